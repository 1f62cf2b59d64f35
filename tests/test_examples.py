"""The example scripts, run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
