"""The pictures of README and docs/, as .svg and .png in docs/images/: from the results files, and one idea drawn.

    python benchmarks/pictures.py                         # all of them from files: make pictures
    python benchmarks/pictures.py idea speed              # some
    python benchmarks/pictures.py small_run --measure     # those of a small run, which trains for a minute or two

The small run is README's: numbers in words, on the small base. What it measured is kept in results/small_run.json.
"""

import argparse
import json
from pathlib import Path

import continual
import report
import speed
from runs import read_runs

from modeling_moextend import RouterShift
from modeling_moextend.evaluation.figures import (
    NEW,
    WIDTH,
    new_figure,
    plot_captured,
    plot_expert_use,
    plot_frontier,
    plot_threshold_curve,
    save,
    styled,
)

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
    axes.text(65.5, 0.4, "tokens of the new task or sense", color=NEW, size=8.5)
    for x, colour in ((29, dark), (80.5, NEW)):
        arrow((x, 10.6), (x, 16.6), colour)
    arrow((25, 23.8), (13.8, 30.6), dark)
    arrow((29, 23.8), (41.8, 30.6), dark)
    arrow((79, 23.8), (76.2, 30.6), NEW)
    arrow((82, 23.8), (91.2, 30.6), NEW)
    save(figure, path)


def forgetting(path: Path) -> None:
    report.plot(read_runs(RESULTS / "forgetting.jsonl"), path)


def frontier(path: Path, task: str = "library") -> None:
    """`plot_frontier` of all methods of the benchmark on one task."""
    methods = report.by_pair(read_runs(RESULTS / "forgetting.jsonl"))[task]
    parts = [(name, report.chosen(methods.get(method, []))) for method, name in report.NAMES.items()]
    plot_frontier([report.point(name, part) for name, part in parts if part], path)


def ablations(path: Path) -> None:
    report.plot_ablations(read_runs(RESULTS / "ablations.jsonl"), path)


def tasks_in_a_row(path: Path) -> None:
    continual.plot([run for run in read_runs(RESULTS / "continual.jsonl") if not run["error"]], path)


def speed_picture(path: Path) -> None:
    speed.picture(json.loads((RESULTS / "speed.json").read_text(encoding="utf-8")), path)


MEASURED = RESULTS / "small_run.json"
NUMBERS = ROOT / "examples/numbers"
TINY = "assets/tiny-moe"  # from ROOT
THRESHOLDS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)


def small_run(path: Path) -> None:
    """The library's own figures: router shift, expert use, captured share, threshold curve."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    results, folder = measured["results"], path.parent
    shift, use = measured["shift"], {name: with_numbers(part) for name, part in results["expert_use"].items()}
    plan = with_numbers(measured["plan"])
    RouterShift(**shift).plot(folder / "router_shift.png", plan)
    plot_expert_use(use, with_numbers(results["new_experts"]), folder / "expert_use.png")
    domains = results["retention"]["domains"].items()
    captured = {name: with_numbers(values["captured"]) for name, values in domains}
    plot_captured(captured, folder / "captured.png", with_numbers(results["task_captured"]))
    plot_threshold_curve(results["threshold_curve"], folder / "threshold.png", results["gate_threshold"])


def with_numbers(values: dict) -> dict:
    """Keys as the layers' numbers that they were before JSON."""
    return {int(key): value for key, value in values.items()}


def measure() -> None:
    """Writes what `small_run` draws: a probe for the router shift, then README's training, measured at thresholds.

    Half of the base's held-out text is what the gate learns to leave alone, the other half what is measured.
    """
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from modeling_moextend import (
        MoExtendForCausalLM,
        MoExtendSFTConfig,
        MoExtendSFTTrainer,
        evaluate_adapter,
        measure_router_shift,
    )
    from modeling_moextend.data.files import read_questions
    from modeling_moextend.extender import probe_config

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    chats = load_dataset("json", data_files=str(NUMBERS / "train.jsonl"), split="train")
    text = load_dataset("json", data_files=f"{TINY}/held_out.jsonl", split="train").train_test_split(0.5, seed=0)
    common = {"per_device_train_batch_size": 16, "assistant_only_loss": True, "bf16": False, "report_to": "none"}
    common |= {"disable_tqdm": True, "gradient_checkpointing": False, "save_strategy": "no"}
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    parts = chats.train_test_split(200, seed=0)
    probe = probe_config("outputs/probe", max_steps=40, **common)
    shift = measure_router_shift(base, parts["train"], parts["test"], args=probe, processing_class=tokenizer)
    plan = shift.select(fraction=0.5, num_new=4)
    model = MoExtendForCausalLM.from_base(base, {2: [0, 1, 2, 3], 3: [0, 1, 2, 3]})
    args = {"max_steps": 150, "learning_rate": 4e-3, "gate_steps": 100, "retention_tokens": 20_000}
    trainer = MoExtendSFTTrainer(
        model,
        MoExtendSFTConfig("outputs/numbers", **args, **common),
        train_dataset=chats,
        retention_dataset=text["train"].select_columns("text"),
        processing_class=tokenizer,
    )
    trainer.train()
    questions, documents = read_questions(NUMBERS / "test.jsonl"), list(text["test"])
    options = {"max_new_tokens": 16, "progress": False}
    results = evaluate_adapter(model.eval(), tokenizer, documents, questions, thresholds=THRESHOLDS, **options)
    counts = {name: getattr(shift, name).tolist() for name in ("counts_before", "counts_after")}
    measured = {
        "shift": {"layers": list(shift.layers), **counts},
        "plan": plan,
        "results": results,
    }
    MEASURED.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


FROM_FILES = {
    "idea": idea,
    "forgetting": forgetting,
    "frontier": frontier,
    "ablations": ablations,
    "continual": tasks_in_a_row,
    "speed": speed_picture,
    "small_run": small_run,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(FROM_FILES)}; default: all")
    parser.add_argument("--measure", action="store_true", help="train and measure the small run anew before")
    args = parser.parse_args()
    names = args.names or list(FROM_FILES)
    unknown = sorted(set(names) - set(FROM_FILES))
    if unknown:
        parser.error(f"no such picture: {', '.join(unknown)}; there are {', '.join(FROM_FILES)}")
    if args.measure:
        measure()
    IMAGES.mkdir(exist_ok=True)
    for name in names:
        FROM_FILES[name](IMAGES / f"{name}.png")
        print(f"docs/images: {name}")


if __name__ == "__main__":
    main()
