"""Tasks in a row: the schedule, what a step leaves to the next one, the count of untouched questions, the table."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
pytest.importorskip("peft")

import continual
import forgetting
import methods
import runs
import tasks
import training
from test_benchmarks import DOMAINS

NAMES = ["numbers", "calendar"]


def measured(job, values, untouched=None):
    """A line of results: `values` are the accuracies of the tasks so far."""
    text = {domain: {"base": 10.0, "after": 11.0, "kl": 0.0, "changed": 0.0, "captured": None} for domain in DOMAINS}
    asked = {split: dict(zip(job["tasks"], values, strict=True)) for split in ("validation", "test")}
    result = {"accuracy": asked, "validation": 0.5, "test": 0.5, "text": text, "bit_equal": False}
    return {**result, "untouched": untouched, "seconds": {"train": 1.0}}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """`run_all` without processes: "lora" fails on the second task."""
    seen = []

    def measure(job):
        seen.append(job)
        if job["method"] == "lora" and len(job["tasks"]) == 2:
            return {"error": "exit code 1\nValueError: boom"}
        counts = {name: {"read": 9, "untouched": 8, "bit_equal": 8} for name in job["tasks"][:-1]}
        done = measured(job, [0.9 - 0.1 * n for n in range(len(job["tasks"]))], counts or None)
        return {"error": None, **done}

    monkeypatch.setattr(forgetting, "in_own_process", measure)
    monkeypatch.setattr(continual, "prepare", lambda args: None)
    return seen


def run_main(monkeypatch, path, *more):
    arguments = ["continual.py", "--output", str(path), "--tasks", "library", "types", "calendar", *more]
    monkeypatch.setattr(sys, "argv", arguments)
    continual.main()


def test_steps_run_in_order_once_and_none_follows_one_that_failed(monkeypatch, tmp_path, fake, capsys):
    path = tmp_path / "runs.jsonl"
    run_main(monkeypatch, path, "--methods", "gate", "lora")
    ran = [(job["method"], len(job["tasks"])) for job in fake]
    assert [step for method, step in ran if method == "gate"] == [1, 2, 3]
    assert [step for method, step in ran if method == "lora"] == [1, 2]  # the third has nothing to begin with
    printed = capsys.readouterr().out
    assert "| gate | calendar | 90.0% / 90.0% | 80.0% / 80.0% | 70.0% / 70.0% | +10.00% | library 8 of 8" in printed
    assert "boom" in printed and path.with_suffix(".png").stat().st_size > 10_000
    run_main(monkeypatch, path, "--methods", "gate", "lora")
    assert len(fake) == 5
    assert all(json.loads(text)["command"].startswith("continual.py") for text in path.read_text().splitlines())


def test_a_steps_key_changes_with_every_task_before_it_and_with_what_is_tried():
    jobs = [
        continual.describe(names, "gate", 0, steps, limit)
        for names, steps, limit in (
            (["types"], None, None),
            (["library", "types"], None, None),
            (["calendar", "types"], None, None),
            (["library", "types"], 5, None),
            (["library", "types"], None, 8),
        )
    ]
    assert len({runs.key(job) for job in jobs}) == len({job["settings"] for job in jobs}) == 5
    assert continual.before(jobs[3]) == continual.describe(["library"], "gate", 0, 5, None)
    with pytest.raises(SystemExit):
        continual.parse(["--tasks", "types", "types"])
    assert continual.parse(["--steps", "5"]).output.name == "continual-tried.jsonl"


@pytest.fixture
def small_data(monkeypatch, tmp_path):
    """A little of the data of two tasks; a gate that trains for a moment."""
    text = {"domain": "windows/code", "text": "def f(x):\n    return x"}
    parts = {"numbers": tasks.number_records(200), "calendar": tasks.calendar_records(200)}
    for name, part in {**parts, "retention": [text] * 40, "documents": [text] * 4}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    monkeypatch.setattr(tasks, "data_folder", lambda: tmp_path)
    monkeypatch.setattr(continual, "CACHE", tmp_path)
    monkeypatch.setattr(continual, "ROOT", tmp_path)
    brief = methods.changed(methods.METHODS["gate"], {"trainer": {"gate_steps": 30}})
    monkeypatch.setitem(methods.METHODS, "gate", brief)


def test_replay_takes_the_bases_text_and_every_earlier_task_in_turn(small_data):
    earlier = [tasks.TASKS[name] for name in NAMES]
    processing = training.load_processing(earlier[0])
    samples = training.replayed(processing, 9, 0, earlier)
    texts = [processing.decode(sample["input_ids"]) for sample in samples]
    assert ["def f" in text for text in texts] == [True, False, False] * 3
    assert ["FREQ=" in text for text in texts] == [False, False, True] * 3
    assert samples[0]["labels"] == samples[0]["input_ids"] and samples[2]["labels"][0] == -100
    assert training.replayed(processing, 4, 0) == training.tokenize_texts(processing, 4, 0)
    shown = training.rendered(processing, earlier, 0, number=3)
    assert len(shown) == 6 and all(text.startswith("<|user|>") and text.endswith("<|end|>") for text in shown)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gate", "full_replay", "lora"])
def test_two_steps_in_a_row_leave_what_the_first_one_learned(method, small_data):
    jobs = [continual.describe(NAMES[:number], method, 0, 2, 4) for number in (1, 2)]
    with pytest.raises(ValueError, match=r"which the step 'numbers' of .* left, is gone"):
        continual.step(jobs[1])
    found = [continual.step(job) for job in jobs]
    assert set(found[1]["accuracy"]["test"]) == set(NAMES) and found[0]["trainable"] == found[1]["trainable"] > 0
    third = continual.load_steps(continual.describe([*NAMES, "library"], method, 0, 2, 4)).eval()
    second = continual.load_steps(jobs[1]).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        logits = {name: model(ids).logits for name, model in (("two", third), ("one", second))}
        logits["base"] = training.load_base()(ids).logits
    if method == "gate":
        assert third.active_adapters() == sorted(NAMES) and third.adapters["calendar"].config.trained_on
        counts = found[1]["untouched"]["numbers"]
        assert counts["bit_equal"] == counts["untouched"] <= counts["read"] == 4
        second = second.adapter_tensors("numbers")
        assert all(torch.equal(tensor, second[key]) for key, tensor in third.adapter_tensors("numbers").items())
    else:
        assert not torch.equal(logits["two"], logits["one"]) and not torch.equal(logits["one"], logits["base"])
    if method == "lora":  # the first LoRA is as it was, below the second
        first = {key: tensor for key, tensor in second.state_dict().items() if ".numbers." in key}
        now = third.state_dict()
        assert first and all(torch.equal(tensor, now[key]) for key, tensor in first.items())
        assert any(".calendar." in key for key in now)
