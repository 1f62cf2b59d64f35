"""The pictures of a report. Every one can be read without colour."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*<>hp"
GREYS = ("0.1", "0.5", "0.75")
TICKS = (-10, -1, 0, 0.1, 1, 10, 100, 1000, 10_000, 100_000)  # percent


def new_figure(width: float, height: float) -> Figure:
    """A matplotlib figure of its own, in inches: pyplot's backend is global and may want a display.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The pictures of a report need matplotlib: pip install 'moextend[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def plot_frontier(points: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """Accuracy on the new task against what the base lost; the best corner is the upper left one.

    The axis of what was lost is linear up to 0.1% and logarithmic beyond.

    Args:
        points: [{"name", "accuracy" (0 to 1), "perplexity_ratio"}]; `accuracy_std` and `perplexity_ratio_std` draw
            error bars.
        path: the image file; its ending says the format.
    """
    figure = new_figure(7.5, 4.2)
    draw_frontier(figure.add_subplot(), points)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def draw_frontier(axes: Axes, points: Sequence[dict[str, Any]], marker_numbers: dict[str, int] | None = None) -> None:
    """One panel of `plot_frontier`.

    Args:
        points: as there.
        marker_numbers: {name: number that chooses its marker}, so that several panels agree; default: the order of
            `points`.
    """
    axes.set_xscale("symlog", linthresh=0.1)
    for number, point in enumerate(points):
        marker = number if marker_numbers is None else marker_numbers[point["name"]]
        axes.errorbar(
            100 * (point["perplexity_ratio"] - 1),
            100 * point["accuracy"],
            xerr=100 * point.get("perplexity_ratio_std", 0.0) or None,
            yerr=100 * point.get("accuracy_std", 0.0) or None,
            fmt=MARKERS[marker % len(MARKERS)],
            markersize=9,
            capsize=3,
            color="0.3",
            markerfacecolor=GREYS[marker % len(GREYS)] if marker < len(MARKERS) else "white",
            markeredgecolor="black",
            label=point["name"],
        )
    lost, gained = ([100 * point[name] for point in points] for name in ("perplexity_ratio", "accuracy"))
    low, high = min(lost) - 100, max(lost) - 100
    ticks = [tick for tick in TICKS if min(0, low) <= tick <= max(1, 10 * high)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlim(min(-0.03, 1.3 * low), max(1.3, 1.3 * high))
    axes.set_ylim(-3, min(103, 10 + 1.1 * max(gained)))
    axes.axvline(0, color="0.4", linestyle=":", linewidth=1)
    axes.set_xlabel("increase of the perplexity of the base's own text (%; 0: nothing forgotten)")
    axes.set_ylabel("accuracy on the new task (%)")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)


def plot_expert_use(
    use: dict[str, dict[int, list[float]]], new_experts: dict[int, int], path: str | os.PathLike
) -> None:
    """One heat map a domain: share of a layer's selections that each expert gets, new experts right of the line.

    Args:
        use: {domain: {layer: [share of each of E + N experts]}}, as `evaluation.expert_use` gives it.
        new_experts: {layer: N}; layers that are not named have none.
        path: the image file.
    """
    layers = sorted(next(iter(use.values())))
    num_base = len(use[next(iter(use))][layers[0]]) - new_experts.get(layers[0], 0)
    width = max(len(shares) for domain in use.values() for shares in domain.values())
    highest = max(max(shares) for domain in use.values() for shares in domain.values())
    columns = min(len(use), 3)
    num_lines = -(-len(use) // columns)
    panel = min(6, max(2.4, 0.22 * width)), min(4, max(1.6, 0.6 + 0.2 * len(layers)))
    figure = new_figure(0.6 + columns * panel[0], 0.9 + num_lines * panel[1])
    grid = figure.subplots(num_lines, columns, squeeze=False, sharex=True, sharey=True)
    empty = float("nan")
    for axes, domain in zip(grid.flat, use, strict=False):
        shares = [[*use[domain][layer], *[empty] * (width - len(use[domain][layer]))] for layer in layers]
        percent = [[100 * share for share in values] for values in shares]
        image = axes.imshow(percent, cmap="Greys", vmin=0, vmax=100 * highest, aspect="auto", interpolation="nearest")
        axes.set_title(domain, fontsize="medium")
        for number, values in enumerate(shares):
            for column, share in enumerate(values):
                if share != share:  # no such expert in this layer
                    axes.plot(column, number, marker="x", color="0.6", markersize=min(4, 72 / width))
        if width > num_base:
            axes.axvline(num_base - 0.5, color="black", linewidth=2)
        columns_shown = [*range(0, num_base, max(1, width // 12)), *range(num_base, width, max(1, width // 12))]
        axes.set_xticks(columns_shown, [str(c) if c < num_base else f"n{c - num_base}" for c in columns_shown])
        layers_shown = range(0, len(layers), max(1, len(layers) // 12))
        axes.set_yticks(layers_shown, [str(layers[number]) for number in layers_shown])
    for axes in grid.flat[len(use) :]:
        axes.set_axis_off()
    figure.supxlabel("expert (n0, n1, ...: new ones; x: none here)", fontsize="medium")
    figure.supylabel("decoder layer", fontsize="medium")
    figure.colorbar(image, ax=grid, label="share of selections (%)")
    figure.savefig(path, dpi=150)


def plot_captured(
    captured: dict[str, dict[int, float]], path: str | os.PathLike, task: dict[int, float] | None = None
) -> None:
    """Bars: share of the tokens of each domain that select a new expert, mean over layers, with lowest and highest.

    Args:
        captured: {domain: {layer: share}} of the base's own text.
        path: the image file.
        task: {layer: share} of the new task, drawn beside it with an axis of its own.
    """
    panels = [(captured, "the base's own text (lower is better)", None)]
    if task:
        panels.append(({"new task": task}, "the new task", "//"))
    widths = [max(2, len(panel[0])) for panel in panels]
    figure = new_figure(1.5 + 1.1 * sum(widths), 3.6)
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axes, (domains, title, hatch) in zip(grid, panels, strict=True):
        shares = [[100 * share for share in layers.values()] for layers in domains.values()]
        means = [sum(values) / len(values) for values in shares]
        spread = [
            [mean - min(values) for mean, values in zip(means, shares, strict=True)],
            [max(values) - mean for mean, values in zip(means, shares, strict=True)],
        ]
        positions = range(len(means))
        axes.bar(positions, means, color="0.75", edgecolor="black", hatch=hatch, width=0.6)
        axes.errorbar(positions, means, yerr=spread, fmt="none", ecolor="black", capsize=4)
        for position, mean, values in zip(positions, means, shares, strict=True):
            axes.annotate(
                f"{mean:.3g}%",
                (position, max(values)),
                (0, 4),
                textcoords="offset points",
                ha="center",
                fontsize="small",
            )
        axes.set_xticks(positions, list(domains), rotation=20 if len(means) > 4 else 0)
        axes.set_xlim(-0.6, len(means) - 0.4)
        highest = max(max(values) for values in shares)
        axes.set_ylim(0, 1.15 * highest if highest else 1)
        axes.set_title(title, fontsize="medium")
    grid[0].set_ylabel("tokens that select a new expert (%)\nmean, lowest and highest of the layers", fontsize="small")
    figure.savefig(path, dpi=150)


def plot_threshold_curve(
    curve: Sequence[dict[str, Any]], path: str | os.PathLike, current: float | None = None
) -> None:
    """What the gate's threshold trades: accuracy above, the base's perplexity below.

    Args:
        curve: [{"threshold", "perplexity_ratio", "accuracy" (0 to 1, or `None` everywhere)}].
        path: the image file.
        current: the model's own threshold, a dotted line.
    """
    curve = sorted(curve, key=lambda point: point["threshold"])
    thresholds = [point["threshold"] for point in curve]
    panels = [("perplexity_ratio", "base perplexity,\nafter / before", 1)]
    if all(point.get("accuracy") is not None for point in curve):
        panels.insert(0, ("accuracy", "accuracy on the\nnew task (%)", 100))
    figure = new_figure(6, 0.8 + 2 * len(panels))
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, label, factor) in zip(grid, panels, strict=True):
        axes.plot(thresholds, [factor * point[name] for point in curve], color="black", marker="o")
        if current is not None:
            axes.axvline(current, color="0.4", linestyle=":", label="the model's own threshold")
        axes.set_ylabel(label)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(color="0.9")
    if current is not None:
        grid[0].legend(frameon=False, fontsize="small")
    grid[-1].set_xlabel("threshold of the gate (higher: fewer tokens may use new experts)")
    figure.savefig(path, dpi=150)
