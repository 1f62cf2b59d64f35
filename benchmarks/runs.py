"""The file of results, one JSON line a run; which learning rate wins; and the figures that tables are made of.

A line: `task`, `method`, `rate`, `seed`, `settings` (these five are its key), `error` (`None`, or the end of what the
run said before it failed), and what `run.py` measured: `validation`, `test`, `text`, `bit_equal`, `trainable`,
`seconds`.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from methods import Method
from tasks import Task, other_base

KEY = ("task", "method", "rate", "seed", "settings")
VERSION = 1  # of the protocol: raise it when records, training or measures change, and old results no longer count
GROUPS = {  # columns of the table: how the text starts, and whether it is in the retention data
    "windows": ("windows/code", "windows/manual", "windows/chat"),
    "aligned": ("aligned/code", "aligned/manual", "aligned/chat", "aligned/questions"),
    "left out, windows": ("windows/science",),
    "left out, aligned": ("aligned/science",),
}
EVERYWHERE = tuple(domain for domains in GROUPS.values() for domain in domains)


def settings_hash(task: Task, method: Method) -> str:
    """Ten characters that change with anything that a run depends on beside task, method, rate and seed."""
    settings = {"version": VERSION, "task": asdict(task), "method": method.settings(), **other_base()}
    return hashlib.sha1(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def key(run: dict[str, Any]) -> tuple:
    return tuple(run[name] for name in KEY)


# ---------------------------------------------------------------- the file


def read_runs(path: str | os.PathLike) -> list[dict[str, Any]]:
    """[run] of a results file; none where there is no file yet. The last line of a run that was cut off is dropped.

    Raises:
        ValueError: another line is no JSON: names it.
    """
    path = Path(path)
    if not path.exists():
        return []
    whole = path.read_bytes()
    complete = whole[: whole.rfind(b"\n") + 1]
    if len(complete) < len(whole):
        cut = len(whole) - len(complete)
        print(f"{path}: the last line is cut off ({cut} bytes without an end); dropped, to be rerun.")
        os.truncate(path, len(complete))
    runs = []
    for number, line in enumerate(complete.decode("utf-8").splitlines(), start=1):
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {path} is no JSON ({error}): mend or delete it.") from error
    return runs


def append_run(path: str | os.PathLike, run: dict[str, Any]) -> None:
    """Adds one line, on the disk when this returns."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")
        file.flush()
        os.fsync(file.fileno())


def missing(chosen: list[dict[str, Any]], runs: list[dict[str, Any]], retry: bool = False) -> list[dict[str, Any]]:
    """Those of the `chosen` runs that no line has; with `retry` also those that failed."""
    done = {key(run) for run in runs if not (retry and run["error"])}
    return [run for run in chosen if key(run) not in done]


def latest(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last line of each key: one that was retried counts as it ended."""
    return list({key(run): run for run in runs}.values())


# ---------------------------------------------------------------- what the lines say


def perplexity(run: dict[str, Any], domains: Sequence[str] = EVERYWHERE, which: str = "after") -> float:
    """Geometric mean over domains of the text read, 1 or more, lower is better; `which`: "base" or "after"."""
    logs = [math.log(run["text"][domain][which]) for domain in domains]
    return math.exp(min(sum(logs) / len(logs), 700.0))


def rise(run: dict[str, Any], domains: Sequence[str] = EVERYWHERE) -> float:
    """Rise of the base's perplexity in percent, 0 is nothing forgotten."""
    return 100 * (perplexity(run, domains) / perplexity(run, domains, "base") - 1)


def winner(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The run of a sweep whose rate the other seeds take, or `None` where all failed.

    The highest validation accuracy wins; then the lowest base perplexity afterwards; then the lowest rate.
    """
    worked = [run for run in runs if not run["error"]]
    return min(worked, key=lambda run: (-run["validation"], perplexity(run), run["rate"]), default=None)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, lowest, highest)."""
    return sum(values) / len(values), min(values), max(values)
