"""Trainer and TRL's trainers go on from a checkpoint, which is an adapter, and take the best one back."""

import json
import logging
import shutil

import pytest
import torch
from conftest import PAPER, batch, make_base, make_encoder
from datasets import Dataset
from test_sft_trainer import PLAN, WORDS, losses, make_texts, make_tokenizer, tensors, text_data
from transformers import AutoTokenizer, ProcessorMixin, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from modeling_moextend import MoExtendForCausalLM

SETTINGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "save_steps": 2,
    "eval_steps": 2,
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}


def rows(number=20):
    ids = [make_tokenizer()(text)["input_ids"][:4] for text in make_texts(number)]
    return [{"input_ids": row, "labels": row} for row in ids]


def make_model(plan=PLAN, dtype=torch.bfloat16, **choices):
    base = make_base(dtype=dtype)
    torch.manual_seed(7)
    return MoExtendForCausalLM.from_base(base, plan, **{**PAPER, **choices})


def make_trainer(kind, folder, model=None, **options):
    model, settings = make_model() if model is None else model, {**SETTINGS, **options}
    if kind is Trainer:
        data = {"train_dataset": rows(), "eval_dataset": rows(4)}
        return Trainer(model, TrainingArguments(str(folder), **settings), **data)
    data = {"train_dataset": text_data(), "eval_dataset": text_data(4), "processing_class": make_tokenizer()}
    return SFTTrainer(model, args=SFTConfig(str(folder), **settings), **data)


@pytest.fixture
def warned(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return lambda: [
        record.message for record in caplog.records if "keys" in record.message or "locate" in record.message
    ]


@pytest.mark.parametrize("kind", [pytest.param(Trainer, marks=pytest.mark.slow), SFTTrainer])
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(kind, tmp_path, warned):
    whole = make_trainer(kind, tmp_path)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = make_trainer(kind, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 4
    ours, theirs = tensors(resumed.model), tensors(whole.model)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}  # over a base in bfloat16
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert warned() == []


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
@pytest.mark.slow
def test_the_best_model_comes_back_at_the_end(kind, tmp_path, warned):
    choice = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make_trainer(kind, tmp_path, max_steps=3, save_steps=1, eval_steps=1, **choice)  # best: the highest loss
    trainer.train()
    evaluated = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = max(evaluated, key=evaluated.get)
    assert best < 3, "the last one is the best, so this shows nothing"
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == evaluated[best]
    assert warned() == []
    trainer.save_model(str(tmp_path / "out"))
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    loaded = MoExtendForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}", base=make_base(dtype=torch.bfloat16))
    assert all(torch.equal(tensor, tensors(trainer.model)[name]) for name, tensor in tensors(loaded).items())


def test_a_checkpoint_of_another_plan_is_refused_at_the_start(tmp_path):
    make_trainer(Trainer, tmp_path).train()
    other = make_trainer(Trainer, tmp_path, make_model({1: [0], 3: [1]}))
    before = tensors(other.model)
    with pytest.raises(ValueError, match="(?s)does not fit the model; nothing was loaded.*missing: layers.3"):
        other.train(resume_from_checkpoint=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(other.model).items())


def test_only_what_a_trainer_writes_as_a_checkpoint_is_found_by_it(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "checkpoint-1")
    model.save_pretrained(tmp_path / "other", state_dict=None)
    assert not [*tmp_path.glob("*/model.safetensors.index.json")]
    model.save_pretrained(tmp_path / "checkpoint-1", state_dict=None, max_shard_size=1000)
    index = json.loads((tmp_path / "checkpoint-1" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"moextend_adapter.safetensors"}
    own = {id(tensor) for tensor in model.adapter_tensors().values()}
    assert {id(model.state_dict(keep_vars=True)[name]) for name in index["weight_map"]} == own


def test_an_adapters_own_state_is_loaded_by_role(tmp_path):
    encoder = {"encoder": make_encoder(), "image_token_id": len(WORDS)}
    one, other = make_model(dtype=torch.float32, **encoder), make_model(dtype=torch.float32, **encoder)
    with torch.no_grad():
        for tensor in one.adapter_tensors().values():
            tensor.add_(0.1)
    state = one.get_adapter_state_dict()
    assert other.load_state_dict(state) == ([], [])
    assert torch.equal(other(**batch()).logits, one(**batch()).logits)
    for damage, reason in (
        (lambda s: s.pop("projector.linear_1.weight"), "missing: projector.linear_1.weight"),
        (lambda s: s.update({"layers.9.router.weight": torch.zeros(1)}), "unexpected: layers.9.router.weight"),
        (lambda s: s.update({"layers.1.router.weight": torch.zeros(1)}), "wrong shape: layers.1.router.weight"),
    ):
        damaged = dict(state)
        damage(damaged)
        with pytest.raises(ValueError, match=reason):
            other.load_state_dict(damaged, strict=False)
    whole = make_model(dtype=torch.float32, **encoder)
    whole.load_state_dict(one.state_dict())
    assert torch.equal(whole(**batch()).logits, one(**batch()).logits)


def test_a_trainer_that_is_given_no_tokenizer_finds_the_one_beside_the_adapter(tmp_path):
    base, folder = "assets/tiny-moe", tmp_path / "adapter"
    MoExtendForCausalLM.from_base(base, {1: [0]}, scope="all").save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    settings = {**SETTINGS, "max_steps": 1, "save_strategy": "no", "eval_strategy": "no"}
    data = Dataset.from_dict({"text": ["The function returns a list."] * 2})
    model = MoExtendForCausalLM.from_pretrained(folder)
    trainer = SFTTrainer(model, args=SFTConfig(str(tmp_path / "out"), **settings), train_dataset=data)
    trainer.train()
    assert not isinstance(trainer.processing_class, ProcessorMixin)
    assert len(trainer.processing_class) == 4096
