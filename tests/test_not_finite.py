"""A run that goes to NaN or infinity: where it stops, and that nothing of it is saved or published."""

import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import make_base
from test_sft_trainer import image_data, make_model, make_trainer
from transformers import TrainerCallback

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.adapter_file_moextend import write_folder
from modeling_moextend.publishing.hub import publish_folder
from modeling_moextend.tools.inspection import inspect_adapter
from modeling_moextend.tools.merge import merge
from modeling_moextend.training.resuming import load_adapter_tensors
from modeling_moextend.training.trainer import AdapterReport

NAME = "layers.2.experts.down_proj"


class Poison(TrainerCallback):
    """Writes `value` into new tensors after the second step."""

    def __init__(self, model, prefix, value=torch.nan):
        self.model, self.prefix, self.value = model, prefix, value

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            for name, tensor in self.model.adapter_tensors().items():
                if name.startswith(self.prefix):
                    tensor.data.view(-1)[:8] = self.value


class WrongGradient(TrainerCallback):
    """Infinity in a gradient of the second step, where no loss shows it."""

    def __init__(self, model):
        self.model = model

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.model.adapter_tensors()[NAME].grad.view(-1)[5] = torch.inf


def bytes_of(folder):
    """What lies in a folder; the card, which a checkpoint writes too, left out."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".md"}


def good_adapter(folder):
    """Saves an adapter; returns its files."""
    trainer = make_trainer(folder)
    trainer.save_model()
    return bytes_of(folder)


def test_a_run_stops_at_the_first_loss_that_is_not_finite(tmp_path):
    before, model = good_adapter(tmp_path), make_model()
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, model, callbacks=[Poison(model, "layers.2.router")], **options)
    with pytest.raises(ValueError, match=r"can't be saved: NaN or infinity in layers.2.router.weight.*as float32"):
        trainer.train()  # a checkpoint comes before the next loss
    trainer = make_trainer(tmp_path, make_model(), max_steps=5)
    trainer.add_callback(Poison(trainer.model, "layers.2.router", torch.inf))
    with pytest.raises(ValueError, match=r"stopped in step 3: task_loss is nan.*lower learning_rate"):
        trainer.train()
    with pytest.raises(ValueError, match=r"can't be saved: NaN or infinity in layers\.\d"):
        trainer.model.save_pretrained(tmp_path)
    assert bytes_of(tmp_path) == before
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]


def test_stage_align_stops_as_well(tmp_path):
    trainer = make_trainer(tmp_path, images=True, stage="align", max_steps=5, train=image_data(2))
    trainer.add_callback(Poison(trainer.model, "projector.linear_2.weight"))
    with pytest.raises(ValueError, match=r"stopped in step 3: task_loss is nan"):
        trainer.train()


def test_a_base_that_overflows_is_named_in_the_first_step(tmp_path):
    base = make_base(dtype=torch.float16)
    for parameter in base.model.layers[1].parameters():
        parameter.data.mul_(3000)
    trainer = make_trainer(tmp_path, MoExtendForCausalLM.from_base(base, {1: [0]}, paper=True))
    with pytest.raises(ValueError, match=r"stopped in step 1: .* is nan.*dtype='bfloat16'"):
        trainer.train()


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_run_stops_at_the_first_gradient_that_is_not_finite(tmp_path, max_grad_norm):
    model = make_model()
    trainer = make_trainer(tmp_path, model, max_steps=3, max_grad_norm=max_grad_norm, callbacks=[WrongGradient(model)])
    before = model.adapter_tensors()[NAME].detach().clone()
    with pytest.raises(ValueError, match=rf"stopped in step 2: .*gradients of {NAME} \(1 tensors\)"):
        trainer.train()
    after = model.adapter_tensors()[NAME]
    assert after.isfinite().all() and not torch.equal(after, before), "step 1 counts, step 2 was not made"


@pytest.mark.parametrize("scale, stops", [(65536.0, False), (1.0, True)])
def test_a_gradient_that_its_loss_scale_made_infinite_is_skipped(tmp_path, scale, stops):
    trainer = make_trainer(tmp_path)
    (report,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, AdapterReport))
    trainer.trainable[NAME].grad = torch.full_like(trainer.trainable[NAME], torch.inf)
    trainer.accelerator.scaler = SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: scale)
    if not stops:
        report.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
        return
    with pytest.raises(ValueError, match="stopped in step 1"):
        report.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)


def test_a_mad_learning_rate_saves_nothing(tmp_path):
    before = good_adapter(tmp_path)
    trainer = make_trainer(tmp_path, learning_rate=1e30, max_steps=4)
    with pytest.raises(ValueError, match=r"stopped in step 2: task_loss is nan"):
        trainer.train()
    assert all(tensor.isfinite().all() for tensor in trainer.trainable.values()), "huge, and of no use"
    with pytest.raises(ValueError, match=r"stopped in step 2: .*model.save_pretrained\(folder\) saves it all"):
        trainer.save_model()
    trainer = make_trainer(tmp_path, learning_rate=1e39, max_steps=1)  # of one step no loss tells
    trainer.train()
    with pytest.raises(ValueError, match=r"can't be saved: NaN or infinity in layers.*untouched"):
        trainer.save_model()
    assert bytes_of(tmp_path) == before


def test_numbers_that_float16_does_not_hold_are_not_saved_in_it(tmp_path):
    model = make_model()
    model.adapter_tensors()[NAME].data[0, 0, 0] = 1e5
    with pytest.raises(ValueError, match=rf"in {NAME} \(1 tensors, as float16\).*adapter_dtype='float32'"):
        model.save_pretrained(tmp_path / "a", adapter_dtype="float16")
    assert not (tmp_path / "a").exists()
    model.save_pretrained(tmp_path / "a")
    assert inspect_adapter(tmp_path / "a")["not_finite"] == []


def test_what_earlier_versions_saved_is_named_wherever_it_is_read(tmp_path, caplog):
    make_base().save_pretrained(tmp_path / "base")
    model = MoExtendForCausalLM.from_base(str(tmp_path / "base"), {1: [0], 2: [3, 1]}, paper=True)
    tensors = {name: tensor.detach().clone() for name, tensor in model.adapter_tensors().items()}
    tensors[NAME][0, 0, 0] = -torch.inf
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_folder(folder, tensors, model.config.published(), max_shard_size="20KB")
    with caplog.at_level(logging.WARNING, "modeling_moextend"):
        loaded = MoExtendForCausalLM.from_pretrained(folder)
    assert f"holds NaN or infinity, and so may its answers: {NAME}." in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "modeling_moextend"):
        model.load_adapter(folder, "other")
    assert NAME in caplog.text
    assert inspect_adapter(folder)["not_finite"] == [NAME]
    for refused in (
        lambda: loaded.save_pretrained(tmp_path / "again"),
        lambda: publish_folder(folder, "me/adapter", base="me/base", dry_run=True),
        lambda: merge(folder, tmp_path / "merged"),
        lambda: load_adapter_tensors(make_model(), folder),
    ):
        with pytest.raises(ValueError, match=rf"can't be (saved|published|merged|loaded): NaN or infinity in {NAME}"):
            refused()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
