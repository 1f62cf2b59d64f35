"""Hidden states below the lowest extended layer, read from disk: the same training, to the bit, or a refusal."""

import contextlib
import os

import pytest
import torch
from conftest import PAPER, batch, in_processes, leave_group, make_base, shake
from families import make_family
from test_families import FAST, SUPPORTED
from test_sft_trainer import (
    GATED,
    assert_equal,
    gated_trainer,
    losses,
    make_model,
    make_trainer,
    task_data,
    tensors,
    text_data,
)

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.deltas_moextend import decoder_layers
from modeling_moextend.families_moextend import find_moe_layers
from modeling_moextend.training.prefix_cache import PrefixCache, SameBatches, recorded, replayed
from modeling_moextend.training.retention import last_hidden_states

PLAN = {2: [0], 3: [3, 1]}
CARRY = {"glm5_next", "glm_moe_dsa", "hy_v4", "mistral_large4"}  # a tuple, which the trial before training refuses
EPOCHS = {"max_steps": -1, "num_train_epochs": 3, "router_aux_loss_coef": 0.1}


class Passes:
    """Counts how often a lower layer computes."""

    def __init__(self, trainer, layer=1):
        self.number = 0
        decoder_layers(trainer.model.get_decoder())[layer].self_attn.register_forward_hook(self.count)

    def count(self, *args):
        self.number += 1


def computed_always(monkeypatch):
    """Batches as with a cache, which is never asked."""
    monkeypatch.setattr(PrefixCache, "_read", lambda self, key, device: None)
    monkeypatch.setattr(PrefixCache, "again", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(PrefixCache, "balance_loss", lambda self, *records: self.core.balance_loss(*records))


RUNS = {
    "text": lambda folder, **more: make_trainer(folder, shake(make_model(PLAN)), train=text_data(7), **more),
    "checkpointed, grouped": lambda folder, **more: make_trainer(
        folder,
        shake(make_model(PLAN)),
        gradient_checkpointing=True,
        train_sampling_strategy="group_by_length",
        gradient_accumulation_steps=2,
        **more,
    ),
    "bf16": lambda folder, **more: make_trainer(folder, shake(make_model(PLAN)).bfloat16(), **more),
    "packed": lambda folder, **more: make_trainer(
        folder, shake(make_model(PLAN)), packing=True, max_length=16, **more
    ),
    "images": lambda folder, **more: make_trainer(
        folder, shake(make_model(PLAN, encoder=True, scope="modality")), images=True, train_projector=False, **more
    ),
    "prompts": lambda folder, **more: gated_trainer(
        folder, make_model(PLAN, **GATED), train=task_data(9), retention_loss="prompts", **more
    ),
    "deltas, text": lambda folder, **more: gated_trainer(
        folder, make_model(PLAN, **GATED | {"deltas": {"embedding": 2, "attention": 2}}), train=task_data(9), **more
    ),
}


@pytest.mark.parametrize("run", ["text", *(pytest.param(name, marks=pytest.mark.slow) for name in [*RUNS][1:])])
def test_training_is_the_same_to_the_bit_and_the_lower_layers_compute_once(tmp_path, monkeypatch, run, capsys):
    """And the run is that of the same batches where nothing is kept."""
    trainer = RUNS[run](tmp_path / "kept", prefix_cache=str(tmp_path / "states"), **EPOCHS)
    passes = Passes(trainer)
    trainer.train()
    assert "GB are free" in capsys.readouterr().out
    kept = list((tmp_path / "states").rglob("*.safetensors"))
    steps = trainer.state.max_steps * trainer.args.gradient_accumulation_steps
    assert steps == 3 * len(kept)
    again = RUNS[run](tmp_path / "again", prefix_cache=str(tmp_path / "states"), **EPOCHS)
    second = Passes(again)
    again.train()
    assert passes.number - second.number == len(kept)  # the first epoch; the rest is the gate's, and the trial
    computed_always(monkeypatch)
    other = RUNS[run](tmp_path / "computed", prefix_cache=str(tmp_path / "other"), **EPOCHS)
    third = Passes(other)
    other.train()
    assert third.number >= passes.number + 2 * len(kept)
    assert losses(trainer) == losses(again) == losses(other)
    assert_equal(tensors(trainer.model), tensors(other.model))
    assert_equal(tensors(again.model), tensors(other.model))


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_what_is_kept_and_anew_with_what_is_damaged(tmp_path):
    def start():
        settings = EPOCHS | {"save_strategy": "steps", "save_steps": 3, "prefix_cache": str(tmp_path / "states")}
        return make_trainer(tmp_path / "run", shake(make_model(PLAN)), train=text_data(8), **settings)

    trainer = start()
    trainer.train()
    first, second, *_ = sorted((tmp_path / "states").rglob("*.safetensors"))
    whole, contents = tensors(trainer.model), first.read_bytes()
    first.write_bytes(contents[:-5])
    second.unlink()
    resumed = start()
    passes = Passes(resumed)
    with pytest.warns(UserWarning, match=f"{first.name} is damaged or truncated.*computed anew"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert_equal(tensors(resumed.model), whole)
    assert passes.number == 1 + 2 and first.read_bytes() == contents


def test_rows_stay_together_and_batches_do_not():
    sampler, epochs = SameBatches([4, 2, 0, 6, 1, 5, 3], 2, seed=5), []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert rows == list(sampler) and len(rows) == len(sampler) == 7 and rows[-1] == 3
        assert {*zip(rows[:-1:2], rows[1::2], strict=True)} == {(4, 2), (0, 6), (1, 5)}
        epochs.append(tuple(rows))
    assert len(set(epochs)) > 2


# ------------------------------------------------------------------ refusals, and what can go wrong


def refused(folder, message, model=None, **settings):
    trainer = make_trainer(folder, model or make_model(PLAN), prefix_cache=str(folder / "states"), **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not list((folder / "states").rglob("*.safetensors"))


def test_what_could_not_be_exact_is_refused_by_name(tmp_path, monkeypatch):
    refused(tmp_path, "no decoder layer lies below", make_model({0: [0], 2: [1]}))
    refused(tmp_path, "the projector trains.*train_projector=False", make_model(PLAN, encoder=True), images=True)
    refused(tmp_path, "neftune_noise_alpha", neftune_noise_alpha=5)
    refused(tmp_path, "streamed training data", train=text_data().to_iterable_dataset())
    refused(tmp_path, "batch_rebalance", train_sampling_strategy="batch_rebalance")
    model = make_model(PLAN)
    model.base.config.attention_dropout = 0.1
    refused(tmp_path, r"draw random numbers \(attention_dropout=0.1\)", model)
    model = make_model(PLAN)
    model.base.model.layers[0].drop = torch.nn.Dropout(0.2)
    refused(tmp_path, r"draw random numbers \(model.layers.0.drop \(p=0.2\)\)", model)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    refused(tmp_path, r"10 micro-batches take about .* GB.*1e-06 GB are free.*larger disk")


def test_layers_that_hand_on_more_than_hidden_states_are_refused(tmp_path):
    model, sums = make_model(PLAN), []
    lower, upper = (decoder_layers(model.get_decoder())[layer].self_attn for layer in (0, 3))
    lower.register_forward_hook(lambda module, args, output: sums.append(output[0].mean()))
    upper.register_forward_hook(lambda module, args, output: (output[0] + sums.pop(), *output[1:]))
    refused(tmp_path, r"MixtralModel \(mixtral\) hand on more than hidden states.*IndexError", model)


def test_batches_that_never_come_again_take_no_more_than_was_said(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, make_model(PLAN), train=text_data(6), prefix_cache=str(tmp_path / "s"), **EPOCHS)
    collate, drawn = trainer.data_collator, []

    def other_each_time(rows):
        batch = collate(rows)
        drawn.append(batch["input_ids"])
        return batch | {"input_ids": batch["input_ids"].clone().fill_(len(drawn))}

    trainer.data_collator = other_each_time
    with pytest.warns(UserWarning, match="more micro-batches come than the data has"):
        trainer.train()
    assert len(list((tmp_path / "s").rglob("*.safetensors"))) == 3
    trainer.prefix_cache.space, trainer.prefix_cache.folder = 1, tmp_path / "gone"
    with pytest.warns(UserWarning, match="nothing more is kept in .*gone"):
        trainer.prefix_cache._write("key", trainer.prefix_cache.held)
    assert trainer.prefix_cache.space == -1


def test_another_base_has_other_entries(tmp_path):
    """Also where it differs in a single value, which no fingerprint sees; not where it differs above."""
    folders = []
    for layer in (None, 3, 1):
        base = make_base()
        if layer is not None:
            with torch.no_grad():
                base.model.layers[layer].self_attn.q_proj.weight[3, 5] += 1e-3
        model = MoExtendForCausalLM.from_base(base, PLAN, **PAPER)
        trainer = make_trainer(tmp_path, model, prefix_cache=str(tmp_path / "s"), max_steps=1)
        trainer.train()
        folders.append(trainer.prefix_cache.folder)
    assert folders[0] == folders[1] != folders[2]


# ------------------------------------------------------------------ families


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SUPPORTED])
def test_upper_layers_take_up_what_was_kept(name):
    """Streams, masks and inputs by layer: whatever the decoder gives a layer beside what the one below hands on."""
    base = make_family(name)
    highest = max(find_moe_layers(base.get_decoder()))
    model = MoExtendForCausalLM.from_base(base, {highest: [0]}, scope="all", calibration="none")
    layers = [decoder_layers(model.get_decoder())[index] for index in range(highest)]
    with torch.no_grad(), last_hidden_states(model) as states:
        with recorded(layers[-1]) as hidden:
            model(**batch(), use_cache=False)
        assert isinstance(hidden[0], torch.Tensor) == (name not in CARRY)
        if name in CARRY:
            return
        with replayed(layers, hidden[0]):
            model(**batch(), use_cache=False)
    assert torch.equal(*states)
    assert not [layer for layer in layers if "forward" in vars(layer)]


# ------------------------------------------------------------------ two processes


def work(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    found, more = {}, EPOCHS | {"ddp_timeout": 300, "ddp_find_unused_parameters": False, "train": text_data(8)}
    for name, states in (("kept", "states"), ("again", "states"), ("other", "other")):
        trainer = make_trainer(f"{folder}/{name}", shake(make_model(PLAN)), prefix_cache=f"{folder}/{states}", **more)
        passes = Passes(trainer)
        if name == "other":
            PrefixCache._read = lambda self, key, device: None
        trainer.train()
        found[name] = losses(trainer), tensors(trainer.model), passes.number
    torch.save(found, f"{folder}/{rank}.pt")
    leave_group()


@pytest.mark.slow
def test_two_processes_share_what_is_kept(tmp_path):
    """A micro-batch that the other process computed in the first epoch is read by this one."""
    in_processes(work, tmp_path)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert [number for *_, number in found.values()] == [1 + 2, 1, 1 + 6]
        for name in ("again", "other"):
            assert found[name][0] == found["kept"][0]
            assert_equal(found[name][1], found["kept"][1])
    assert len(list((tmp_path / "states").rglob("*.safetensors"))) == 4
