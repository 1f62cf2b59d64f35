"""The pictures of a report, and what all pictures share: one style (moextend.mplstyle), vectors beside pixels.

Every one can be read without colour: what colour tells, markers, places or words tell as well.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("moextend.mplstyle")
MARKERS = "osD^vPXp<>h*"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # the style's
NEW, BASE = COLOURS[0], "#999999"  # new experts; what is the base's own
WIDTH = 7.2  # inches, of a page
TICKS = (-10, -1, 0, 0.1, 1, 10, 100, 1000, 10_000, 100_000)  # percent


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """`draw`, with the style of all pictures while it runs.

    Raises:
        ImportError: matplotlib is missing.
    """

    @wraps(draw)
    def in_style(*args: Any, **options: Any) -> Any:
        try:
            import matplotlib.figure
            import matplotlib.style
        except ImportError as error:
            raise ImportError("Pictures need matplotlib: pip install 'moextend[plot]'") from error
        with matplotlib.style.context(STYLE):
            return draw(*args, **options)

    return in_style


def new_figure(width: float, height: float) -> Figure:
    """A matplotlib figure of its own, in inches: pyplot's backend is global and may want a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Writes the image file; beside a .png the same as .svg. The same figure gives the same files."""
    path = Path(path)
    add_fonts(figure)
    with warnings.catch_warnings():  # a glyph that no font here has is drawn as a box, and nobody can help it
        warnings.filterwarnings("ignore", "Glyph .* missing from font|Matplotlib currently does not support")
        figure.savefig(path)
        if path.suffix == ".png":
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def short_name(name: str, most: int = 24) -> str:
    """A user's name on one line, cut to as many characters as there is room for."""
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def add_fonts(figure: Figure) -> None:
    """Has texts fall back on installed fonts for characters that the style's font lacks, as of names in Chinese."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    lacking = {ord(letter) for text in texts for letter in text.get_text() if letter.isprintable()}
    lacking -= set(get_font(findfont(FontProperties())).get_charmap())
    families = []
    for font in fontManager.ttflist if lacking else ():
        if font.name.startswith("Last Resort"):  # matplotlib's own boxes
            continue
        if found := lacking.intersection(get_font(font.fname).get_charmap()):
            families.append(font.name)
            lacking -= found
    for text in texts if families else ():
        text.set_fontfamily([*text.get_fontfamily(), *families])


@styled
def plot_frontier(points: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """Accuracy on the new task against what the base lost; the best corner is the upper left one.

    The axis of what was lost is linear up to 0.1% and logarithmic beyond.

    Args:
        points: [{"name", "accuracy" (0 to 1), "perplexity_ratio"}]; `accuracy_std` and `perplexity_ratio_std` draw
            error bars.
        path: the image file; its ending says the format.
    """
    figure = new_figure(WIDTH, 3.6)
    axes = figure.add_subplot()
    draw_frontier(axes, points)
    figure.legend(
        [bars[0] for bars in axes.containers],
        [short_name(point["name"], 36) for point in points],
        loc="outside right upper",
    )
    save(figure, path)


def draw_frontier(axes: Axes, points: Sequence[dict[str, Any]]) -> None:
    """The one panel of `plot_frontier`."""
    axes.set_xscale("symlog", linthresh=0.1)
    for number, point in enumerate(points):
        axes.errorbar(
            100 * (point["perplexity_ratio"] - 1),
            100 * point["accuracy"],
            xerr=100 * point.get("perplexity_ratio_std", 0.0) or None,
            yerr=100 * point.get("accuracy_std", 0.0) or None,
            fmt=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            markersize=8,
            capsize=2,
            zorder=4 - number / len(points),  # the first ones on top
            clip_on=False,
        )
    lost, gained = ([100 * point[name] for point in points] for name in ("perplexity_ratio", "accuracy"))
    low, high = min(lost) - 100, max(lost) - 100
    lost_axis(axes, low, high)
    axes.set_ylim(-3, min(103, 10 + 1.1 * max(gained)))
    axes.set_xlabel("rise of the perplexity of the base's own text (%); 0: nothing lost")
    axes.set_ylabel("accuracy on the new task (%)")


def lost_axis(axes: Axes, low: float, high: float) -> None:
    """The axis of what the base lost, in percent from `low` to `high`: linear up to 0.1, logarithmic beyond."""
    axes.set_xscale("symlog", linthresh=0.1)
    ticks = [tick for tick in TICKS if min(0, low) <= tick <= max(1, 10 * high)]
    axes.set_xticks(ticks, [f"{tick:+,g}%" if tick else "0" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(-0.03, 1.3 * low), max(1.3, 2 * high))
    axes.axvline(0, color="0.4", linestyle=":", linewidth=1)


@styled
def plot_router_shift(
    layers: Sequence[int],
    before: Any,
    after: Any,
    per_layer: Sequence[float],
    plan: dict[int, list[int]],
    path: str | os.PathLike,
) -> None:
    """Two heat maps, the share of selections that each expert gets before and after the probe, and d_j as bars.

    Args:
        layers: decoder layers, L of them.
        before, after: shares, [L, E]; each layer sums to 1.
        per_layer: d_j, [L].
        plan: {layer: source experts}: these are ringed in the second map, the layers' bars are dark.
        path: the image file.
    """
    figure = new_figure(WIDTH + 1.6, max(2.6, 1.5 + 0.16 * len(layers)))
    maps = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1, 0.8))
    highest = 100 * max(before.max(), after.max())
    for axes, values, title in zip(maps, (before, after), ("before the probe", "after"), strict=False):
        image = axes.imshow(100 * values, aspect="auto", vmin=0, vmax=highest, interpolation="nearest")
        axes.set_title(title)
        axes.set_xlabel("expert")
        axes.grid(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in maps[1:]:  # the layers are named left of them all
        axes.tick_params(axis="y", length=0)
    figure.get_layout_engine().set(wspace=0.05)
    sources = [(source, row) for row, layer in enumerate(layers) for source in set(plan.get(layer, ()))]
    if sources:
        size = max(3.0, min(9.0, 110 / before.shape[1]))
        ring = {"marker": "o", "linestyle": "none", "markerfacecolor": "none", "markersize": size}
        maps[1].plot(*zip(*sources, strict=True), markeredgecolor="black", markeredgewidth=2.6, **ring)
        maps[1].plot(*zip(*sources, strict=True), markeredgecolor="white", markeredgewidth=1.3, **ring)
        black = {**ring, "markeredgecolor": "black", "markersize": 8}
        maps[1].plot([], [], label="source of a new expert", markeredgewidth=1.3, **black)
    figure.colorbar(image, ax=maps[:2], label="share of selections (%)")
    for chosen, colour, label in ((True, NEW, "gets new experts"), (False, "#C8C8C8", "left as it is")):
        rows = [row for row, layer in enumerate(layers) if (layer in plan) == chosen]
        if rows:
            maps[2].barh(rows, [per_layer[row] for row in rows], color=colour, label=label)
    maps[2].set_title("router shift dⱼ")
    maps[2].set_xlabel("standard deviation of the change")
    maps[2].set_xlim(left=0)
    maps[2].grid(axis="y", visible=False)
    step = max(1, len(layers) // 12)
    maps[0].set_yticks(range(0, len(layers), step), layers[::step])
    maps[0].set_ylabel("decoder layer")
    figure.legend(loc="outside lower right", ncols=3)
    save(figure, path)


@styled
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
        image = axes.imshow(percent, vmin=0, vmax=100 * highest, aspect="auto", interpolation="nearest")
        axes.set_title(short_name(domain))
        axes.grid(False)
        for number, values in enumerate(shares):
            for column, share in enumerate(values):
                if share != share:  # no such expert in this layer
                    axes.plot(column, number, marker="x", markeredgecolor="0.6", markersize=min(4, 72 / width))
        if width > num_base:
            axes.axvline(num_base - 0.5, color="white", linewidth=3.5)
            axes.axvline(num_base - 0.5, color="black", linewidth=1.5)
        columns_shown = [*range(0, num_base, max(1, width // 12)), *range(num_base, width, max(1, width // 12))]
        axes.set_xticks(columns_shown, [str(c) if c < num_base else f"n{c - num_base}" for c in columns_shown])
        layers_shown = range(0, len(layers), max(1, len(layers) // 12))
        axes.set_yticks(layers_shown, [str(layers[number]) for number in layers_shown])
    for axes in grid.flat[len(use) :]:
        axes.set_axis_off()
    for axes in grid.flat[max(0, len(use) - columns) : len(use)]:  # nothing is below them
        axes.tick_params(labelbottom=True)
    figure.supxlabel("expert (n0, n1, ...: new ones, right of the line; x: none here)", fontsize="medium")
    figure.supylabel("decoder layer", fontsize="medium")
    figure.colorbar(image, ax=grid, label="share of the layer's selections (%)")
    save(figure, path)


@styled
def plot_captured(
    captured: dict[str, dict[int, float]], path: str | os.PathLike, task: dict[int, float] | None = None
) -> None:
    """Bars: share of the tokens of each domain that select a new expert, mean over layers, with lowest and highest.

    One scale for all, 0 to 100%: of the base's own text a short bar is good, of the new task a long one.

    Args:
        captured: {domain: {layer: share}} of the base's own text.
        path: the image file.
        task: {layer: share} of the new task.
    """
    rows = [(short_name(domain), layers, BASE) for domain, layers in captured.items()]
    rows += [("new task", task, NEW)] if task else []
    figure = new_figure(WIDTH, 1.0 + 0.34 * len(rows))
    axes = figure.add_subplot()
    labelled = set()
    for place, (_, layers, colour) in enumerate(rows):
        shares = [100 * share for share in layers.values()]
        mean, lowest, highest = sum(shares) / len(shares), min(shares), max(shares)
        label = "the base's own text" if colour == BASE else "the new task"
        spread = [[mean - lowest], [highest - mean]]
        hatch = None if colour == BASE else "//"
        legend = None if label in labelled else label
        axes.barh(place, mean, color=colour, edgecolor="white", hatch=hatch, height=0.62, label=legend)
        if lowest < highest:
            axes.errorbar(mean, place, xerr=spread, fmt="none", ecolor="black", capsize=3, linewidth=1)
        axes.annotate(f"{mean:.3g}%", (highest, place), (5, 0), textcoords="offset points", va="center")
        labelled.add(label)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("tokens that select a new expert (%): mean of the layers, lowest and highest")
    figure.legend(loc="outside upper right", ncols=2)
    save(figure, path)


@styled
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
    panels = [("perplexity_ratio", "base perplexity,\nafter / before", 1, COLOURS[1])]
    if all(point.get("accuracy") is not None for point in curve):
        panels.insert(0, ("accuracy", "accuracy on the\nnew task (%)", 100, NEW))
    figure = new_figure(6, 0.9 + 1.7 * len(panels))
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, label, factor, colour) in zip(grid, panels, strict=True):
        axes.plot(thresholds, [factor * point[name] for point in curve], color=colour, marker="o")
        if current is not None:
            axes.axvline(current, color="0.3", linestyle=":", marker="", label="the model's own threshold")
        axes.set_ylabel(label)
        axes.ticklabel_format(axis="y", useOffset=False)
    if current is not None:
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper right")
    grid[-1].set_xlabel("threshold of the gate (higher: fewer tokens may use new experts)")
    save(figure, path)
