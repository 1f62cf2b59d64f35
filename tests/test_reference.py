"""Preference training with TRL's own trainers: what the reference computes, what trains, what is saved."""

import gc
import re
import shutil

import pytest
import torch
from conftest import frozen_copy, shake
from datasets import Dataset
from PIL import Image
from test_gate_moextend import open_gate
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.utils import add_fused_lm_head

from modeling_moextend import MoExtendForCausalLM, load_processor, use_reference
from modeling_moextend.tools.hashes import base_tensors_hash

BASE, ENCODER = "assets/tiny-moe", "assets/tiny-clip"
PLAN = {1: [0, 3], 2: [1]}
TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
    "rloo": (RLOOTrainer, RLOOConfig),
}
SAMPLING = ("grpo", "rloo")  # which take no ref_model and sample their own completions
SETTINGS = {
    "max_steps": 2,
    "save_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def extended(scope="all", plan=None, **choices):
    torch.manual_seed(0)
    return MoExtendForCausalLM.from_base(BASE, PLAN if plan is None else plan, scope=scope, dtype="float32", **choices)


def turn(role, text):
    return [{"role": role, "content": text}]


def samples(kind, number=8):
    """What a trainer of this kind trains on."""
    pairs = [
        {
            "prompt": turn("user", f"What is {index}?"),
            "chosen": turn("assistant", f"It is {index}."),
            "rejected": turn("assistant", "No idea at all."),
        }
        for index in range(number)
    ]
    if kind in SAMPLING:
        return [{"prompt": pair["prompt"]} for pair in pairs]
    if kind == "kto":
        wanted = [("rejected", "chosen")[index % 2] for index in range(number)]
        return [
            {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
            for pair, name in zip(pairs, wanted, strict=True)
        ]
    return pairs


def shortness(completions, **columns):
    return [-float(len(completion[0]["content"])) for completion in completions]


def trainer_of(kind, model, folder, processor, reference=None, rows=None, **settings):
    trainer, config = TRAINERS[kind]
    options = {"processing_class": processor, "train_dataset": Dataset.from_list(rows or samples(kind))}
    if kind in SAMPLING:
        settings = {"num_generations": 4, "max_completion_length": 8, **settings}
        made = trainer(model, shortness, args=config(str(folder), **SETTINGS | settings, beta=0.0), **options)
        use_reference(made, 0.1, reference)
        return made
    reference = model.reference() if reference is None else reference
    return trainer(model, reference, args=config(str(folder), **SETTINGS | settings), **options)


def tensors(model, name=None):
    return {key: tensor.detach().clone() for key, tensor in model.adapter_tensors(name).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits


def text(rows=2, length=9):
    return {"input_ids": torch.randint(5, 4000, (rows, length), generator=torch.Generator().manual_seed(3))}


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(
    "kind, start",
    [("dpo", "loaded"), ("grpo", "fresh")]
    + [pytest.param(kind, "fresh", marks=pytest.mark.slow) for kind in TRAINERS if kind != "grpo"]
    + [pytest.param(kind, "loaded", marks=pytest.mark.slow) for kind in TRAINERS if kind != "dpo"],
)
def test_a_trainer_of_trls_trains_the_adapter_and_nothing_else(kind, start, tokenizer, tmp_path):
    """Fresh: scope "all"; loaded: behind an open gate. Checkpoints and results load, bit for bit."""
    model = extended() if start == "fresh" else open_gate(extended("gate", gate_hidden_size=8))
    if start == "loaded":
        model.save_pretrained(tmp_path / "start")
        model = MoExtendForCausalLM.from_pretrained(tmp_path / "start", dtype="float32")
    trained = model.set_trainable()
    base, before = base_tensors_hash(model), tensors(model)
    trainer = trainer_of(kind, model, tmp_path / "run", tokenizer)
    trainer.train()
    moved = {name for name, tensor in tensors(model).items() if not torch.equal(tensor, before[name])}
    still = set(trained) - moved  # in the first step lora_B is zero, and in the second a reward may be
    assert moved <= set(trained) and all(name.endswith(".lora_A") for name in still)
    assert base_tensors_hash(model) == base
    trainer.save_model(tmp_path / "result")
    model.eval()
    for folder in ("run/checkpoint-2", "result"):
        again = MoExtendForCausalLM.from_pretrained(tmp_path / folder, dtype="float32")
        assert same(tensors(again), tensors(model))
        assert torch.equal(logits(again, **text()), logits(model, **text()))
    kl = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert kind not in SAMPLING or kl[0] > 0


def test_a_model_loaded_as_remote_code_has_a_reference(tokenizer, tmp_path):
    shake(extended()).save_pretrained(tmp_path / "start")
    remote = get_class_from_dynamic_module("modeling_moextend.MoExtendForCausalLM", str(tmp_path / "start"))
    model = remote.from_pretrained(tmp_path / "start", dtype="float32")
    assert not isinstance(model, MoExtendForCausalLM)
    trainer = trainer_of("dpo", model, tmp_path / "run", tokenizer)
    before = tensors(model)
    trainer.train()
    assert not same(tensors(model), before)
    with model.eval().disable_adapter():
        assert torch.equal(logits(trainer.ref_model, **text()), logits(model, **text()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
def test_a_resumed_run_ends_as_one_that_never_stopped(kind, tokenizer, tmp_path):
    model, again = extended(), extended()
    trainer_of(kind, model, tmp_path, tokenizer, max_steps=3).train()
    shutil.rmtree(tmp_path / "checkpoint-3")
    shutil.rmtree(tmp_path / "checkpoint-2")
    trainer = trainer_of(kind, again, tmp_path, tokenizer, max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert same(tensors(again), tensors(model))


def test_checkpointing_changes_no_loss(tokenizer, tmp_path):
    """The reference runs between a policy's forward and its backward, in which the policy's layers run once more."""
    losses = []
    for checkpointing in (False, True):
        trainer = trainer_of("dpo", extended(), tmp_path, tokenizer, gradient_checkpointing=checkpointing)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1] and len(losses[0]) == 2


# ---------------------------------------------------------------- what the reference computes


@pytest.mark.parametrize("scope", ["all", "gate"])
def test_the_reference_is_the_base_bit_for_bit_while_the_model_trains(scope, tokenizer, tmp_path):
    model = shake(extended(scope))
    if scope == "gate":
        open_gate(model)
    reference, inputs = model.reference(), text()
    expected = logits(frozen_copy(AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")), **inputs)
    for layer in model.train().get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5  # of training, and not of a reference
    with model.record_routing() as records:  # a pass of the reference is no pass of the model
        assert torch.equal(logits(reference, **inputs), expected)
    assert not records and model.training and all(module.training for module in model.base.modules())
    assert not reference(**inputs).logits.requires_grad
    assert not torch.equal(logits(model, **inputs), expected)
    with model.disable_adapter():
        assert torch.equal(logits(reference, **inputs), expected)


@pytest.mark.parametrize(
    "kind", ["dpo", "grpo", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("kto", "rloo"))]
)
def test_a_trainers_reference_is_a_second_bases(kind, tokenizer, tmp_path):
    """Log probabilities as TRL computes them with a copy of the base in memory."""
    settings = {"temperature": 0.7} if kind in SAMPLING else {}
    trainer = trainer_of(kind, shake(extended()), tmp_path, tokenizer, **settings)
    second = frozen_copy(AutoModelForCausalLM.from_pretrained(BASE, dtype="float32"))
    add_fused_lm_head(second, **settings)
    ids = text(4, 12)["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = second(**inputs, labels=ids, fused_lm_head=True).log_probs
        found = trainer.ref_model(**inputs, labels=ids, fused_lm_head=True).log_probs
    assert torch.equal(found, expected) and found.any()


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.slow
def test_precomputed_log_probabilities_are_those_of_the_run(kind, tokenizer, tmp_path):
    losses = []
    for precomputed in (False, True):
        model = extended()
        trainer = trainer_of(kind, model, tmp_path, tokenizer, precompute_ref_log_probs=precomputed)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)  # batches are padded to other lengths


def test_what_is_on_disk_is_told_apart_by_what_the_reference_computes():
    """TRL finds precomputed log probabilities again by the reference's state dict."""
    model, other = extended(), shake(extended())
    state = model.reference().state_dict()
    assert same(state, other.reference().state_dict())  # what trains is not in it
    with torch.no_grad():
        other.base.lm_head.weight[0, 0] += 1
    assert not same(state, other.reference().state_dict())


@pytest.mark.slow
def test_there_is_no_second_base_in_memory(tokenizer, tmp_path):
    model = extended()
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.base.parameters())
    for kind in ("dpo", "grpo"):
        before = held_bytes()
        trainer = trainer_of(kind, model, tmp_path, tokenizer)
        assert held_bytes() - before < size / 100
        assert not list(trainer.ref_model.parameters()) and not list(trainer.ref_model.buffers())


def held_bytes():
    """Bytes of all tensors in memory, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


# ---------------------------------------------------------------- images


def seeing(**choices):
    torch.manual_seed(0)
    processor = load_processor(BASE, ENCODER)
    choices = {"encoder": ENCODER, "image_token_id": processor.image_token_id, "scope": "modality", **choices}
    return MoExtendForCausalLM.from_base(BASE, choices.pop("plan", PLAN), dtype="float32", **choices), processor


def image_pairs(number=4):
    colours = ("red", "blue")
    return [
        {
            "images": [Image.new("RGB", (64, 64), colours[index % 2])],
            "prompt": turn("user", "What colour?"),
            "chosen": turn("assistant", f"It is {colours[index % 2]}."),
            "rejected": turn("assistant", "No idea."),
        }
        for index in range(number)
    ]


def test_images_are_seen_by_the_reference_through_the_projector_as_it_was(tmp_path):
    model, processor = seeing()
    shake(model)
    aligned, _ = seeing(plan={})
    aligned.projector.load_state_dict(model.projector.state_dict())
    trained, base = set(model.set_trainable()), base_tensors_hash(model)
    trainer = trainer_of("dpo", model, tmp_path, processor, rows=image_pairs(), max_length=None)
    inputs = processor(text="<image>What colour?", images=image_pairs()[0]["images"], return_tensors="pt")
    expected, before = logits(aligned, **inputs), tensors(model)
    assert torch.equal(logits(trainer.ref_model, **inputs), expected)
    trainer.train()
    moved = {name for name, tensor in tensors(model).items() if not torch.equal(tensor, before[name])}
    assert moved == trained and "projector.linear_1.weight" in moved
    assert torch.equal(logits(trainer.ref_model, **inputs), expected)
    assert base_tensors_hash(model) == base
    again = MoExtendForCausalLM.from_pretrained(tmp_path / "checkpoint-2", dtype="float32")
    assert torch.equal(logits(again, **inputs), logits(model.eval(), **inputs))


# ---------------------------------------------------------------- several adapters


def stacked():
    """An adapter "top", which trains, on "default", both far from the base."""
    model = shake(extended())
    model.add_adapter("top", {1: [4, 5]}, scope="all")
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.adapter_tensors("top").values():
            tensor.add_(torch.randn_like(tensor) * 0.3)
    model.set_trainable(adapter_name="top")
    return model


@pytest.mark.parametrize("kind", ["dpo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_the_reference_of_an_adapter_on_top_is_what_it_stands_on(kind, tokenizer, tmp_path):
    model = stacked()
    alone = extended()
    for name, tensor in alone.adapter_tensors().items():
        tensor.data.copy_(model.adapter_tensors("default")[name])
    below, base, inputs = tensors(model, "default"), base_tensors_hash(model), text()
    trainer = trainer_of(kind, model, tmp_path, tokenizer)
    expected, before = logits(alone.eval(), **inputs), tensors(model, "top")
    assert torch.equal(logits(trainer.ref_model, **inputs), expected)
    assert not torch.equal(logits(model.eval(), **inputs), expected)
    trainer.train()
    assert torch.equal(logits(trainer.ref_model, **inputs), expected)
    assert same(tensors(model, "default"), below) and not same(tensors(model, "top"), before)
    assert base_tensors_hash(model) == base
    again = MoExtendForCausalLM.from_base(BASE, PLAN, scope="all", dtype="float32")
    for name, tensor in again.adapter_tensors().items():
        tensor.data.copy_(below[name])
    again.load_adapter(tmp_path / "checkpoint-2", "top")
    assert same(tensors(again, "top"), tensors(model, "top"))


def test_an_adapter_as_it_was_is_a_reference(tokenizer, tmp_path):
    shake(extended()).save_pretrained(tmp_path / "start")
    model = MoExtendForCausalLM.from_pretrained(tmp_path / "start", dtype="float32")
    inputs, trained = text(), set(model.set_trainable())
    expected = logits(model, **inputs)
    model.load_adapter(tmp_path / "start", "start")
    trainer = trainer_of("dpo", model, tmp_path / "run", tokenizer, model.reference("start"))
    assert torch.equal(logits(trainer.ref_model, **inputs), expected)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # both are the same at first
    assert torch.equal(logits(trainer.ref_model, **inputs), expected)
    assert not torch.equal(logits(model.eval(), **inputs), expected)
    assert {name for name, tensor in model.adapter_tensors().items() if tensor.requires_grad} == trained
    assert not any(tensor.requires_grad for tensor in model.adapter_tensors("start").values())


# ---------------------------------------------------------------- refusals


def test_a_reference_that_would_move_is_refused(tmp_path):
    model = extended()
    with pytest.raises(ValueError, match=r"Adapters \['default'\] train, and a reference would move.*'start'"):
        model.reference("default")
    with pytest.raises(ValueError, match=r"Adapters \['law'\] are not loaded; this model has \['default'\]"):
        model.reference(["law"])
    model.add_adapter("law", {1: [4]}, scope="all")
    model.set_adapter(["default", "law"])
    model.adapters["law"].depends_on.clear()
    model.adapters["law"].config.trained_on = []
    model.set_adapter(["default", "law"])
    with pytest.raises(ValueError, match=r"\['default', 'law'\].*none is on top.*model.reference\(\[\.\.\.\]\)"):
        model.reference()


def test_use_reference_is_refused_where_a_reference_is_already(tokenizer, tmp_path):
    model = extended()
    with pytest.raises(ValueError, match=r"this is a DPOTrainer with beta=0\.1.*ref_model=model\.reference\(\)"):
        use_reference(trainer_of("dpo", model, tmp_path, tokenizer), 0.1)
    made = trainer_of("grpo", model, tmp_path, tokenizer)
    with pytest.raises(ValueError, match=r"made with beta=0\.0.*this is a GRPOTrainer with beta=0\.1"):
        use_reference(made, 0.2)
    made.ref_model, made.beta = None, 0.0
    for beta in (0.0, -1.0, float("nan"), float("inf"), None):
        with pytest.raises(ValueError, match=re.escape(f"beta={beta!r} must be above 0 and finite")):
            use_reference(made, beta)
    plain = SFTTrainer(
        model,
        SFTConfig(str(tmp_path), **SETTINGS),
        train_dataset=Dataset.from_list([{"messages": turn("user", "Hi") + turn("assistant", "Hello")}]),
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match="this is a SFTTrainer with beta=None"):
        use_reference(plain, 0.1)
