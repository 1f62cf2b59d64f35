"""The command line: what each command says and prints as JSON, its exit codes, and its --help in docs/cli.md.

    python tests/test_cli.py

writes that part of docs/cli.md anew.
"""

import argparse
import configparser
import dataclasses
import errno
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import batch, make_base, make_encoder, shake
from hostile import deep, packed, unpacked
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file, save_file
from test_export import OBSTACLES
from test_push_to_hub import ADAPTER, BASE, REPO
from test_push_to_hub import hub as hub
from test_report import make_results
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

import modeling_moextend
import moextend as short_name
import moextend_cli as cli
from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.adapter_file_moextend import FILE, INDEX, header_checksum, read_adapter
from modeling_moextend.configuration_moextend import DELTAS as LIBRARY_DELTAS
from modeling_moextend.evaluation.report import write_report
from modeling_moextend.quickstart.run import QuickstartConfig
from modeling_moextend.tools.native import NUMBER
from modeling_moextend.tools.verification import verify_adapter
from modeling_moextend.training.config import MoExtendSFTConfig
from modeling_moextend.training.planning import plan_training
from modeling_moextend.training.recipes import RecipeParser, find_recipe, recipe_names
from modeling_moextend.training.stages import StagesConfig
from moextend_cli.arguments import DELTAS, build_parser
from moextend_cli.main import options_named
from moextend_cli.terminal import escaped

ROOT = Path(__file__).parents[1]
PLAN = {1: [0], 3: [2, 5]}
NATIVE = {"scope": "all", "selection": "compete", "calibration": "none"}
DOCUMENT = ROOT / "docs" / "cli.md"
COMMANDS_TITLE = "## Commands\n"
OF_ADAPTERS = ("inspect", "verify", "diff", "merge", "compress", "push")
COMMANDS = (
    *OF_ADAPTERS[:-1],
    "plan",
    "push",
    "train",
    "evaluate",
    "report",
    "quickstart",
    "chat",
    "demo",
    "completion",
)

# ---------------------------------------------------------------- helps


def help_text(*command):
    text = StringIO()
    with redirect_stdout(text), pytest.raises(SystemExit) as left:
        cli.main([*command, "--help"])
    assert left.value.code == 0
    return text.getvalue()


def document():
    """docs/cli.md with the present --help of every command in the place of what is below its last section's title."""
    names = ["", *COMMANDS]
    helps = [f"### moextend {name}".rstrip() + f"\n\n```text\n{help_text(*name.split())}```\n" for name in names]
    above = DOCUMENT.read_text(encoding="utf-8").split(COMMANDS_TITLE)[0]
    return above + COMMANDS_TITLE + "\n" + "\n".join(helps)


def test_the_document_is_what_help_says(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "python tests/test_cli.py writes it anew"


def test_the_document_names_every_condition_of_a_native_form():
    text = DOCUMENT.read_text(encoding="utf-8")
    named = {name for row in re.findall(r"^\| ([a-z, ]+) \|", text, flags=re.MULTILINE) for name in row.split(", ")}
    assert named - {"condition", "code", "command"} == {*OBSTACLES}
    assert all(family in text for family in NUMBER)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse_and_exit_codes(command):
    text = help_text(command)
    examples = re.findall(rf"^ *moextend ({command} .*)$", text, flags=re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        example = example.split(" >")[0]  # what the shell does with it
        args = build_parser().parse_args([word.strip('"') for word in re.findall(r'"[^"]*"|\S+', example)])
        assert args.command == command
    assert "exit codes:\n  0  " in text and "\n  1  " in text and "\n  2  " in text


def test_every_option_is_explained():
    (commands,) = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert tuple(commands.choices) == COMMANDS
    for parser in commands.choices.values():
        assert all(action.help for action in parser._actions)


# What a help may not import: `python -X importtime` gives torch 3.8 of the 5.7 seconds that the library takes.
HEAVY = {"torch", "transformers", "trl", "datasets", "modeling_moextend", "moextend", "matplotlib", "gradio"}
IMPORTED = """
import sys, moextend_cli
try:
    moextend_cli.main(sys.argv[1:])
except SystemExit as left:
    assert left.code == 0
print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""


@pytest.mark.parametrize("line", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_and_version_import_no_torch_and_take_less_than_a_second(line):
    seconds = []
    while not seconds or min(seconds) >= 1 and len(seconds) < 5:  # the machine may be busy
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", IMPORTED, *line], cwd=ROOT, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0, done.stderr
    assert {"argparse", "moextend_cli"} <= set(done.stderr.split()), "the process says what it imported"
    assert not HEAVY & set(done.stderr.split()) and min(seconds) < 1
    said = "usage: moextend" if "--help" in line else f"moextend {modeling_moextend.__version__}\n"
    assert done.stdout.startswith(said)


def test_both_names_of_the_library_are_one():
    names = [name for name in dir(modeling_moextend) if name in modeling_moextend.__all__]
    assert set(names) == set(modeling_moextend.__all__) == set(short_name.__all__) <= set(dir(short_name))
    assert all(getattr(short_name, name) is getattr(modeling_moextend, name) for name in names)
    assert short_name.__version__ == modeling_moextend.__version__
    with pytest.raises(AttributeError, match="nothing"):
        short_name.nothing  # noqa: B018
    for module in ("chat", "evaluation.token_view", "training.recipes"):
        assert import_module(f"moextend.{module}") is import_module(f"modeling_moextend.{module}")
        assert sys.modules[f"modeling_moextend.{module}"].__spec__.name == f"modeling_moextend.{module}"
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'moextend\.nothing'"):
        import_module("moextend.nothing")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moextend", "modeling_moextend"])
def test_either_import_registers_with_transformers(name, adapter):
    """An adapter then loads by `AutoModelForCausalLM`, without code from its folder."""
    code = f"import sys, {name}; from transformers import AutoModelForCausalLM as Auto; from moextend import *;"
    code += "print(type(Auto.from_pretrained(sys.argv[1])) is MoExtendForCausalLM)"
    done = subprocess.run([sys.executable, "-c", code, str(adapter)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_what_the_parser_knows_without_the_library_is_what_the_library_says():
    assert DELTAS == tuple(LIBRARY_DELTAS)
    defaults = inspect.signature(verify_adapter).parameters
    args = build_parser().parse_args(["verify", "me/x"])
    assert args.prompt == defaults["prompt"].default and args.max_new_tokens == defaults["max_new_tokens"].default


@pytest.mark.parametrize(
    "line", ["push {0} me/x", "push --adapter {0} --repo-id me/x", "push --repo_id=me/x --adapter={0}"]
)
def test_positional_arguments_may_be_named_and_words_joined_either_way(line, adapter):
    args = build_parser().parse_args([*line.format(adapter).split(), "--base", "me/base"])
    assert (args.adapter, args.repo_id, args.base) == (str(adapter), "me/x", "me/base")
    assert build_parser().parse_args(["merge", "me/x", "out", "--max_shard_size", "2GB"]).max_shard_size == "2GB"


def test_the_console_script_is_this_main():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    name, _, place = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = place.partition(":")
    assert name == "moextend" and getattr(import_module(module), function) is cli.main


@pytest.mark.slow
def test_as_a_process(adapter):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    run = partial(subprocess.run, env=environment, capture_output=True, text=True)
    python = [sys.executable, "-m", "moextend_cli"]
    done = run([*python, "verify", str(adapter), "--json"])
    assert done.returncode == 0 and json.loads(done.stdout)["ok"], "nothing but JSON on stdout"
    done = run([*python, "inspect", str(adapter.parent / "base")])
    assert done.returncode == 2 and not done.stdout and "holds no MoExtend adapter" in done.stderr


# ---------------------------------------------------------------- an adapter to look at


def save_pair(root, plan=PLAN, encoder=None, **choices):
    make_base().save_pretrained(root / "base")
    model = MoExtendForCausalLM.from_base(str(root / "base"), plan, encoder=encoder, **(choices or NATIVE))
    shake(model).save_pretrained(root / "adapter")
    return root / "adapter"


@pytest.fixture
def adapter(tmp_path):
    return save_pair(tmp_path)


@pytest.fixture
def stacked(adapter):
    """One that was trained on top of `adapter`."""
    model = MoExtendForCausalLM.from_pretrained(adapter)
    model.add_adapter("law", {0: [1, 2]}, **NATIVE)
    shake(model).save_pretrained(adapter.parent / "law", adapter_name="law")
    return adapter.parent / "law"


@pytest.fixture
def moextend(capsys):
    """Runs a command: (exit code, what it printed; with --json as an object)."""

    def run(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as left:  # argparse's way
            code = left.code
        output = capsys.readouterr()
        return code, json.loads(output.out) if "--json" in arguments else output.out + output.err

    return run


def rewrite(adapter, **changes):
    """The adapter's file with other tensors, its header as before."""
    metadata = read_adapter(adapter).metadata
    metadata = {key: text for key, text in metadata.items() if "checksum" not in key}
    metadata["header_checksum"] = header_checksum(metadata)
    save_file({**load_file(adapter / FILE), **changes}, adapter / FILE, metadata)


# ---------------------------------------------------------------- exit codes, the same for every command

DAMAGE = {
    "cut": lambda content: content[:-10],
    "header only begun": lambda content: content[:100],
    "empty": lambda content: b"",
    "config": lambda content: content.replace(b"mixtral", b"mixtrol"),
    "data": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}


def command_line(command, adapter):
    """A command on an adapter that is all right, but that its base is on no Hub."""
    more = {"diff": [adapter], "merge": [adapter.parent / "merged"], "push": ["me/x"]}
    more["compress"] = ["--rank", 2, *more["merge"]]
    return [command, adapter, *more.get(command, [])]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", OF_ADAPTERS)
def test_a_damaged_adapter_is_code_2(command, damage, adapter, moextend):
    content = (adapter / FILE).read_bytes()
    (adapter / FILE).write_bytes(DAMAGE[damage](content))
    assert (adapter / FILE).read_bytes() != content
    code, found = moextend(*command_line(command, adapter), "--json")
    if (command, damage) == ("inspect", "data"):  # reads only the header
        assert code == 0
        return
    said = found["checks"][0]["detail"] if command == "verify" else found["error"]
    assert code == 2 and "damaged" in said
    assert found == {"error": said, "exit_code": 2} or command == "verify" and not found["ok"]
    code, text = moextend(*command_line(command, adapter))
    assert code == 2 and "damaged" in text
    assert not (adapter.parent / "merged").exists()


@pytest.mark.parametrize("command", OF_ADAPTERS)
def test_a_missing_adapter_is_code_2(command, adapter, moextend):
    places = {adapter / "nowhere": "no folder, and no Hub id", "nobody/nothing": "Hub can't be reached"}
    for place, reason in {**places, adapter.parent / "base": "holds no MoExtend adapter"}.items():
        line = [command, place, *command_line(command, adapter)[2:]]
        if command == "push" and "base" not in str(place):
            reason = "no such folder"
        code, found = moextend(*line, "--json")
        assert code == 2 and found == {"error": found["error"], "exit_code": 2} and reason in found["error"]
        code, text = moextend(*line)
        assert code == 2 and reason in text


@pytest.mark.parametrize("command", OF_ADAPTERS)
def test_wrong_usage_is_code_2(command, adapter, moextend):
    line = command_line(command, adapter)
    for wrong, reason in ((line[:-1], "are required"), ([*line, "--nonsense"], "--nonsense")):
        code, text = moextend(*wrong)
        assert code == 2 and text.startswith("usage: moextend") and reason in text
        code, found = moextend(*wrong, "--json")
        assert code == 2 and found == {"error": found["error"], "exit_code": 2} and reason in found["error"]


EVALUATE, TRAIN = "evaluate {} --text {} --output NEW", "train --base {} --data {} --stages finetune --output-dir NEW"
OF_NO_USE = {  # what is said -> lines with something of another kind
    "holds no MoExtend adapter": [
        *(f"{command} PEFT" for command in ("inspect", "verify", "chat", "demo")),
        *("diff PEFT PEFT", "merge PEFT NEW", "compress PEFT NEW --rank 2", "push PEFT me/x"),
        EVALUATE.format("PEFT", "README"),
    ],
    "not valid JSON": [EVALUATE.format("ADAPTER", "README")],
    "is a folder: give a file": [
        EVALUATE.format("ADAPTER", "PEFT"),
        EVALUATE.format("ADAPTER", "TEXT") + " --questions PEFT",
    ],
    "there is no such f": [  # file, folder
        EVALUATE.format("ADAPTER", "NEW"),
        EVALUATE.format("ADAPTER", "TEXT") + " --questions NO_TEXT --image-folder README",
    ],
    "no such picture": ["push ADAPTER me/x --dry-run --shift PEFT"],
    "is a file: give the folder": ["inspect README", "diff ADAPTER WEIGHTS", "chat README"],
    "may not be empty": [
        *("inspect EMPTY", "inspect ADAPTER --subfolder EMPTY", "verify ADAPTER --base EMPTY", "diff ADAPTER EMPTY"),
        *("merge ADAPTER EMPTY", "compress ADAPTER EMPTY --rank 2", "plan --base EMPTY", "push EMPTY me/x"),
        *("report EMPTY", "chat ADAPTER --encoder EMPTY", "demo EMPTY", "quickstart --test EMPTY"),
        EVALUATE.format("ADAPTER", "TEXT") + " --questions EMPTY",
        TRAIN.format("BASE", "TEXT") + " --plan EMPTY",
    ],
    "--revision: of no effect, for the": [
        *(f"{line} --revision x" for line in ("verify ADAPTER", "merge ADAPTER NEW", "compress ADAPTER NEW --rank 2")),
        *(f"{line} --revision x" for line in ("inspect ADAPTER", "plan --base BASE")),
    ],
    "--cache-dir: of no effect, for the": ["inspect ADAPTER --cache-dir x", "plan --base BASE --cache-dir x"],
    "of no effect without --tokens": ["plan --base BASE --tflops 300"],
    "of no effect without --questions": [
        EVALUATE.format("ADAPTER", "TEXT") + option
        for option in (" --max-questions 3", " --image-folder PEFT", " --metric exact_match", " --max-new-tokens 9")
    ],
    "is empty.": [TRAIN.format("BASE", "HOLLOW") + " --plan {}"],
    "is no file, and no JSON": [TRAIN.format("BASE", "TEXT") + " --plan PEFT"],
    "takes image: leave out": ["verify ADAPTER --image README"],
    "is no text in UTF-8": [
        EVALUATE.format("ADAPTER", "WEIGHTS"),
        EVALUATE.format("ADAPTER", "TEXT") + " --questions WEIGHTS",
    ],
    "must hold a list": [EVALUATE.format("ADAPTER", "TEXT") + " --questions README"],
    "is no report": ["report PEFT", EVALUATE.format("ADAPTER", "TEXT") + " --compare PEFT"],
    "a file must be .json or .jsonl": [TRAIN.format("BASE", "README") + " --plan {}"],
    "holds no config.json": [
        TRAIN.format("PEFT", "TEXT") + " --plan {}",
        "quickstart --base PEFT --output-dir NEW",
        "chat ADAPTER --base PEFT",
    ],
    "is a PEFT adapter": ["plan --base PEFT"],
    "is extended already": ["plan --base ADAPTER"],
    "it is of another kind": ["plan --base assets/tiny-clip"],
    "not a valid JSON file": ["plan --base README"],
    "expected int, got str": ["plan --base STRANGE"],
    "model type `5`": ["plan --base NUMBERED"],
    "not allowed with": ["plan --base BASE --layers 1 --fraction 0.5"],
    "is no finite number": [EVALUATE.format("ADAPTER", "TEXT") + " --thresholds nan"],
    "is no port": ["demo ADAPTER --port 70000"],
    "must be {": [EVALUATE.format("ADAPTER", name) for name in ("NO_DOMAIN", "NO_CHAT")],
    "no text or list of parts": [EVALUATE.format("ADAPTER", "TEXT") + " --questions NO_TEXT"],
    "is a file, or lies": [EVALUATE.format("ADAPTER", "TEXT") + f" --output {one}" for one in ("README", "README/x")],
    "flow sequence": ["train --config NO_YAML"],
    "keywords must be": ["train --config NO_NAMES"],
    "has no ending": ["report PEFT --picture NEW"],
    "nonesuch": ["completion nonesuch"],
}
WRONG_FILES = {
    "NUMBERED": '{"model_type": 5}',
    "NO_DOMAIN": '{"domain": null, "text": "a b"}',
    "NO_CHAT": '{"domain": "a", "messages": "hi"}',
    "NO_TEXT": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 7}]}',
    "NO_YAML": "a: [1",
    "NO_NAMES": "1: 2",
}


@pytest.mark.parametrize(("line", "reason"), [(line, reason) for reason in OF_NO_USE for line in OF_NO_USE[reason]])
def test_what_is_of_no_use_is_code_2_and_leaves_nothing(line, reason, adapter, moextend):
    place = adapter.parent
    names = {"ADAPTER": adapter, "BASE": place / "base", "WEIGHTS": adapter / FILE, "NEW": place / "new" / "er"}
    names |= {"README": ROOT / "README.md", "TEXT": ROOT / "assets/tiny-moe/held_out.jsonl", "PEFT": place / "peft"}
    names |= {"STRANGE": place / "strange", "README/x": ROOT / "README.md" / "x", "EMPTY": "", "HOLLOW": place / "no"}
    names["HOLLOW"].mkdir()
    strange = {"model_type": "mixtral", "hidden_size": "x"}
    for name, values in {"peft/adapter_config": {}, "strange/config": strange}.items():
        (place / name).parent.mkdir()
        (place / f"{name}.json").write_text(json.dumps(values))
    for name, content in WRONG_FILES.items():
        names[name] = place / f"{name}.jsonl"
        names[name].write_text(content)
    code, text = moextend(*(names.get(word, word) for word in line.split()))
    assert code == 2 and reason in text
    assert "Traceback" not in text and "huggingface.co//" not in text and not names["NEW"].parent.exists()


def test_the_lines_of_no_use_are_of_every_command():
    assert {line.split()[0] for lines in OF_NO_USE.values() for line in lines} == {*COMMANDS}


@pytest.mark.parametrize("damage", ["cut", "empty"])
@pytest.mark.parametrize("command", [*OF_ADAPTERS, "merge --native"])
def test_a_damaged_base_is_code_2_where_it_is_read(command, damage, adapter, moextend):
    command, *more = command.split()
    weights = adapter.parent / "base" / "model.safetensors"
    weights.write_bytes(DAMAGE[damage](weights.read_bytes()))
    code, found = moextend(*command_line(command, adapter), *more, "--json")
    assert code == {"inspect": 0, "diff": 0, "push": 1}.get(command, 2)  # push: is refused, for it is on no Hub
    if code == 2:
        assert f"{weights} is damaged" in found["error"], "the file's name"
    assert not (adapter.parent / "merged").exists()


def damaged_index(folder):
    MoExtendForCausalLM.from_pretrained(folder.parent / "adapter").base.save_pretrained(folder, max_shard_size="30KB")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    return "model.safetensors.index.json is damaged"


def no_weights(folder):
    (folder / "model.safetensors").unlink()
    return "safetensors"


def no_config(folder):
    (folder / "config.json").unlink()
    return "config.json"


def damaged_config(folder):
    (folder / "config.json").write_text("{")
    return "config.json"


def listed_config(folder):
    (folder / "config.json").write_text("[]")
    return "has a config.json that can't be read"


def of_another_kind(folder):
    make_encoder().save_pretrained(folder)
    return "is no causal LM: transformers has no causal head for"


def is_an_adapter(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "adapter", folder)
    named = "On the command line: base= is --base."
    return f"base={str(folder)!r} is extended already: it is an adapter. Pass base=<its base>.\n{named}"


def is_not_there(folder):
    shutil.rmtree(folder)
    return "On the command line: base= is --base."


BASES = [damaged_index, no_weights, no_config, damaged_config, listed_config, of_another_kind, is_an_adapter]


@pytest.mark.parametrize("spoil", [*BASES, is_not_there], ids=lambda function: function.__name__)
@pytest.mark.parametrize("command", ["verify", "merge"])
def test_what_is_no_base_is_code_2(command, spoil, adapter, moextend):
    shutil.copytree(adapter.parent / "base", adapter.parent / "other")
    reason = spoil(adapter.parent / "other")
    code, found = moextend(*command_line(command, adapter), "--base", adapter.parent / "other", "--json")
    assert code == 2 and reason in found["error"]
    assert not (adapter.parent / "merged").exists()


@pytest.mark.parametrize("command", ["verify", "merge"])
def test_a_damaged_encoder_is_code_2(command, tmp_path, moextend):
    make_encoder().save_pretrained(tmp_path / "encoder")
    adapter = save_pair(tmp_path, encoder=str(tmp_path / "encoder"), scope="modality")
    assert moextend(*command_line(command, adapter))[0] == 0
    shutil.rmtree(tmp_path / "merged", ignore_errors=True)
    weights = tmp_path / "encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    code, found = moextend(*command_line(command, adapter), "--json")
    assert code == 2 and f"{weights} is damaged" in found["error"]
    make_base().save_pretrained(tmp_path / "encoder")
    code, found = moextend(*command_line(command, adapter), "--json")
    assert code == 2 and "an encoder must be a model of transformers that takes images" in found["error"]


@pytest.mark.parametrize("command", ["verify", "merge"])
def test_another_encoder_is_code_1(command, tmp_path, moextend):
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path / "encoder")
    adapter = save_pair(tmp_path, encoder=str(tmp_path / "encoder"), scope="modality")
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.5)
    encoder.save_pretrained(tmp_path / "other")
    code, found = moextend(*command_line(command, adapter), "--encoder", tmp_path / "other", "--json")
    said = found["checks"][-1]["detail"] if command == "verify" else found["error"]
    assert code == 1 and "This is a different encoder than the adapter was made on" in said


FAULTS = [RuntimeError("oops"), KeyError("name")]


@pytest.mark.parametrize("error", [*FAULTS, ImportError("no jinja2"), HTTPError("gone")])
def test_whatever_happens_there_is_one_object_on_stdout(error, adapter, monkeypatch, capsys):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("modeling_moextend.tools.inspection.diff_adapters", fail)
    assert cli.main(["diff", str(adapter), str(adapter), "--json"]) == 2
    output = capsys.readouterr()
    ours = error in FAULTS
    said = f"{type(error).__name__}: {error}" if ours else str(error)
    assert json.loads(output.out) == {"error": said, "exit_code": 2}
    assert ("Traceback" in output.err) == ours, "a fault of the program is to be reported"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect", "push"])
def test_no_network_is_code_2(command, adapter):
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_TOKEN": "hf_me"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(adapter.parent / "cache"), **hub}
    line = ["inspect", "me/x"] if command == "inspect" else ["push", str(adapter), "me/x", "--base", "me/base"]
    python = [sys.executable, "-m", "moextend_cli", *line, "--json"]
    done = subprocess.run(python, env=environment, capture_output=True, text=True, timeout=600)
    found = json.loads(done.stdout)
    assert done.returncode == 2 and "refused" in found["error"] and "Traceback" not in done.stderr


# ---------------------------------------------------------------- what strangers write

CONTROL = "a\x1b[2Jb\0c\nok\u202ed\ud800"  # clears the screen; ends a text; forges a line; turns it round; is none
ESCAPED = r"a\x1b[2Jb\x00c\nok\u202ed\ud800"
CONFIGS = {
    "a list": "[1, 2]",
    "null": "null",
    "a number": "3",
    "a text": '"all"',
    "deep": '{"text_config": ' + deep(10_000) + "}",
    "deep in mappings": deep(10_000, '{"a":', "}"),
    "no JSON": '{"scope": "all"',
    "keys twice": '{"scope": "all", "scope": "gate"}',
    "a number of 5,000 digits": '{"image_token_id": ' + "9" * 5000 + "}",
    "a plan that is a list": '{"extended_layers": [1, 2]}',
    "a plan of texts": '{"extended_layers": {"1": "02"}}',
    "a plan of mappings": '{"extended_layers": {"1": {"0": 0}}}',
    "a plan of no layers": '{"extended_layers": {"x": [0]}}',
    "a plan with a huge layer": '{"extended_layers": {"' + "9" * 30 + '": [0]}}',
    "a threshold that is no number": '{"gate_threshold": NaN}',
    "an infinite threshold": '{"gate_threshold": -Infinity}',
    "a name with control characters": json.dumps({"base_model_name_or_path": CONTROL}),
    "a choice with control characters": json.dumps({"scope": CONTROL}),
    "an entry with control characters": json.dumps({CONTROL: 1}),
}
HEADERS = {  # huggingface_hub hands on what safetensors would refuse
    "a list": lambda header: [header],
    "null": lambda header: None,
    "no metadata": lambda header: {**header, "__metadata__": None},
    "metadata that is a list": lambda header: {**header, "__metadata__": [1]},
    "metadata of numbers": lambda header: {**header, "__metadata__": {**header["__metadata__"], "config": 1}},
    "a tensor that is a list": lambda header: {**header, "x": [1]},
    "a dtype that is a list": lambda header: {**header, "x": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}},
    "a shape that is a text": lambda header: {**header, "x": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}},
    "a huge shape": lambda header: {**header, "x": {"dtype": "F32", "shape": [2**62] * 2, "data_offsets": [0, 4]}},
    "a negative shape": lambda header: {**header, "x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
}


def edit_header(adapter, edit):
    """Writes the header that `edit` makes of the adapter's own."""
    header, data = unpacked((adapter / FILE).read_bytes())
    (adapter / FILE).write_bytes(packed(edit(header), data))


def write_config(adapter, text):
    """Another config in the header, without checksums, as files without them are read too."""
    edit_header(adapter, lambda header: {**header, "__metadata__": {"moextend_format": "1", "config": text}})


def config_of(adapter):
    return json.loads(unpacked((adapter / FILE).read_bytes())[0]["__metadata__"]["config"])


@pytest.fixture
def wide(monkeypatch):
    """A terminal whose tables fold nothing."""
    monkeypatch.setenv("COLUMNS", "400")


def assert_printable(text):
    lines = [line for line in text.split("\n") if "it/s]" not in line]  # transformers' progress bars
    assert all(line.isprintable() for line in lines), ascii(text)


def parse_strictly(text):
    """The one object in `text`, which holds no NaN or Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("command", OF_ADAPTERS)
def test_a_config_that_is_none_is_code_2(command, config, adapter, moextend, capsys):
    write_config(adapter, CONFIGS[config])
    code, text = moextend(*command_line(command, adapter))
    assert code == 2 and "Traceback" not in text
    assert_printable(text)
    assert not any(line.startswith("ok") for line in text.split("\n")), "a line that somebody else wrote"
    assert cli.main([*map(str, command_line(command, adapter)), "--json"]) == 2
    found = parse_strictly(capsys.readouterr().out)
    assert command == "verify" and not found["ok"] or found == {"error": found["error"], "exit_code": 2}


@pytest.mark.parametrize("name", ["layers", "layers.", ".", "output", "layers.1.experts.down_proj.more"])
def test_a_tensor_of_any_name_is_inspected_and_refused_where_it_counts(name, adapter, moextend):
    rewrite(adapter, **{name: torch.zeros(1)})
    code, text = moextend("inspect", adapter)
    assert code == 0 and "Traceback" not in text
    code, text = moextend("verify", adapter)
    assert code == 1 and f"unexpected: {name}" in text and "Traceback" not in text


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.slow
def test_a_config_on_the_hub_that_is_none_is_code_2(config, hub, adapter, moextend):
    write_config(adapter, CONFIGS[config])
    hub.add(REPO, adapter)
    code, text = moextend("inspect", REPO)
    assert code == 2 and "Traceback" not in text
    assert_printable(text)


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_is_none_is_code_2(header, hub, adapter, moextend):
    edit_header(adapter, HEADERS[header])
    hub.add(REPO, adapter)
    for place in (adapter, REPO):
        code, text = moextend("inspect", place)
        assert code == 2 and "is damaged" in text and "Traceback" not in text
        assert moextend("inspect", place, "--json")[0] == 2


@pytest.mark.parametrize("command", OF_ADAPTERS)
def test_tensor_names_never_reach_the_terminal_as_they_are(command, adapter, tmp_path, moextend, wide):
    name = CONTROL.removesuffix("\ud800")  # safetensors writes none
    shutil.copytree(adapter, tmp_path / "same")
    rewrite(adapter, **{name: torch.full((2,), torch.nan), ":warning: [red]": torch.zeros(1)})
    line = command_line(command, adapter)
    code, text = moextend(*(line if command != "diff" else ["diff", adapter, tmp_path / "same"]))
    assert code == (0 if command == "inspect" else 1)
    assert_printable(text)
    assert not any(line.startswith("ok") for line in text.split("\n"))
    if command != "push":  # which is refused for its base before that
        text += moextend("inspect", adapter, "--tensors")[1]
        assert ESCAPED.removesuffix(r"\ud800") in text and ":warning: [red]" in text
        assert_printable(text)


def test_entries_of_a_config_never_reach_the_terminal_as_they_are(adapter, tmp_path, moextend):
    config = {**config_of(adapter), "trained_on": [{"name": CONTROL, "fingerprint": None}], "note": [CONTROL]}
    write_config(adapter, json.dumps({**config, "\x1b[31mnote": {CONTROL: 1}, "text_config": {"model_type": CONTROL}}))
    for line in (["inspect", adapter], ["verify", adapter], ["merge", adapter, tmp_path / "x"]):
        assert_printable(moextend(*line)[1])
    config["a note"] = config["note"]
    write_config(adapter, json.dumps(config))
    for line in (["inspect", adapter], ["verify", adapter], ["merge", adapter, tmp_path / "x"]):
        assert_printable(moextend(*line)[1])


def test_diff_prints_entries_and_numbers_that_json_lacks(adapter, tmp_path, moextend, capsys):
    shutil.copytree(adapter, tmp_path / "other")
    config = {**config_of(adapter), "note": {"a": float("nan"), "b": [float("inf"), CONTROL]}, "same": float("nan")}
    write_config(adapter, json.dumps(config))
    write_config(tmp_path / "other", json.dumps({**config, "note": {"a.b": 1}}))
    assert cli.main(["diff", str(adapter), str(tmp_path / "other"), "--json"]) == 1
    found = parse_strictly(capsys.readouterr().out)["config"]
    assert {row["entry"]: row["values"] for row in found} == {
        "note.a": ["NaN", None],
        "note.b": [["Infinity", CONTROL], None],
        "note.a.b": [None, 1],
    }
    text = moextend("diff", adapter, tmp_path / "other")[1]
    assert_printable(text)
    assert "note.a.b" in text


@pytest.mark.parametrize("name", ["moextend_adapter-\x1b[2J.safetensors", "moextend_adapter-\n.safetensors", CONTROL])
@pytest.mark.parametrize("command", OF_ADAPTERS)
def test_names_of_shards_never_reach_the_terminal_as_they_are(command, name, adapter, moextend, wide):
    (adapter / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    code, text = moextend(*command_line(command, adapter))
    assert code == 2 and "index.json is damaged" in text and "Traceback" not in text
    assert_printable(text)


@pytest.mark.parametrize("index", [*map(json.dumps, ({"a": CONTROL}, {"a": 3}, [], "x")), "NaN", deep(10_000)])
@pytest.mark.parametrize("command", ["verify", "merge"])
def test_a_bases_index_is_no_better(command, index, adapter, moextend):
    (adapter.parent / "base" / "model.safetensors").unlink()
    (adapter.parent / "base" / "model.safetensors.index.json").write_text(f'{{"weight_map": {index}}}')
    code, text = moextend(*command_line(command, adapter))
    assert code == 2 and "Traceback" not in text
    assert_printable(text)


def test_arguments_are_escaped_as_well(moextend):
    code, text = moextend("inspect", "\x1b[2J")
    assert code == 2 and r"\x1b[2J is no folder, and no Hub id" in text
    assert_printable(text)


def test_what_a_terminal_cannot_print_is_escaped():
    assert escaped("é│\t", encoding="ascii") == r"\xe9\u2502\t"
    assert escaped("a\n\tb\\", allowed="\n\t") == "a\n\tb\\"


# ---------------------------------------------------------------- inspect


def test_inspect(adapter, moextend):
    code, found = moextend("inspect", adapter, "--json")
    assert code == 0
    assert found["base"] == {
        "name_or_path": str(adapter.parent / "base"),
        "subfolder": None,
        "revision": None,
        "model_type": "mixtral",
    }
    assert (found["adapter"], found["format"], found["encoder"], found["files"]) == (str(adapter), 1, None, [FILE])
    assert {name: found[name] for name in NATIVE} == NATIVE and found["gate_threshold"] is None
    expert = 48 * 32 + 32 * 24 + 32  # gate_up_proj, down_proj, router row
    assert [list(row.values()) for row in found["layers"]] == [
        [1, [0], 3, expert, 4 * expert],
        [3, [2, 5], 3, 2 * expert, 8 * expert],
    ]
    assert (found["num_tensors"], found["num_parameters"], found["num_bytes"]) == (6, 3 * expert, 12 * expert)
    assert found["others"] == []
    assert found["tensors"][0] == {"name": "layers.1.experts.down_proj", "dtype": "float32", "shape": [1, 32, 24]}
    assert len(found["tensors"]) == 6


def test_inspect_prints_layers_and_on_demand_tensors(adapter, moextend):
    code, text = moextend("inspect", adapter)
    assert code == 0 and "mixtral" in text and "scope all, selection compete, calibration none" in text
    assert re.search(r"3 +│ 2 5 +│ 3 +│ 4,672 +│ 18,688", text)
    assert "layers.1.experts" not in text
    assert re.search(r"layers.1.router.weight +│ float32 +│ 1 x 32", moextend("inspect", adapter, "--tensors")[1])


def test_inspect_names_gate_encoder_and_projector(tmp_path, moextend):
    make_encoder().save_pretrained(tmp_path / "encoder")
    adapter = save_pair(tmp_path, encoder=str(tmp_path / "encoder"), scope="gate")
    _, found = moextend("inspect", adapter, "--json")
    assert found["encoder"]["name_or_path"] == str(tmp_path / "encoder") and found["gate_threshold"] == 0.0
    assert [row["part"] for row in found["others"]] == [
        "embedding deltas",
        "attention deltas",
        "output deltas",
        "gate",
        "projector",
    ]
    parts = found["layers"] + found["others"]
    assert all(
        sum(row[name] for row in parts) == found[name] for name in ("num_tensors", "num_parameters", "num_bytes")
    )
    assert found["num_parameters"] == sum(tensor.numel() for tensor in load_file(adapter / FILE).values())


def test_inspect_reads_headers_only_and_never_a_base(adapter, moextend):
    (adapter.parent / "base" / "config.json").unlink()
    before = moextend("inspect", adapter, "--json")
    content = bytearray((adapter / FILE).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = bytes(len(content) - start)
    (adapter / FILE).write_bytes(content)
    assert moextend("inspect", adapter, "--json") == before and before[0] == 0
    assert moextend("diff", adapter, adapter)[0] == 2, "that one reads the data"


def test_inspect_of_shards(adapter, moextend):
    before = moextend("inspect", adapter, "--json")[1]
    MoExtendForCausalLM.from_pretrained(adapter).save_pretrained(adapter, max_shard_size="8KB")
    assert (adapter / INDEX).exists()
    found = moextend("inspect", adapter, "--json")[1]
    assert len(found.pop("files")) > 2 and before.pop("files") == [FILE]
    assert found == before


# ---------------------------------------------------------------- verify


def checks(found):
    return {row["check"]: row["ok"] for row in found["checks"]}


def test_verify(adapter, moextend):
    code, found = moextend("verify", adapter, "--json", "--max-new-tokens", 5)
    assert code == 0 and found["ok"]
    assert checks(found) == dict.fromkeys(["file", "finite", "base", "fit", "off", "sample"], True)
    ids = torch.arange(1, 9)[None]
    model = MoExtendForCausalLM.from_pretrained(adapter)
    answers = [model.generate(ids, max_new_tokens=5, do_sample=False)[0, 8:].tolist()]
    with model.disable_adapter():
        answers.append(model.generate(ids, max_new_tokens=5, do_sample=False)[0, 8:].tolist())
    assert [found["sample"]["adapter"], found["sample"]["base"]] == answers and answers[0] != answers[1]
    assert found["sample"]["prompt"] == list(range(1, 9)), "no tokenizer, so no text"
    code, text = moextend("verify", adapter)
    assert code == 0 and "ok" in text and "FAILED" not in text and "off" in text


def test_verify_on_another_base(adapter, moextend):
    other = make_base()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    other.save_pretrained(adapter.parent / "other")
    code, found = moextend("verify", adapter, "--base", adapter.parent / "other", "--json")
    assert code == 1 and not found["ok"]
    assert checks(found) == {"file": True, "finite": True, "base": False, "fit": True, "off": True, "sample": True}
    assert "FAILED" in moextend("verify", adapter, "--base", adapter.parent / "other")[1]


def test_verify_finds_values_that_are_no_numbers(adapter, moextend):
    rewrite(adapter, **{"layers.1.experts.down_proj": torch.full((1, 32, 24), torch.nan)})
    code, found = moextend("verify", adapter, "--json")
    assert code == 1
    assert checks(found) == {"file": True, "finite": False, "base": True, "fit": True, "off": True, "sample": False}
    assert "layers.1.experts.down_proj" in found["checks"][1]["detail"]
    code, text = moextend("inspect", adapter)
    assert code == 0 and "\nNaN or infinity in layers.1.experts.down_proj\n" in text
    assert moextend("inspect", adapter, "--json")[1]["not_finite"] == ["layers.1.experts.down_proj"]


def test_verify_finds_what_does_not_fit(adapter, moextend):
    rewrite(adapter, **{"layers.1.router.weight": torch.zeros(2, 32), "layers.2.router.weight": torch.zeros(1, 32)})
    code, found = moextend("verify", adapter, "--json")
    assert code == 1 and found["sample"] is None
    assert checks(found) == {"file": True, "finite": True, "base": True, "fit": False}
    detail = found["checks"][-1]["detail"]
    assert (
        "wrong shape: layers.1.router.weight is (2, 32)" in detail and "unexpected: layers.2.router.weight" in detail
    )


def test_verify_of_a_damaged_file_and_without_a_base(adapter, moextend):
    content = bytearray((adapter / FILE).read_bytes())
    content[-1] ^= 1
    (adapter / FILE).write_bytes(content)
    code, found = moextend("verify", adapter, "--json")
    assert code == 2 and checks(found) == {"file": False} and "checksum" in found["checks"][0]["detail"]
    content[-1] ^= 1
    (adapter / FILE).write_bytes(content)
    code, text = moextend("verify", adapter, "--base", adapter.parent / "nowhere")
    assert code == 2 and "can't be loaded" in text


def test_verify_answers_a_prompt(adapter, moextend):
    words = Tokenizer(models.WordLevel({f"word{number}": number for number in range(96)}, unk_token="word0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(adapter)
    code, found = moextend("verify", adapter, "--prompt", "word3 word9", "--max-new-tokens", 3, "--json")
    model = MoExtendForCausalLM.from_pretrained(adapter)
    answer = model.generate(torch.tensor([[3, 9]]), max_new_tokens=3, do_sample=False)[0, 2:].tolist()
    assert code == 0 and found["sample"]["prompt"] == "word3 word9"
    assert found["sample"]["adapter"] == " ".join(f"word{number}" for number in answer)
    code, found = moextend("verify", adapter, "--prompt", "", "--json")
    assert code == 2 and "prompt='' makes no tokens" in found["error"] and "prompt= is --prompt." in found["error"]


@pytest.mark.parametrize("option", ["--dtype=foo", "--max-new-tokens=0", "--max-new-tokens=x"])
def test_verify_refuses_values_that_mean_nothing(option, adapter, moextend):
    code, text = moextend("verify", adapter, option)
    assert code == 2 and f"error: argument {option.split('=')[0]}" in text


def test_verify_of_an_adapter_that_was_trained_on_top_of_another(stacked, moextend):
    code, found = moextend("verify", stacked, "--json")
    assert code == 0 and "trained on top of 'default', left out here" in found["checks"][3]["detail"]


def test_verify_asks_the_base_in_the_state_of_an_extended_one(adapter, moextend, monkeypatch):
    """Frozen: torch may round otherwise where a weight trains, see `frozen_copy`. Here every linear layer does."""
    plain = torch.nn.Linear.forward
    rounded = lambda self, x: plain(self, x) * (1 + 1e-3 * self.weight.requires_grad)  # noqa: E731
    monkeypatch.setattr(torch.nn.Linear, "forward", rounded)
    code, found = moextend("verify", adapter, "--json")
    assert code == 0 and checks(found)["off"]


def test_verify_notices_a_model_that_is_not_the_base_when_off(adapter, moextend, monkeypatch):
    monkeypatch.setattr(MoExtendForCausalLM, "disable_adapter", lambda self: torch.no_grad())
    code, found = moextend("verify", adapter, "--json")
    assert code == 1 and [name for name, ok in checks(found).items() if not ok] == ["off"]


# ---------------------------------------------------------------- diff


def test_diff_of_equals(adapter, moextend):
    code, found = moextend("diff", adapter, adapter, "--json")
    assert code == 0 and found["equal"] and found["config"] == found["shapes"] == [] == sum(found["only_in"], [])
    assert all(row["equal"] and row["max_abs"] == row["relative"] == 0 for row in found["tensors"])
    assert moextend("diff", adapter, adapter)[1] == "equal: config and every tensor, bit by bit\n"


def test_diff(adapter, tmp_path, moextend):
    model = MoExtendForCausalLM.from_pretrained(adapter)
    with torch.no_grad():
        model.adapter_tensors()["layers.1.router.weight"].copy_(torch.eye(1, 32) * 3)
    model.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        model.adapter_tensors()["layers.1.router.weight"][0, 5] = -1.5
    model.config.image_token_id = 77
    model.extend({2: [0]})
    model.save_pretrained(tmp_path / "other")
    row = model.adapter_tensors()["layers.3.router.weight"].detach().clone()
    row[1, 4] = torch.nan  # nothing of ours saves it
    for folder in ("one", "other"):
        rewrite(tmp_path / folder, **{"layers.3.router.weight": row})
    code, found = moextend("diff", tmp_path / "one", tmp_path / "other", "--json")
    assert code == 1 and not found["equal"] and found["shapes"] == []
    entries = {row["entry"]: row["values"] for row in found["config"]}
    assert entries.pop("image_token_id")[1] == 77
    assert entries == {"extended_layers.2": [None, [0]]}
    assert found["only_in"] == [
        [],
        [f"layers.2.{name}" for name in ("experts.down_proj", "experts.gate_up_proj")] + ["layers.2.router.weight"],
    ]
    rows = {row["name"]: list(row.values())[1:] for row in found["tensors"]}
    assert rows["layers.1.router.weight"] == [False, 1.5, 0.5]
    assert rows["layers.3.router.weight"] == [True, None, None], "NaN in both: the same bits"
    assert rows["layers.1.experts.down_proj"] == [True, 0, 0]
    text = moextend("diff", tmp_path / "one", tmp_path / "other")[1]
    assert "layers.2.router.weight" in text and "image_token_id" in text
    assert re.search(r"layers.1.router.weight +│ 1.5 +│ 0.5", text) and "5 of 6 tensors in both are equal" in text


def test_diff_of_shapes_and_dtypes(adapter, tmp_path, moextend):
    MoExtendForCausalLM.from_base(str(adapter.parent / "base"), {1: [0], 3: [2]}, **NATIVE).save_pretrained(
        tmp_path / "one"
    )
    _, found = moextend("diff", adapter, tmp_path / "one", "--json")
    assert {"name": "layers.3.router.weight", "values": [[2, 32], [1, 32]]} in found["shapes"]
    assert not any(row["name"].startswith("layers.3.") for row in found["tensors"])
    MoExtendForCausalLM.from_pretrained(adapter).save_pretrained(tmp_path / "half", adapter_dtype="bfloat16")
    code, found = moextend("diff", adapter, tmp_path / "half", "--json")
    assert code == 1 and found["config"] == []
    assert all(not row["equal"] and 0 < row["relative"] < 2**-8 for row in found["tensors"])


# ---------------------------------------------------------------- merge


def test_merge_of_an_adapter_that_was_trained_on_top_of_another(stacked, tmp_path, moextend):
    code, text = moextend("merge", stacked, tmp_path / "merged")
    assert code == 1 and "law was trained on top of 'default', and a merged folder holds one adapter" in text
    assert "; check_trained_on=False merges it alone all the same" in text and not (tmp_path / "merged").exists()
    assert text.endswith("\nOn the command line: check_trained_on=False is --no-check-trained-on.\n")
    assert moextend("merge", stacked, tmp_path / "merged", "--no-check-trained-on")[0] == 0
    alone = MoExtendForCausalLM.from_pretrained(stacked, check_trained_on=False)
    merged = MoExtendForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(merged(**batch()).logits, alone(**batch()).logits)


def test_what_keywords_are_called_as_options_comes_from_the_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("place")
    parser.add_argument("--base")
    parser.add_argument("-n", "--no-check", dest="check", action="store_false")
    named = partial(options_named, parser=parser)
    assert named("Pass base=<its base>; check=False takes any.") == {"base=": "--base", "check=False": "--no-check"}
    assert named("the base, check_base=False, check=True, place=1, --base x") == {}


def test_errors_speak_of_options(adapter, tmp_path, moextend):
    other = make_base()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    code, text = moextend("merge", adapter, tmp_path / "merged", "--base", tmp_path / "other")
    assert code == 1 and "Pass base=<the right one>; check_base=False loads it all the same" in text
    assert text.endswith("\nOn the command line: check_base=False is --no-check-base, base= is --base.\n")
    assert moextend("merge", adapter, tmp_path / "merged", "--base", tmp_path / "other", "--no-check-base")[0] == 0


@pytest.mark.parametrize("size", ["foo", "0", "0GB", "5", "-5GB", "5 bytes", "nanGB", "1e3MB", ""])
def test_merge_refuses_sizes_that_are_none(size, adapter, tmp_path, moextend):
    line = ["merge", adapter, tmp_path / "merged", f"--max-shard-size={size}"]
    code, text = moextend(*line)
    assert code == 2 and f"argument --max-shard-size: {size!r} is no size above 0 like 500MB or 2.5GB" in text
    assert moextend(*line, "--json")[0] == 2 and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("size", ["20KB", "0.02MB", "20 kb"])
def test_merge_takes_sizes(size, adapter, tmp_path, moextend):
    assert moextend("merge", adapter, tmp_path / "merged", "--max-shard-size", size)[0] == 0
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == 2


def test_merge(adapter, tmp_path, moextend):
    code, done = moextend("merge", adapter, tmp_path / "merged", "--json")
    assert code == 0 and done["kind"] == "standalone" and (tmp_path / "merged" / "base" / "config.json").exists()
    code, text = moextend("merge", adapter, tmp_path / "merged")
    assert code == 2 and "exists already" in text
    code, text = moextend("merge", adapter, tmp_path / "native", "--native")
    assert code == 1 and "layers: MoE layers [0, 2] have no new experts" in text
    code, text = moextend("inspect", tmp_path / "merged")
    assert code == 0 and "base: base/ in this checkpoint (mixtral)" in text
    assert moextend("verify", tmp_path / "merged", "--json")[0] == 0


def test_merge_hands_its_options_on(adapter, monkeypatch, moextend):
    given = {}
    done = {"folder": "out", "kind": "native", "files": 1, "bytes": 2}
    monkeypatch.setattr(
        "modeling_moextend.tools.merge.merge", lambda *args, **options: given.update(args=args, **options) or done
    )
    options = ["--native", "--base", "b", "--no-check-base", "--max-shard-size", "2GB", "--revision", "v2"]
    options += ["--no-check-trained-on"]
    code, text = moextend("merge", "a", "out", *options)
    assert code == 0 and text == "out: a native checkpoint, 1 files, 2 bytes\n"
    assert given == {
        "args": ("a", "out"),
        "base": "b",
        "encoder": None,
        "native": True,
        "check_base": False,
        "check_trained_on": False,
        "max_shard_size": "2GB",
        "revision": "v2",
    }


# ---------------------------------------------------------------- push


def test_push_refuses_what_only_this_machine_has(adapter, tmp_path, moextend):
    code, text = moextend("push", adapter, "me/x")
    assert code == 1 and "its base is" in text and "a path on this machine" in text
    moextend("merge", adapter, tmp_path / "merged")
    code, text = moextend("push", tmp_path / "merged", "me/x")
    assert code == 1 and f"hf upload me/x {tmp_path / 'merged'}" in text


def test_push_refuses_arguments_that_mean_nothing(adapter, tmp_path, moextend):
    for wrong in (["a/b/c"], [tmp_path / "x"], ["me/x", "--base", "a b"], ["me/x", "--encoder", tmp_path / "base"]):
        code, text = moextend("push", adapter, *wrong)
        assert code == 2 and f"{wrong[-1]} is no Hub id like me/my-adapter" in text
    code, text = moextend("push", adapter, "me/x", "--report", tmp_path / "base")
    assert code == 2 and "base: no report there" in text
    code, text = moextend("push", adapter, "me/x", "--base", "me/base", "--encoder", "me/eyes", "--dry-run")
    assert code == 1 and "has no encoder" in text and "encoder= is --encoder" in text


def test_push(hub, tmp_path, moextend):
    """The adapter of a base on this machine, whose place on the Hub the call names."""
    adapter = save_pair(tmp_path, PLAN)
    (adapter / "optimizer.pt").write_text("nobody else's business")
    (tmp_path / "base" / "model.safetensors").unlink()  # no base is read
    code, done = moextend("push", adapter, REPO, "--base", BASE, "--private", "--json")
    repo, files = hub.repos[REPO], hub.files(REPO)
    assert code == 0 and repo.private and set(files) == ADAPTER
    assert done == {"repo_id": REPO, "commit": repo.refs["main"], "url": f"{hub.url}/{REPO}/commit/{done['commit']}"}
    assert files[FILE] == (adapter / FILE).read_bytes()
    assert json.loads(files["config.json"])["base_model_name_or_path"] == BASE
    expected = MoExtendForCausalLM.from_pretrained(adapter)
    with torch.no_grad():
        assert torch.equal(MoExtendForCausalLM.from_pretrained(REPO)(**batch()).logits, expected(**batch()).logits)
    code, text = moextend("push", adapter, REPO, "--revision", "v2")
    assert code == 0 and text.startswith(f"published: {hub.url}/{REPO}/commit/{repo.refs['v2']}\n")
    assert hub.files(REPO, "v2") == files


DAMAGED_FACTS = ["[]", "null", "{", '{"no_such_argument": 1}', '{"tags": [], "tags": []}', deep(10_000)]
DAMAGED_REPORTS = ["[]", "{", "{}", '{"card": []}', '{"card": {}}', '{"card": {"figures": {"a": "../x.png"}}}']


@pytest.mark.parametrize("text", [*DAMAGED_FACTS, *DAMAGED_REPORTS])
@pytest.mark.slow
def test_push_with_damaged_facts_for_the_card_is_code_2(text, hub, tmp_path, moextend):
    line = ["push", save_pair(tmp_path, PLAN), REPO, "--base", BASE]
    if text in DAMAGED_FACTS:
        (tmp_path / "adapter" / "card.json").write_text(text)
    else:
        (tmp_path / "report.json").write_text(text)
        line += ["--report", tmp_path]
    code, found = moextend(*line, "--json")
    assert code == 2 and ("card.json" in found["error"] or "report.json" in found["error"])
    assert "README.md" not in hub.files(REPO)


def test_push_that_the_hub_refuses_is_code_2(hub, tmp_path, moextend, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    code, found = moextend("push", save_pair(tmp_path, PLAN), REPO, "--base", BASE, "--json")
    assert code == 2 and found["exit_code"] == 2 and "403" in found["error"] and REPO not in hub.repos


def test_push_with_a_base_that_is_not_on_the_hub_is_refused(hub, tmp_path, moextend):
    code, text = moextend("push", save_pair(tmp_path, PLAN), REPO, "--base", "org/nothing")
    assert code == 1 and "'org/nothing', which is not on the Hub" in text and REPO not in hub.repos


def test_ctrl_c_ends_with_one_line(monkeypatch, capsys, tmp_path):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("modeling_moextend.tools.inspection.inspect_adapter", stop)
    assert cli.main(["inspect", str(tmp_path)]) == 130
    assert (
        capsys.readouterr().err
        == "moextend: stopped; nothing was left half-written, and the same command begins anew\n"
    )
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["exit_code"] == 130


if __name__ == "__main__":
    os.environ["COLUMNS"] = "100"
    DOCUMENT.write_text(document(), encoding="utf-8")


# ---------------------------------------------------------------- train


def test_recipes_ship_and_are_found_by_name_or_path(moextend, tmp_path):
    names = sorted(path.stem for path in (ROOT / "configuration" / "recipes").glob("*.yaml"))
    assert recipe_names() == names and all(name in help_text("train") for name in names)
    assert Path(find_recipe("easy_vqa")).read_text() == (ROOT / "configuration/recipes/easy_vqa.yaml").read_text()
    (tmp_path / "mine.yaml").write_text("base: x")
    assert find_recipe(str(tmp_path / "mine.yaml")) == str(tmp_path / "mine.yaml")
    code, text = moextend("train", "--config", "no_such")
    assert code == 2 and f"no such recipe among {', '.join(names)}" in text
    code, text = moextend("train", "--bf16", "false", "--use_cpu", "true")
    assert code == 2 and "--base" in text and len(text.splitlines()) <= 4 and "Traceback" not in text
    code, text = moextend("train", names[0])
    assert code == 2 and f"a recipe is named by --config {names[0]}." in text
    (tmp_path / "r.yaml").write_bytes(b"\xff")
    code, text = moextend("train", "--config", tmp_path / "r.yaml")
    assert code == 2 and "The recipe is no text in UTF-8" in text


def test_alone_it_says_what_there_is(moextend):
    code, text = moextend()
    assert code == 2 and text.startswith("usage: moextend") and all(name in text for name in COMMANDS)
    code, found = moextend("--json")
    assert code == 2 and "are required" in found["error"]


@pytest.mark.parametrize(
    ("options", "said"), [({"--output-dir": "/no/way"}, "can't be made"), ({"--plan": "{3}"}, "plan='{3}' is no JSON")]
)
def test_where_a_training_cannot_begin_it_says_so_in_a_line(options, said, adapter, moextend, monkeypatch, tmp_path):
    make = Path.mkdir

    def mkdir(path, *args, **kwargs):
        if path.is_relative_to("/no"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    (tmp_path / "data.jsonl").write_text('{"text": "a"}')
    options = {"--plan": '{"0": [0]}', "--output-dir": tmp_path / "out", **options}
    line = ["train", "--base", adapter.parent / "base", "--data", tmp_path / "data.jsonl", "--stages", "finetune"]
    code, text = moextend(*line, *(word for option in options.items() for word in option))
    assert code == 2 and said in text and "Traceback" not in text


@pytest.mark.parametrize("line", ["--nonsense 1", "--max_steps many", "--stages fly"])
@pytest.mark.parametrize("command", ["train --base x --data y --stages extend", "quickstart"])
def test_wrong_options_of_a_recipe_are_said_in_a_line(command, line, moextend):
    code, text = moextend(*command.split(), *line.split(), "--use_cpu", "true")
    assert code == 2 and len(text.splitlines()) <= 4 and "Traceback" not in text
    assert "nonsense" not in line or "no such options: --nonsense 1." in text
    assert f"moextend {command.split()[0]} --help-all" in text


@pytest.mark.parametrize("command", ["train", "quickstart"])
def test_the_options_that_help_shows_are_those_that_the_library_parses(command):
    parser = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices[command]
    shown = {word for action in parser._actions for word in action.option_strings}
    classes = (StagesConfig, MoExtendSFTConfig) + ((QuickstartConfig,) if command == "quickstart" else ())
    known = {word for action in RecipeParser(classes)._actions for word in action.option_strings}
    assert shown - {"-h", "--help", "--json", "--config", "--help-all"} <= known
    own = {field.name for cls in classes for field in dataclasses.fields(cls)} - {
        field.name for field in dataclasses.fields(SFTConfig)
    }
    assert {f"--{name.replace('_', '-')}" for name in own} <= shown


def test_train_trains_what_the_options_say(moextend, tmp_path):
    """The door is thin: words go to the library's parser as they are, and its result comes back."""
    make_base().save_pretrained(tmp_path / "base")
    words = Tokenizer(models.WordLevel({"<unk>": 0, **{f"w{n}": n for n in range(1, 60)}}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>", eos_token="w1")
    tokenizer.save_pretrained(tmp_path / "base")
    lines = [json.dumps({"text": " ".join(f"w{(a + b) % 50 + 2}" for b in range(8))}) for a in range(24)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    recipe = {"base": str(tmp_path / "base"), "data": str(tmp_path / "data.jsonl"), "stages": ["finetune"]}
    recipe |= {"plan": '{"1": [0]}', "scope": "all", "deltas": ["none"], "use_cpu": True, "bf16": False}
    recipe |= {"output_dir": str(tmp_path / "a"), "max_steps": 9, "report_to": "none", "save_strategy": "no"}
    recipe |= {"adapter_dtype": "bfloat16"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    line = ["train", "--config", tmp_path / "recipe.yaml", "--max-steps", 1, "--output_dir", tmp_path / "b", "--json"]
    code, done = moextend(*line)
    assert code == 0, done
    assert done["adapter"] == str(tmp_path / "b") and done["stages"] == ["finetune"] and not (tmp_path / "a").exists()
    written = moextend("inspect", tmp_path / "b", "--json")[1]
    assert (written["num_parameters"], written["num_bytes"]) == (done["parameters"], done["bytes"])


def test_reports_side_by_side(moextend, tmp_path):
    for name in ("one", "two"):
        write_report(tmp_path / name, make_results(), title=name)
    code, found = moextend("report", tmp_path / "one", tmp_path / "two", "--picture", tmp_path / "f.svg", "--json")
    assert code == 0 and [report["title"] for report in found["reports"]] == ["one", "two"]
    assert (tmp_path / "f.svg").read_text().startswith("<?xml")
    code, text = moextend("report", tmp_path / "one")
    assert code == 0 and "perplexity" in text
    code, text = moextend("report", tmp_path)
    assert code == 2 and "is no report" in text
    for damaged, reason in ("{", "Expecting"), ("{}", "'title' is missing"):
        (tmp_path / "one" / "report.json").write_text(damaged)
        code, text = moextend("report", tmp_path / "one")
        assert code == 2 and f"is damaged: {reason}" in text


def test_completion(moextend, monkeypatch):
    """Without the package a word about it; with it, the shell's question is answered without importing torch."""
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    code, text = moextend("completion", "bash")
    assert code == 2 and "pip install 'moextend[completion]'" in text


def test_completion_answers_the_shell(tmp_path):
    pytest.importorskip("argcomplete")
    for line, words in {"moextend me": "merge ", "moextend pl": "plan ", "moextend merge --na": "--native "}.items():
        answer = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\v"}
        answer |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer"), "PYTHONPATH": str(ROOT)}
        code = "import sys, moextend_cli; sys.argv[0] = 'moextend'; moextend_cli.main()"
        subprocess.run([sys.executable, "-c", code], env={**os.environ, **answer}, check=True)
        assert set((tmp_path / "answer").read_text().split("\v")) == {words}


# ---------------------------------------------------------------- plan


def test_plan_says_what_a_run_would_take(adapter, moextend, wide):
    base = adapter.parent / "base"
    line = ["plan", "--base", base, "--layers", "0-1", "--new-experts", "2", "--scope", "all", "--tokens", "1e6"]
    code, found = moextend(*line, "--gpus", "2", "--json")
    assert code == 0 and found["layers"] == [0, 1]
    assert found == plan_training(base, layers=[0, 1], new_experts=2, scope="all", tokens=1e6, gpus=2)
    assert found == moextend(*line, "--base", base / "config.json", "--gpus", "2", "--json")[1] | {
        "base": found["base"]
    }
    code, text = moextend(*line)
    assert code == 0 and "MoExtend" in text and "a GPU, FSDP2" in text and "hours" in text
    assert "does not fit" not in text and "does not fit" in moextend(*line, "--gpu-memory", "1KB")[1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (["plan"], "--base"),
        (["plan", "--base", "BASE", "--layers", "x"], "no layers like"),
        (["plan", "--base", "BASE", "--layers", "3-1"], "no layers like"),
        (["plan", "--base", "BASE", "--gpu-memory", "80"], "no size above 0"),
        (["plan", "--base", "BASE", "--tokens", "-1"], "no number above 0"),
        (["plan", "--base", "BASE", "--fraction", "2"], "fraction=2.0"),
        (["plan", "--base", "BASE", "--layers", "9"], "not MoE layers"),
        (["plan", "--base", "/no/such/base"], "no such folder"),
    ],
)
def test_a_plan_without_meaning_is_code_2(line, reason, adapter, moextend):
    code, found = moextend(*(str(adapter.parent / "base") if word == "BASE" else word for word in line), "--json")
    assert code == 2 and reason in found["error"]
