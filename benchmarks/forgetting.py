"""Learning against forgetting: every method on every task, one resumable command.

    python benchmarks/forgetting.py                    # everything: a day; go on with the same command after a stop
    python benchmarks/forgetting.py --quick            # two tasks, one rate, one seed, fewer methods: 20 minutes
    python benchmarks/forgetting.py --tasks library --methods gate lora_replay
    python benchmarks/forgetting.py --ablations --tasks library types numbers --rates 3e-3
    python benchmarks/forgetting.py --base outputs/benchmarks/smollm2-moe --tasks library types --methods gate full
    python benchmarks/forgetting.py --output my.jsonl  # from the start, beside the results that are here already
    python benchmarks/report.py                        # tables and picture from the results

For each task and method, four learning rates on the first seed; the best on the validation split (ties: the lower
base perplexity) goes on to the other seeds. Tables show the test split at that rate. Each run is a process of its own
on one thread, and one line in the results file. A line that is there already is not run again; a run that fails is a
line with its error, and the rest go on.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from methods import ABLATIONS, METHODS, Method, changed
from runs import append_run, key, latest, missing, read_runs, settings_hash, winner
from tasks import OTHER_BASE, ROOT, TASKS, Task, data_folder, other_base

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TABLE_TASKS = ("library", "types", "numbers", "calendar", "follow_up", "easy_vqa")
QUICK_TASKS = ("library", "easy_vqa")
QUICK = ("paper", "modality", "gate", "full_replay", "lora_replay")
ENVIRONMENT = {  # one thread a run: small expert loops gain nothing from two; glibc keeps large activations
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help=f"default: {' '.join(TABLE_TASKS)}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all; of those, what fits the task")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates in place of each method's own grid")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="the sweep is on the first; default 0 1 2"
    )
    parser.add_argument("--quick", action="store_true", help="two tasks, the second rate, one seed, the main methods")
    text = "variants of this method instead, one run each; default: gate_deltas"
    parser.add_argument("--ablations", nargs="?", const="gate_deltas", choices=ABLATIONS, help=text)
    parser.add_argument("--workers", type=int, default=2, help="runs at once, one thread each; default 2")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--base", type=Path, help="folder of another base, as upcycle.py writes; text tasks only")
    parser.add_argument("--steps", type=int, help="fewer optimiser steps a run, to try it: into outputs/")
    parser.add_argument("--output", type=Path, help="default: results/forgetting.jsonl (ablations.jsonl) beside this")
    args = parser.parse_args(arguments)
    name = "ablations.jsonl" if args.ablations else "forgetting.jsonl"
    aside = "quick.jsonl" if args.quick else "tried.jsonl" if args.steps else ""
    if args.base:
        choose_base(parser, args)
        aside = f"{args.base.resolve().name}-{aside or name}"
    args.output = args.output or (ROOT / "outputs/benchmarks" / aside if aside else RESULTS / name)
    args.tasks = args.tasks or list(QUICK_TASKS if args.quick else TABLE_TASKS)
    args.methods = args.methods or list(QUICK if args.quick else METHODS)
    args.seeds = args.seeds[:1] if args.quick else args.seeds
    return args


def choose_base(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Lets this process and those of the runs take `args.base`, or says why they can't."""
    if not (args.base / "config.json").exists():
        parser.error(f"--base {args.base}: no folder with a config.json; benchmarks/upcycle.py writes one")
    args.tasks = args.tasks or [name for name in TABLE_TASKS if not TASKS[name].vision]
    if vision := [name for name in args.tasks if TASKS[name].vision]:
        parser.error(
            f"--base with --tasks {' '.join(vision)}: the encoder is made for the small base; give text tasks"
        )
    os.environ[OTHER_BASE] = str(args.base.resolve())
    other_base.cache_clear()


# ---------------------------------------------------------------- which runs


def describe(task: Task, method: Method, rate: float, seed: int, **more: Any) -> dict[str, Any]:
    """One run as `run.py` takes it, with its key."""
    run = {"task": task.name, "method": method.name, "rate": rate, "seed": seed, **other_base()}
    more |= {"steps": task.steps} if task != TASKS[task.name] else {}
    return {**run, "settings": settings_hash(task, method), **more}


def pairs(args: argparse.Namespace) -> list[tuple[Task, Method]]:
    """The (task, method) pairs that were asked for."""
    tasks = [replace(TASKS[name], steps=args.steps or TASKS[name].steps) for name in args.tasks]
    chosen = [(task, METHODS[method]) for task in tasks for method in args.methods]
    return [(task, method) for task, method in chosen if method.fits(task)]


def rates(args: argparse.Namespace, method: Method) -> Sequence[float]:
    """The sweep's rates: the options', or the method's own; the second of them for `--quick` and `--ablations`."""
    grid = args.rates or method.rates
    return [grid[min(1, len(grid) - 1)]] if args.quick or args.ablations else grid


def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs on the first seed."""
    return [
        describe(task, method, rate, args.seeds[0]) for task, method in pairs(args) for rate in rates(args, method)
    ]


def finals(args: argparse.Namespace, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs on the other seeds, at the rates that won; pairs whose sweep failed have none."""
    chosen = []
    for task, method in pairs(args):
        keys = {key(describe(task, method, rate, args.seeds[0])) for rate in rates(args, method)}
        best = winner([run for run in latest(runs) if key(run) in keys])
        chosen += [describe(task, method, best["rate"], seed) for seed in args.seeds[1:]] if best else []
    return chosen


def ablations(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One run for each entry of a method's `ABLATIONS`, named "method: entry"."""
    chosen = []
    for task in (TASKS[name] for name in args.tasks):
        for name, changes in ABLATIONS[args.ablations]:
            method = changed(METHODS[args.ablations], changes)
            for rate in rates(args, method):
                run = describe(task, method, rate, args.seeds[0], changes=changes)
                chosen.append({**run, "method": f"{args.ablations}: {name}", "of": args.ablations})
    return chosen


# ---------------------------------------------------------------- running them


def in_own_process(job: dict[str, Any]) -> dict[str, Any]:
    """What `run.py` measures for `job`, with `error` set where it failed."""
    command_job = {**job, "method": job.get("of", job.get("method"))}
    command = [sys.executable, str(HERE / "run.py"), json.dumps(command_job)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    try:
        if done.returncode == 0:
            return {"error": None, **json.loads(done.stdout.splitlines()[-1])}
        problem = f"exit code {done.returncode}"
    except (IndexError, json.JSONDecodeError) as error:
        problem = f"no result: {error}"
    errors = done.stderr[-1500:].replace(str(ROOT), ".")  # results are shared: no paths of this machine
    return {"error": f"{problem}\n{errors}"}


def prepare(args: argparse.Namespace) -> None:
    """Data, and for tasks with images the shared projector of each seed.

    Raises:
        RuntimeError: one of them failed: no run could work.
    """
    jobs = [] if (data_folder() / "done").exists() else [{"prepare": True}]
    vision = next((name for name in args.tasks if TASKS[name].vision), None)
    for seed in args.seeds if vision else ():
        if not (data_folder() / f"aligned-{seed}" / "config.json").exists():
            jobs.append({"align": vision, "seed": seed})
    for job in jobs:
        print(f"preparing {job} ...", flush=True)
        if error := in_own_process(job)["error"]:
            raise RuntimeError(f"Preparing {job} failed: {error}")


def run_all(args: argparse.Namespace, chosen: list[dict[str, Any]]) -> None:
    """Runs those of `chosen` that the results file lacks, `args.workers` at once."""
    todo = missing(chosen, read_runs(args.output), args.retry)
    print(f"{len(chosen)} runs, {len(chosen) - len(todo)} of them in {args.output} already", flush=True)
    start = time.perf_counter()
    pool = ThreadPoolExecutor(args.workers)
    try:
        futures = {pool.submit(in_own_process, run): run for run in todo}
        for number, future in enumerate(as_completed(futures), start=1):
            command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
            run = {**futures[future], **future.result(), "command": command}
            append_run(args.output, run)
            minutes_left = (time.perf_counter() - start) / number * (len(todo) - number) / 60
            print(f"[{number}/{len(todo)}, {minutes_left:.0f} min to go] {summary_line(run)}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C too: what has not begun never begins


def summary_line(run: dict[str, Any]) -> str:
    """One line about one run."""
    name = f"{run['task']} {run['method']} {run['rate']:g} seed {run['seed']}"
    if run["error"]:
        return f"{name}: FAILED, {run['error'].strip().splitlines()[-1]}"
    return f"{name}: validation {run['validation']:.3f}, {sum(run['seconds'].values()):.0f} s"


def main() -> None:
    args = parse()
    prepare(args)
    if args.ablations:
        run_all(args, ablations(args))
    else:
        run_all(args, sweep(args))
        args.retry = False  # what was run again just now and failed again has failed
        run_all(args, finals(args, read_runs(args.output)))
    from report import show

    show(args.output)


if __name__ == "__main__":
    main()
