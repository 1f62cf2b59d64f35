"""Runs a command: arguments, result or error, exit code."""

import argparse
import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence

from .arguments import UNREADABLE, Parser, WrongUsage, build_parser
from .terminal import Terminal, escaped

STOPPED = 130  # the exit code of what a signal 2 ended, as shells count


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command (default: that of `sys.argv`); returns its exit code."""
    args = parsed(sys.argv[1:] if argv is None else argv)
    try:
        # With --json standard output holds one object: what a training says on its way goes to the other stream.
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            result = args.run(args)
    except KeyboardInterrupt as stop:
        return stopped(stop, args)
    except Exception as error:
        if not isinstance(error, expected()) or args.trains and not is_ours(error):
            Terminal(stderr=True).say(traceback.format_exc(), allowed="\n")
        return failed(error, args.refused if is_refusal(error) else UNREADABLE, args.json, args.parser)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        args.show(Terminal(), result)
    return args.code(result)


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; wrong ones end the process, with JSON if they ask for it, and else as argparse does."""
    parser = build_parser()
    if not argv and "_ARGCOMPLETE" not in os.environ:  # someone looks what there is
        parser.print_help(sys.stderr)
        raise SystemExit(UNREADABLE)
    if "_ARGCOMPLETE" in os.environ:  # the shell asks how the line could go on; it is answered and the process ends
        import argcomplete

        argcomplete.autocomplete(parser)
    try:
        args, unknown = parser.parse_known_args(argv)
        if unknown and not args.passes_on:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return args
    except WrongUsage as wrong:
        parser, message = wrong.args
        if "--json" not in argv:
            argparse.ArgumentParser.error(parser, escaped(message))
        raise SystemExit(failed(message, UNREADABLE, as_json=True)) from None


def expected() -> tuple[type[Exception], ...]:
    """Errors that are no fault of the program: the last but one says that there is no network."""
    from huggingface_hub.errors import HTTPError
    from safetensors import SafetensorError

    return OSError, ValueError, ImportError, HTTPError, SafetensorError


def is_refusal(error: Exception) -> bool:
    """Whether what was given could be read, and the answer is no."""
    from modeling_moextend.tools.base_weights import Unusable

    return isinstance(error, ValueError) and not isinstance(error, Unusable)


def is_ours(error: Exception) -> bool:
    """Whether the library said it: what comes from elsewhere in hours of training needs its traceback."""
    return "modeling_moextend" in traceback.extract_tb(error.__traceback__)[-1].filename


def stopped(stop: KeyboardInterrupt, args: argparse.Namespace) -> int:
    """Says, on one process of several, where Ctrl-C came and how to go on."""
    if not stop.args:
        return failed("stopped; nothing was left half-written, and the same command begins anew", STOPPED, args.json)
    if os.environ.get("RANK", "0") == "0":
        if args.json:
            return failed(f"Stopped: {stop.args[0]}", STOPPED, True)
        print(f"\nStopped: {stop.args[0]}", file=sys.stderr)
    return STOPPED


def failed(error: Exception | str, code: int, as_json: bool, parser: Parser | None = None) -> int:
    """Says what is wrong, and what the keywords in it are called as options of `parser`; returns the exit code."""
    text = str(error) if isinstance(error, (str, *expected())) else f"{type(error).__name__}: {error}"
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
