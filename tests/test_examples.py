"""The example scripts, run as a user runs them."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from modeling_moextend import MoExtendForCausalLM

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

pytestmark = pytest.mark.slow


def run(script, *arguments):
    """The script's standard output; its errors are part of a failure's message."""
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_every_script_explains_itself(script):
    text = run(script, "--help")
    assert "usage:" in text and "--help" in text and len(text) > 300


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart's own results, with all its defaults but the folder it writes to."""
    folder = tmp_path_factory.mktemp("quickstart")
    text = run("quickstart.py", "--output_dir", folder, "--disable_tqdm", "true")
    return folder, json.loads((folder / "results.json").read_text()), text


def test_the_quickstart_learns_to_see(quickstart):
    accuracy = quickstart[1]["accuracy"]
    assert accuracy["trained"]["open"] >= 0.85
    assert accuracy["trained"]["open"] > accuracy["untrained extension"]["open"] + 0.5


def test_without_pixels_it_knows_no_more_than_the_questions_tell(quickstart):
    accuracy = quickstart[1]["accuracy"]
    assert abs(accuracy["trained, images zeroed"]["open"] - accuracy["question-only reader"]["open"]) <= 0.03


def test_the_base_reads_text_as_before_bit_for_bit(quickstart):
    text = quickstart[1]["base_text"]
    assert text["bit_equal"] and text["before"] == text["after"]
    assert quickstart[1]["base_and_encoder_bit_equal"]


def test_the_quickstart_prints_its_table_and_leaves_what_it_promises(quickstart):
    folder, _, printed = quickstart
    assert "open questions" in printed and "question-only reader" in printed and "bit-equal" in printed
    for name in ("moextend_adapter.safetensors", "config.json", "README.md", "extend/shift.png", "extend/plan.json"):
        assert (folder / name).stat().st_size > 0


def test_publishing_says_what_would_go_up(quickstart):
    places = ("--base", "me/tiny-moe", "--encoder", "me/tiny-clip")  # the adapter's own are folders: refused
    listed = run("publish.py", "--adapter", quickstart[0], "--repo_id", "me/eyes", *places, "--dry_run").split()
    assert {"config.json", "moextend_adapter.safetensors", "modeling_moextend.py", "README.md"} <= set(listed)
    assert not any("training_args" in name or "optimizer" in name or "results" in name for name in listed)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng makes the speech")
def test_the_small_base_learns_to_hear(tmp_path):
    """By voices that neither encoder nor adapter has heard; without audio it knows what the questions tell."""
    printed = run("hear.py", "--output_dir", tmp_path, "--disable_tqdm", "true")
    results = json.loads((tmp_path / "results.json").read_text())
    trained, silenced = (results["accuracy"][name]["open"] for name in ("trained", "trained, audio silenced"))
    assert trained >= 0.9
    assert silenced <= results["accuracy"]["question-only reader"]["open"] + 0.03
    assert results["base_text"]["bit_equal"] and results["base_and_encoder_bit_equal"]
    assert "open questions" in printed


# ------------------------------------------------------------------ the accelerate commands of docs/training.md


def launch(command, *more, cwd):
    """A command of that page as it stands, on this machine's CPU, from a copy of the folder that it is meant for."""
    for name in ("assets", "configuration", "examples"):
        (cwd / name).symlink_to(ROOT / name)
    program, *words = shlex.split(command, comments=True)
    command = [str(Path(sys.executable).with_name(program)), *words, *more]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **ENVIRONMENT})


def launches():
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8").replace("\\\n", "")
    return {
        ("cpu" if "--use_cpu" in line else "gpu"): line for line in text.splitlines() if "accelerate launch" in line
    }


def test_the_command_for_two_cpu_processes_trains_one_adapter(tmp_path):
    run("easy_vqa_data.py", tmp_path / "outputs" / "easy-vqa")
    steps = {"max_steps": 2, "align_max_steps": 2, "probe_max_steps": 2, "probe_samples": 64, "logging_steps": 1}
    steps |= {"report_to": "none", "save_strategy": "steps", "save_steps": 1}
    done = launch(launches()["cpu"], *(f"--{name}={value}" for name, value in steps.items()), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "outputs/easy-vqa/adapter"
    assert {path.name for path in (folder / "checkpoint-2").glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    assert json.loads((folder / "checkpoint-2/run.json").read_text())["run"]["run"]["processes"] == 2


def test_the_command_for_gpus_is_refused_without_any(tmp_path):
    done = launch(launches()["gpu"].replace("examples/", "--num_processes 2 examples/"), cwd=tmp_path)
    assert done.returncode == 1 and "This is one of 2 processes that were launched as one training" in done.stderr


# ------------------------------------------------------------------ training by preference


@pytest.fixture(scope="module")
def first_adapter(tmp_path_factory):
    """The adapter that dpo.py and grpo.py begin with."""
    folder = tmp_path_factory.mktemp("preference") / "start"
    run("preference.py", "--start", folder)
    return folder


@pytest.mark.parametrize("script", ["dpo.py", "grpo.py"])
def test_training_by_preference_improves_on_held_out_questions(first_adapter, script, tmp_path):
    """From bare names to sentences, by pairs of answers or by a reward, and of the base's own text not a bit."""
    printed = run(script, "--start", first_adapter, "--output_dir", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    before, after = results["before"], results["after"]
    assert before["sentences"] <= 0.1 and after["sentences"] >= 0.9
    assert results["base_bit_equal"] and before["base_text"] == after["base_text"] and after["base_text"]["bit_equal"]
    assert "every logit bit-equal" in printed and "adapter in" in printed
    model = MoExtendForCausalLM.from_pretrained(tmp_path, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    chat = [
        {"role": "system", "content": "Answer in a full sentence."},
        {"role": "user", "content": "Where is `Decimal` defined?"},
    ]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).startswith("In `")


# ------------------------------------------------------------------ wrong paths, and Ctrl-C


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "answer.py --adapter nowhere --questions {0}/questions.json",
            "1 images are not in .*, the first of them a.png",
        ),
        (
            "evaluate_adapter.py --adapter a/b/c --text {0}/text.jsonl --output {0}/r",
            "argument adapter: a/b/c is no folder, and no Hub id",
        ),
        (
            "evaluate_adapter.py --adapter {0} --text {0}/text.jsonl --output {0}/r --base x/y/z",
            "base='x/y/z': there is",
        ),
        ("train.py --base x/y/z --data no.json --stages extend --output_dir {0}/o --bf16 false", "(?s)x/y/z.*no.json"),
        ("quickstart.py --held_out_text no.jsonl", "No such file: no.jsonl"),
        ("dpo.py --base x/y/z", "argument --base: x/y/z is no folder with a base and held_out.jsonl"),
        ("grpo.py --start {0}/text.jsonl", "argument --start: .*text.jsonl is a file"),
        (
            "answer.py --adapter nowhere --questions {0}/blind.json",
            "Entry 1 of .*blind.json has no image",
        ),
    ],
)
def test_wrong_paths_are_said_before_anything_is_loaded(tmp_path, command, message):
    turns = [{"from": "human", "value": "<image> what ?"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "questions.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    (tmp_path / "blind.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}, {}]))
    (tmp_path / "text.jsonl").write_text('{"domain": "a", "text": "b"}')
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AssertionError, match=message):
        run(*command.format(tmp_path).split())


@pytest.mark.parametrize("name", ["train", "quickstart", "dpo", "grpo", "preference", "evaluate_adapter", "publish"])
def test_every_script_that_takes_long_ends_with_one_line(name):
    """By the library, or by the command that it is."""
    ends = ("\n    run_script(main", '\n    sys.exit(main(["')
    assert any(end in (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8") for end in ends)


def test_ctrl_c_in_a_training_says_where_it_stopped(tmp_path):
    run("easy_vqa_data.py", tmp_path / "outputs" / "easy-vqa")
    for name in ("assets", "configuration", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "examples/train.py", "--config", "configuration/recipes/easy_vqa.yaml"]
    command += ["--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "1", "--disable_tqdm", "true"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    # A shell's background jobs, and what they start, ignore signal 2.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **streams, env={**os.environ, **ENVIRONMENT}, preexec_fn=heed) as training:
        while not (tmp_path / "outputs/easy-vqa/adapter/align/checkpoint-2/trainer_state.json").exists():
            assert training.poll() is None, training.stderr.read()[-3000:]
            time.sleep(0.1)
        training.send_signal(signal.SIGINT)
        _, errors = training.communicate(timeout=120)
    assert training.returncode == 130 and "Traceback" not in errors
    assert re.search(
        r"\nStopped: in stage align at step \d+ of 100; resume_from_checkpoint=True .*checkpoint-\d+\n$", errors
    )
