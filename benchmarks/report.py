"""Tables and the frontier picture from the results of `forgetting.py`.

    python benchmarks/report.py                  # prints Markdown, writes docs/images/forgetting.png and .svg
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

from modeling_moextend.evaluation.figures import COLOURS, MARKERS, NEW, WIDTH, lost_axis, new_figure, save, styled

RESULTS = Path(__file__).resolve().parent / "results"
IMAGES = Path(__file__).resolve().parents[1] / "docs/images"
SPLITS = ("validation", "test")
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


README_TASKS = {"library": "docstring → library", "easy_vqa": "questions on images"}  # that all three ran on
README_METHODS = ("new experts (ours)", "LoRA, replay", "full fine-tuning, replay")  # of `SHOWN`


def readme_table(runs: list[dict[str, Any]]) -> str:
    """README's three rows: test accuracy and the rise of the base's perplexity on the same tasks, means over seeds."""
    pairs = by_pair(runs)
    head = [f"{words} | base text" for words in README_TASKS.values()]
    lines = ["| | " + " | ".join(head) + " |", "|---" + "|---:" * (2 * len(head)) + "|"]
    for name in README_METHODS:
        cells = []
        for task in README_TASKS:
            part = next(part for method in SHOWN[name] if (part := chosen(pairs[task].get(method, []))))
            same = all(run["bit_equal"] for run in part)
            cells += [f"{100 * mean(run['test'] for run in part):.1f}%"]
            cells += ["bit-equal" if same else percent(mean(map(rise, part)))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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


LOST = (  # rise of the base's perplexity below so many percent -> colour, marker, words
    (0.05, NEW, "o", "below +0.05%"),
    (1.0, COLOURS[4], "s", "+0.05% to +1%"),
    (math.inf, COLOURS[1], "^", "+1% and more"),
)
WORDS = {  # of tasks, for readers of the picture
    "library": "docstring →\nits library",
    "types": "parameter →\nits type",
    "numbers": "digits →\nwords",
    "calendar": "appointment →\nits rule",
    "follow_up": "follow-up\nquestions",
    "easy_vqa": "questions\non images",
}
NAMES = {  # of methods, for readers of the pictures
    "gate_deltas": "new experts (ours)",
    "gate_deltas_self": "ours, text by the base itself",
    "gate": "ours, no deltas",
    "gate_self": "ours, no deltas, text by the base",
    "modality": "new experts (ours)",
    "paper": "the paper's routing",
    "lora_replay": "LoRA, replay",
    "lora": "LoRA",
    "full_replay": "full fine-tuning, replay",
    "full": "full fine-tuning",
    "router_only": "routers alone",
}
SHOWN = {  # rows of the picture -> the methods that it may be, the first that was run
    NAMES["gate_deltas"]: ("gate_deltas", "modality"),
    **{NAMES[method]: (method,) for method in ("lora_replay", "lora", "full_replay", "full", "paper")},
}
VARIANTS = {  # of the ablations: what their letters are
    "A = 0": "gate's loss on the task at weight 0",
    "K = 1": "gate's loss on kept text at weight 1",
    "K = 100": "gate's loss on kept text at weight 100",
    "compete": "compete, no calibration",
}


@styled
def plot(runs: list[dict[str, Any]], path: str | os.PathLike) -> None:
    """Two panels, a line a task: accuracy (right is better) and what the base lost (left is better).

    Dots are means over seeds at the winning rate, of the test split; lines go from the lowest to the highest seed.
    """
    found = {}
    for task, methods in by_pair(runs).items():
        for name, known in SHOWN.items():
            part = next((part for method in known if (part := chosen(methods.get(method, [])))), None)
            if part:
                found.setdefault(task, {})[name] = figures(part) | {"rises": [rise(run) for run in part]}
    names = [name for name in SHOWN if any(name in parts for parts in found.values())]
    figure = new_figure(WIDTH + 0.8, 1.3 + 0.66 * len(found))
    gained, lost = figure.subplots(1, 2, sharey=True)
    for row, parts in enumerate(found.values()):
        for axes in (gained, lost):
            axes.axhspan(row - 0.44, row + 0.44, color="0.965", zorder=0, linewidth=0)
        for number, name in enumerate(names):
            if name not in parts:
                continue
            place, look = row + 0.145 * (number - (len(names) - 1) / 2), {"color": COLOURS[number], "zorder": 3}
            mean_of, lowest, highest = (100 * value for value in parts[name]["test"])
            gained.plot([lowest, highest], [place, place], marker="", **look)
            gained.plot(mean_of, place, MARKERS[number], **look)
            rises = [max(0.0, value) for value in parts[name]["rises"]]
            lost.plot([min(rises), max(rises)], [place, place], marker="", **look)
            lost.plot(mean(rises), place, MARKERS[number], clip_on=False, **look)
    gained.set_yticks(range(len(found)), [WORDS.get(task, task) for task in found])
    gained.set_ylim(len(found) - 0.45, -0.55)
    gained.set_xlim(0, 102)
    gained.set_xlabel("accuracy, test split (%): right is better")
    lost_axis(lost, 0, max(value for parts in found.values() for part in parts.values() for value in part["rises"]))
    lost.set_xlabel("rise of the base's perplexity: left is better")
    lost.axvspan(-1, 0.03, color=COLOURS[0], alpha=0.12, zorder=1, linewidth=0)
    lost.text(0.045, -0.47, "shaded: below +0.03%", size=7.5, color=COLOURS[0], va="center")
    for axes in (gained, lost):
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    handles = [gained.plot([], [], MARKERS[n], color=COLOURS[n], label=name)[0] for n, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, handletextpad=0.2)
    save(figure, path)


def point(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A method's point in `figures.plot_frontier`'s terms: means and standard deviations over seeds."""
    lost, gained = [rise(run) for run in runs], [run["test"] for run in runs]
    return {
        "name": name,
        "accuracy": mean(gained),
        "accuracy_std": pstdev(gained),
        "perplexity_ratio": 1 + mean(lost) / 100,
        "perplexity_ratio_std": pstdev(lost) / 100,
    }


def one_line(task: str) -> str:
    """The words for a task where there is room for a line."""
    return WORDS.get(task, task).replace("\n", " ")


@styled
def plot_ablations(runs: list[dict[str, Any]], path: str | os.PathLike) -> None:
    """A panel a task of the method of most variants there, a line a variant: accuracy of both splits; what the base
    lost as the dot's shape and colour. The method as it is: the dotted line."""
    groups = {}
    for run in latest(runs):
        if not run["error"]:
            groups.setdefault((run["of"], run["task"]), []).append(run)
    groups = {key: group for key, group in groups.items() if len(group) > 3}  # a few runs are no comparison
    figure = new_figure(WIDTH, 1.3 + sum(0.5 + 0.215 * len(group) for group in groups.values()))
    ratios = [2.2 + len(group) for group in groups.values()]
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axes, ((of, task), group) in zip(panels, groups.items(), strict=True):
        group = sorted(group, key=lambda run: run["test"])
        plain = next(run for run in group if run["method"].endswith(": as it is"))
        for row, run in enumerate(group):
            kind = next(number for number, kind in enumerate(LOST) if abs(rise(run)) < kind[0])
            colour, marker = LOST[kind][1:3]
            axes.plot([100 * run["validation"], 100 * run["test"]], [row, row], marker="", color="0.75", zorder=2)
            axes.plot(100 * run["test"], row, marker, color=colour, markersize=5, markeredgewidth=0, zorder=3)
            look = {"color": "none", "markersize": 8, "markeredgecolor": colour, "markeredgewidth": 1.2}
            axes.plot(100 * run["validation"], row, marker, zorder=4, **look)  # rings the other where both are one
        axes.axvline(100 * plain["test"], color="0.3", linestyle=":", marker="", linewidth=1)
        axes.set_yticks(
            range(len(group)), [VARIANTS.get(name := run["method"].partition(": ")[2], name) for run in group]
        )
        axes.get_yticklabels()[group.index(plain)].set_fontweight("bold")
        axes.set_title(f"{NAMES[of]}: {one_line(task)}")
        axes.set_xlim(-2, 102)
        axes.grid(axis="y", visible=False)
    panels[-1].set_xlabel("accuracy (%): filled, the test split; hollow, the validation split. Dotted: as it is")
    handles = [axes.plot([], [], marker, color=colour, label=text)[0] for _, colour, marker, text in LOST]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, title="perplexity of the base's own text")
    save(figure, path)


def show(path: str | os.PathLike) -> None:
    """Prints the tables of a results file and draws the picture beside it."""
    runs = read_runs(path)
    draw = plot_ablations if any("of" in run for run in runs) else plot
    present(path, runs, lambda runs: overview(runs) + "\n" + markdown(runs), draw, "forgetting.py")


def present(
    path: str | os.PathLike,
    runs: list[dict[str, Any]],
    markdown: Callable[[list[dict[str, Any]]], str],
    plot: Callable[[list[dict[str, Any]], Path], None],
    script: str,
) -> None:
    """Prints what `markdown` makes of `runs` and has `plot` draw a picture, of the committed results files in
    docs/images/, of others beside them; without runs, which script makes them."""
    if not runs:
        print(f"{path} holds no run that worked yet: python benchmarks/{script}")
        return
    print(markdown(runs))
    path = Path(path).resolve()
    picture = (IMAGES / path.name if path.parent == RESULTS else path).with_suffix(".png")
    plot(runs, picture)
    print(f"Picture: {picture}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = RESULTS / "forgetting.jsonl"
    parser.add_argument("results", nargs="?", type=Path, default=default, help="default: results/forgetting.jsonl")
    parser.add_argument("--readme", action="store_true", help="prints README's table only")
    args = parser.parse_args()
    if args.readme:
        print(readme_table(read_runs(args.results)), end="")
    else:
        show(args.results)
