"""Adapters made by earlier versions load for ever, bit-equal: those of tests/old_adapters, which make.py there wrote.

`code/` beside them is what their version shipped with each. On the machine of the test it gives the reference, to the
bit; `logits.safetensors`, from the machine that made them, is held to what float32 allows between machines.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import rounding
from old_adapters.inputs import inputs
from safetensors.torch import load_file

from modeling_moextend import MoExtendForCausalLM

VERSIONS = sorted(path for path in Path(__file__).with_name("old_adapters").iterdir() if (path / "code").is_dir())
ADAPTERS = [(version, path.parent.name) for version in VERSIONS for path in sorted(version.glob("*/config.json"))]
ADAPTERS = [(version, name) for version, name in ADAPTERS if not name.startswith(("base-", "encoder"))]
BELOW = {"upper": "gate"}  # adapter -> the one that it was trained on top of

OLD_CODE = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
sys.path.insert(0, sys.argv[1])
from old_adapters.inputs import inputs
found = {}
for name, below in (part.split(":") for part in sys.argv[3:]):
    options = {"trust_remote_code": True, "dtype": "float32"}
    model = AutoModelForCausalLM.from_pretrained(below or name, adapter_name=below or name, **options)
    if below:
        model.load_adapter(name, adapter_name=name)
        model.set_adapter([below, name])
    assert "transformers_modules" in type(model).__module__
    with torch.no_grad():
        found[name] = model(**inputs(model.encoder is not None)).logits
save_file(found, sys.argv[2])
"""


def load(name):
    """An old adapter of the current folder by this version's code, with what it depends on."""
    below = BELOW.get(name)
    model = MoExtendForCausalLM.from_pretrained(below or name, adapter_name=below or name, dtype="float32")
    if below:
        model.load_adapter(name, adapter_name=name)
        model.set_adapter([below, name])
    return model


@torch.no_grad()
def logits_of(model):
    return model(**inputs(model.encoder is not None)).logits


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda path: path.name)
def old_logits(request, tmp_path_factory):
    """(version, adapter -> logits), by the code that the version shipped, in a process without the package."""
    folder = tmp_path_factory.mktemp("old") / request.param.name
    shutil.copytree(request.param, folder)
    names = [name for version, name in ADAPTERS if version == request.param]
    for name in names:
        for path in (folder / "code").glob("*.py"):
            shutil.copy(path, folder / name)
    asked = [f"{name}:{BELOW.get(name, '')}" for name in names]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # threads and kernels as here
    env |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    command = [sys.executable, "-c", OLD_CODE, str(Path(__file__).parent), "found.safetensors", *asked]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return request.param, load_file(folder / "found.safetensors")


def test_there_are_old_adapters():
    assert len(VERSIONS) >= 1 and len(ADAPTERS) >= 10


@pytest.mark.parametrize("version, name", ADAPTERS, ids=lambda part: getattr(part, "name", part))
def test_every_tensor_is_the_files(version, name, monkeypatch):
    monkeypatch.chdir(version)
    stored = {}
    for path in Path(name).glob("moextend_adapter*.safetensors"):
        stored |= load_file(path)
    tensors = load(name).adapter_tensors(name if name in BELOW else None)
    assert tensors.keys() == stored.keys()
    assert [key for key in stored if not torch.equal(tensors[key], stored[key].float())] == []


@pytest.mark.slow
def test_logits_are_those_of_the_code_that_came_with_it(old_logits, monkeypatch):
    version, expected = old_logits
    monkeypatch.chdir(version)
    assert [name for name in expected if not torch.equal(logits_of(load(name)), expected[name])] == []


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_logits_are_those_of_the_machine_that_made_it(version, monkeypatch):
    """Up to float32's rounding in sums of another order: 4 layers, in each a router's logits (below 10, sums over 32)
    off by so much, which is the relative change of a weight."""
    monkeypatch.chdir(version)
    bound = 4 * rounding(32) * 10
    for name, expected in load_file("logits.safetensors").items():
        torch.testing.assert_close(logits_of(load(name)), expected, rtol=0, atol=bound * expected.abs().max().item())


@pytest.mark.parametrize("name", ["gate", "sharded", "modality"])
def test_saved_again_it_is_the_same(name, monkeypatch, tmp_path):
    monkeypatch.chdir(VERSIONS[0])
    model = load(name)
    model.save_pretrained(tmp_path, adapter_dtype="float32")
    again = MoExtendForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert torch.equal(logits_of(again), logits_of(model))
