"""The command line: what each command says and prints as JSON, its exit codes, and its --help in docs/cli.md.

    python tests/test_cli.py

writes that part of docs/cli.md anew.
"""

import argparse
import configparser
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import make_base, make_encoder, shake
from safetensors.torch import load_file, save_file
from test_export import OBSTACLES

from modeling_moextend import MoExtendForCausalLM, cli
from modeling_moextend.adapter_moextend import FILE, INDEX, header_checksum, read_adapter
from modeling_moextend.native import NUMBER

ROOT = Path(__file__).parents[1]
PLAN = {1: [0], 3: [2, 5]}
NATIVE = {"scope": "all", "selection": "compete", "calibration": "none"}
DOCUMENT = ROOT / "docs" / "cli.md"
COMMANDS_TITLE = "## Commands\n"
COMMANDS = ("inspect", "verify", "diff", "merge", "push")

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
    assert named - {"condition"} == {*OBSTACLES}
    assert all(family in text for family in NUMBER)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse_and_exit_codes(command):
    text = help_text(command)
    examples = re.findall(rf"^ *moextend ({command} .*)$", text, flags=re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        args = cli.build_parser().parse_args([word.strip('"') for word in re.findall(r'"[^"]*"|\S+', example)])
        assert args.command == command
    assert "exit codes:\n  0  " in text and "\n  1  " in text and "\n  2  " in text


def test_every_option_is_explained():
    (commands,) = [action for action in cli.build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert tuple(commands.choices) == COMMANDS
    for parser in commands.choices.values():
        assert all(action.help for action in parser._actions)


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
    python = [sys.executable, "-m", "modeling_moextend.cli"]
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
def moextend(capsys):
    """Runs a command: (exit code, what it printed; with --json as an object)."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return code, json.loads(output.out) if "--json" in arguments else output.out + output.err

    return run


def rewrite(adapter, **changes):
    """The adapter's file with other tensors, its header as before."""
    metadata = read_adapter(adapter)[2]
    metadata = {key: text for key, text in metadata.items() if "checksum" not in key}
    metadata["header_checksum"] = header_checksum(metadata)
    save_file({**load_file(adapter / FILE), **changes}, adapter / FILE, metadata)


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
    assert [row["part"] for row in found["others"]] == ["gate", "projector"]
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


@pytest.mark.parametrize("command", ["inspect", "diff"])
def test_what_cannot_be_read_is_code_2(command, adapter, moextend, capsys):
    more = [adapter] if command == "diff" else []
    for place in ("nobody/nothing", adapter.parent / "base"):
        code, text = moextend(command, place, *more)
        assert code == 2 and "holds no MoExtend adapter" in text
    with pytest.raises(SystemExit) as left:
        moextend(command, adapter / "nowhere", *more)
    assert left.value.code == 2 and "no folder, and no Hub id" in capsys.readouterr().err
    (adapter / FILE).write_bytes((adapter / FILE).read_bytes()[:-10])
    code, text = moextend(command, adapter, *more)
    assert code == 2 and "damaged" in text
    code, found = moextend(command, adapter, *more, "--json")
    assert code == 2 and "damaged" in found["error"]


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
    assert code == 1 and checks(found) == {"file": False} and "checksum" in found["checks"][0]["detail"]
    content[-1] ^= 1
    (adapter / FILE).write_bytes(content)
    code, text = moextend("verify", adapter, "--base", adapter.parent / "nowhere")
    assert code == 2 and "can't be loaded" in text


@pytest.mark.parametrize("option", ["--dtype=foo", "--max-new-tokens=0", "--max-new-tokens=x"])
def test_verify_refuses_values_that_mean_nothing(option, adapter, moextend, capsys):
    with pytest.raises(SystemExit) as left:
        moextend("verify", adapter, option)
    assert left.value.code == 2 and option.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("command", [["verify"], ["merge"], ["merge", "--native"]])
def test_a_damaged_base_is_code_2(command, adapter, tmp_path, moextend):
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    more = [tmp_path / "merged"] if command[0] == "merge" else []
    code, found = moextend(*command, adapter, *more, "--json")
    assert code == 2 and "incomplete metadata" in found["error"]
    assert not (tmp_path / "merged").exists()


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
        model.adapter_tensors()["layers.3.router.weight"][1, 4] = torch.nan
    model.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        model.adapter_tensors()["layers.1.router.weight"][0, 5] = -1.5
    model.config.image_token_id = 77
    model.extend({2: [0]})
    model.save_pretrained(tmp_path / "other")
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
    monkeypatch.setattr(cli, "merge", lambda *args, **options: given.update(args=args, **options) or done)
    options = ["--native", "--base", "b", "--no-check-base", "--max-shard-size", "2GB", "--revision", "v2"]
    code, text = moextend("merge", "a", "out", *options)
    assert code == 0 and text == "out: a native checkpoint, 1 files, 2 bytes\n"
    assert given == {
        "args": ("a", "out"),
        "base": "b",
        "encoder": None,
        "native": True,
        "check_base": False,
        "max_shard_size": "2GB",
        "revision": "v2",
    }


# ---------------------------------------------------------------- push


def test_push_refuses_what_is_no_adapters_folder(adapter, tmp_path, moextend):
    code, text = moextend("push", adapter / "nowhere", "me/x")
    assert code == 2 and "no such folder" in text
    assert moextend("push", tmp_path / "base", "me/x")[0] == 2
    moextend("merge", adapter, tmp_path / "merged")
    code, text = moextend("push", tmp_path / "merged", "me/x")
    assert code == 1 and f"hf upload me/x {tmp_path / 'merged'}" in text
    rewrite(adapter, **{"layers.1.router.weight": torch.zeros(1, 32)})
    (adapter / FILE).write_bytes((adapter / FILE).read_bytes()[:-3])
    assert moextend("push", adapter, "me/x")[0] == 1


if __name__ == "__main__":
    os.environ["COLUMNS"] = "100"
    DOCUMENT.write_text(document(), encoding="utf-8")
