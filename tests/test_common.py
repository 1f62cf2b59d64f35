"""transformers' own common tests with our classes: what a plain base passes, it passes with new experts too.

`ModelTesterMixin` and `ProcessorTesterMixin` come from transformers' source distribution in the installed version,
which pip downloads once into pytest's cache; or from the checkout that `TRANSFORMERS_SOURCE` names, which alone has
`GenerationTesterMixin` as well. common_suite.py points them at our classes. Where an extended model answers otherwise,
`OTHERWISE` says why; an entry that is no longer needed fails.
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import transformers

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
VERSION = transformers.__version__
OUTCOMES = ("passed", "skipped", "failed")

FIXED = "the embedding and head of the base are never changed: refused"
FILE = "an adapter's file has other names than a checkpoint, holds new tensors only, and must lack none of them"
VIEW = "get_text_config() is a copy that trainers write to: what is set on one does not reach the other"
FROZEN = "the base is frozen: nothing below the new experts has a gradient"
OWN_SOURCE = "looks for experts in the source of the model's own class; ours run in the base's"
ENCODER = "the encoder keeps its own attention implementation"
OTHERWISE = {  # test, without its parameters -> (the classes of common_suite.py that it is about, why)
    "test_resize_tokens_embeddings": ("Text|Image", FIXED),
    "test_resize_embeddings_untied": ("Text|Image", FIXED),
    "test_resize_embeddings_untied_no_reinit_on_post_init": ("Text|Image", FIXED),
    "test_model_get_set_embeddings": ("Text|Image", FIXED),
    "test_correct_missing_keys": ("Text|Image", FILE),
    "test_load_save_without_tied_weights": ("Text|Image", FILE),
    "test_model_weights_reload_no_missing_tied_weights": ("Text|Image", FILE),
    "test_reverse_loading_mapping": ("Text|Image", FILE),
    "test_model_rope_scaling_from_config": ("Text|Image", VIEW),
    "test_tied_weights_keys": ("Text|Image", VIEW),
    "test_tp_plan_matches_params": ("QwenText|QwenImage", VIEW),
    "test_retain_grad_hidden_states_attentions": ("Text", FROZEN),  # a projector that trains is below all layers
    "test_enable_input_require_grads_with_gradient_checkpointing": ("Text|Image", FROZEN),
    "test_moe_models_record_router_logits": ("Text|Image", OWN_SOURCE),
    "test_sliding_window_mask": ("QwenText|QwenImage", "looks for the base's settings on the adapter's config"),
    "test_can_init_all_missing_weights": ("Text|Image", "what is missing never starts at random: refused"),
    "test_init_weights_can_init_buffers": ("Text|Image", "buffers never start anew, they are the base's"),
    "test_training_gradient_checkpointing_use_reentrant_true": ("Text|Image", "refused: can't restore a pass's plan"),
    "test_inputs_embeds": ("Image", "embeds an image token, whose id lies past the embedding"),
    "test_inputs_embeds_matches_input_ids": ("Image", "embeds an image token, whose id lies past the embedding"),
    "test_from_pretrained_no_checkpoint": ("Text|Image", "a model without an adapter's file: refused"),
    "test_save_load": ("Text|Image", "looks for generation_config.json: what has changed of it is in the config"),
    "test_config_attn_implementation_setter": ("Text|Image", VIEW),
    "test_can_set_attention_dynamically": ("Image", ENCODER),
    "test_sdpa_can_dispatch_non_composite_models": ("Image", ENCODER),
    "test_if_input_has_mismatching_tokens_and_mm_data": ("Processor", "refused, in other words"),
    "test_flat_kwarg_applied_when_modality_dict_lacks_it": ("Processor", "hands audio to one of images: refused"),
    "test_model_input_names": ("Processor", "the same"),
    "test_tokenizer_decode_defaults": ("Processor", "makes a processor without num_image_tokens: refused"),
    "test_processor_from_and_save_pretrained": ("Processor", "saving leaves auto_map on a processor with own code"),
    "test_processor_from_and_save_pretrained_as_nested_dict": ("Processor", "the same"),
}
# Runs on memory that nobody has filled: image positions come from the encoder's checkpoint.
BY_CHANCE = {"test_all_tensors_are_parameter_or_buffer": "Image"}


def download(folder):
    """transformers' source distribution in the installed version, its tests unpacked to `folder`; skips without it."""
    options = [
        "--retries",
        "1",
        "--no-deps",
        "--no-build-isolation",
        "--no-binary",
        ":all:",
        f"transformers=={VERSION}",
    ]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), *options]
    pip = subprocess.run(command, capture_output=True, text=True, timeout=900)
    archives = list(folder.glob("transformers-*.tar.gz"))
    if pip.returncode or not archives:
        pytest.skip(f"pip can't download the source of transformers {VERSION}: {pip.stderr.strip()[-300:]}")
    with tarfile.open(archives[0]) as archive:
        members = [
            member for member in archive if re.match(r"[^/]+/(tests/|src/transformers/__init__\.py)", member.name)
        ]
        archive.extractall(folder, members, filter="data")
    return folder / archives[0].name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def source(request):
    """The folder of transformers' source, in the installed version."""
    if importlib.util.find_spec("parameterized") is None:
        pytest.skip("transformers' tests need the package parameterized: pip install parameterized")
    folder = request.config.cache.mkdir(f"transformers-{VERSION}")
    folder = Path(os.environ.get("TRANSFORMERS_SOURCE") or folder / f"transformers-{VERSION}")
    if not (folder / "tests/test_modeling_common.py").exists():
        assert "TRANSFORMERS_SOURCE" not in os.environ, f"{folder} has no tests/test_modeling_common.py"
        folder = download(folder.parent)
    found = re.search(r'__version__ = "(.+)"', (folder / "src/transformers/__init__.py").read_text())[1]
    assert found == VERSION, f"{folder} has the tests of transformers {found}; installed is {VERSION}"
    return folder


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    """`run(name)` -> test -> outcome, of a class of common_suite.py, in a process of its own."""

    @functools.cache
    def outcomes(name):
        folder = tmp_path_factory.mktemp(name)
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts="]  # its markers are not among ours
        options += [f"{Path(__file__).parent / 'common_suite.py'}::{name}", f"--junitxml={folder / 'report.xml'}"]
        env = {**os.environ, "TRANSFORMERS_TESTS": str(source / "tests"), "TMPDIR": str(folder)}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
        print(done.stdout)
        found = {}
        for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
            tags = {child.tag for child in case}
            outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
            found[case.get("name")] = max(found.get(case.get("name"), "passed"), outcome, key=OUTCOMES.index)
        return found

    return outcomes


def check(name, found, expected):
    """What is "passed" in `expected` has to be so in `found`, nothing may fail there, but for `OTHERWISE`."""
    wrong = {test for test, outcome in found.items() if outcome == "failed"}
    wrong |= {test for test, outcome in expected.items() if outcome == "passed" and found[test] != "passed"}
    concerned = {test for test, (classes, _) in OTHERWISE.items() if re.search(classes, name)}
    chance = {test for test, classes in BY_CHANCE.items() if re.search(classes, name)}

    def entry(test, entries):  # parameters stand behind a test's name: _0, _1_dynamic
        return next((known for known in entries if re.fullmatch(rf"{known}(_\d+(_\w+)?)?", test)), None)

    surprising = sorted(test for test in wrong if not entry(test, concerned | chance))
    assert not surprising, f"{name}: {surprising} should pass, or OTHERWISE has to say why not"
    needless = concerned - {entry(test, concerned) for test in wrong}
    assert not needless, f"{name}: OTHERWISE needs {sorted(needless)} no longer"


@pytest.mark.parametrize("kind", ["Text", "Image"])
@pytest.mark.parametrize("base", ["Mixtral", "Qwen"])
def test_an_extended_base_passes_what_a_plain_one_passes(run, base, kind):
    plain, extended = run(f"{base}Plain"), run(f"{base}{kind}")
    assert "failed" not in plain.values() and list(plain.values()).count("passed") > 100
    check(f"{base}{kind}", extended, plain)


def test_the_processor_passes_the_tests_of_processors(run):
    found = run("Processor")
    assert list(found.values()).count("passed") > 25
    check("Processor", found, {})
