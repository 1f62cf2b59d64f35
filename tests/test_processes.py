"""One, two and four processes train the same: equal losses, a killed process is noticed, its run goes on elsewhere.

A step is four micro-batches of one row, whoever takes them: so the same products are computed, and only sums over
processes are done in another order.
"""

import functools
import os
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from conftest import in_processes, leave_group, shake
from test_sft_trainer import (
    GATED,
    assert_equal,
    gated_trainer,
    make_model,
    make_trainer,
    task_data,
    tensors,
    text_data,
)
from transformers import TrainerCallback

STEPS, ROWS = 20, 4
COMPARED = ("loss", "task_loss", "balance_loss", "retention_loss")
NUMBERS = (2, 4)


def settings(world, **more):
    shared = {"max_steps": STEPS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS // world}
    shared |= {"train_sampling_strategy": "sequential", "ddp_find_unused_parameters": False, "ddp_timeout": 300}
    return shared | {"router_aux_loss_coef": 0.01, "learning_rate": 1e-3} | more


def with_images(folder, world, choices, **more):
    """Every third row has no image: a process without a token for new experts, in some steps two of them."""
    model = shake(make_model(encoder=True, scope="modality", **choices))
    return make_trainer(folder, model, True, **settings(world, **more))


def behind_a_gate(folder, world):
    """Sampled retention text; the adapter has deltas, and its loss keeps that text."""
    model = make_model(**GATED | {"deltas": {"embedding": 2, "attention": 2}})
    more = {"gate_learning_rate": 2e-2, "learning_rate": 1e-2}
    return gated_trainer(folder, model, None, train=task_data(), **settings(world, **more))


def two_adapters(folder, world):
    """The second one trains beside the first, which takes part."""
    model = shake(make_model(calibration="none"))
    model.add_adapter("second", {1: [4], 3: [0, 2]}, scope="all", selection="compete", calibration="none")
    return make_trainer(folder, model, **settings(world))


RUNS = {
    "low rank": functools.partial(with_images, choices={"expert_rank": 3, "calibration": "none"}),
    "deltas": functools.partial(
        with_images,
        choices={"selection": "exclusive", "calibration": "none", "deltas": {"embedding": 2, "attention": 2}},
    ),
    "gate": behind_a_gate,
    "adapters": two_adapters,
}


def history(trainer):
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return [{name: log[name] for name in COMPARED if name in log} for log in logs]


def close(one, other):
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def join(rank, port, world):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


# ------------------------------------------------------------------ the same losses


def work(rank, port, folder, world):
    join(rank, port, world)
    found = {}
    for name, start in RUNS.items():
        trainer = start(Path(folder, name), world)
        trainer.train()
        found[name] = history(trainer), tensors(trainer.model)
    trainer = resumable(Path(folder, "resumed"), world)
    trainer.train(resume_from_checkpoint=str(Path(folder).parent / "resumable/checkpoint-10"))
    found["resumed"] = history(trainer), tensors(trainer.model)
    torch.save(found, f"{folder}/{rank}.pt")
    leave_group()


def resumable(folder, world, **more):
    saves = {"save_strategy": "steps", "save_steps": 10, "check_resume": False, **more}
    return with_images(folder, world, {}, **saves)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each run on one process, and the folder of all of them."""
    folder, found = tmp_path_factory.mktemp("processes"), {}
    for name, start in RUNS.items():
        trainer = start(folder / name, 1)
        trainer.train()
        found[name] = history(trainer), tensors(trainer.model)
    trainer = resumable(folder / "resumable", 1)
    trainer.train()
    found["resumed"] = history(trainer), tensors(trainer.model)
    return folder, found


@pytest.fixture(scope="module", params=NUMBERS)
def together(request, alone):
    folder = alone[0] / str(request.param)
    folder.mkdir()
    in_processes(functools.partial(work, world=request.param), folder, request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RUNS, "resumed"])
def test_the_losses_are_those_of_one_process(alone, together, name):
    """`resumed`: from a checkpoint of one process, on two and four."""
    expected, whole = alone[1][name]
    assert len(expected) == STEPS and expected[0]["task_loss"] > 1.001 * expected[-1]["task_loss"]
    for found in together:
        close(found[name][0], expected)
        for tensor, values in found[name][1].items():
            torch.testing.assert_close(values, whole[tensor], rtol=1e-3, atol=1e-4)
        assert_equal(found[name][1], together[0][name][1])


@pytest.mark.slow
def test_another_number_of_processes_is_said_and_refused(alone, tmp_path):
    shutil.copytree(alone[0] / "resumable/checkpoint-10", tmp_path / "checkpoint-10")
    record = (tmp_path / "checkpoint-10/run.json").read_text()
    (tmp_path / "checkpoint-10/run.json").write_text(record.replace('"processes": 1', '"processes": 2'))
    trainer = resumable(tmp_path, 1, check_resume=True)
    with pytest.raises(ValueError, match="processes: it was 2, now 1"):
        trainer.train(resume_from_checkpoint=True)


# ------------------------------------------------------------------ a killed process


class Killed(TrainerCallback):
    """Ends this process without a word, in the middle of a step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os._exit(9)


def train_saved(rank, port, folder, killed):
    join(rank, port, 2)
    more = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10}
    trainer = make_trainer(folder, shake(make_model()), train=text_data(), **settings(2, **more))
    if killed is not None and rank == killed:
        trainer.add_callback(Killed())
    trainer.train(resume_from_checkpoint=os.path.isdir(f"{folder}/checkpoint-4"))
    torch.save(tensors(trainer.model), f"{folder}/{rank}.pt")
    leave_group()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path, killed):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    folder = str(tmp_path / "stopped")
    processes = [context.Process(target=train_saved, args=(rank, port, folder, killed)) for rank in (0, 1)]
    for process in processes:
        process.start()
    processes[killed].join()
    start = time.monotonic()
    other = processes[1 - killed]
    other.join(60)
    assert time.monotonic() - start < 60 and other.exitcode not in (0, None)
    assert processes[killed].exitcode == 9
    for name in ("stopped", "whole"):  # the one goes on, the other is never disturbed
        in_processes(functools.partial(train_saved, killed=None), tmp_path / name)
    for rank in (0, 1):
        assert_equal(*(torch.load(tmp_path / name / f"{rank}.pt") for name in ("stopped", "whole")))
