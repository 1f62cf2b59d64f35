"""The trainer: what trains, what is logged, what is saved, exact resumption, and the base that never changes."""

import os
import re

import pytest
import torch
from conftest import PAPER, in_processes, leave_group, make_base, make_encoder, shake
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from modeling_moextend import MoExtendForCausalLM, MoExtendProcessor
from modeling_moextend.data.collators import MaskImageLabels
from modeling_moextend.training import gate as gate_training
from modeling_moextend.training.config import MoExtendSFTConfig
from modeling_moextend.training.gate import GateReport
from modeling_moextend.training.retention import last_hidden_states, prompt_distance
from modeling_moextend.training.trainer import MoExtendSFTTrainer, optimizer_bytes

PLAN = {1: [0], 2: [3, 1]}  # layers 0 and 3 stay as they are: widths 6, 7, 8, 6
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "USER:", "ASSISTANT:"]
ADAPTER = "moextend_adapter.safetensors"
ENCODER_PART = "adapters.default.encoder.*patch_embedding.weight"


def make_tokenizer():
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = Split(" ", behavior="removed")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def make_processor():
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return MoExtendProcessor.from_encoder(make_tokenizer(), image_processor, make_encoder().config)


def make_texts(number=20):
    return [" ".join(WORDS[4 + (i * 7 + j * (3 + i % 4)) % 26] for j in range(4 + i % 6)) for i in range(number)]


def text_data(number=20):
    return Dataset.from_dict({"text": make_texts(number)})


def image_data(number=20):
    """Every third sample has no image."""
    rows = []
    for i, text in enumerate(make_texts(number)):
        images = [] if i % 3 == 2 else [Image.new("RGB", (20, 20), ((i * 40) % 256, (i * 90) % 256, 60))]
        question = [{"role": "user", "content": text[:5]}, {"role": "assistant", "content": text[4:]}]
        rows.append({"messages": question, "images": images})
    return Dataset.from_list(rows)


def make_model(plan=PLAN, encoder=False, family="mixtral", **kwargs):
    base = make_base(family)
    torch.manual_seed(
        7
    )  # the projector and the calibration start at random; the first make_base has a seed of its own
    if encoder:
        kwargs |= {"encoder": make_encoder(), "image_token_id": len(WORDS)}
    return MoExtendForCausalLM.from_base(base, extended_layers=plan, **{**PAPER, **kwargs})


def config(folder, **overrides):
    settings = {
        "max_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_length": 64,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "gradient_checkpointing": False,
    }
    return MoExtendSFTConfig(output_dir=str(folder), **{**settings, **overrides})


def make_trainer(folder, model=None, images=False, train=None, **overrides):
    keys = (
        "eval_dataset",
        "callbacks",
        "data_collator",
        "peft_config",
        "compute_loss_func",
        "retention_dataset",
        "optimizers",
    )
    given = {key: overrides.pop(key) for key in keys if key in overrides}
    return MoExtendSFTTrainer(
        model=model if model is not None else make_model(encoder=images),
        args=config(folder, **overrides),
        train_dataset=train if train is not None else (image_data() if images else text_data()),
        processing_class=make_processor() if images else make_tokenizer(),
        **given,
    )


def tensors(model):
    return {name: tensor.detach().clone() for name, tensor in model.adapter_tensors().items()}


def frozen_tensors(model):
    """Base and encoder, by name."""
    frozen = {name: t.clone() for name, t in model.base.state_dict().items() if ".moextend." not in name}
    encoder = model.encoder.state_dict() if model.encoder is not None else {}
    return frozen | {f"encoder.{name}": t.clone() for name, t in encoder.items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ------------------------------------------------------------------ what trains


@pytest.mark.parametrize("images", [False, True])
def test_training_moves_every_new_tensor_and_no_other(tmp_path, images):
    trainer = make_trainer(tmp_path, images=images, max_steps=3)
    model = trainer.model
    before, frozen = tensors(model), frozen_tensors(model)
    trainer.train()
    assert_equal(frozen, frozen_tensors(model))
    after = tensors(model)
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_stage_align_trains_the_projector_only(tmp_path):
    trainer = make_trainer(tmp_path, images=True, stage="align")
    before = tensors(trainer.model)
    trainer.train()
    after = tensors(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("projector.")}


def test_the_projector_can_be_left_alone(tmp_path):
    trainer = make_trainer(tmp_path, images=True, train_projector=False)
    before = tensors(trainer.model)
    trainer.train()
    after = tensors(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if not name.startswith("projector.")}


def test_what_trains_is_float32_over_a_bf16_base(tmp_path):
    model = MoExtendForCausalLM.from_base(make_base(dtype=torch.bfloat16), extended_layers=PLAN, paper=True)
    trainer = make_trainer(tmp_path, model, bf16=True)
    assert {p.dtype for p in trainer.trainable.values()} == {torch.float32}
    frozen = frozen_tensors(model)
    trainer.train()
    assert_equal(frozen, frozen_tensors(model))
    assert all(torch.isfinite(torch.tensor(losses(trainer))))


def test_the_summary_says_what_it_costs(tmp_path, capsys):
    trainer = make_trainer(tmp_path, adapter_dtype="bfloat16", max_steps=1)
    number = sum(p.numel() for p in trainer.trainable.values())
    trainer.train()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("MoExtend, stage finetune"))
    assert f"{number:,} trainable parameters" in line
    assert f"adapter {2 * number / 2**20:,.1f} MiB" in line
    state = sum(t.nbytes for s in trainer.optimizer.state.values() for k, t in s.items() if k != "step")
    assert optimizer_bytes(trainer.args.optim, trainer.trainable.values()) == state


# ------------------------------------------------------------------ losses and logs


def test_logged_losses_add_up_with_gradient_accumulation(tmp_path):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, router_aux_loss_coef=0.1, max_steps=3)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert entry["balance_loss"] >= 0.9
        assert entry["loss"] == pytest.approx(entry["task_loss"] + 0.1 * entry["balance_loss"], rel=1e-4)


def test_task_loss_is_the_models_own_over_all_tokens_of_a_step(tmp_path):
    """Micro-batches of different numbers of tokens weigh by tokens."""
    model = shake(make_model())
    trainer = make_trainer(
        tmp_path, model, train=text_data(4), gradient_accumulation_steps=2, router_aux_loss_coef=0.0, max_steps=1
    )
    total = count = 0
    for text in make_texts(4):
        ids = torch.tensor([[*trainer.processing_class(text)["input_ids"], 2]])
        with torch.no_grad():
            total += model(ids, labels=ids).loss * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["task_loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert entry["loss"] == pytest.approx(entry["task_loss"])
    assert "balance_loss" not in entry


def test_the_coefficient_is_the_bases_own_unless_given(tmp_path):
    own = make_model().router_aux_loss_coef
    assert own > 0
    assert make_trainer(tmp_path).router_aux_loss_coef == own
    trainer = make_trainer(tmp_path, router_aux_loss_coef=0.25)
    assert trainer.router_aux_loss_coef == trainer.args.router_aux_loss_coef == 0.25
    assert trainer.model.config.text_config.router_aux_loss_coef == own


def test_the_balance_loss_gives_gradients_to_the_new_rows(tmp_path):
    """Without learning from the task (every label masked), only the balance loss is left to move the rows."""
    model = shake(make_model(calibration="none"))
    trainer = make_trainer(tmp_path, model, router_aux_loss_coef=1.0)
    inputs = next(iter(trainer.get_train_dataloader()))
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    trainer.compute_loss(model, inputs).backward()
    assert model.adapter_tensors()["layers.1.router.weight"].grad.abs().sum() > 0


def test_share_of_new_experts_counts_real_tokens(tmp_path):
    model = shake(make_model())
    trainer = make_trainer(tmp_path, model, train=text_data(2), learning_rate=0.0, max_steps=1)
    selected, real = {1: 0, 2: 0}, 0
    for text in make_texts(2):
        ids = torch.tensor([[*trainer.processing_class(text)["input_ids"], 2]])
        real += ids.numel()
        with torch.no_grad(), model.record_routing() as records:
            model(ids)
        for layer in selected:
            selected[layer] += int((records[layer].index >= 6).any(dim=-1).sum())
    trainer.train()
    entry = trainer.state.log_history[0]
    shares = [selected[layer] / real for layer in (1, 2)]
    assert 0 < shares[0] < 1
    assert [entry["new_expert_share/layer_1"], entry["new_expert_share/layer_2"]] == pytest.approx(shares)
    assert entry["new_expert_share"] == pytest.approx(sum(shares) / 2)
    assert entry["tokens_per_second"] > 0
    assert "new_expert_share/layer_0" not in entry


def test_evaluation_logs_the_same_names(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=text_data(6), eval_strategy="steps", eval_steps=1, max_steps=1)
    trainer.train()
    names = {"task_loss", "balance_loss", "new_expert_share", "new_expert_share/layer_2", "tokens_per_second"}
    entry = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert {f"eval_{name}" for name in names} <= entry.keys()
    assert names <= trainer.state.log_history[0].keys()


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen3_moe"])
def test_other_families_train(tmp_path, family):
    trainer = make_trainer(tmp_path, make_model(family=family), router_aux_loss_coef=0.01)
    trainer.train()
    assert len(losses(trainer)) == 2


# ------------------------------------------------------------------ images


def test_image_tokens_and_ids_past_the_head_are_no_labels():
    labels = torch.tensor([[5, 40, 7, 96, -100]])
    collate = MaskImageLabels(lambda examples: {"labels": labels.clone()}, placeholder_ids=[40], vocab_size=96)
    assert collate([])["labels"].tolist() == [[5, -100, 7, -100, -100]]


def test_image_batches_reach_the_model_with_masked_labels(tmp_path):
    trainer = make_trainer(tmp_path, images=True, train_sampling_strategy="sequential")
    inputs = next(iter(trainer.get_train_dataloader()))
    image = trainer.model.config.image_token_id
    assert (inputs["input_ids"] == image).any()
    assert not (inputs["labels"] == image).any()
    assert (inputs["labels"] != -100).any()


@pytest.mark.parametrize("kind", ["messages", "text", "prompt_completion"])
def test_trls_own_trainer_counts_no_image_tokens(tmp_path, kind):
    data, image, model = image_data(2), len(WORDS), make_model(encoder=True)
    if kind == "text":
        data = data.map(lambda row: {"text": "<image> " + row["messages"][1]["content"]}, remove_columns="messages")
    elif kind == "prompt_completion":
        rows = [
            {"images": row["images"], "prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in data
        ]
        data = Dataset.from_list(rows)
    still = {"max_steps": 1, "learning_rate": 0.0, "max_length": None, "remove_unused_columns": kind != "text"}
    args = config(tmp_path, **still, completion_only_loss=False, router_aux_loss_coef=0.0)
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=make_processor())
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["input_ids"] == image).sum() == 2 * 4
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}).logits
    targets = batch["input_ids"][:, 1:]
    counts = (batch["attention_mask"][:, 1:] == 1) & (targets != image)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1][counts], targets[counts])
    trainer.train()
    assert losses(trainer) == [pytest.approx(expected.item(), rel=1e-3)]  # logged with few digits


def test_assistant_only_loss_with_images(tmp_path):
    trainer = make_trainer(tmp_path, images=True, assistant_only_loss=True)
    inputs = next(iter(trainer.get_train_dataloader()))
    user = WORDS.index("USER:")
    assert user in inputs["input_ids"] and user not in inputs["labels"]
    trainer.train()
    assert len(losses(trainer)) == 2


# ------------------------------------------------------------------ tokens that the base does not know


def added(processor, **special):
    """With tokens that were added behind the vocabulary and the image token; the base has 96 rows."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.add_tokens([f"<{number}>" for number in range(96 - len(tokenizer))] + ["<tool>", "<|x|>"])
    tokenizer.add_special_tokens(special)
    return processor


@pytest.mark.parametrize("token", ["pad_token", "eos_token"])
def test_a_special_token_past_the_embedding_is_named_before_training(tmp_path, token):
    with pytest.raises(ValueError, match=rf"The tokenizer's {token}: '<tool>' has the id 96, .* has 96 rows"):
        MoExtendSFTTrainer(
            make_model(),
            config(tmp_path),
            train_dataset=text_data(),
            processing_class=added(make_tokenizer(), **{token: "<tool>"}),
        )


def test_a_row_with_a_token_past_the_embedding_is_named_before_training(tmp_path):
    rows = [*make_texts(3), "a <tool> b"]
    good, bad = text_data(), Dataset.from_dict({"text": rows})
    known = {"model": make_model(), "args": config(tmp_path), "processing_class": added(make_tokenizer())}
    MoExtendSFTTrainer(**known, train_dataset=good)  # that a tokenizer has more tokens than are used is no error
    with pytest.raises(ValueError, match="Row 3 of the train dataset, as it is tokenised: '<tool>' has the id 96"):
        MoExtendSFTTrainer(**known, train_dataset=bad)
    with pytest.raises(ValueError, match="Row 3 of the held out dataset, as it is tokenised: '<tool>'"):
        MoExtendSFTTrainer(**known, train_dataset=good, eval_dataset={"held out": bad})
    streamed = MoExtendSFTTrainer(**known, train_dataset=bad.to_iterable_dataset())
    with pytest.raises(ValueError, match="A batch: '<tool>' has the id 96"):
        streamed.train()


@pytest.mark.parametrize("wrong", [500, -3])
def test_an_id_that_is_no_token_is_named_before_training(tmp_path, wrong):
    data = Dataset.from_dict({"input_ids": [[1, 2], [2, 3], [1, wrong]]})
    known = {"model": make_model(), "processing_class": make_tokenizer(), "train_dataset": data}
    with pytest.raises(ValueError, match=f"Row 2 of the train dataset.*: {wrong} is no token .* has 96 rows"):
        MoExtendSFTTrainer(**known, args=config(tmp_path))
    MoExtendSFTTrainer(**known, args=config(tmp_path), data_collator=list)  # which may put something in its place


@pytest.mark.parametrize("stream", [False, True])
def test_a_token_past_the_embedding_in_retention_text_is_named(tmp_path, stream):
    texts = [*lines(13), "a <tool> b"]
    rows = Dataset.from_dict({"text": texts})
    trainer = gated_trainer(
        tmp_path,
        retention_dataset=rows.to_iterable_dataset() if stream else rows,
        tokenizer=added(make_tokenizer()),
        retention_tokens=10**6,
    )
    where = (
        "A row of the retention" if stream else f"Row {len(texts) - 1} of the retention dataset, as it is tokenised"
    )
    with pytest.raises(ValueError, match=f"{where}.*: '<tool>' has the id 96, .* has 96 rows"):
        trainer.train()


def test_a_batch_of_images_with_a_token_past_the_embedding_is_named(tmp_path):
    rows = [{**row, "messages": [{"role": "user", "content": "<|x|>"}, *row["messages"][1:]]} for row in image_data(2)]
    trainer = MoExtendSFTTrainer(
        make_model(encoder=True),
        config(tmp_path),
        train_dataset=Dataset.from_list(rows),
        processing_class=added(make_processor()),
    )
    with pytest.raises(ValueError, match=r"A batch: '<\|x\|>' has the id 97, .* has 96 rows"):
        trainer.train()


# ------------------------------------------------------------------ gradient checkpointing, packing


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, images):
    scope = {"scope": "modality"} if images else {}
    runs = []
    for checkpointing in (False, True):
        model = make_model(encoder=images, **scope)
        trainer = make_trainer(
            tmp_path, model, images, gradient_checkpointing=checkpointing, router_aux_loss_coef=0.1, max_steps=3
        )
        trainer.train()
        assert model.is_activation_checkpointing == checkpointing
        runs.append((losses(trainer), tensors(model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(tensor, runs[1][1][name], rtol=1e-4, atol=1e-6)


def test_packed_rows_train_like_single_ones(tmp_path):
    """The first step's task loss is the mean over all tokens, however they are laid out."""
    first = {}
    for packing in (False, True):
        trainer = make_trainer(
            tmp_path,
            shake(make_model()),
            train=text_data(8),
            packing=packing,
            max_length=16,
            per_device_train_batch_size=8,
            router_aux_loss_coef=0.01,
            max_steps=2,
        )
        inputs = next(iter(trainer.get_train_dataloader()))
        assert ("position_ids" in inputs) == packing
        trainer.train()
        first[packing] = trainer.state.log_history[0]
    assert first[True]["task_loss"] == pytest.approx(first[False]["task_loss"], rel=1e-4)
    assert first[True]["new_expert_share"] == pytest.approx(first[False]["new_expert_share"])
    assert first[True]["balance_loss"] == pytest.approx(first[False]["balance_loss"], rel=1e-4)


# ------------------------------------------------------------------ saving


def test_checkpoints_hold_the_adapter_in_float32_and_what_resuming_needs(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, adapter_dtype="bfloat16")
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert_equal(load_file(folder / ADAPTER), tensors(trainer.model))
    names = {file.name for file in folder.iterdir()}
    kept = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
    assert kept | {"config.json", "tokenizer.json"} <= names
    assert not names & {"model.safetensors", "adapter_config.json", "pytorch_model.bin"}
    weights = sum(tensor.nbytes for tensor in tensors(trainer.model).values())
    assert (folder / ADAPTER).stat().st_size < weights + 20_000
    assert (folder / "optimizer.pt").stat().st_size < 2 * weights + 40_000


def test_save_model_writes_the_adapter_in_its_dtype_and_nothing_pickled(tmp_path):
    trainer = make_trainer(tmp_path / "out", adapter_dtype="bfloat16")
    trainer.save_model()
    saved = load_file(tmp_path / "out" / ADAPTER)
    assert_equal(saved, {name: tensor.bfloat16() for name, tensor in tensors(trainer.model).items()})
    assert not list((tmp_path / "out").glob("*.bin"))
    trainer.args.adapter_dtype = None
    trainer.save_model(str(tmp_path / "own"))
    assert load_file(tmp_path / "own" / ADAPTER)["layers.1.router.weight"].dtype == torch.float32


def test_a_saved_adapter_loads_on_the_base(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    loaded = MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base())
    assert_equal(tensors(loaded), tensors(trainer.model))
    ids = torch.tensor([[5, 6, 7, 8]])
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model(ids).logits)


def test_the_card_is_moextends(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert "trust_remote_code=True" in card and "pipeline(" not in card
    assert "| learning_rate | 0.01 |" in card and "| lr_scheduler_type | linear |" in card


# ------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    ("images", "stop", "order"),
    [
        pytest.param(False, 3, "random", marks=pytest.mark.slow),
        (False, 5, "random"),
        pytest.param(False, 6, "random", marks=pytest.mark.slow),
        pytest.param(False, 6, "group_by_length", marks=pytest.mark.slow),
        (True, 3, "random"),
    ],
)
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, images, stop, order):
    """20 samples, 2 a batch, 2 batches a step: step 3 is in mid-epoch, 5 at an epoch's end, 6 in the second epoch."""
    settings = {
        "max_steps": 7,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "train_sampling_strategy": order,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "router_aux_loss_coef": 0.02,
    }

    def start():
        model = make_model(encoder=images, scope="modality" if images else "all")
        model.base.config.attention_dropout = 0.1  # draws random numbers at every step
        for layer in model.base.model.layers:
            layer.self_attn.attention_dropout = 0.1
        return make_trainer(tmp_path, model, images, **settings)

    whole = start()
    whole.train()
    resumed = start()
    assert_equal(tensors(start().model), tensors(resumed.model))
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert resumed.state.global_step == 7
    history = [[e for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    for one, other in zip(*history, strict=True):
        for key in (
            "loss",
            "task_loss",
            "balance_loss",
            "grad_norm",
            "learning_rate",
            "new_expert_share",
            "num_tokens",
        ):
            assert one[key] == other[key], (key, one["step"])
    assert_equal(tensors(whole.model), tensors(resumed.model))
    states = [t.optimizer.state_dict()["state"] for t in (whole, resumed)]
    assert all(torch.equal(states[0][i]["exp_avg_sq"], states[1][i]["exp_avg_sq"]) for i in states[0])


def test_dropout_matters_in_the_test_above(tmp_path):
    """The comparison above would not notice random numbers that nothing depends on."""
    first = []
    for seed in (1, 2):
        model = make_model()
        for layer in model.base.model.layers:
            layer.self_attn.attention_dropout = 0.1
        trainer = make_trainer(tmp_path, model, max_steps=1, seed=seed, data_seed=0)
        trainer.train()
        first.append(losses(trainer)[0])
    assert first[0] != first[1]


def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    other = make_trainer(tmp_path, make_model({1: [0], 3: [2]}))
    before = tensors(other.model)
    with pytest.raises(ValueError, match="(?s)does not belong to this model; nothing was loaded.*extended_layers"):
        other.train(resume_from_checkpoint=True)
    assert_equal(before, tensors(other.model))


def test_the_best_checkpoint_comes_back_at_the_end(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset=text_data(6),
        max_steps=3,
        greater_is_better=True,  # the loss falls at every step: the first checkpoint has the most
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert not best.endswith("checkpoint-3")
    assert_equal(tensors(trainer.model), load_file(os.path.join(best, ADAPTER)))


# ------------------------------------------------------------------ the base never changes


class Tamper(TrainerCallback):
    def __init__(self, tensor):
        self.tensor = tensor

    def on_step_end(self, args, state, control, **kwargs):
        with torch.no_grad():
            self.tensor.view(-1)[3] += 1e-6


@pytest.mark.parametrize("part", ["base.model.layers.0.mlp.experts.down_proj", ENCODER_PART])
def test_verify_base_names_a_changed_tensor(tmp_path, part):
    model = make_model(encoder=True)
    tensor = next(p for name, p in model.named_parameters() if re.fullmatch(part, name))
    trainer = make_trainer(tmp_path, model, True, verify_base=True, callbacks=[Tamper(tensor)])
    with pytest.raises(RuntimeError, match=f"changed 1 tensors that must never change: {part}"):
        trainer.train()


def test_verify_base_passes_an_honest_run(tmp_path):
    make_trainer(tmp_path, images=True, verify_base=True).train()


@pytest.mark.filterwarnings("ignore:.return_outputs=True.:FutureWarning")  # TRL's own call of it
@pytest.mark.parametrize("dtype, way", [("bf16", "evaluate"), ("fp16", "predict")])
def test_a_full_evaluation_in_half_precision_leaves_every_bit_as_it_was(tmp_path, dtype, way):
    """Before and after training; a run after it ends as one without."""
    data, ends, seen = text_data(2), [], []
    for evaluated in (False, True):
        options = {"eval_dataset": data, "verify_base": True, f"{dtype}_full_eval": evaluated, "learning_rate": 2e-5}
        trainer = make_trainer(tmp_path, make_model(encoder=True), True, train=text_data(), **options)
        model = trainer.model
        model.base.register_buffer("scale", torch.tensor([1.0001]))
        model.base.lm_head.weight.grad = torch.full_like(model.base.lm_head.weight, 1.0001)
        state = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
        if evaluated:
            run = getattr(trainer, way)
            hook = model.get_input_embeddings().register_forward_hook(lambda *call: seen.append(call[-1].dtype))
            run(trainer.eval_dataset)
            hook.remove()
            assert set(seen) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]}, "it is in half precision"
        for name, tensor in model.state_dict(keep_vars=True).items():
            known, before = state[name]
            assert tensor.dtype == before.dtype and torch.equal(tensor, before), name
            assert tensor is known or name == "base.scale"
        assert model.base.lm_head.weight.grad.unique().tolist() == [torch.tensor(1.0001).item()]
        model.base.lm_head.weight.grad = None
        del model.base.scale
        trainer.train()
        ends.append(tensors(model))
        if evaluated:
            run(trainer.eval_dataset)
            assert_equal(ends[-1], tensors(model))
    assert_equal(*ends)


def test_a_full_evaluation_in_half_precision_of_shards_is_refused(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, eval_dataset=text_data(4), bf16_full_eval=True)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match="bf16_full_eval .* leave shards .* leave them out"):
        trainer.evaluate()


# ------------------------------------------------------------------ refusals


def test_other_models_are_refused(tmp_path):
    for model in (make_base(), "me/adapter"):
        with pytest.raises(ValueError, match=r"adapter of a MoExtend model, but got .*from_base"):
            make_trainer(tmp_path, model)


def test_options_that_would_train_something_else_are_refused(tmp_path):
    with pytest.raises(ValueError, match="peft_config would train the base"):
        make_trainer(tmp_path, peft_config=object())
    with pytest.raises(ValueError, match="load-balancing loss would lose its gradient"):
        make_trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="hub_strategy='checkpoint' pushes optimiser states"):
        make_trainer(tmp_path, push_to_hub=True, hub_strategy="checkpoint")
    with pytest.raises(ValueError, match="must be a MoExtendSFTConfig, not SFTConfig"):
        args = SFTConfig(str(tmp_path), bf16=False, use_cpu=True)
        MoExtendSFTTrainer(make_model(), args, train_dataset=text_data(), processing_class=make_tokenizer())
    with pytest.raises(ValueError, match="nothing to train"):
        make_trainer(tmp_path, stage="align")


def test_wrong_settings_say_what_is_allowed(tmp_path):
    with pytest.raises(ValueError, match="stage must be one of .*, not 'extend'.*measure_router_shift"):
        config(tmp_path, stage="extend")
    with pytest.raises(ValueError, match="stage must be one of 'align', 'finetune', not 'sft'.$"):
        config(tmp_path, stage="sft")
    with pytest.raises(ValueError, match="adapter_dtype must be one of 'float32', 'bfloat16', 'float16' or None"):
        config(tmp_path, adapter_dtype="int8")
    with pytest.raises(ValueError, match="leaves nothing to train"):
        config(tmp_path, stage="align", train_projector=False)


# ------------------------------------------------------------------ scope="gate"


GATED = {"scope": "gate", "selection": "exclusive", "calibration": "none", "gate_hidden_size": 8, "deltas": ()}
CHAT = "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}{{ m['content'] }} {% endfor %}"


def lines(first, number=20, length=6):
    """Texts of thirteen letters: those of the task (from 0) and of the base's own text (from 13) differ in all."""
    return [" ".join(WORDS[4 + first + (i * 5 + j * (2 + i % 3)) % 13] for j in range(length)) for i in range(number)]


def task_data(number=20):
    rows = [(text[:6], text[6:]) for text in lines(0, number)]
    return Dataset.from_dict({"prompt": [one for one, _ in rows], "completion": [other for _, other in rows]})


def retention_data(kind="text", number=20):
    texts = lines(13, number)
    if kind == "text":
        return Dataset.from_dict({"text": texts})
    if kind == "prompt-completion":
        return Dataset.from_dict({"prompt": [text[:6] for text in texts], "completion": [text[6:] for text in texts]})
    chats = [[{"role": "user", "content": t[:5]}, {"role": "assistant", "content": t[6:]}] for t in texts]
    return Dataset.from_dict({"messages": chats})


REPORT = GateReport(loss=0.0, routed=1.0, captured=0.0, prefix=1)


def gated_trainer(folder, model=None, retention_dataset="text", train=None, images=False, tokenizer=None, **overrides):
    settings = {"gate_steps": 60, "gate_learning_rate": 2e-2, "retention_tokens": 200, "retention_length": 16}
    settings |= {"retention_cache_dir": str(folder / "cache"), "router_aux_loss_coef": 0.01, **overrides}
    callbacks, eval_dataset = settings.pop("callbacks", None), settings.pop("eval_dataset", None)
    if isinstance(retention_dataset, str):
        trains_gate = settings["gate_steps"] > 0 and settings.get("stage") != "align"
        retention_dataset = retention_data(retention_dataset) if trains_gate else None
    if tokenizer is None:
        tokenizer = make_processor() if images else make_tokenizer()
    return MoExtendSFTTrainer(
        model=model or make_model(encoder=images, **GATED),
        args=config(folder, **settings),
        train_dataset=train or (image_data() if images else task_data()),
        retention_dataset=retention_dataset,
        processing_class=tokenizer,
        callbacks=callbacks,
        eval_dataset=eval_dataset,
    )


def gate_tensors(model):
    return {name: tensor for name, tensor in tensors(model).items() if name.startswith("gate.")}


def open_wide(model):
    """Lets about half of all tokens through, whatever they are."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.gate.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
    return model


def test_the_gate_learns_before_the_first_step_and_never_after(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            seen.append(tensors(model))

    trainer = gated_trainer(tmp_path, callbacks=[Watch()], max_steps=4)
    before, frozen = tensors(trainer.model), frozen_tensors(trainer.model)
    trainer.train()
    (begun,), after = seen, tensors(trainer.model)
    assert [name for name in before if not torch.equal(before[name], begun[name])] == list(gate_tensors(trainer.model))
    moved = {name for name in before if not torch.equal(begun[name], after[name])}
    fixed = {"layers.1.router.weight"}  # the only new expert of its layer
    assert moved == {name for name in before if not name.startswith("gate.")} - fixed
    assert_equal(frozen, frozen_tensors(trainer.model))
    report = trainer.gate_report
    assert report.routed > 0.7 and report.captured < 0.1 and report.prefix == 0  # 7 tokens; both end with </s>
    assert trainer.state.log_history[0]["new_expert_share"] > 0.8


@pytest.mark.parametrize(
    "kind", ["text", *[pytest.param(kind, marks=pytest.mark.slow) for kind in ("prompt-completion", "messages")]]
)
def test_retention_text_comes_in_any_format(tmp_path, kind):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    trainer = gated_trainer(tmp_path, retention_dataset=kind, tokenizer=tokenizer, max_steps=1)
    trainer.train()
    assert trainer.gate_report.routed > 0.7 and trainer.gate_report.captured < 0.2


@pytest.mark.slow
def test_retention_text_may_be_tokenised_or_streamed(tmp_path):
    ids = [make_tokenizer()(text)["input_ids"] for text in lines(13)]
    given = [Dataset.from_dict({"input_ids": ids}), retention_data().to_iterable_dataset()]
    for number, dataset in enumerate(given):
        trainer = gated_trainer(tmp_path / str(number), retention_dataset=dataset, max_steps=1)
        trainer.train()
        assert trainer.gate_report.captured < 0.2 < 0.7 < trainer.gate_report.routed


def test_without_retention_text_the_trainer_says_so_and_samples_it(tmp_path, capsys):
    trainer = gated_trainer(tmp_path, retention_dataset=None, max_steps=1)
    trainer.train()
    out = capsys.readouterr().out
    assert "no retention_dataset was given, so text is sampled from the base itself" in out
    (file,) = (tmp_path / "cache").iterdir()
    rows = Dataset.from_parquet(str(file), keep_in_memory=True)["input_ids"][:]
    assert [len(row) for row in rows] == [16] * 13  # 200 tokens and a bit


@pytest.mark.slow
def test_asked_for_its_own_text_the_trainer_samples_without_a_word(tmp_path, capsys, monkeypatch):
    trainer = gated_trainer(tmp_path, retention_dataset=None, retention="self", max_steps=1)
    trainer.train()
    assert "no retention_dataset" not in capsys.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr("modeling_moextend.training.retention.draw", None)  # the next run reads
    again = gated_trainer(tmp_path, retention_dataset=None, retention="self", max_steps=1)
    again.train()
    assert_equal(tensors(again.model), tensors(trainer.model))


def test_the_gates_memory_is_said_before_it_trains(tmp_path, capsys):
    gated_trainer(tmp_path, max_steps=1, retention_tokens=16384).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MoExtend")]
    assert re.search(
        "hidden states of about 16,384 task tokens.* 4 MiB of memory", lines[0]
    )  # 2 * 16384 * 32 * 4 bytes
    assert re.search("lets .*% of task tokens through .* and captures .*% of retention tokens", lines[1])
    assert lines[2].startswith("MoExtend, stage finetune")


def test_a_gate_that_is_mostly_shut_is_warned_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gate_training, "fit_gate", lambda *args, **options: REPORT._replace(routed=0.4))
    gated_trainer(tmp_path, open_wide(make_model(**GATED)), max_steps=1).train()
    assert "WARNING: most of the task stays with the base" in capsys.readouterr().out
    monkeypatch.setattr(gate_training, "fit_gate", lambda *args, **options: REPORT._replace(routed=0.6))
    gated_trainer(tmp_path, open_wide(make_model(**GATED)), max_steps=1).train()
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize(("task", "retention", "opens"), [(10.0, 0.1, True), (0.1, 10.0, False)])
def test_the_weights_of_the_gates_losses_are_the_arguments(tmp_path, task, retention, opens):
    """The same text on both sides, which no gate can tell apart."""
    settings = {"gate_task_weight": task, "gate_retention_weight": retention, "max_steps": 1}
    train = retention_data("prompt-completion")
    trainer = gated_trainer(tmp_path, train=train, retention_dataset="prompt-completion", **settings)
    report = gate_training.train_gate(trainer)
    assert report[1:3] == ((1.0, 1.0) if opens else (0.0, 0.0))


def test_zero_steps_leave_the_gate_and_sample_nothing(tmp_path):
    trainer = gated_trainer(tmp_path, open_wide(make_model(**GATED)), retention_dataset=None, gate_steps=0)
    before = gate_tensors(trainer.model)
    trainer.train()
    assert_equal(before, gate_tensors(trainer.model))
    assert trainer.gate_report is None and not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_training_twice_gives_the_same_adapter_and_the_process_its_random_numbers(tmp_path):
    ends = []
    for draws in (1, 2):
        trainer = gated_trainer(tmp_path / str(draws), retention_dataset=None, retention="self", max_steps=2)
        torch.randn(draws)
        trainer.train()
        ends.append(tensors(trainer.model))
    assert_equal(*ends)


def test_the_parts_of_the_loss_add_up(tmp_path):
    model = open_wide(make_model(**GATED))
    settings = {"gate_steps": 0, "gradient_accumulation_steps": 2, "retention_weight": 3.0, "max_steps": 4}
    trainer = gated_trainer(tmp_path, shake(model), router_aux_loss_coef=0.1, **settings)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 4
    for entry in entries:
        parts = entry["task_loss"] + 0.1 * entry["balance_loss"] + 3.0 * entry["retention_loss"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-4)
        assert entry["retention_loss"] > 1e-3


def test_the_first_retention_loss_is_that_of_the_prompts(tmp_path):
    model = shake(open_wide(make_model(**GATED)))
    trainer = gated_trainer(tmp_path, model, gate_steps=0, max_steps=1)
    inputs = next(iter(trainer.get_train_dataloader()))
    assert (inputs["labels"] == -100).any()
    with last_hidden_states(model) as hidden, torch.no_grad():
        model(**{name: value for name, value in inputs.items() if name != "labels"})
        expected = prompt_distance(model, model, hidden[0], inputs).item()
    trainer.train()
    assert trainer.state.log_history[0]["retention_loss"] == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3


@pytest.mark.slow
def test_the_retention_loss_keeps_prompts_nearer_to_the_base(tmp_path):
    last = {}
    for weight in (1e-6, 30.0):
        settings = {"learning_rate": 2e-3, "per_device_train_batch_size": 20, "max_steps": 15}
        model = open_wide(make_model(**GATED))
        trainer = gated_trainer(tmp_path, model, gate_steps=0, retention_weight=weight, **settings)
        trainer.train()
        last[weight] = [entry["retention_loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last[30.0] < 0.5 * last[1e-6]


def test_without_its_weight_there_is_no_retention_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_moextend.training.trainer.prompt_distance", None)
    model = shake(open_wide(make_model(**GATED)))
    trainer = gated_trainer(tmp_path, model, gate_steps=0, retention_weight=0.0)
    trainer.train()
    assert len(losses(trainer)) == 2
    assert not any("retention_loss" in entry for entry in trainer.state.log_history)


def test_without_prompts_the_retention_loss_is_zero(tmp_path):
    model = shake(open_wide(make_model(**GATED)))
    trainer = gated_trainer(tmp_path, model, gate_steps=0, train=text_data(), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["retention_loss"] == 0.0
    assert trainer.state.log_history[0]["new_expert_share"] > 0


def test_evaluation_logs_no_retention_loss(tmp_path):
    trainer = gated_trainer(tmp_path, shake(open_wide(make_model(**GATED))), gate_steps=0, max_steps=1)
    assert "eval_retention_loss" not in trainer.evaluate(task_data(4))


@pytest.mark.parametrize("layout", [{"packing": True, "max_length": 16}, {"padding_free": True, "max_length": None}])
def test_without_prompts_the_retention_loss_of_packed_rows_is_zero(tmp_path, layout):
    model = shake(open_wide(make_model(**GATED)))
    trainer = gated_trainer(tmp_path, model, gate_steps=0, train=text_data(), max_steps=1, **layout)
    trainer.train()
    assert trainer.state.log_history[0]["retention_loss"] == 0.0


@pytest.mark.parametrize("layout", [{"packing": True, "max_length": 16}, {"padding_free": True, "max_length": None}])
def test_the_gate_learns_from_packed_rows_as_from_single_ones(tmp_path, layout):
    train = Dataset.from_dict({"text": lines(0)})
    trainer = gated_trainer(tmp_path, train=train, max_steps=1, **layout)
    trainer.train()
    assert trainer.gate_report.routed > 0.7 and trainer.gate_report.captured < 0.2
    assert trainer.state.log_history[0]["new_expert_share"] > 0.8


def test_the_gate_learns_from_streamed_data(tmp_path):
    trainer = gated_trainer(tmp_path, train=task_data().to_iterable_dataset(), max_steps=2)
    trainer.train()
    assert trainer.gate_report.routed > 0.7 and len(losses(trainer)) == 2


def test_checkpointing_changes_no_loss_of_a_gated_run(tmp_path):
    runs = []
    for checkpointing in (False, True):
        settings = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 2, "max_steps": 3}
        trainer = gated_trainer(tmp_path, shake(open_wide(make_model(**GATED))), gate_steps=0, **settings)
        trainer.train()
        runs.append((losses(trainer), tensors(trainer.model)))
        assert all(entry["retention_loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(tensor, runs[1][1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gated", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_base_spread_over_devices_trains_as_one_that_is_not(tmp_path, gated):
    make_base().save_pretrained(tmp_path / "base")
    near = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.3", "model.norm", "lm_head"]
    spread = {**dict.fromkeys(near, "cpu"), "model.layers.1": "disk", "model.layers.2": "disk"}
    runs = []
    for options in ({}, {"device_map": spread, "offload_folder": str(tmp_path / "off")}):
        torch.manual_seed(7)
        choices = {**(GATED if gated else PAPER), **options}
        model = MoExtendForCausalLM.from_base(str(tmp_path / "base"), PLAN, **choices)
        make = gated_trainer if gated else make_trainer
        trainer = make(tmp_path / f"run{len(runs)}", model, max_steps=3, eval_dataset=text_data(4), verify_base=True)
        trainer.train()
        runs.append((losses(trainer), trainer.evaluate()["eval_loss"], tensors(model)))
    assert model.base.model.layers[1].mlp.gate.weight.is_meta
    assert model.hf_device_map == {f"base.{name}": device for name, device in spread.items()}
    (one, evaluated, trained), (other, also_evaluated, also_trained) = runs
    assert other == pytest.approx(one, rel=1e-5) and also_evaluated == pytest.approx(evaluated, rel=1e-5)
    torch.testing.assert_close(also_trained, trained, rtol=1e-3, atol=1e-4)
    for move in ("to", "cuda"):
        with pytest.raises(RuntimeError, match="can't move a model that has some modules offloaded to cpu or disk"):
            getattr(model, move)("cpu" if move == "to" else 0)


def test_one_new_expert_a_layer_keeps_its_row(tmp_path):
    trainer = gated_trainer(tmp_path, make_model({1: [0], 2: [3]}, **GATED))
    before = tensors(trainer.model)
    trainer.train()
    after = tensors(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "router" not in name}


def test_several_new_experts_that_compete_and_calibrate_behind_a_gate(tmp_path):
    choices = {**GATED, "selection": "compete", "calibration": "routed"}
    trainer = gated_trainer(tmp_path, make_model({1: [0, 2, 4], 2: [3, 1]}, **choices), max_steps=4)
    before = tensors(trainer.model)
    trainer.train()
    after = tensors(trainer.model)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert trainer.state.log_history[0]["new_expert_share"] > 0.3


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_a_gate_with_eyes(tmp_path, kind):
    """Task samples have images, retention text has none; the processor's tokenizer reads it."""
    processor = make_processor()
    processor.tokenizer.chat_template = CHAT
    settings = {"assistant_only_loss": True, "verify_base": True, "tokenizer": processor, "max_steps": 3}
    trainer = gated_trainer(tmp_path, images=True, retention_dataset=kind, retention_tokens=400, **settings)
    frozen = frozen_tensors(trainer.model)
    trainer.train()
    assert_equal(frozen, frozen_tensors(trainer.model))
    assert trainer.gate_report.routed > 0.7 and trainer.gate_report.captured < 0.3
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3 and entries[0]["new_expert_share"] > 0.5
    for entry in entries:
        _, weight = trainer.retention
        parts = entry["task_loss"] + 0.01 * entry["balance_loss"] + weight * entry["retention_loss"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-3)


def test_a_gate_with_eyes_may_sample_its_retention_text(tmp_path):
    settings = {"retention": "self", "retention_tokens": 3000, "gate_task_weight": 100.0}
    trainer = gated_trainer(tmp_path, images=True, retention_dataset=None, max_steps=1, **settings)
    trainer.train()
    assert trainer.gate_report.routed > 0


def test_a_resumed_gated_run_has_its_gate_and_ends_as_the_run_that_never_stopped(tmp_path, monkeypatch):
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}

    def start(folder):
        model = make_model(**GATED)
        model.base.config.attention_dropout = 0.1
        for layer in model.base.model.layers:
            layer.self_attn.attention_dropout = 0.1
        return gated_trainer(folder, model, **settings)

    whole = start(tmp_path)
    whole.train()
    monkeypatch.setattr("modeling_moextend.training.gate.fit_gate", None)
    monkeypatch.setattr("modeling_moextend.training.retention.draw", None)
    resumed = start(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    history = [[e for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    for one, other in zip(*history, strict=True):
        for key in ("loss", "task_loss", "balance_loss", "retention_loss", "grad_norm", "new_expert_share"):
            assert one[key] == other[key], (key, one["step"])
    assert history[0][-1]["retention_loss"] > 0
    assert_equal(tensors(whole.model), tensors(resumed.model))


def test_what_a_gated_run_saves_loads_and_decides_alike(tmp_path):
    trainer = gated_trainer(tmp_path, verify_base=True)
    trainer.train()
    trainer.save_model()
    loaded = MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base())
    assert_equal(tensors(loaded), tensors(trainer.model))
    ids = torch.tensor([make_tokenizer()(text)["input_ids"] for text in lines(0, 4) + lines(13, 4)])
    trainer.model.eval()
    with torch.no_grad(), trainer.model.disable_adapter():
        base = [trainer.model(part).logits for part in (ids[:4], ids[4:])]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model(ids).logits)
        assert torch.equal(loaded(ids[4:]).logits, base[1])  # the base's own text
        assert not torch.allclose(loaded(ids[:4]).logits, base[0], atol=1e-3)


def test_a_gate_over_a_bf16_base(tmp_path):
    model = MoExtendForCausalLM.from_base(make_base(dtype=torch.bfloat16), extended_layers=PLAN, **GATED)
    trainer = gated_trainer(tmp_path, model, bf16=True, verify_base=True)
    trainer.train()
    assert {tensor.dtype for tensor in gate_tensors(model).values()} == {torch.float32}
    assert trainer.gate_report.routed > 0.7 and trainer.gate_report.captured < 0.2


def test_stage_align_trains_no_gate(tmp_path):
    model = make_model(encoder=True, **GATED)
    trainer = gated_trainer(tmp_path, model, images=True, stage="align")
    before = gate_tensors(model)
    trainer.train()
    assert_equal(before, gate_tensors(model))
    assert trainer.gate_report is None


def test_stage_align_has_no_retention_loss(tmp_path):
    model = shake(open_wide(make_model(encoder=True, **GATED)))
    trainer = gated_trainer(tmp_path, model, images=True, stage="align", assistant_only_loss=True, max_steps=1)
    trainer.train()
    assert "retention_loss" not in trainer.state.log_history[0]


def test_empty_retention_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="retention"):
        gated_trainer(tmp_path, retention_dataset=retention_data().select([])).train()


def test_long_prompts_are_retention_text_as_well(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    texts = lines(13, 20, length=30)
    chats = {"prompt": [[{"role": "user", "content": text}] for text in texts]}
    chats["completion"] = [[{"role": "assistant", "content": "a"}] for _ in texts]
    trainer = gated_trainer(tmp_path, retention_dataset=Dataset.from_dict(chats), tokenizer=tokenizer, max_steps=1)
    trainer.train()
    assert trainer.gate_report.captured < 0.2


def test_retention_text_without_a_gate_is_refused(tmp_path):
    for given in ({"retention_dataset": retention_data()}, {"retention": "self", "retention_dataset": None}):
        with pytest.raises(ValueError, match="trains the gate of scope='gate'. scope='all' has no gate"):
            gated_trainer(tmp_path, make_model(), **given)
        with pytest.raises(ValueError, match="scope='modality' needs none: .*Leave retention out"):
            gated_trainer(tmp_path, make_model(encoder=True, scope="modality"), images=True, **given)


def test_two_sources_of_retention_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="retention_dataset=... or retention='self', not both"):
        gated_trainer(tmp_path, retention="self")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retention": "base"}, "retention must be 'self' or None, not 'base'.*retention_dataset="),
        ({"retention_tokens": 0}, "retention_tokens must be an integer of at least 1, not 0"),
        ({"retention_length": 7}, "retention_length must be an integer of at least 8, not 7"),
        ({"gate_steps": -1}, "gate_steps must be an integer of at least 0, not -1"),
        ({"gate_learning_rate": -1e-3}, "gate_learning_rate must be a finite number of at least 0.0"),
        ({"gate_task_weight": -1.0}, "gate_task_weight must be a finite number of at least 0.0"),
        (
            {"gate_retention_weight": float("nan")},
            "gate_retention_weight must be a finite number of at least 0.0, not nan",
        ),
        ({"retention_weight": -0.1}, "retention_weight must be a finite number of at least 0.0, not -0.1"),
    ],
)
def test_retention_settings_out_of_range_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_training_data_that_is_all_the_same_is_refused(tmp_path):
    with pytest.raises(ValueError, match="all its samples are the same"):
        gated_trainer(tmp_path, train=Dataset.from_dict({"text": ["a b c"] * 6})).train()


# ------------------------------------------------------------------ several processes


def start_rank(folder, **overrides):
    """Samples in order, one a process: process 1 sees images in some steps, and none in others."""
    model = shake(make_model(encoder=True, scope="modality"))
    settings = {"max_steps": 4, "train_sampling_strategy": "sequential", "router_aux_loss_coef": 1e-4}
    return make_trainer(folder, model, True, **{**settings, **overrides})


def train_rank(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    # False: a parameter without a gradient on one process is an error.
    trainer = start_rank(folder, per_device_train_batch_size=1, ddp_find_unused_parameters=False, ddp_timeout=300)
    trainer.train()
    torch.save((tensors(trainer.model), trainer.state.log_history), f"{folder}/rank{rank}.pt")
    leave_group()


@pytest.mark.slow
def test_two_processes_end_with_the_same_adapter(tmp_path):
    in_processes(train_rank, tmp_path)
    (first, history), (second, _) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert_equal(first, second)
    alone = start_rank(tmp_path / "alone", per_device_train_batch_size=2)
    alone.train()
    # Two processes see what one sees in a batch of twice the size; only the balance loss is a mean over processes.
    for one, other in zip(history[:4], alone.state.log_history, strict=False):
        assert one["task_loss"] == pytest.approx(other["task_loss"], rel=1e-3)
    assert history[0]["new_expert_share"] == pytest.approx(alone.state.log_history[0]["new_expert_share"])


def test_every_setting_of_the_gate_reaches_its_training(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(gate_training, "fit_gate", lambda *args, **options: given.update(options) or REPORT)
    settings = {"gate_learning_rate": 0.5, "gate_task_weight": 0.25, "gate_retention_weight": 7.0, "gate_steps": 3}
    model = open_wide(make_model(**GATED))
    model.gate_threshold = 0.125
    gated_trainer(tmp_path, model, seed=11, max_steps=1, **settings).train()
    expected = {"learning_rate": 0.5, "task_weight": 0.25, "retention_weight": 7.0, "steps": 3, "threshold": 0.125}
    assert {name: given[name] for name in expected} == expected and given["seed"] == 11


def test_every_setting_of_retention_reaches_the_sampler(tmp_path, monkeypatch):
    given = {}

    def record(model, tokenizer, **options):
        given.update(options)
        return [[5, 6, 7, 8]] * 20

    monkeypatch.setattr(gate_training, "sample_retention", record)
    monkeypatch.setattr(gate_training, "fit_gate", lambda *args, **options: REPORT)
    settings = {"retention_tokens": 77, "retention_length": 9, "retention_cache_dir": "place", "seed": 5}
    gated_trainer(tmp_path, open_wide(make_model(**GATED)), None, max_steps=1, **settings).train()
    assert given == {"tokens": 77, "length": 9, "cache_dir": "place", "seed": 5, "progress": False}


def test_a_gate_that_was_never_trained_is_not_finetuned_behind(tmp_path):
    with pytest.raises(ValueError, match="Set gate_steps above 0"):
        gated_trainer(tmp_path, gate_steps=0).train()


def test_given_retention_text_is_cut_and_in_mixed_order(tmp_path):
    texts = [" ".join([word] * 12) for word in "abcdefgh"]
    trainer = gated_trainer(tmp_path, retention_dataset=Dataset.from_dict({"text": texts}), retention_length=8)
    trainer.processing_class.model_max_length = 4
    rows = [row["input_ids"] for row in gate_training.retention_from_dataset(trainer)]
    tokens = make_tokenizer()(list("abcdefgh"), add_special_tokens=False).input_ids
    assert {len(row) for row in rows} == {8}
    assert not trainer.processing_class.deprecation_warnings, "text that is cut is not said to be too long"
    assert sorted(row[-1] for row in rows) == sorted(token for (token,) in tokens) != [row[-1] for row in rows]


def test_a_second_training_keeps_the_gate_of_the_first(tmp_path):
    trainer = gated_trainer(tmp_path, max_steps=1)
    trainer.train()
    first = {name: tensor.clone() for name, tensor in gate_tensors(trainer.model).items()}
    trainer.args.gate_learning_rate = 0.5  # another gate, if it were trained
    trainer.train()
    assert_equal(gate_tensors(trainer.model), first)


def test_a_gate_that_stays_shut_is_not_finetuned_behind(tmp_path):
    with pytest.raises(ValueError, match="Raise gate_steps"):
        gated_trainer(tmp_path, gate_task_weight=0.0).train()


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([{"text": "a"}], "not list. Of a DatasetDict"),
        (Dataset.from_list([{"content": "a"}]), "has the columns"),
        (Dataset.from_list([{"prompt": "a"}]), "has the columns"),
        (Dataset.from_list([{"text": "a", "images": ["a.png"]}]), "retention data is text"),
        (Dataset.from_list([{"text": "a", "audios": ["a.wav"]}]), "retention data is text"),
    ],
    ids=["a list", "another column", "prompts alone", "images", "audio"],
)
def test_retention_text_that_nobody_can_read_is_refused_at_once(tmp_path, dataset, message):
    with pytest.raises(ValueError, match=message):
        gated_trainer(tmp_path, retention_dataset=dataset)


@pytest.mark.parametrize("settings", [{"gate_steps": 0}, {"stage": "align"}], ids=str)
def test_retention_text_for_a_gate_that_does_not_train_is_refused(tmp_path, settings):
    with pytest.raises(ValueError, match="nothing does"):
        gated_trainer(tmp_path, retention_dataset=retention_data("text"), images=True, **settings)


@pytest.mark.parametrize("name", ["gate_retention_weight", "gate_steps", "retention_tokens"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), "5", -1])
def test_numbers_out_of_range_are_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        config(tmp_path, **{name: value})


@pytest.mark.parametrize("loss", ["prompts", "text"])
def test_the_adapter_may_be_off_while_the_gate_trains(tmp_path, loss):
    trainer = gated_trainer(tmp_path, max_steps=1, retention_loss=loss)
    trainer.model.disable_adapters()
    trainer.train()
    assert trainer.gate_report.routed > 0


def test_the_gate_is_stored_in_float32(tmp_path):
    model = open_wide(make_model(**GATED))
    model.save_pretrained(tmp_path, adapter_dtype="bfloat16")
    stored = load_file(tmp_path / ADAPTER)
    assert {str(t.dtype) for name, t in stored.items() if name.startswith("gate.")} == {"torch.float32"}
    assert {str(t.dtype) for name, t in stored.items() if not name.startswith("gate.")} == {"torch.bfloat16"}
    assert model.adapter_bytes(torch.bfloat16) == sum(tensor.nbytes for tensor in stored.values())
