"""Tables and the frontier picture from the results of `forgetting.py`.

    python benchmarks/report.py                                      # prints Markdown, writes results/forgetting.png
    python benchmarks/report.py benchmarks/results/ablations.jsonl

Accuracy is that of the validation split and of the test split at the rate that won on the validation split, which
favours whoever had luck there: mean over seeds (lowest to highest). Then the rise of the base's perplexity in percent,
mean over seeds (to the highest): of windows of text and of text from its own start (documents, chats, questions), in
domains of the retention data and in the one left out of it.
"""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from methods import METHODS, changed
from runs import GROUPS, latest, read_runs, rise, settings_hash, spread, winner
from tasks import TASKS

from modeling_moextend.evaluation.figures import draw_frontier, new_figure

SPLITS = ("validation", "test")
ACROSS = 3  # panels of the picture
OVERVIEW = ("gate_deltas", "gate_deltas_self", "modality", "lora_replay", "full_replay", "full")  # its columns
COLUMNS = ("method", "rate", "seeds", *SPLITS, *GROUPS, "captured", "seconds")


def by_pair(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """{task: {method: [run]}} in the order of the file, each run as it ended last."""
    pairs = {}
    for run in latest(runs):
        pairs.setdefault(run["task"], {}).setdefault(run["method"], []).append(run)
    return pairs


def chosen(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A method's runs at the rate that won on the seed it was swept on; none where all failed.

    Only those with the settings of its last line: what was run before a setting changed is history.
    """
    worked = [run for run in runs if not run["error"] and run["settings"] == runs[-1]["settings"]]
    if not worked:
        return []
    best = winner([run for run in worked if run["seed"] == swept_seed(worked)])
    return sorted((run for run in worked if run["rate"] == best["rate"]), key=lambda run: run["seed"])


def swept_seed(runs: list[dict[str, Any]]) -> int:
    """The seed with most runs: of these one has all rates, the others the winner's only. Ties: the lowest."""
    seeds = [run["seed"] for run in runs]
    return max(sorted(set(seeds)), key=seeds.count)


def figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A table's entry from the chosen runs of a method: {column: value}; numbers are (mean, lowest, highest)."""
    captured = [part["captured"] for run in runs for part in run["text"].values() if part["captured"] is not None]
    return {
        "rate": runs[0]["rate"],
        "seeds": len(runs),
        **{split: spread([run[split] for run in runs]) for split in SPLITS},
        **{group: spread([rise(run, domains) for run in runs]) for group, domains in GROUPS.items()},
        "captured": spread(captured) if captured else None,
        "seconds": spread([sum(run["seconds"].values()) for run in runs]),
        "bit_equal": all(run["bit_equal"] for run in runs),
    }


def markdown(runs: list[dict[str, Any]]) -> str:
    """One table a task, best test accuracy first; below it methods whose runs all failed, and outdated ones."""
    parts = []
    for task, methods in by_pair(runs).items():
        shown = {method: part for method, ran in methods.items() if (part := chosen(ran))}
        records = {method: figures(part) for method, part in shown.items()}
        lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        for method, record in sorted(records.items(), key=lambda item: -item[1]["test"][0]):
            lines.append("| " + " | ".join(cells(method, record)) + " |")
        lines += shares(shown)
        named = {
            "Failed": sorted(set(methods) - set(records)),
            "Of earlier records or settings": [method for method, part in shown.items() if outdated(part[0])],
        }
        for what, names in named.items():
            lines += ["", f"{what}: {', '.join(names)}."] if names else []
        parts.append("\n".join([f"### {task}", "", *lines]))
    return "\n\n".join(parts) + "\n"


def overview(runs: list[dict[str, Any]]) -> str:
    """A line a task, a column for each of `OVERVIEW`: accuracy on both splits, and what the base lost, means over
    seeds; below it how many seeds, where these are fewer than three."""
    found = {
        task: {m: part for m in OVERVIEW if (part := chosen(ran.get(m, [])))} for task, ran in by_pair(runs).items()
    }
    shown = [method for method in OVERVIEW if any(method in parts for parts in found.values())]
    lines = ["| task | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for task, parts in found.items():
        lines.append(f"| {task} | " + " | ".join(brief(parts[m]) if m in parts else "" for m in shown) + " |")
    fewer = [
        f"{task} {m} ({len(part)})" for task, parts in found.items() for m, part in parts.items() if len(part) < 3
    ]
    return "\n".join(lines + (["", f"Fewer than three seeds: {', '.join(fewer)}."] if fewer else [])) + "\n"


def brief(runs: list[dict[str, Any]]) -> str:
    """As in "91.0% / 90.1%, bit-equal": validation split, test split, rise of base perplexity; means over seeds."""
    accuracy = " / ".join(f"{100 * mean(run[split] for run in runs):.1f}%" for split in SPLITS)
    return f"{accuracy}, {'bit-equal' if all(run['bit_equal'] for run in runs) else percent(mean(map(rise, runs)))}"


def outdated(run: dict[str, Any]) -> bool:
    """Whether the task's records or the method's settings are others today: not to be compared with new runs."""
    method = changed(METHODS[run.get("of", run["method"])], run.get("changes", {}))
    return run["settings"] != settings_hash(TASKS[run["task"]], method)


def shares(parts: dict[str, list[dict[str, Any]]], of: str = "full_replay") -> list[str]:
    """Lines below a table: each method's accuracy as a share of another's, on both splits, where that was run."""
    if of not in parts:
        return []
    whole = {split: mean(run[split] for run in parts[of]) for split in SPLITS}
    if not all(whole.values()):
        return []
    named = [
        f"{method} " + " / ".join(f"{100 * mean(run[split] for run in part) / whole[split]:.1f}%" for split in whole)
        for method, part in parts.items()
        if method != of
    ]
    return ["", f"Accuracy as a share of {of}'s, validation / test split: {', '.join(named)}."]


def cells(method: str, record: dict[str, Any]) -> list[str]:
    rises = ["bit-equal" if record["bit_equal"] else rises_in(record[group], record["seeds"]) for group in GROUPS]
    captured = "" if record["captured"] is None else f"{100 * record['captured'][0]:.2f}%"
    return [
        method,
        f"{record['rate']:g}",
        str(record["seeds"]),
        *(accuracy_in(record[split], record["seeds"]) for split in SPLITS),
        *rises,
        captured,
        f"{record['seconds'][0]:.0f}",
    ]


def accuracy_in(values: tuple[float, float, float], seeds: int) -> str:
    """Mean over seeds, and the lowest and highest where there are several."""
    average, lowest, highest = (100 * value for value in values)
    return f"{average:.1f}%" + (f" ({lowest:.1f} to {highest:.1f})" if seeds > 1 else "")


def rises_in(values: tuple[float, float, float], seeds: int) -> str:
    """Mean over seeds, and the highest where there are several."""
    average, _, highest = map(percent, values)
    return average if seeds == 1 or highest == average else f"{average} (to {highest})"


def percent(value: float) -> str:
    """+0.04%, +12.3%, x41: as many digits as matter."""
    if value >= 900:
        return f"x{value / 100 + 1:.3g}"
    return f"{value:+.2f}%" if abs(value) < 10 else f"{value:+.1f}%"


def plot(runs: list[dict[str, Any]], path: str | os.PathLike) -> None:
    """The frontier, a panel a task: what the base lost against accuracy; up and left is better.

    Large: the test split at the winning rate, mean and standard deviation over seeds. Small: the validation split at
    the rates swept.
    """
    ran = by_pair(runs)
    tasks = {task: {m: part for m in methods if (part := chosen(methods[m]))} for task, methods in ran.items()}
    names = sorted({name for methods in tasks.values() for name in methods})
    marker_numbers = {name: number for number, name in enumerate(names)}
    wide, high = min(ACROSS, len(tasks)), math.ceil(len(tasks) / ACROSS)
    figure = new_figure(4.6 * wide + 1.5, 3.8 * high)
    panels = figure.subplots(high, wide, squeeze=False).flatten()
    for empty in panels[len(tasks) :]:
        empty.set_axis_off()
    for axes, (task, methods) in zip(panels, tasks.items(), strict=False):
        draw_frontier(axes, [point(name, part) for name, part in methods.items()], marker_numbers)
        swept = [run for part in ran[task].values() for run in part if not run["error"]]
        validation = [100 * run["validation"] for run in swept]
        axes.plot([rise(run) for run in swept], validation, ".", color="0.6", zorder=1)
        axes.set_title(task)
        axes.set_xlabel("rise of the base's perplexity (%)")
        axes.set_ylabel("accuracy (%)")
    handles = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


def point(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A method's point in `figures.plot_frontier`'s terms."""
    lost, gained = [rise(run) for run in runs], [run["test"] for run in runs]
    return {
        "name": name,
        "accuracy": mean(gained),
        "accuracy_std": pstdev(gained),
        "perplexity_ratio": 1 + mean(lost) / 100,
        "perplexity_ratio_std": pstdev(lost) / 100,
    }


def show(path: str | os.PathLike) -> None:
    """Prints the tables of a results file and draws the picture beside it."""
    present(path, read_runs(path), lambda runs: overview(runs) + "\n" + markdown(runs), plot, "forgetting.py")


def present(
    path: str | os.PathLike,
    runs: list[dict[str, Any]],
    markdown: Callable[[list[dict[str, Any]]], str],
    plot: Callable[[list[dict[str, Any]], Path], None],
    script: str,
) -> None:
    """Prints what `markdown` makes of `runs` and has `plot` draw a picture beside the results file `path`; without
    runs, which script makes them."""
    if not runs:
        print(f"{path} holds no run that worked yet: python benchmarks/{script}")
        return
    print(markdown(runs))
    picture = Path(path).with_suffix(".png")
    plot(runs, picture)
    print(f"Picture: {picture}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parent / "results/forgetting.jsonl"
    parser.add_argument("results", nargs="?", type=Path, default=default, help="default: results/forgetting.jsonl")
    show(parser.parse_args().results)
