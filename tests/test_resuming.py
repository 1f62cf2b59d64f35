"""Going on from a checkpoint: which ones are whole, and whether the run is the one that wrote it."""

import dataclasses
import json
import random
import shutil
import subprocess
import sys

import datasets
import pytest
import torch
from conftest import make_base
from datasets import Dataset
from test_sft_trainer import (
    PLAN,
    assert_equal,
    config,
    image_data,
    make_model,
    make_processor,
    make_texts,
    make_tokenizer,
    make_trainer,
    tensors,
    text_data,
)
from transformers import DataCollatorForSeq2Seq, EarlyStoppingCallback

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.adapter_file_moextend import FILE
from modeling_moextend.training.checkpoints import RECORD, TRAINER_STATE, last_checkpoint, problem_of
from modeling_moextend.training.config import MoExtendSFTConfig
from modeling_moextend.training.run_record import NOT_COMPARED, batch_hash, data_hash

SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a run of two steps, and its adapter."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, **SAVING)
    trainer.train()
    return folder, tensors(trainer.model)


@pytest.fixture
def run(written, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(written[0], tmp_path / "run")


# ------------------------------------------------------------------ whole or not


def test_a_checkpoint_cut_off_at_any_file_is_passed_over(run):
    """As a killed process or a full disk leaves it: files in the order in which they were written, the last cut."""
    folder = run / "checkpoint-2"
    assert last_checkpoint(run) == (folder, [])
    files = sorted((path for path in folder.iterdir()), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    assert [path.name for path in files[:2]] == [TRAINER_STATE, RECORD]
    for path in files:
        path.write_bytes(path.read_bytes()[:-2])
        checkpoint, unfinished = last_checkpoint(run)
        assert checkpoint == run / "checkpoint-1", path
        assert [one.folder for one in unfinished] == [folder]
        path.unlink()
        assert last_checkpoint(run)[0] == run / "checkpoint-1", path
    assert last_checkpoint(run / "nowhere") == (None, [])


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "moextend_adapter.safetensors"])
def test_one_file_that_is_short_or_missing_is_named(run, name):
    path = run / "checkpoint-2" / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    if name != "rng_state.pth":
        assert f"{name} ({size // 2:,} of {size:,} bytes)" in problem_of(path.parent)
    path.unlink()
    assert name in problem_of(path.parent)


@pytest.mark.parametrize("text", ["[]", "{}", "3", '"x"', '{"global_step": "x"}', '{"files": 3, "run": {}}'])
@pytest.mark.parametrize("name", [TRAINER_STATE, "run.json"])
def test_a_record_of_something_else_is_passed_over(run, name, text):
    last, *_ = sorted(run.glob("checkpoint-*"), reverse=True)
    (last / name).write_text(text)
    checkpoint, [unfinished] = last_checkpoint(run)
    assert checkpoint != last and f"{last} is not a complete checkpoint: its {name} can't be read" in str(unfinished)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, "zeros") for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", FILE)),
        *((name, "a bit") for name in ("optimizer.pt", FILE)),
    ],
)
def test_a_file_of_its_size_and_other_content_is_named(run, name, damage):
    last, *_ = sorted(run.glob("checkpoint-*"), reverse=True)
    content = bytearray((last / name).read_bytes())
    content[len(content) // 2] ^= 1
    (last / name).write_bytes(bytes(len(content)) if damage == "zeros" else content)
    checkpoint, [unfinished] = last_checkpoint(run)
    assert checkpoint != last and "not as they were written: " in str(unfinished) and name in str(unfinished)


def test_after_a_full_disk_the_run_goes_on_from_the_last_whole_checkpoint(written, tmp_path, monkeypatch, capsys):
    save, saved = torch.save, []

    def fill(thing, path, *args, **kwargs):
        save(thing, path, *args, **kwargs)
        saved.append(path)
        if "checkpoint-2" in str(path) and "optimizer" in str(path):
            with open(path, "r+b") as file:
                file.truncate(1000)
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill)
        with pytest.raises(OSError, match="No space left"):
            make_trainer(tmp_path, **SAVING).train()
    capsys.readouterr()
    resumed = make_trainer(tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    said = capsys.readouterr().out
    assert "checkpoint-2 is not a complete checkpoint: it has no trainer_state.json, which is written last" in said
    assert f"The run goes on from {tmp_path / 'checkpoint-1'}" in said
    assert_equal(tensors(resumed.model), written[1])
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", [])


def test_a_checkpoint_asked_for_by_name_must_be_whole(run):
    (run / "checkpoint-2" / TRAINER_STATE).unlink()
    trainer = make_trainer(run, **SAVING)
    with pytest.raises(ValueError, match="checkpoint-2 is not a complete checkpoint.*Resume from .*checkpoint-1; for"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    (run / "checkpoint-1" / TRAINER_STATE).write_text('{"global_step": 1')
    for asked, message in ((str(run / "checkpoint-1"), "begin anew"), (True, "(?s)no whole.*checkpoint-2.*can't be")):
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=asked)
    with pytest.raises(ValueError, match="nowhere is not a complete checkpoint: there is no such folder"):
        trainer.train(resume_from_checkpoint=str(run / "nowhere"))


def test_a_checkpoint_that_is_written_over_is_unfinished_meanwhile(run, monkeypatch):
    """Killed half-way it would else be the new adapter beside the old optimiser state."""
    trainer = make_trainer(run, **SAVING)
    monkeypatch.setattr(torch, "save", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert last_checkpoint(run)[0] == run / "checkpoint-1"


def test_a_checkpoint_of_the_adapter_alone_is_no_place_to_go_on(tmp_path):
    make_trainer(tmp_path, **SAVING, save_only_model=True).train()
    with pytest.raises(ValueError, match="(?s)no whole checkpoint.*save_only_model=True leaves it"):
        make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_an_earlier_version_goes_on_and_says_what_is_not_known(run, written, capsys):
    (run / "checkpoint-1" / RECORD).unlink()
    trainer = make_trainer(run, **SAVING)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert "written by an earlier version" in capsys.readouterr().out
    assert_equal(tensors(trainer.model), written[1])
    (run / "checkpoint-1" / RECORD).unlink(missing_ok=True)
    adapter = run / "checkpoint-1" / "moextend_adapter.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-4])
    assert problem_of(run / "checkpoint-1") is not None


# ------------------------------------------------------------------ the same run or another


def model_with(dtype=torch.float32, **base):
    return MoExtendForCausalLM.from_base(make_base("mixtral", dtype, **base), extended_layers=PLAN, paper=True)


def test_the_same_run_goes_on(run, written):
    """Where, how often and under which name it saves and logs makes no difference; neither does asking twice."""
    harmless = {
        "logging_steps": 2,
        "save_steps": 2,
        "run_name": "b",
        "adapter_dtype": "bfloat16",
        "save_total_limit": 3,
    }
    trainer = make_trainer(run, **{**SAVING, **harmless})
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert_equal(tensors(trainer.model), written[1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 0.02}, "learning_rate: it was 0.01, now 0.02"),
        ({"max_steps": 3}, "max_steps: it was 2, now 3"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type: it was 'linear', now 'cosine'"),
        ({"seed": 1, "data_seed": 2}, "(?s)data_seed: it was None, now 2.*seed: it was 42, now 1"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size: it was 2, now 4"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"packing": True}, "packing: it was False, now True"),
        ({"max_length": 5}, "(?s)training data: not the same.*max_length: it was 64, now 5"),
        ({"router_aux_loss_coef": 0.5}, "router_aux_loss_coef"),
        ({"gate_steps": 7}, "gate_steps"),
        ({"ignore_data_skip": True}, "ignore_data_skip=True: it begins again"),
        ({"train": text_data(21)}, "training data: not the same"),
        (
            {"train": Dataset.from_dict({"text": [*make_texts(19), "a b"]})},
            r"with check_resume=False.\n  training data",
        ),
        ({"train": Dataset.from_dict({"text": make_texts()[::-1]})}, "training data: not the same"),
        ({"eval_dataset": text_data(4), "eval_strategy": "steps", "eval_steps": 1}, "evaluation data: not the same"),
        ({"model": lambda: model_with(torch.bfloat16)}, "dtype of the base: it was .'torch.float32'., now"),
        (
            {"model": lambda: model_with(attention_dropout=0.1)},
            "base's config: attention_dropout: it was 0.0, now 0.1",
        ),
        ({"model": lambda: model_with(_attn_implementation="eager")}, "attention: it was 'sdpa', now 'eager'"),
        ({"data_collator": DataCollatorForSeq2Seq(make_tokenizer())}, "data_collator: it was None, now 'DataCollator"),
        ({"callbacks": [EarlyStoppingCallback()]}, "callback EarlyStoppingCallback: it was not there, now it is"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_another_run_is_refused_by_what_has_changed(written, changed, message):
    model = changed.get("model")
    trainer = make_trainer(written[0], **{**SAVING, **changed, "model": model and model()})
    before = tensors(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert_equal(before, tensors(trainer.model))


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("versions", "torch", "2.0", "versions: torch: it was '2.0', now"),
        ("run", "processes", 2, "processes: it was 2, now 1"),
        ("run", "device", "NVIDIA H100", "device: it was 'NVIDIA H100', now 'cpu"),
        ("run", "mixed precision", "bf16", "mixed precision: it was 'bf16', now 'no'"),
        ("data", "retention data", "0", "retention data: not the same"),
        ("settings", "an_option_of_old", 1, "an_option_of_old: it was 1, now None"),
    ],
)
def test_what_the_machine_had_is_compared_as_well(run, part, name, value, message):
    path = run / "checkpoint-2" / RECORD
    record = json.loads(path.read_text())
    record["run"][part][name] = value
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        make_trainer(run, **SAVING).train(resume_from_checkpoint=True)


def test_a_checkpoint_from_before_the_weight_of_retention_could_be_unset_is_the_same_run(run):
    """Its default, 5, was recorded where none is given now."""
    path = run / "checkpoint-2" / RECORD
    record = json.loads(path.read_text())
    del record["run"]["settings"]["retention_loss"]
    record["run"]["settings"]["retention_weight"] = 4.0
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="retention_weight: it was 4.0, now 5.0"):
        make_trainer(run, **SAVING).train(resume_from_checkpoint=True)
    record["run"]["settings"]["retention_weight"] = 5.0
    path.write_text(json.dumps(record))
    make_trainer(run, **SAVING).train(resume_from_checkpoint=True)


def test_a_changed_run_goes_on_when_asked_to_and_says_what_has_changed(run, capsys):
    trainer = make_trainer(run, **SAVING, check_resume=False, learning_rate=0.02)
    trainer.args.max_steps = 3
    trainer.train(resume_from_checkpoint=True)
    said = capsys.readouterr().out
    assert "with what has changed (check_resume=False)" in said and "learning_rate: it was 0.01, now 0.02" in said
    assert trainer.state.global_step == 3


def test_random_states_of_other_processes_are_no_random_state(run):
    for number in (1, 2):
        path = run / f"checkpoint-{number}" / "rng_state.pth"
        path.rename(path.with_name("rng_state_0.pth"))
        (path.parent / RECORD).unlink()
    with pytest.raises(ValueError, match="has no rng_state.pth, the random state of process 0: resume with as many"):
        make_trainer(run).train(resume_from_checkpoint=True)


def test_an_early_stopping_goes_on_with_its_patience_or_is_refused(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "eval_dataset": text_data(4)}

    def start(**options):
        return make_trainer(tmp_path, callbacks=[EarlyStoppingCallback(5)], **SAVING, **best, **options)

    start().train()
    with pytest.raises(ValueError, match="EarlyStoppingCallback: set restore_callback_states_from_checkpoint=True"):
        start().train(resume_from_checkpoint=True)
    start(restore_callback_states_from_checkpoint=True).train(resume_from_checkpoint=True)


def test_streamed_data_is_compared_by_its_first_samples(tmp_path, capsys):
    def start(texts):
        stream = Dataset.from_dict({"text": texts}).to_iterable_dataset()
        return make_trainer(tmp_path, train=stream, **SAVING)

    start(make_texts()).train()
    with pytest.raises(ValueError, match="first samples, as the model gets them: not the same"):
        start(make_texts()[1:]).train(resume_from_checkpoint=True)
    start(make_texts()).train(resume_from_checkpoint=True)
    assert "training data is streamed, so only its first samples were compared" in capsys.readouterr().out


def test_every_option_that_is_not_compared_is_one():
    """A name that transformers or TRL no longer has would hide nothing, and one mistyped would hide nothing either."""
    assert sorted(NOT_COMPARED - {field.name for field in dataclasses.fields(MoExtendSFTConfig)}) == []


# ------------------------------------------------------------------ one training a folder


def test_launched_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    """What `accelerate launch` and torchrun start on a machine without GPUs."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for options in ({"use_cpu": False}, {"use_cpu": False, "bf16": True}):
        with pytest.raises(ValueError, match="one of 2 processes .* write to .*Launch one process.*--use_cpu true"):
            config(tmp_path, **options)
    monkeypatch.setenv("WORLD_SIZE", "1")
    config(tmp_path)


def test_a_second_training_in_a_folder_is_refused(tmp_path):
    trainer = make_trainer(tmp_path / "out")
    (tmp_path / "out").mkdir(exist_ok=True)
    command = f"""
import fcntl
with open({str(tmp_path / "out" / ".train.lock")!r}, "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("there", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", command], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "there\n"
        with pytest.raises(ValueError, match="Another process is at work in .*out.*another output_dir"):
            trainer.train()
        other.kill()
    trainer.train()  # what a killed process held is free
    assert not list((tmp_path / "out").glob(".*"))


# ------------------------------------------------------------------ data


def test_equal_rows_have_one_hash_wherever_they_lie(tmp_path):
    rows = [{"text": str(i), "n": None if i % 3 else i, "parts": [{"a": str(i)}] * (i % 4)} for i in range(2500)]
    data = Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "data")
    halves = datasets.concatenate_datasets([data.select(range(700)), data.select(range(700, 2500))])
    mixed = data.select([*range(2499, -1, -1)]).select([*range(2499, -1, -1)])
    same = [data, Dataset.from_list(rows), datasets.load_from_disk(tmp_path / "data"), halves, mixed]
    assert len({data_hash(one) for one in same}) == 1
    others = [data.select(range(2499)), data.rename_column("n", "m"), data.shuffle(seed=0), data.remove_columns("n")]
    others += [Dataset.from_list([*rows[:-1], {**rows[-1], "n": 0}])]
    assert len({data_hash(one) for one in [data, *others]}) == 6
    assert data_hash({"a": data, "b": None}) == {"a": data_hash(data), "b": None}
    assert data_hash(data.to_iterable_dataset()) == "streamed"


def test_first_samples_show_another_template_and_leave_random_numbers_alone(tmp_path):
    trainer = make_trainer(tmp_path, images=True)
    before = torch.random.get_rng_state(), random.getstate()
    first = batch_hash(trainer)
    assert first == batch_hash(trainer) and torch.equal(before[0], torch.random.get_rng_state())
    assert random.getstate() == before[1]
    processor = make_processor()
    processor.chat_template = processor.chat_template.replace("USER: ", "USER:  a ")
    other = type(trainer)(
        make_model(encoder=True), config(tmp_path), train_dataset=image_data(), processing_class=processor
    )
    assert batch_hash(other) != first
