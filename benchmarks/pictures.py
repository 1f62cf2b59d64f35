"""The pictures of README and docs/, as .svg and .png in docs/images/: from the results files, and one idea drawn.

    python benchmarks/pictures.py               # all of them: make pictures
    python benchmarks/pictures.py idea speed    # some

`router_shift`, `expert_use`, `captured`, `frontier` and `threshold` show the library's own figures, of the runs that
their functions name; they train for a few minutes and are drawn only where they are named.
"""

import argparse
import json
from pathlib import Path

import continual
import report
import speed
from runs import read_runs

from modeling_moextend.evaluation.figures import NEW, WIDTH, new_figure, save, styled

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
IMAGES = ROOT / "docs/images"
INK = "#333333"


@styled
def idea(path: Path) -> None:
    """A router with grey and blue experts: text takes the grey way, the task's tokens the blue one."""
    from matplotlib.patches import FancyBboxPatch

    figure = new_figure(WIDTH, 3.3)
    axes = figure.add_subplot()
    axes.set(xlim=(0, 100), ylim=(0, 46))
    axes.set_axis_off()

    def box(x, y, width, height, colour, text="", ink="white", size=9, **more):
        shape = f"round,pad=0,rounding_size={more.pop('corner', 1.2)}"
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=colour, **more))
        axes.text(x + width / 2, y + height / 2 - 0.1, text, color=ink, size=size, ha="center", va="center")

    def arrow(start, end, colour, **more):
        style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0, **more}
        axes.annotate("", end, start, arrowprops=style)

    grey, dark = "#B5B5B5", "#6E6E6E"
    for number in range(8):
        box(4 + 7 * number, 31, 5.6, 7.5, grey, f"{number}", ink=INK, linewidth=0)
    for number in range(4):
        box(65.5 + 7.6 * number, 31, 6.2, 7.5, NEW, f"new {number}", size=7.5, linewidth=0)
    axes.text(4, 41.5, "the base's experts: every weight as it was", color=dark, size=9, weight="bold")
    axes.text(65.5, 41.5, "new experts: the adapter", color=NEW, size=9, weight="bold")
    box(4, 17, 91.7, 6.5, "#F1F1F1", edgecolor="#D0D0D0", linewidth=0.8)
    axes.text(49.8, 20.2, "router", color=INK, size=10, ha="center", va="center", weight="bold")
    for number in range(8):
        box(6 + 3.4 * number, 18.6, 2.4, 3.3, grey, corner=0.4, linewidth=0)
    for number in range(4):
        box(80.6 + 3.4 * number, 18.6, 2.4, 3.3, NEW, corner=0.4, linewidth=0)
    axes.text(34.2, 20.2, "rows", color=dark, size=8, va="center")
    axes.text(79.6, 20.2, "new rows", color=NEW, size=8, ha="right", va="center")
    for number, text in enumerate(("def", "area", "(", "radius", ")")):
        box(4 + 10.2 * number, 4, 9, 6, "white", text, ink=INK, edgecolor=grey, linewidth=1.2)
    for number, text in enumerate(("5", "4", "9")):
        box(65.5 + 10.2 * number, 4, 9, 6, "white", text, ink=NEW, edgecolor=NEW, linewidth=1.2)
    axes.text(4, 0.4, "text that the base knows", color=dark, size=8.5)
    axes.text(65.5, 0.4, "tokens of the new task, or of an image", color=NEW, size=8.5)
    for x, colour in ((29, dark), (80.5, NEW)):
        arrow((x, 10.6), (x, 16.6), colour)
    arrow((25, 23.8), (13.8, 30.6), dark)
    arrow((29, 23.8), (41.8, 30.6), dark)
    arrow((79, 23.8), (76.2, 30.6), NEW)
    arrow((82, 23.8), (91.2, 30.6), NEW)
    save(figure, path)


def forgetting(path: Path) -> None:
    report.plot(read_runs(RESULTS / "forgetting.jsonl"), path)


def ablations(path: Path) -> None:
    report.plot_ablations(read_runs(RESULTS / "ablations.jsonl"), path)


def tasks_in_a_row(path: Path) -> None:
    continual.plot([run for run in read_runs(RESULTS / "continual.jsonl") if not run["error"]], path)


def speed_picture(path: Path) -> None:
    speed.picture(json.loads((RESULTS / "speed.json").read_text(encoding="utf-8")), path)


FROM_FILES = {
    "idea": idea,
    "forgetting": forgetting,
    "ablations": ablations,
    "continual": tasks_in_a_row,
    "speed": speed_picture,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(FROM_FILES)}; default: all")
    names = parser.parse_args().names or list(FROM_FILES)
    unknown = sorted(set(names) - set(FROM_FILES))
    if unknown:
        parser.error(f"no such picture: {', '.join(unknown)}; there are {', '.join(FROM_FILES)}")
    IMAGES.mkdir(exist_ok=True)
    for name in names:
        FROM_FILES[name](IMAGES / f"{name}.png")
        print(f"docs/images/{name}.png, .svg")


if __name__ == "__main__":
    main()
