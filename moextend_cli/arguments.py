"""The arguments of every command. Nothing here imports torch: --help and completion are there at once."""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from inspect import getdoc
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import commands, results
from .options import add_recipe_options

if TYPE_CHECKING:
    from .terminal import Terminal

OK, PROBLEM, UNREADABLE = 0, 1, 2
EXIT_CODES = """\
exit codes:
  0  all is well: read, every check passed, equal, written, pushed
  1  the answer is no: a check failed, the adapters differ, merge, compress or push refused
  2  wrong usage, or what was given is of no use: not there, damaged, of another kind, no network
  130  stopped by Ctrl-C
They mean the same for every command: of a damaged adapter verify too ends with 2."""
AS_WRITTEN = argparse.RawDescriptionHelpFormatter
ADAPTER = "folder or Hub id of an adapter"
DTYPES = ("auto", "float32", "bfloat16", "float16")
SHELLS = ("bash", "zsh", "fish")
DELTAS = ("embedding", "attention", "output")


class WrongUsage(Exception):
    """Arguments that a parser can't take: (parser, what is wrong)."""


class Parser(argparse.ArgumentParser):
    """Takes words of an option with - and with _ between them, and positional arguments by their names as well."""

    def error(self, message: str) -> NoReturn:
        raise WrongUsage(self, message)

    def parse_known_args(
        self, args: list[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        found, unknown = super().parse_known_args(self.spelled(list(args)), namespace)
        if not hasattr(found, "given"):  # a command's own words, as they were typed
            found.given = list(args)
            for check in getattr(found, "checks", ()):
                check(found)
        return found, unknown

    def spelled(self, words: list[str]) -> list[str]:
        """`words` in the parser's own spelling: `--repo_id me/x` is the positional argument `repo_id`."""
        names = [action.dest for action in self._actions if not action.option_strings]
        if names == ["command"]:
            return words
        positional, others, words = {}, [], iter(words)
        for word in words:
            name, equals, value = word.partition("=")
            dest = name[2:].replace("-", "_")
            if not word.startswith("--") or name == "--":
                others.append(word)
            elif dest in names:
                positional[dest] = value if equals else next(words, "")
            else:
                others.append(f"--{dest.replace('_', '-')}{equals}{value}")
        if positional and len(positional) < len(names) and others and not others[0].startswith("-"):
            missing = ", ".join(f"--{name.replace('_', '-')}" for name in names if name not in positional)
            self.error(f"name all of what a command works on, or nothing of it: {missing} is missing")
        return [positional[name] for name in names if name in positional] + others


def library() -> Path:
    """The folder of the library, found without importing it."""
    return Path(find_spec("modeling_moextend").submodule_search_locations[0])


def version() -> str:
    """The library's version, as its source says: what is installed in place may have older metadata."""
    return re.search(r'^__version__ = "(.+)"', (library() / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)[
        1
    ]


class ShowVersion(argparse.Action):
    """--version: that of the library, without importing it."""

    def __init__(self, option_strings: list[str], dest: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> NoReturn:
        print(f"moextend {version()}")
        parser.exit()


def build_parser() -> Parser:
    """The parser of all commands."""
    text = "Train MoExtend adapters, measure them, talk to them, look into them, export and publish them."
    parser = Parser("moextend", description=text, epilog=EXIT_CODES, formatter_class=AS_WRITTEN)
    parser.add_argument("--version", action=ShowVersion)
    hint = "`moextend <command> --help` says more"
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="<command>", help=hint)

    command = add_command(subparsers, "inspect", commands.inspect_command, results.show_inspect)
    command.add_argument("adapter", type=adapter_location, help=ADAPTER)
    command.add_argument(
        "--tensors", dest="show", action="store_const", const=results.show_inspect_all, help="list every tensor"
    )
    add_hub_options(command, "adapter")

    command = add_command(
        subparsers, "verify", commands.verify_command, results.show_verify, code=verify_exit_code, refused=UNREADABLE
    )
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
        "--prompt", type=str, default="The", help="what the sample answers; without a tokenizer some token ids are"
    )
    for kind in ("image", "audio"):
        command.add_argument(f"--{kind}", metavar="FILE", help=f"{kind} that stands before the prompt")
    command.add_argument(
        "--max-new-tokens", type=positive, default=20, metavar="N", help="length of the sample (default: 20)"
    )
    add_hub_options(command, "adapter", loads_base=True)

    command = add_command(
        subparsers,
        "diff",
        commands.diff_command,
        results.show_diff,
        code=lambda result: OK if result["equal"] else PROBLEM,
    )
    command.add_argument("adapter", type=adapter_location, help=ADAPTER)
    command.add_argument("other", type=adapter_location, help="another one")

    command = add_command(subparsers, "merge", commands.merge_command, results.show_merge, refused=PROBLEM)
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
    add_hub_options(command, "adapter", loads_base=True)

    command = add_command(subparsers, "compress", commands.compress_command, results.show_compress, refused=PROBLEM)
    command.add_argument("adapter", type=adapter_location, help=ADAPTER)
    command.add_argument("output", help="the new folder; may not exist yet")
    command.add_argument("--rank", type=positive, required=True, metavar="R", help="of each new expert's difference")
    command.add_argument("--base", help="folder or Hub id of the base, if it lies elsewhere than the adapter says")
    command.add_argument(
        "--no-check-base", dest="check_base", action="store_false", help="take another base than it was made on"
    )
    add_hub_options(command, "adapter", loads_base=True)

    command = add_command(
        subparsers, "plan", commands.plan_command, results.show_plan, checks=[needs("tokens", "tflops")]
    )
    add_plan_options(command)
    add_hub_options(command, "base")

    command = add_command(subparsers, "push", commands.push_command, results.show_push, refused=PROBLEM)
    command.add_argument("adapter", metavar="folder", help="that save_pretrained or the trainer wrote")
    command.add_argument("repo_id", type=hub_name, help="where to, e.g. me/my-adapter; made if it is not there")
    command.add_argument("--private", action="store_true", help="make the repository private")
    command.add_argument("--revision", metavar="BRANCH", help="branch to push to; made if it is not there")
    text = "Hub id of the base, where the adapter names another place"
    command.add_argument("--base", type=hub_name, metavar="ID", help=text)
    text = "the same for its encoder; once for each of several"
    command.add_argument("--encoder", action="append", type=hub_name, metavar="ID", help=text)
    command.add_argument(
        "--report", metavar="FOLDER", help="of `moextend evaluate`: results and pictures for the card"
    )
    text = "picture of the router shift (default: what stage extend left there)"
    command.add_argument("--shift", metavar="FILE", help=text)
    command.add_argument("--license", metavar="NAME", help="of the adapter, for the card")
    command.add_argument("--language", nargs="+", metavar="CODE", help="ISO 639 codes, for the card")
    text = "what it was trained on, for the card: Hub ids, or names of files"
    command.add_argument("--datasets", nargs="+", metavar="NAME", help=text)
    text = "say what would be uploaded, beside the card's pictures, and stop"
    command.add_argument("--dry-run", action="store_true", help=text)

    command = add_command(subparsers, "train", commands.train_command, results.show_train)
    add_recipe(command, "training.recipes", "a recipe: its file, or the name of one that ships")
    add_recipe_options(command, library())

    of_questions = needs("questions", "image_folder", "max_questions", "metric", "max_new_tokens")
    command = add_command(
        subparsers, "evaluate", commands.evaluate_command, results.show_evaluate, checks=[of_questions]
    )
    command.add_argument("adapter", type=adapter_location, help=ADAPTER)
    add_evaluate_options(command)
    add_parts(command)

    command = add_command(subparsers, "report", commands.report_command, results.show_report)
    command.add_argument("folders", nargs="+", help="of `moextend evaluate`, or their report.json")
    command.add_argument("--picture", metavar="FILE", help="draw accuracy against forgetting there (.png, .svg, .pdf)")

    command = add_command(subparsers, "quickstart", commands.quickstart_command, results.show_nothing)
    add_recipe(command, "quickstart.run", "another recipe than easy_vqa: its file, or the name of one that ships")
    add_recipe_options(command, library(), quickstart=True)

    command = add_command(subparsers, "chat", commands.chat_command, results.show_nothing, as_json=False)
    command.add_argument("adapter", type=adapter_location, help=ADAPTER)
    add_talk_options(command)
    add_parts(command)

    command = add_command(subparsers, "demo", commands.demo_command, results.show_nothing, as_json=False)
    command.add_argument("adapter", type=adapter_location, help=ADAPTER)
    add_talk_options(command)
    command.add_argument("--port", type=port, metavar="N", help="default: the first free one from 7860 on")
    command.add_argument("--share", action="store_true", help="behind a public link of gradio's, for 72 hours")
    add_parts(command)

    command = add_command(subparsers, "completion", commands.completion_command, results.show_completion)
    command.add_argument("shell", choices=SHELLS, help=f"one of {', '.join(SHELLS)}")
    return parser


def add_talk_options(parser: argparse.ArgumentParser) -> None:
    text = "length of an answer (default: 256)"
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help=text)
    text = "draw tokens at this temperature (default: the likeliest one)"
    parser.add_argument("--temperature", type=above_zero, default=0.0, metavar="T", help=text)
    parser.add_argument("--dtype", default="auto", choices=DTYPES, metavar="DTYPE", help="default: the base's")


def add_recipe(parser: argparse.ArgumentParser, module: str, text: str) -> None:
    """The options of a command that trains. Words that are no option of ours are the trainer's, which the library's
    `module` has a parser for."""
    parser.allow_abbrev = False
    parser.usage = f"{parser.prog} [-h] [--json] [--config RECIPE] [--option VALUE ...]"
    parser.set_defaults(passes_on=True, trains=True)
    parser.add_argument("--config", metavar="RECIPE", help=text)
    text = "show the trainer's options too, several hundred, and exit"
    parser.add_argument("--help-all", action=HelpAll, const=f"modeling_moextend.{module}", help=text)


class HelpAll(argparse.Action):
    """--help-all: what the library's parser says of every option."""

    def __init__(self, option_strings: list[str], dest: str, const: str, help: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, const=const, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> NoReturn:
        print(import_module(self.const).recipe_parser().format_help(), end="")
        parser.exit()


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", required=True, help="JSON lines with texts that the base knew")
    parser.add_argument("--questions", help="JSON or JSON lines with the new task; default: only the base's text")
    parser.add_argument("--image-folder", help="what image paths start from; default: the folder of --questions")
    parser.add_argument("--max-questions", type=positive, metavar="N", help="a random sample of so many (seed 0)")
    metrics = ("exact_match", "vqa_accuracy")
    parser.add_argument("--metric", choices=metrics, help="of the answers (default: exact_match)")
    text = "of the gate, with scope 'gate' (default: -1 -0.5 0 0.5 1)"
    parser.add_argument("--thresholds", type=finite, nargs="*", metavar="Z", help=text)
    text = "report folders to show in the frontier as well"
    parser.add_argument("--compare", nargs="*", default=[], metavar="FOLDER", help=text)
    parser.add_argument("--title", help="the adapter's name in the report (default: its folder's)")
    parser.add_argument("--max-length", type=positive, default=256, metavar="N", help="tokens of a text that count")
    text = "tokens at which an answer that has not ended is cut (default: 64)"
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help=text)
    text = "texts at once (default: 16); four times as many questions"
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help=text)
    parser.add_argument("--dtype", default="auto", choices=DTYPES, metavar="DTYPE", help="default: the base's")
    parser.add_argument("--output", default="report", metavar="FOLDER", help="of the report (default: report)")


def add_command(
    subparsers: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    show: "Callable[[Terminal, dict[str, Any]], None]",
    *,
    code: Callable[[dict[str, Any]], int] = lambda result: OK,
    refused: int = UNREADABLE,
    as_json: bool = True,
    checks: Sequence[Callable[[argparse.Namespace], None]] = (),
) -> argparse.ArgumentParser:
    """A command's parser.

    Args:
        run: parsed arguments -> JSON-ready result; its docstring is the help text.
        show: prints the result.
        code: result -> exit code.
        refused: exit code when `run` raises a `ValueError` that is no `Unusable`: whether "no" is an answer to it.
        as_json: whether it has a result to print as JSON.
        checks: parsed arguments -> `WrongUsage`, where some of them mean nothing beside others.
    """
    text = getdoc(run)
    brief = text.split("\n", 1)[0]
    parser = subparsers.add_parser(name, help=brief, description=text, epilog=EXIT_CODES, formatter_class=AS_WRITTEN)
    choices = {"run": run, "show": show, "code": code, "refused": refused, "parser": parser, "checks": [*checks]}
    parser.set_defaults(**choices, json=False, passes_on=False, trains=False)
    parser.register("type", None, not_empty)  # of every argument that names no other
    if as_json:
        text = 'print JSON: the result, or {"error": ..., "exit_code": ...}'
        parser.add_argument("--json", action="store_true", help=text)
    return parser


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help="Hub id or folder of a base, or its config.json")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--layers", type=layer_numbers, metavar="L", help="that get new experts, like 16-31 or 3,5,7")
    which.add_argument(
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
        "--tflops", type=above_zero, metavar="X", help="that a GPU reaches in training, for the hours (default: 200)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES[1:], metavar="DTYPE", help="default: bfloat16")


def verify_exit_code(result: dict[str, Any]) -> int:
    """A file that can't be read is no different here than in other commands."""
    unreadable = any(check["check"] == "file" and not check["ok"] for check in result["checks"])
    return OK if result["ok"] else UNREADABLE if unreadable else PROBLEM


def add_parts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="folder or Hub id of the base, if it lies elsewhere than the adapter says")
    parser.add_argument("--encoder", action="append", help="the same for its encoder; once for each of several")


def add_hub_options(parser: argparse.ArgumentParser, what: str, loads_base: bool = False) -> None:
    """Where in a repository the argument `what` lies. A command that `loads_base` may download that in any case."""
    parser.add_argument("--revision", help=f"branch, tag or commit of the {what}'s repository")
    parser.add_argument("--subfolder", help=f"of the {what} in its repository")
    parser.add_argument("--cache-dir", metavar="DIR", help="of downloads (default: the usual one)")
    of_the_hub = ("revision",) if loads_base else ("revision", "cache_dir")

    def check(args: argparse.Namespace) -> None:
        place = getattr(args, what)
        if Path(place).exists() and (without := given_among(of_the_hub, args)):
            args.parser.error(
                f"{', '.join(without)}: of no effect, for the {what} {place} is no repository on the Hub"
            )

    parser.get_default("checks").append(check)


def needs(what: str, *names: str) -> Callable[[argparse.Namespace], None]:
    """A check that refuses the options `names` without the option `what`."""

    def check(args: argparse.Namespace) -> None:
        if getattr(args, what) is None and (without := given_among(names, args)):
            args.parser.error(f"{', '.join(without)}: of no effect without --{what}")

    return check


def given_among(names: Sequence[str], args: argparse.Namespace) -> list[str]:
    """Those of the options `names`, which have no default, that were given, as they are typed."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]


# ---------------------------------------------------------------- what an argument may be


def not_empty(text: str) -> str:
    """Any words; none are wrong usage, for a path of no words would be the folder that one happens to be in."""
    if not text.strip():
        raise argparse.ArgumentTypeError("may not be empty")
    return text


def adapter_location(text: str) -> str:
    """An adapter's argument, refused as wrong usage where it can be neither a folder nor a Hub id."""
    if Path(not_empty(text)).is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file: give the folder that an adapter lies in, or a Hub id")
    if not Path(text).is_dir():
        try:
            hub_name(text)
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(f"{text} is no folder, and no Hub id like me/my-adapter") from None
    return text


def hub_name(text: str) -> str:
    """A Hub id; anything else is wrong usage."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

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


def finite(text: str) -> float:
    """A number that is not infinite; anything else is wrong usage."""
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def port(text: str) -> int:
    """A port of this machine; anything else is wrong usage."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port from 1 to 65535")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1 on; anything else is wrong usage."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)
