"""A published adapter loads from the Hub in processes that know only transformers, as any model does.

Adapter, base and code all come from the Hub of `hub_server.py`, each process begins with empty caches.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import make_base, shake
from hub_server import running_hub
from test_processing_moextend import build_processor

from modeling_moextend import MoExtendForCausalLM

REPO, BASE = "me/my-adapter", "org/base"
PLAN = {1: [0], 3: [2, 5]}

START = """
import json, os, sys
from pathlib import Path
sys.modules["modeling_moextend"] = None  # installed or not, importing the package fails here
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
repo, trust = "me/my-adapter", {"trust_remote_code": True}
commits, url = json.loads(sys.argv[1]), os.environ["HF_ENDPOINT"]

def logits(*names, **options):
    model = AutoModelForCausalLM.from_pretrained(*names or (repo,), **trust, **options)
    return model(input_ids=torch.arange(3, 13)[None]).logits.tolist()

def refused(*names, **options):
    try:
        logits(*names, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("loaded")

def cached(folder):
    return sorted({path.parts[-4] for path in Path(folder).glob("models--*/snapshots/*/*")})

found = {}
"""
END = "\nprint('FOUND' + json.dumps(found))\n"


def run(hub, home, script, **environment):
    """What a fresh process finds with the caches in `home`; the package can't be imported there."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    home.mkdir(exist_ok=True)
    commits = {name: dict(repo.refs) for name, repo in hub.repos.items()}
    command = [sys.executable, "-P", "-c", START + script + END, json.dumps(commits)]
    child = subprocess.run(
        command,
        env=inherited | hub.environment(home) | environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.split("FOUND")[1])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The Hub with a base, and an adapter in three states: "first" (an older branch), main, "sub" (in a subfolder);
    both repositories are private. With it: what they answer."""
    root = tmp_path_factory.mktemp("published")
    make_base().save_pretrained(root / "base")
    with running_hub() as hub:
        made_on = hub.add(BASE, root / "base", private=True)
        expected = {}
        for revision, seed in (("first", 1), ("main", 2)):
            model = shake(MoExtendForCausalLM.from_base(str(root / "base"), PLAN, paper=True), seed=seed).eval()
            model.config.base_model_name_or_path, model.config.base_model_revision = BASE, made_on
            model.save_pretrained(root / revision)
            build_processor().save_pretrained(root / revision)
            hub.add(REPO, root / revision, private=True, revision=revision)
            with torch.no_grad():
                expected[revision] = model(input_ids=torch.arange(3, 13)[None]).logits.tolist()
        (root / "sub").mkdir()
        (root / "main").rename(root / "sub" / "v2")  # adapter and config, as in a repository of several
        for code in (root / "sub" / "v2").glob("*.py"):
            code.rename(root / "sub" / code.name)  # transformers looks for code at the top, whatever the subfolder
        hub.add(REPO, root / "sub", revision="sub")
        hub.commit(hub.repos[BASE], "main", "something else", {"config.json": b"{}"})  # the adapter's own is recorded
        yield hub, expected


@pytest.mark.slow
def test_revisions_tokens_and_caches_are_as_for_any_model(published, tmp_path):
    hub, expected = published
    script = """
found["no token"] = refused()
found["wrong token"] = refused(token="hf_stranger")
found["cached without token"] = cached(Path(os.environ["HF_HOME"], "hub"))
token = {"token": "hf_me"}
found["not cached yet"] = refused(local_files_only=True, **token)
found["elsewhere"] = logits(cache_dir="elsewhere", revision="first", **token)
found["cached elsewhere"], found["cached"] = cached("elsewhere"), cached(Path(os.environ["HF_HOME"], "hub"))
found["main"] = logits(**token)
found["commit"] = logits(revision=commits[repo]["first"], **token)
found["unknown"] = refused(revision="gone", **token)
found["from cache"] = logits(local_files_only=True)
found["from the other cache"] = logits(local_files_only=True, cache_dir="elsewhere", revision="first")
found["text"] = AutoTokenizer.from_pretrained(repo, **trust, **token)("what?").input_ids
found["processor"] = type(AutoProcessor.from_pretrained(repo, **trust, **token)).__name__
config = AutoConfig.from_pretrained(repo, **trust, **token)
found["config"] = [config.model_type, config.base_model_name_or_path, config.base_model_revision]
"""
    found = run(hub, tmp_path / "home", script)
    for name in ("no token", "wrong token"):
        assert found[name].startswith("OSError") and REPO in found[name] and "token" in found[name]
    assert found["cached without token"] == []
    assert found["not cached yet"].startswith("OSError")
    assert found["elsewhere"] == found["commit"] == found["from the other cache"] == expected["first"]
    assert found["main"] == found["from cache"] == expected["main"]
    assert expected["first"] != expected["main"]
    assert found["cached elsewhere"] == ["models--me--my-adapter", "models--org--base"]
    assert found["cached"] == [], "neither adapter, code nor base went to the default cache"
    assert found["unknown"].startswith("OSError") and "gone" in found["unknown"]
    assert found["text"] == build_processor().tokenizer("what?").input_ids
    assert found["processor"] == "MoExtendProcessor"
    made_on = hub.repos[BASE].history[0][1]
    assert found["config"] == ["moextend", BASE, made_on]


@pytest.mark.slow
def test_what_remote_code_loaded_goes_back_to_the_hub(published, tmp_path):
    """push_to_hub is the package's; without it, what save_pretrained writes is uploaded by huggingface_hub."""
    hub, expected = published
    script = """
model = AutoModelForCausalLM.from_pretrained(repo, **trust)
try:
    model.push_to_hub("me/again", card={"license": "mit"})
except ImportError as error:
    found["refused"] = str(error)
model.save_pretrained("saved")
from huggingface_hub import HfApi
HfApi().create_repo("me/again", private=True)
HfApi().upload_folder(repo_id="me/again", folder_path="saved")
found["again"] = logits("me/again")
"""
    found = run(hub, tmp_path / "home", script, HF_TOKEN="hf_me")
    assert "pip install 'moextend[train]'" in found["refused"], (
        "what may be published, and its card, the package knows"
    )
    assert found["again"] == expected["main"]
    code = {name for name in hub.files(REPO) if name.endswith(".py")} - {"processing_moextend.py"}
    assert set(hub.files("me/again")) == code | {".gitattributes", "config.json", "moextend_adapter.safetensors"}
    assert hub.repos["me/again"].private


@pytest.mark.slow
def test_code_revision_and_subfolder(published, tmp_path):
    hub, expected = published
    marked = b"print('code of another revision')\n" + hub.files(REPO)["modeling_moextend.py"]
    hub.commit(hub.repos[REPO], "audited", "", {**hub.files(REPO, "first"), "modeling_moextend.py": marked})
    script = """
import contextlib, io
found["sub"] = logits(subfolder="v2", revision="sub")
found["nowhere"] = refused(subfolder="v3", revision="sub")
with contextlib.redirect_stdout(io.StringIO()) as said:
    found["plain"], found["said by it"] = logits(), said.getvalue()
with contextlib.redirect_stdout(io.StringIO()) as said:
    found["audited"], found["said by the other"] = logits(code_revision="audited"), said.getvalue()
"""
    found = run(hub, tmp_path / "home", script, HF_TOKEN="hf_me")
    assert found["sub"] == expected["main"]
    assert REPO in found["nowhere"], "transformers' own error: there is no config"
    assert found["plain"] == expected["main"] and found["said by it"] == ""
    assert found["audited"] == expected["main"], "the tensors are main's"
    assert "code of another revision" in found["said by the other"]


@pytest.mark.slow
def test_a_warm_cache_needs_no_hub(published, tmp_path):
    hub, expected = published
    script = """
found["main"] = logits()
"""
    offline = """
import urllib.request
found["main"] = logits()
found["text"] = AutoTokenizer.from_pretrained(repo, **trust)("what?").input_ids
found["new"] = refused(revision="sub")
"""
    warm = tmp_path / "warm"
    warming = script + "AutoTokenizer.from_pretrained(repo, **trust)\n"
    assert run(hub, warm, warming, HF_TOKEN="hf_me")["main"] == expected["main"]
    before = len(hub.requests)
    found = run(hub, warm, offline, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == before, "offline asks nobody"
    assert found["main"] == expected["main"] and found["text"] == build_processor().tokenizer("what?").input_ids
    assert found["new"].startswith("OSError")
    # no server at all: an address where nobody answers
    with running_hub() as gone:
        pass
    assert run(gone, warm, script)["main"] == expected["main"]
