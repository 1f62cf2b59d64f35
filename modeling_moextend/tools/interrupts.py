"""Ctrl-C: it ends a command with one line that says where it stopped and how to go on."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

STOPPED = 130  # the exit code of what a signal 2 ended, as shells count


@contextlib.contextmanager
def stopped_at(where: Callable[[], str]) -> Iterator[None]:
    """Gives a `KeyboardInterrupt` that comes out of the block the text `where()`; one from further inside keeps its
    own."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if stop.args:
            raise
        raise KeyboardInterrupt(where()) from stop


def run_script(main: Callable[[], None], otherwise: str = "nothing was written; the same command begins anew") -> None:
    """Runs a script's `main`; Ctrl-C ends the process with one line and exit code 130, on one process of several.

    Args:
        otherwise: what to say where the interrupt does not say where it came.
    """
    try:
        main()
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"\nStopped: {stop.args[0] if stop.args else otherwise}", file=sys.stderr)
        raise SystemExit(STOPPED) from None
