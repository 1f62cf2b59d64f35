"""One run in a process of its own: train, ask, read the base's text; the last line on stdout is the result as JSON.

    python benchmarks/run.py '{"task": "library", "method": "lora", "rate": 0.001, "seed": 0}'

`forgetting.py` starts these. `{"prepare": true}` writes the data, `{"align": "easy_vqa", "seed": 0}` trains the
projector that all methods of a task with images share. Of a run: `steps`, `changes` (to the method's settings).
`{"tasks": ["library", "types"], "method": ...}` is the second step of `continual.py`.
"""

import json
import sys
import time
from importlib.metadata import version
from typing import Any

from methods import METHODS, Method, changed
from tasks import TASKS, Task, held_out_records, messages, prepare, read
from training import align, load_base, load_processing, train
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, logging

from modeling_moextend.data.processors import text_tokenizer
from modeling_moextend.evaluation.compare import answer, base_retention, compare_with_base, score

# What runs, and what records are made of.
STACK = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "sympy",
    "matplotlib",
    "numpy",
    "pandas",
    "networkx",
    "scipy",
    "scikit-learn",
)
SPLITS = ("validation", "test")
READ = {"max_length": 256, "batch_size": 16, "progress": False}  # how the base's text is read


def run(
    task: Task, method: Method, rate: float, seed: int, steps: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Trains and measures one run.

    Args:
        limit: asks and reads so many records only, for tests.

    Returns:
        a dict: `validation` and `test` (exact match, 0 to 1), `text` (see `read_text`), `bit_equal`, `trainable`
        (parameters), `seconds`, `versions`.
    """
    start = time.perf_counter()
    model, processing = train(task, method, rate, seed, steps)
    trained = time.perf_counter()
    model.eval()
    result = {split: exact_match(model, processing, task, held_out_records(task, split)[:limit]) for split in SPLITS}
    asked = time.perf_counter()
    result |= read_text(model, text_tokenizer(processing), method, read("documents")[:limit])
    times = {"train": trained - start, "ask": asked - trained, "read": time.perf_counter() - asked}
    trainable = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    seconds = {name: round(value, 1) for name, value in times.items()}
    return {**result, "trainable": trainable, "seconds": seconds, "versions": {name: version(name) for name in STACK}}


def exact_match(
    model: PreTrainedModel,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    task: Task,
    records: list[dict[str, Any]],
) -> float:
    """Share of records whose greedy answer is the right one: the metric exact_match."""
    prompts = [messages(record, answer=False) for record in records]
    images = [[record["image"]] for record in records] if task.vision else None
    options = {"max_new_tokens": task.max_new_tokens, "progress": False}
    answers = answer(model, processing, prompts, images=images, **options)
    return score(answers, [record["answer"] for record in records])


def read_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: Method, documents: list[dict[str, Any]]
) -> dict[str, Any]:
    """What became of the base's own text.

    Returns:
        {"text": {kind/domain: {"base", "after" (perplexity), "kl" (nats a token), "changed" (share of top-1 tokens),
        "captured" (share of tokens, mean over extended layers; `None` where there is none)}}, "bit_equal"}
    """
    other = {}
    if method.routing is None:  # the base itself has changed: read it beside a fresh one
        model, other = getattr(model, "base", model), {"base": load_base().eval()}
    compared = compare_with_base(model, tokenizer, documents, **READ, **other)
    text = {domain: summary(values) for domain, values in base_retention(compared)["domains"].items()}
    return {"text": text, "bit_equal": all(document["bit_equal"] for document in compared)}


def summary(values: dict[str, Any]) -> dict[str, float | None]:
    """One domain's values of the metric base_retention, as a line of results names them."""
    names = {"base": "perplexity_before", "after": "perplexity_after", "kl": "kl", "changed": "top1_changed"}
    return {name: values[value] for name, value in {**names, "captured": "captured_mean"}.items()}


def main() -> None:
    job = json.loads(sys.argv[1])
    logging.set_verbosity_error()
    if job.get("prepare"):
        prepare(load_processing(TASKS["library"]))
        result = {}
    elif "align" in job:
        align(TASKS[job["align"]], job["seed"])
        result = {}
    elif "tasks" in job:
        from continual import step

        result = step(job)
    else:
        method = changed(METHODS[job["method"]], job.get("changes", {}))
        options = {name: job.get(name) for name in ("steps", "limit")}
        result = run(TASKS[job["task"]], method, job["rate"], job["seed"], **options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
