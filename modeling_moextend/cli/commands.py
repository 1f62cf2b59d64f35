"""`moextend`: a command line for adapters. `moextend --help` tells all; docs/cli.md is that text."""

import argparse
import json
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from inspect import getdoc
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from ..configuration_moextend import DELTAS
from ..publishing.hub import publish_folder
from ..tools.base_weights import Unusable
from ..tools.compression import compress
from ..tools.inspection import diff_adapters, inspect_adapter
from ..tools.interrupts import STOPPED
from ..tools.merge import merge
from ..tools.verification import PROMPT, verify_adapter

OK, PROBLEM, UNREADABLE = 0, 1, 2
EXIT_CODES = """\
exit codes:
  0  all is well: read, every check passed, equal, written, pushed
  1  a problem was found: a check failed, the adapters differ, the merge or push was refused
  2  wrong usage, or something can't be read: not there, damaged, no network
  130  stopped by Ctrl-C
They mean the same for every command: of a damaged adapter verify too ends with 2."""
EXPECTED = (OSError, ValueError, ImportError, HTTPError, SafetensorError)  # the last but one: no network
AS_WRITTEN = argparse.RawDescriptionHelpFormatter
ADAPTER = "folder or Hub id of an adapter"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command (default: that of `sys.argv`); returns its exit code."""
    args = parsed(sys.argv[1:] if argv is None else argv)
    try:
        result = args.run(args)
    except KeyboardInterrupt:
        return failed("stopped; nothing was left half-written, and the same command begins anew", STOPPED, args.json)
    except Exception as error:
        if not isinstance(error, EXPECTED):  # a fault of ours
            Terminal(stderr=True).say(traceback.format_exc(), allowed="\n")
        refused = isinstance(error, ValueError) and not isinstance(error, Unusable)
        return failed(error, args.refused if refused else UNREADABLE, args.json, args.parser)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        args.show(Terminal(), result)
    return args.code(result)


class WrongUsage(Exception):
    """Arguments that a parser can't take: (parser, what is wrong)."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise WrongUsage(self, message)


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; wrong ones end the process, with JSON if they ask for it, and else as argparse does."""
    try:
        return build_parser().parse_args(argv)
    except WrongUsage as wrong:
        parser, message = wrong.args
        if "--json" not in argv:
            argparse.ArgumentParser.error(parser, escaped(message))
        raise SystemExit(failed(message, UNREADABLE, as_json=True)) from None


def failed(error: Exception | str, code: int, as_json: bool, parser: argparse.ArgumentParser | None = None) -> int:
    """Says what is wrong, and what the keywords in it are called as options of `parser`; returns the exit code."""
    text = str(error) if isinstance(error, (str, *EXPECTED)) else f"{type(error).__name__}: {error}"
    options = {} if parser is None else options_named(text, parser)
    if options:
        text += f"\nOn the command line: {', '.join(f'{name} is {option}' for name, option in options.items())}."
    if as_json:
        print(json.dumps({"error": text, "exit_code": code}))
    else:
        Terminal(stderr=True).say(f"moextend: {text}", allowed="\n")
    return code


def options_named(text: str, parser: argparse.ArgumentParser) -> dict[str, str]:
    """Keywords of Python in an error's text ("base=", "check_base=False") -> the options of `parser` that set them."""
    keywords = {
        f"{action.dest}={action.const if action.nargs == 0 else ''}": action.option_strings[-1]
        for action in parser._actions
        if action.option_strings
    }
    return {name: option for name, option in keywords.items() if re.search(rf"\b{re.escape(name)}", text)}


def escaped(text: str, allowed: str = "", encoding: str = "utf-8") -> str:
    """`text` with an escape like `\\x1b` for every character that is not printable (except those `allowed`) or not in
    `encoding`: what adapters, bases and the Hub say comes from strangers, and terminals act on control characters."""
    characters = (c if c.isprintable() or c in allowed else ascii(c)[1:-1] for c in text)
    return "".join(characters).encode(encoding, "backslashreplace").decode(encoding)


class Terminal(Console):
    """A console for texts of any origin: printed as they are (names may hold brackets, and long lines are for the
    reader to wrap), but escaped."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def say(self, text: str, allowed: str = "") -> None:
        self.print(escaped(text, allowed, self.encoding))

    def table(self, columns: Sequence[str], lines: Sequence[Sequence[object]], allowed: str = "") -> None:
        """A table, unless there is nothing in it."""
        table = Table()
        for column in columns:
            table.add_column(escaped(column, allowed, self.encoding), overflow="fold")
        for line in lines:
            table.add_row(*(escaped(str(cell), allowed, self.encoding) for cell in line))
        if lines:
            self.print(table)


# ---------------------------------------------------------------- commands: arguments -> result; texts of --help


def inspect_command(args: argparse.Namespace) -> dict[str, Any]:
    """Say what is in an adapter.

    For which base it is, how tokens reach its experts, and what it holds, layer by
    layer with the source experts; in a folder, which tensors hold NaN or infinity.
    Never reads a base; of a repository on the Hub only headers, a few kilobytes.

    examples:
      moextend inspect outputs/adapter
      moextend inspect me/my-adapter --revision v2 --tensors
      moextend inspect me/my-adapter --json
    """
    return inspect_adapter(args.adapter, **hub_options(args))


def verify_command(args: argparse.Namespace) -> dict[str, Any]:
    """Check an adapter against its base.

    Loads the base, and checks
      file    it is whole: the checksum of its tensors
      finite  no tensor holds NaN or infinity
      base    the base is the one it was made on: its fingerprint
      fit     names and shapes are what base and config ask for
      off     with the adapter off, logits are the base's, bit for bit
      sample  a greedy answer with the adapter: its logits are finite
    and prints the answer of base and adapter. What a failed check makes void is left out.

    examples:
      moextend verify outputs/adapter
      moextend verify me/my-adapter --base /data/mixtral --prompt "What is a monad?"
    """
    names = ("base", "encoder", "prompt", "image", "audio", "max_new_tokens", "dtype")
    return verify_adapter(args.adapter, **{name: getattr(args, name) for name in names}, **hub_options(args))


def verify_exit_code(result: dict[str, Any]) -> int:
    """A file that can't be read is no different here than in other commands."""
    unreadable = any(check["check"] == "file" and not check["ok"] for check in result["checks"])
    return OK if result["ok"] else UNREADABLE if unreadable else PROBLEM


def diff_command(args: argparse.Namespace) -> dict[str, Any]:
    """Compare two adapters.

    Entries of the config, tensors that one of them lacks, and for tensors in both the
    largest difference and the norm of the difference relative to the first one's.
    Reads both adapters whole, and never a base.

    examples:
      moextend diff outputs/checkpoint-100 outputs/checkpoint-200
      moextend diff me/my-adapter outputs/adapter --json
    """
    return diff_adapters(args.adapter, args.other)


def merge_command(args: argparse.Namespace) -> dict[str, Any]:
    """Write base and adapter into one new folder.

    A standalone checkpoint: the adapter's folder, with base and encoder in subfolders.
    It loads with trust_remote_code=True and needs nothing from elsewhere.

    With --native: the base's own architecture with more experts a layer, which loads
    without code of ours. It exists where it gives the same answers (up to rounding):
    every MoE layer extended by the same number, scope "all", selection "compete",
    calibration "none", no encoder, and a base whose router allows it. Elsewhere every
    condition that fails is named.

    A folder holds one adapter. One that was trained on top of others is refused, for it
    was not trained to answer without them.

    Needs memory for the adapter and about one file of the base (with --native: and the one
    that is written), not for the base. The folder appears whole or not at all.

    examples:
      moextend merge me/my-adapter outputs/standalone
      moextend merge outputs/adapter outputs/more-experts --native --max-shard-size 2GB
    """
    names = ("base", "encoder", "native", "check_base", "check_trained_on", "max_shard_size")
    return merge(args.adapter, args.output, **{name: getattr(args, name) for name in names}, **hub_options(args))


def compress_command(args: argparse.Namespace) -> dict[str, Any]:
    """Write an adapter anew with new experts of a low rank.

    Of each new expert the new adapter holds the difference to its source expert, cut to
    the nearest one of that rank (a truncated singular value decomposition), and nothing
    else changes. Says for each layer how much of the difference was lost: the norm of
    the error relative to it (Frobenius), and the largest error of a weight.

    Of the base only the source experts are read, one weight of a layer at a time. An
    adapter that has a rank already has to have a higher one. The folder appears whole or
    not at all.

    The card (README.md) stays behind, for its sizes are those of before: publishing
    writes a new one.

    An adapter that was trained on top of this one does not know the new one by its
    fingerprint: load it with the old one, or with check_trained_on=False.

    examples:
      moextend compress outputs/adapter outputs/small --rank 32
      moextend compress me/my-adapter outputs/small --rank 64 --base /data/mixtral
    """
    names = ("rank", "base", "check_base")
    return compress(args.adapter, args.output, **{name: getattr(args, name) for name in names}, **hub_options(args))


def plan_command(args: argparse.Namespace) -> dict[str, Any]:
    """Say what a training run would take, before a GPU is paid.

    From the base's config alone: new parameters, bytes of the adapter, memory and
    operations of a step, and hours, for new experts, for LoRA (rank 16, attention and
    experts) and for full fine-tuning, on each GPU under DDP and FSDP2.

    Parameters and bytes are exact. Memory and operations come from the sizes of the
    layers, with every token using new experts, and lie within a tenth of small runs
    that were measured; what the driver and gaps take is not in them, so a GPU counts
    as full at 92%. Hours stand on --tflops, what a GPU really reaches. The loss that
    keeps the base's text (scope gate) is not in them.

    The layers that get new experts are found by stage extend; here they are the upper
    ones, which cost least: below the lowest of them nothing is computed backward.

    examples:
      moextend plan --base mistralai/Mixtral-8x7B-Instruct-v0.1 --new-experts 1 --gpus 8
      moextend plan --base config.json --expert-rank 64 --gpus 2 --gpu-memory 24GB
      moextend plan --base Qwen/Qwen3-30B-A3B --layers 24-47 --tokens 5e8 --json
    """
    from ..training.planning import plan_training  # not above: other commands have no use for it, and it takes seconds

    names = ("layers", "fraction", "new_experts", "expert_rank", "scope", "deltas", "sequence", "batch", "gpus")
    names += ("checkpointing", "gpu_memory", "tokens", "tflops", "dtype")
    return plan_training(args.base, **{name: getattr(args, name) for name in names}, **hub_options(args))


def push_command(args: argparse.Namespace) -> dict[str, Any]:
    """Publish an adapter's folder on the Hub.

    One commit of exactly the files that make an adapter: weights, config, code,
    processor, card. The adapter is read and checked first. The token is that of
    `hf auth login`, or HF_TOKEN.

    examples:
      moextend push outputs/adapter me/my-adapter --private
      moextend push outputs/adapter me/my-adapter --revision v2 --base me/the-base
    """
    folder = Path(args.folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder.")
    if args.report is not None and not Path(args.report, "report.json").is_file():
        raise FileNotFoundError(f"{args.report}: no report there. examples/evaluate_adapter.py writes one.")
    options = {name: getattr(args, name) for name in ("base", "encoder", "report", "revision")}
    commit = publish_folder(folder, args.repo_id, private=args.private or None, **options)
    return {"repo_id": args.repo_id, "commit": commit.oid, "url": commit.commit_url}


def adapter_location(text: str) -> str:
    """An adapter's argument, refused as wrong usage where it can be neither a folder nor a Hub id."""
    if not Path(text).is_dir():
        try:
            hub_name(text)
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(f"{text} is no folder, and no Hub id like me/my-adapter") from None
    return text


def hub_name(text: str) -> str:
    """A Hub id; anything else is wrong usage."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        raise argparse.ArgumentTypeError(f"{text} is no Hub id like me/my-adapter") from None
    return text


def shard_size(text: str) -> str:
    """A size as huggingface_hub reads it; anything else is wrong usage."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?) ?[KMGT]B", text.upper())
    if number is None or not float(number[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size above 0 like 500MB or 2.5GB (units: KB, MB, GB, TB)")
    return text


def byte_count(text: str) -> float:
    """Bytes of a size like 80GB; anything else is wrong usage."""
    shard_size(text)
    return float(text[:-2]) * 1000 ** (1 + "KMGT".index(text[-2].upper()))


def layer_numbers(text: str) -> list[int]:
    """Numbers like 3,5,16-31; anything else is wrong usage."""
    layers = []
    for part in text.split(","):
        number = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if number is None or int(number[2] or number[1]) < int(number[1]):
            raise argparse.ArgumentTypeError(f"{text!r} are no layers like 3,5,16-31")
        layers += range(int(number[1]), int(number[2] or number[1]) + 1)
    return layers


def above_zero(text: str) -> float:
    """A number above 0, as 1e9; anything else is wrong usage."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def positive(text: str) -> int:
    """A whole number from 1 on; anything else is wrong usage."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def hub_options(args: argparse.Namespace) -> dict[str, str]:
    """The keywords for the Hub that the arguments name."""
    options = {name: getattr(args, name) for name in ("revision", "subfolder", "cache_dir")}
    return {name: value for name, value in options.items() if value is not None}


# ---------------------------------------------------------------- printing results


def show_inspect(console: Terminal, result: dict[str, Any]) -> None:
    console.say(f"{result['adapter']} (format {result['format']}, {', '.join(result['files'])})")
    for role in ("base", "encoder", "audio_encoder"):
        if result.get(role) is not None:
            part = result[role]
            location = f"{part['subfolder']}/ in this checkpoint" if part["subfolder"] else part["name_or_path"]
            revision = f" at {part['revision']}" if part["revision"] and not part["subfolder"] else ""
            console.say(f"{role.replace('_', ' ')}: {location}{revision} ({part['model_type']})")
    console.say(", ".join(f"{name} {result[name]}" for name in ("scope", "selection", "calibration")))
    if result["deltas"]:
        ranks = (f"{kind} ({f'rank {rank}' if rank else 'whole'})" for kind, rank in result["deltas"].items())
        console.say(f"deltas of {', '.join(ranks)}")
    if result["expert_rank"] is not None:
        console.say(f"new experts of rank {result['expert_rank']}: each is its source expert and a low-rank delta")
    if result["gate_threshold"] is not None:
        console.say(f"gate threshold {result['gate_threshold']}")
    if result["not_finite"]:
        console.say(f"NaN or infinity in {', '.join(result['not_finite'])}")
    lines = [
        [entry["layer"], " ".join(map(str, entry["source_experts"])), *sizes(entry)] for entry in result["layers"]
    ]
    lines += [[entry["part"], "", *sizes(entry)] for entry in result["others"]] + [["all", "", *sizes(result)]]
    console.table(["layer", "source experts", "tensors", "parameters", "bytes"], lines)


def show_inspect_all(console: Terminal, result: dict[str, Any]) -> None:
    show_inspect(console, result)
    lines = [[entry["name"], entry["dtype"], " x ".join(map(str, entry["shape"]))] for entry in result["tensors"]]
    console.table(["tensor", "dtype", "shape"], lines)


def sizes(entry: dict[str, Any]) -> list[str]:
    return [f"{entry[name]:,}" for name in ("num_tensors", "num_parameters", "num_bytes")]


def show_verify(console: Terminal, result: dict[str, Any]) -> None:
    lines = [["ok" if check["ok"] else "FAILED", check["check"], check["detail"]] for check in result["checks"]]
    console.table(["", "check", result["adapter"]], lines, allowed="\n")
    for name, text in (result["sample"] or {}).items():
        console.say(f"{name}: {text}", allowed="\n\t")


def show_diff(console: Terminal, result: dict[str, Any]) -> None:
    if result["equal"]:
        console.say("equal: config and every tensor, bit by bit")
        return
    names = result["adapters"]
    lines = [[entry["entry"], *map(short, entry["values"])] for entry in result["config"]]
    lines += [[entry["name"], *map(short, entry["values"])] for entry in result["shapes"]]
    lines += [[name, "is there", ""] for name in result["only_in"][0]]
    lines += [[name, "", "is there"] for name in result["only_in"][1]]
    console.table(["entry or tensor", *names], lines)
    lines = [
        [entry["name"], number(entry["max_abs"]), number(entry["relative"])]
        for entry in result["tensors"]
        if not entry["equal"]
    ]
    console.table(["tensor", "max |a - b|", "|a - b| / |a|"], lines)
    console.say(
        f"{len(result['tensors']) - len(lines)} of {len(result['tensors'])} tensors in both are equal, bit by bit"
    )


def short(value: object, length: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def show_merge(console: Terminal, result: dict[str, Any]) -> None:
    console.say(
        f"{result['folder']}: a {result['kind']} checkpoint, {result['files']} files, {result['bytes']:,} bytes"
    )


def show_compress(console: Terminal, result: dict[str, Any]) -> None:
    lines = [[entry["layer"], number(entry["relative"]), number(entry["max_abs"])] for entry in result["layers"]]
    console.table(["layer", "|error| / |difference to the source|", "max |error|"], lines)
    sizes = f"{result['bytes']:,} bytes of tensors, before {result['bytes_before']:,}"
    console.say(f"{result['folder']}: new experts of rank {result['rank']}, {sizes}")


def show_plan(console: Terminal, result: dict[str, Any]) -> None:
    base, adapter, layers, methods = (result[name] for name in ("base", "adapter", "layers", "methods"))
    console.say(f"base: {base['name']}, {counted(base['parameters'])} parameters, {counted(base['bytes'])}B")
    text = f"{len(layers)} layers ({', '.join(map(str, layers))})"
    sizes = f"{counted(adapter['parameters'])} parameters, {counted(adapter['bytes'])}B on disk"
    console.say(f"new experts in {text}: {sizes}")
    lines = [["parameters that train", *(counted(one["parameters"]) for one in methods.values())]]
    lines.append(["operations a step and GPU", *(counted(one["flops"]) for one in methods.values())])
    for part in next(iter(methods.values()))["memory"]:
        lines.append([f"memory: {part}", *(f"{counted(one['memory'][part])}B" for one in methods.values())])
    for way, name in (("ddp", "a GPU, DDP"), ("fsdp2", "a GPU, FSDP2")):
        needs = [one["per_gpu"][way] for one in methods.values()]
        lines.append([name, *(f"{counted(n['bytes'])}B{'' if n['fits'] else ': does not fit'}" for n in needs)])
    if next(iter(methods.values()))["hours"] is not None:
        lines.append(["hours", *(f"{one['hours']:,.1f}" for one in methods.values())])
    console.table(["", *methods], lines)


def counted(value: float) -> str:
    """A number with three digits and a unit: 2.82G."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or unit == "P":
            return f"{value:.3g} {unit}".rstrip() if unit else f"{value:.3g}"
        value /= 1000
    raise AssertionError


def show_push(console: Terminal, result: dict[str, Any]) -> None:
    console.say(f"published: {result['url']}")


# ---------------------------------------------------------------- arguments


def build_parser() -> Parser:
    """The parser of all commands."""
    text = "Plan MoExtend adapters; look into them, check, compare, export and publish them."
    parser = Parser("moextend", description=text, epilog=EXIT_CODES, formatter_class=AS_WRITTEN)
    hint = "`moextend <command> --help` says more"
    commands = parser.add_subparsers(dest="command", required=True, metavar="<command>", help=hint)

    command = add_command(commands, "inspect", inspect_command, show_inspect, refused=UNREADABLE)
    command.add_argument("adapter", type=adapter_location, help=ADAPTER)
    command.add_argument(
        "--tensors", dest="show", action="store_const", const=show_inspect_all, help="list every tensor"
    )
    add_hub_options(command)

    command = add_command(commands, "verify", verify_command, show_verify, code=verify_exit_code, refused=UNREADABLE)
    command.add_argument("adapter", type=adapter_location, help=ADAPTER)
    add_parts(command)
    command.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        metavar="DTYPE",
        help=f"to load base and encoder in: {', '.join(DTYPES)} (default: auto, what they were saved in)",
    )
    command.add_argument(
        "--prompt", default=PROMPT, help="what the sample answers; without a tokenizer some token ids are"
    )
    for kind in ("image", "audio"):
        command.add_argument(f"--{kind}", metavar="FILE", help=f"{kind} that stands before the prompt")
    command.add_argument(
        "--max-new-tokens", type=positive, default=20, metavar="N", help="length of the sample (default: 20)"
    )
    add_hub_options(command)

    command = add_command(
        commands,
        "diff",
        diff_command,
        show_diff,
        code=lambda result: OK if result["equal"] else PROBLEM,
        refused=UNREADABLE,
    )
    command.add_argument("adapter", type=adapter_location, help=ADAPTER)
    command.add_argument("other", type=adapter_location, help="another one")

    command = add_command(commands, "merge", merge_command, show_merge)
    command.add_argument("adapter", type=adapter_location, help=ADAPTER)
    command.add_argument("output", help="the new folder; may not exist yet")
    command.add_argument("--native", action="store_true", help="the base's own architecture with more experts")
    command.add_argument(
        "--max-shard-size",
        type=shard_size,
        default="5GB",
        metavar="SIZE",
        help="of files written anew, e.g. 500MB (default: 5GB)",
    )
    command.add_argument(
        "--no-check-base", dest="check_base", action="store_false", help="take another base than it was made on"
    )
    command.add_argument(
        "--no-check-trained-on",
        dest="check_trained_on",
        action="store_false",
        help="merge it without the adapters that it was trained on top of",
    )
    add_parts(command)
    add_hub_options(command)

    command = add_command(commands, "compress", compress_command, show_compress)
    command.add_argument("adapter", type=adapter_location, help=ADAPTER)
    command.add_argument("output", help="the new folder; may not exist yet")
    command.add_argument("--rank", type=positive, required=True, metavar="R", help="of each new expert's difference")
    command.add_argument("--base", help="folder or Hub id of the base, if it lies elsewhere than the adapter says")
    command.add_argument(
        "--no-check-base", dest="check_base", action="store_false", help="take another base than it was made on"
    )
    add_hub_options(command)

    command = add_command(commands, "plan", plan_command, show_plan, refused=UNREADABLE)
    add_plan_options(command)
    add_hub_options(command)

    command = add_command(commands, "push", push_command, show_push)
    command.add_argument("folder", help="that save_pretrained or the trainer wrote")
    command.add_argument("repo_id", type=hub_name, help="where to, e.g. me/my-adapter; made if it is not there")
    command.add_argument("--private", action="store_true", help="make the repository private")
    command.add_argument("--revision", metavar="BRANCH", help="branch to push to; made if it is not there")
    for part in ("base", "encoder"):
        text = f"Hub id of the {part}, where the adapter names another place"
        command.add_argument(f"--{part}", type=hub_name, metavar="ID", help=text)
    command.add_argument(
        "--report", metavar="FOLDER", help="of evaluate_adapter.py: results and pictures for the card"
    )
    return parser


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    show: Callable[[Terminal, dict[str, Any]], None],
    *,
    code: Callable[[dict[str, Any]], int] = lambda result: OK,
    refused: int = PROBLEM,
) -> argparse.ArgumentParser:
    """A command's parser.

    Args:
        run: parsed arguments -> JSON-ready result; its docstring is the help text.
        show: prints the result.
        code: result -> exit code.
        refused: exit code when `run` raises a `ValueError` that is no `Unusable`.
    """
    text = getdoc(run)
    brief = text.split("\n", 1)[0]
    parser = commands.add_parser(name, help=brief, description=text, epilog=EXIT_CODES, formatter_class=AS_WRITTEN)
    parser.set_defaults(run=run, show=show, code=code, refused=refused, parser=parser)
    parser.add_argument(
        "--json", action="store_true", help='print JSON: the result, or {"error": ..., "exit_code": ...}'
    )
    return parser


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help="Hub id or folder of a base, or its config.json")
    parser.add_argument("--layers", type=layer_numbers, metavar="L", help="that get new experts, like 16-31 or 3,5,7")
    parser.add_argument(
        "--fraction",
        type=above_zero,
        default=0.5,
        metavar="F",
        help="of the MoE layers, upper ones (default: 0.5)",
    )
    parser.add_argument(
        "--new-experts", type=positive, default=4, metavar="N", help="in each of these layers (default: 4)"
    )
    parser.add_argument("--expert-rank", type=positive, metavar="R", help="of new experts (default: whole ones)")
    parser.add_argument("--scope", choices=("all", "gate"), help="which tokens use them (default: gate)")
    kinds = ", ".join(DELTAS)
    parser.add_argument("--deltas", nargs="*", choices=tuple(DELTAS), metavar="D", help=f"any of {kinds}, or nothing")
    parser.add_argument("--sequence", type=positive, default=2048, metavar="S", help="tokens (default: 2048)")
    parser.add_argument("--batch", type=positive, default=1, metavar="B", help="sequences a GPU and step (default: 1)")
    parser.add_argument(
        "--no-checkpointing", dest="checkpointing", action="store_false", help="without gradient checkpointing"
    )
    parser.add_argument("--gpus", type=positive, default=1, metavar="G", help="default: 1")
    parser.add_argument(
        "--gpu-memory", type=byte_count, default="80GB", metavar="SIZE", help="of each of them (default: 80GB)"
    )
    parser.add_argument("--tokens", type=above_zero, metavar="T", help="of the data, all epochs, for the hours")
    parser.add_argument(
        "--tflops", type=above_zero, default=200.0, metavar="X", help="that a GPU reaches in training (default: 200)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES[1:], metavar="DTYPE", help="default: bfloat16")


def add_parts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="folder or Hub id of the base, if it lies elsewhere than the adapter says")
    parser.add_argument("--encoder", nargs="+", help="the same for its encoder, or for several in any order")


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of the adapter's repository")
    parser.add_argument("--subfolder", help="of the adapter in its repository")
    parser.add_argument("--cache-dir", metavar="DIR", help="of downloads (default: the usual one)")
