"""Several tasks in a row, each learned on top of the earlier ones: what is left of them, and of the base.

    python benchmarks/continual.py                              # hours; go on with the same command after a stop
    python benchmarks/continual.py --steps 5 --limit 8          # does it run: minutes, into outputs/
    python benchmarks/continual.py --methods gate_deltas full_replay --tasks types library

`gate_deltas` (and `gate`, without deltas) stacks adapters: each is trained on top of frozen ones by the library's own
trainer, and retention text holds records of the earlier tasks beside the base's own text. `full` goes on with all
weights, `lora` stacks LoRAs, each on frozen ones; `full_replay` and `lora_replay` replay the same texts and earlier
records that the gate has as retention text. Rates are fixed, those that won most often in `forgetting.py`; the order
of tasks and the records are the same for all methods.

A step is a process of its own and one line in the results file; it begins with what the step before left under
outputs/benchmarks/continual. A line holds accuracy on every task so far (both splits), the base's text, and for a gate
of how many earlier questions no token selects an expert of the new adapter: their logits have to be bit-equal to those
before the step.
"""

import argparse
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from forgetting import RESULTS, prepare, run_all
from methods import METHODS, Method
from report import NAMES, WORDS, one_line, percent, present
from run import SPLITS, exact_match, read_text
from runs import key, latest, read_runs, rise, settings_hash
from safetensors.torch import load_file, save_file
from tasks import ROOT, TASKS, Task, held_out_records, messages, read
from training import CACHE, add_lora, load_base, train
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.data.processors import text_tokenizer
from modeling_moextend.evaluation.figures import WIDTH, new_figure, save, styled

ORDER = ("library", "types", "calendar", "follow_up")
RATES = {"gate_deltas": 3e-3, "gate": 4e-3, "full": 1e-3, "full_replay": 1e-3, "lora": 4e-3, "lora_replay": 4e-3}
OURS = ("gate_deltas", "gate")
COMPARED = 200  # questions of each earlier task whose logits are compared


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text_tasks = [name for name, task in TASKS.items() if not task.vision]
    parser.add_argument("--tasks", nargs="+", choices=text_tasks, default=list(ORDER), help="in the order of learning")
    parser.add_argument("--methods", nargs="+", choices=RATES, default=["gate_deltas", "full", "full_replay", "lora"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument("--steps", type=int, help="fewer optimiser steps a task, to try it")
    parser.add_argument("--limit", type=int, help="asks and reads so many records only, to try it")
    parser.add_argument("--workers", type=int, default=2, help="methods at once, one thread each; default 2")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--output", type=Path, help="default: results/continual.jsonl beside this")
    args = parser.parse_args(arguments)
    tried = args.steps or args.limit
    args.output = args.output or (CACHE / "continual-tried.jsonl" if tried else RESULTS / "continual.jsonl")
    if len(set(args.tasks)) < len(args.tasks):
        parser.error(f"--tasks {' '.join(args.tasks)}: each task is learned once")
    return args


# ---------------------------------------------------------------- the steps


def describe(names: Sequence[str], method: str, seed: int, steps: int | None, limit: int | None) -> dict[str, Any]:
    """The step that learns the last of the tasks `names`, as `run.py` takes it, with its key."""
    hashes = [settings_hash(shortened(name, steps), METHODS[method]) for name in names]
    settings = hashlib.sha1(" ".join([*hashes, *([f"limit {limit}"] if limit else [])]).encode()).hexdigest()[:10]
    run = {"task": " > ".join(names), "method": method, "rate": RATES[method], "seed": seed, "settings": settings}
    return {**run, "tasks": list(names), "steps": steps, "limit": limit}


def shortened(name: str, steps: int | None) -> Task:
    return replace(TASKS[name], steps=steps) if steps else TASKS[name]


def before(job: dict[str, Any]) -> dict[str, Any]:
    """The step before one."""
    return describe(job["tasks"][:-1], job["method"], job["seed"], job["steps"], job["limit"])


def folder_of(job: dict[str, Any]) -> Path:
    """Where a step leaves what it trained."""
    return CACHE / "continual" / f"{job['method']}-{job['seed']}-{job['settings']}"


def ready(jobs: list[dict[str, Any]], path: str | os.PathLike) -> list[dict[str, Any]]:
    """Those of `jobs` whose step before has worked, or that have none."""
    worked = {key(run) for run in latest(read_runs(path)) if not run["error"]}
    return [job for job in jobs if len(job["tasks"]) == 1 or key(before(job)) in worked]


def step(job: dict[str, Any]) -> dict[str, Any]:
    """Learns one task on top of the earlier ones, and measures all of them.

    Returns:
        a dict: `accuracy` ({split: {task: exact match, 0 to 1}}), `validation` and `test` (their means), `text` and
        `bit_equal` (see `run.read_text`), `untouched` (see `untouched`), `trainable` (parameters), `seconds`.

    Raises:
        ValueError: what the step before left is gone.
    """
    start = time.perf_counter()
    *earlier, task = [shortened(name, job["steps"]) for name in job["tasks"]]
    method, limit = METHODS[job["method"]], job["limit"]
    model = load_steps(job)
    options = {"model": model, "earlier": earlier, "adapter": task.name}
    model, processing = train(task, method, job["rate"], job["seed"], **options)
    save_step(model.eval(), method, task.name, folder_of(job))
    trained = time.perf_counter()
    trainable = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    asked = {
        split: {
            each.name: exact_match(model, processing, each, held_out_records(each, split)[:limit])
            for each in (*earlier, task)
        }
        for split in SPLITS
    }
    tokenizer = text_tokenizer(processing)
    result = {"accuracy": asked, **{split: mean(asked[split].values()) for split in SPLITS}, "trainable": trainable}
    result |= read_text(model, tokenizer, method, read("documents")[:limit])
    if method.routing is not None:
        result["untouched"] = untouched(model, tokenizer, earlier, task, min(limit or COMPARED, COMPARED))
    measured = time.perf_counter()
    return {**result, "seconds": {"train": round(trained - start, 1), "measure": round(measured - trained, 1)}}


def load_steps(job: dict[str, Any]) -> PreTrainedModel:
    """The base with all that the earlier steps trained."""
    model, method, jobs = load_base(), METHODS[job["method"]], []
    while len(job["tasks"]) > 1:
        job = before(job)
        jobs.insert(0, job)
        if not folder_of(job).exists():
            raise ValueError(
                f"{folder_of(job).relative_to(ROOT)}, which the step {job['task']!r} of {job['method']!r} left, is "
                "gone: delete that method's lines from the results, or give another --output, to learn it again."
            )
    for job in jobs:
        name, folder = job["tasks"][-1], folder_of(job)
        if method.routing is None:
            if method.trains == "lora":
                add_lora(model, name)
            _, unexpected = model.load_state_dict(load_file(folder / "trained.safetensors"), strict=False)
            assert not unexpected, unexpected
        elif job is jobs[0]:
            model = MoExtendForCausalLM.from_pretrained(folder, base=model, adapter_name=name)
        else:
            model.load_adapter(str(folder), adapter_name=name)
            model.set_adapter([part["tasks"][-1] for part in jobs[: len(model.adapters)]])
    return model


def save_step(model: PreTrainedModel, method: Method, name: str, folder: Path) -> None:
    """What one step trained: the adapter, or the tensors that asked for gradients."""
    folder.mkdir(parents=True, exist_ok=True)
    if method.routing is not None:
        model.save_pretrained(str(folder), adapter_name=name, adapter_dtype=torch.float32)
        return
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    save_file(trained, folder / "trained.safetensors")


@torch.inference_mode()
def untouched(
    model: MoExtendForCausalLM, tokenizer: PreTrainedTokenizerBase, earlier: Sequence[Task], task: Task, number: int
) -> dict[str, dict[str, int]]:
    """What the adapter of `task` changed for earlier tasks' questions and answers, read one at a time.

    Returns:
        {earlier task: {"read", "untouched" (no token selects an expert of the new adapter), "bit_equal" (of the
        untouched ones: every logit is that of the model before the step)}}: the last two have to be the same number.
    """
    names, result = model.active_adapters(), {}
    for each in earlier:
        talks = [messages(record) for record in held_out_records(each, "test")[:number]]
        all_ids = [
            tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True).input_ids for talk in talks
        ]
        now = [read_with(model, ids, task.name) for ids in all_ids]
        model.set_adapter([name for name in names if name != task.name])
        same = [torch.equal(logits, model(ids).logits) for (logits, _), ids in zip(now, all_ids, strict=True)]
        model.set_adapter(names)
        free = [not selected for _, selected in now]
        bit_equal = sum(equal and unused for equal, unused in zip(same, free, strict=True))
        result[each.name] = {"read": len(talks), "untouched": sum(free), "bit_equal": bit_equal}
    return result


def read_with(model: MoExtendForCausalLM, ids: torch.Tensor, name: str) -> tuple[torch.Tensor, bool]:
    """(logits, whether any token selects an expert of the adapter `name`) of `ids` [1, S]."""
    with model.record_routing() as records:
        logits = model(ids).logits
    selected = False
    for layer, plan in model.passes.layer_plans(model.select_adapters()).items():
        if name in plan.spans:
            first, stop = (records[layer].num_base + column for column in plan.spans[name])
            selected |= bool(((records[layer].index >= first) & (records[layer].index < stop)).any())
    return logits, selected


# ---------------------------------------------------------------- what came out


def by_method(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{method: its steps} of the first seed, in the order of learning; those that failed are left out."""
    methods = {}
    for run in sorted(latest(runs), key=lambda run: (run["seed"], len(run["tasks"]))):
        if not run["error"]:
            methods.setdefault((run["method"], run["seed"]), []).append(run)
    return {
        method if seed == min(s for m, s in methods if m == method) else f"{method}, seed {seed}": steps
        for (method, seed), steps in methods.items()
    }


def markdown(runs: list[dict[str, Any]]) -> str:
    """A line a step: accuracy (validation / test) of every task so far, and what became of the base's text."""
    order = max((run["tasks"] for run in runs), key=len)
    columns = ("method", "learned last", *order, "base text", "untouched and bit-equal")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for method, steps in by_method(runs).items():
        for run in steps:
            cells = [accuracy(run, name) for name in order]
            lines.append("| " + " | ".join([method, run["tasks"][-1], *cells, *rest(run)]) + " |")
    return "\n".join(lines) + "\n"


def accuracy(run: dict[str, Any], task: str) -> str:
    if task not in run["tasks"]:
        return ""
    return " / ".join(f"{100 * run['accuracy'][split][task]:.1f}%" for split in SPLITS)


def rest(run: dict[str, Any]) -> list[str]:
    """The last two cells: the rise of the base's perplexity, and how many earlier questions are as before."""
    domains = tuple(run["text"])
    text = "bit-equal" if run["bit_equal"] else percent(rise(run, domains))
    counts = run.get("untouched") or {}
    shown = [
        f"{name} {part['bit_equal']} of {part['untouched']} untouched ({part['read']} read)"
        for name, part in counts.items()
    ]
    return [text, ", ".join(shown)]


@styled
def plot(runs: list[dict[str, Any]], path: str | os.PathLike) -> None:
    """A panel a method: test accuracy of each task after each step; below it the rise of the base's perplexity."""
    methods, order = by_method(runs), max((run["tasks"] for run in runs), key=len)
    across = 2 if len(methods) > 1 else 1
    high = -(-len(methods) // across)
    figure = new_figure(WIDTH, 1.0 + 2.25 * high)
    panels = figure.subplots(high, across, squeeze=False, sharey=True).flatten()
    for axes, (method, steps) in zip(panels, methods.items(), strict=False):
        for number, task in enumerate(order):
            known = [(len(run["tasks"]), 100 * run["accuracy"]["test"][task]) for run in steps if task in run["tasks"]]
            axes.plot(
                *(zip(*known, strict=True) if known else ((), ())),
                label=one_line(task),
                clip_on=False,
                zorder=3 + number,
            )
        rises = [f"{WORDS.get(run['tasks'][-1], run['tasks'][-1])}\n{rest(run)[0]}" for run in steps]
        axes.set_xticks(range(1, len(steps) + 1), rises)
        axes.set_xlim(0.7, len(order) + 0.3)
        axes.set_ylim(-3, 103)
        axes.set_title(NAMES.get(method, method) + ", one adapter a task" * (method in OURS))
    for empty in panels[len(methods) :]:
        empty.set_axis_off()
    figure.supylabel("test accuracy (%)", fontsize="medium")
    figure.supxlabel(
        "task learned last, and the rise of the perplexity of the base's own text by then", fontsize="medium"
    )
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2)
    save(figure, path)


def show(path: str | os.PathLike) -> None:
    """Prints the table of a results file and draws the picture beside it."""
    present(path, [run for run in read_runs(path) if not run["error"]], markdown, plot, "continual.py")


def main() -> None:
    args = parse()
    prepare(args)
    for number in range(1, len(args.tasks) + 1):
        jobs = [
            describe(args.tasks[:number], method, seed, args.steps, args.limit)
            for seed in args.seeds
            for method in args.methods
        ]
        run_all(args, ready(jobs, args.output))
    show(args.output)


if __name__ == "__main__":
    main()
