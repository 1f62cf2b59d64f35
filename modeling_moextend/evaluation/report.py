"""A report folder for an adapter: what it learned, what its base lost, in JSON, Markdown and pictures.

    results = evaluate_adapter(model, tokenizer, documents, questions)
    card = write_report("report", results, title="my adapter")
    create_card(model.config, **card).save("report/model_card.md")  # publish.py --report fills one with all it knows

In training: `MoExtendSFTTrainer(..., callbacks=[ReportCallback(documents, questions)])`.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..data.files import as_text, read_documents, read_questions
from ..data.processors import text_tokenizer
from ..publishing.card import cell
from ..tools.files import write_text
from ..tools.modes import is_moextend
from .compare import (
    answer,
    base_of,
    base_retention,
    check_gate,
    compare_with_base,
    expert_use,
    score,
    threshold_curve,
)
from .figures import plot_captured, plot_expert_use, plot_frontier, plot_threshold_curve
from .token_view import TokenUse, as_records, token_view, tokens_line, tokens_page

TASK = "new task"  # the domain that questions are counted under in tables of expert use
TEXT = "text the base knew"
SAMPLES = 10  # questions shown with their answers
VIEWS, LINES = 5, 3  # of them, token by token: as a page, in a card
TOKENS = "tokens.html"


def evaluate_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    documents: list[dict[str, Any]],
    questions: Sequence[dict[str, Any]] = (),
    *,
    base: PreTrainedModel | None = None,
    thresholds: Sequence[float] = (),
    metric: str = "exact_match",
    max_length: int = 256,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    progress: bool = True,
) -> dict[str, Any]:
    """Everything a report holds.

    Args:
        model, tokenizer, documents, base, max_length, batch_size, progress: as `compare_with_base` takes them.
        questions: records of `read_questions`.
        thresholds: with scope "gate", values of `gate_threshold` to measure both sides at; the model's own stays.
        metric: what answers are scored by, "exact_match" or "vqa_accuracy".
        max_new_tokens: as in `answer`.

    Returns:
        {"retention": the values of the metric base_retention, "bit_equal": share of documents, "accuracy",
        "base_accuracy" (`None` without questions, the latter also with images), "metric", "questions": how many,
        "samples": some of them with the answers, "token_view": of `views_of`, "expert_use": see there (with the
        questions, where they have no images, as domain "new task"), "task_captured": {layer: share of the questions'
        tokens}, "new_experts": {layer: N}, "scope", "gate_threshold", "threshold_curve": points of `threshold_curve`}.
    """
    thresholds = list(thresholds)
    if thresholds:
        check_gate(model)
    check_enabled(model)
    options = {"base": base, "max_length": max_length, "batch_size": batch_size, "progress": progress}
    compared = compare_with_base(model, tokenizer, documents, **options)
    answer_options = {"max_new_tokens": max_new_tokens, "batch_size": 4 * batch_size, "progress": progress}
    config = model.config if is_moextend(model) else None
    results = {
        "scope": getattr(config, "scope", None),
        "gate_threshold": model.gate_threshold if getattr(config, "scope", None) == "gate" else None,
        "new_experts": new_experts(model),
        "retention": base_retention(compared),
        "bit_equal": sum(document["bit_equal"] for document in compared) / len(compared),
        **evaluate_questions(model, tokenizer, questions, base, metric, **answer_options),
    }
    task = compare_with_base(model, tokenizer, task_documents(questions), **options) if text_only(questions) else []
    results["task_captured"] = base_retention(task)["captured"] if task else {}
    results["token_view"] = views_of(model, tokenizer, questions, results["samples"])
    results["expert_use"] = {**expert_use(compared), **expert_use(task)}

    def measure():
        retention = base_retention(compare_with_base(model, tokenizer, documents, **options))
        retention = {name: retention[name] for name in ("perplexity_ratio", "kl", "top1_changed", "captured_mean")}
        return {**retention, "accuracy": accuracy(model, tokenizer, questions, metric, **answer_options)[0]}

    results["threshold_curve"] = threshold_curve(model, measure, thresholds, progress=progress) if thresholds else []
    return results


def new_experts(model: PreTrainedModel) -> dict[int, int]:
    """{layer: N} of all active adapters together; `{}` of a plain model."""
    active = (
        [model.adapters[name].config.extended_layers for name in model.active_adapters()] if is_moextend(model) else []
    )
    layers = sorted({layer for plan in active for layer in plan})
    return {layer: sum(len(plan.get(layer, ())) for plan in active) for layer in layers}


def check_enabled(model: PreTrainedModel) -> None:
    """Refuses to report on an adapter that takes no part: everything would look unchanged.

    Raises:
        ValueError: `disable_adapters()` was called.
    """
    if is_moextend(model) and not model.active_adapters():
        raise ValueError("The adapter is switched off, so there is nothing to report on: model.enable_adapters().")


def task_documents(questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Questions with their answers as documents of the domain "new task"."""
    return [
        {"domain": TASK, "messages": [*question["prompt"], {"role": "assistant", "content": question["answer"]}]}
        for question in questions
    ]


def text_only(questions: Sequence[dict[str, Any]]) -> bool:
    """Whether there are questions, and none about images or audio."""
    return bool(questions) and not any(question.get("images") or question.get("audios") for question in questions)


def evaluate_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    questions: Sequence[dict[str, Any]],
    base: PreTrainedModel | None,
    metric: str,
    **answer_options: Any,
) -> dict[str, Any]:
    """The part of `evaluate_adapter` that questions bring: of the model, and of the base where there are no images."""
    share, answers = accuracy(model, tokenizer, questions, metric, **answer_options)
    results = {"accuracy": share, "base_accuracy": None, "metric": metric, "questions": len(questions)}
    if text_only(questions):
        with base_of(model, base) as reference:
            results["base_accuracy"] = accuracy(reference, tokenizer, questions, metric, **answer_options)[0]
    results["samples"] = [
        {"question": as_text(question["prompt"][-1]["content"]), "reference": question["answer"], "answer": text}
        for question, text in zip(questions[:SAMPLES], answers[:SAMPLES], strict=True)
    ]
    return results


def views_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    questions: Sequence[dict[str, Any]],
    samples: Sequence[dict[str, str]],
) -> list[dict[str, Any]]:
    """[{"question", "tokens": see `token_view`}]: which tokens of the first questions and answers used new experts."""
    if not (is_moextend(model) and text_only(questions)):
        return []
    views = []
    for question, sample in zip(questions[:VIEWS], samples[:VIEWS], strict=True):
        said = [*question["prompt"], {"role": "assistant", "content": sample["answer"]}]
        text = tokenizer.apply_chat_template(said, tokenize=False)
        ids = text_tokenizer(tokenizer)(text, add_special_tokens=False).input_ids
        views.append({"question": sample["question"], "tokens": as_records(token_view(model, tokenizer, ids))})
    return views


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    questions: Sequence[dict[str, Any]],
    metric: str,
    **answer_options: Any,
) -> tuple[float | None, list[str]]:
    """(share of right answers, the answers); (`None`, []) without questions."""
    if not questions:
        return None, []
    prompts, images, audio = (
        [question["prompt"] for question in questions],
        [question.get("images") or [] for question in questions],
        [question.get("audios") or [] for question in questions],
    )
    answers = answer(model, tokenizer, prompts, images=images, audio=audio, **answer_options)
    several = metric == "vqa_accuracy"  # the only one that hears several people
    references = [several and question.get("answers") or question["answer"] for question in questions]
    return score(answers, references, metric), answers


# ---------------------------------------------------------------- the folder


def write_report(
    folder: str | os.PathLike,
    results: dict[str, Any],
    *,
    title: str = "MoExtend adapter",
    points: Sequence[dict[str, Any]] = (),
    task: str = TASK,
    text: str = TEXT,
) -> dict[str, Any]:
    """Writes report.json, report.md and the pictures.

    Args:
        folder: made where there is none.
        results: of `evaluate_adapter`.
        title: heading, and the adapter's name in the frontier.
        points: others for the frontier, [{"name", "accuracy", "perplexity_ratio"}], e.g. of `read_point`.
        task, text: names of the data sets that questions and the base's text are from, for the model-index.

    Returns:
        {"results": records, "forgetting": records, "metrics": for the model-index, "figures": {caption: file in
        `folder`}, "token_lines": of some answers, where there are any}, the part of `create_card` that was measured.

    Raises:
        ValueError: a result that is NaN or infinite.
        ImportError: matplotlib is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = point(title, results)
    card = {
        "results": result_records(results),
        "forgetting": domain_records(results["retention"]["domains"]),
        "metrics": card_metrics(results, task, text),
        "figures": draw(folder, results, [*([own] if own else []), *points]),
    }
    views = [
        (view["question"], [TokenUse(**token) for token in view["tokens"]]) for view in results.get("token_view") or ()
    ]
    if views:
        card["token_lines"] = [tokens_line(tokens, colour=False) for _, tokens in views[:LINES]]
        write_text(folder / TOKENS, tokens_page(views))
    content = json.dumps({"title": title, **results, "card": card}, indent=2, allow_nan=False)
    write_text(folder / "report.json", content)
    write_text(folder / "report.md", markdown(title, results, card))
    return card


def point(name: str, results: dict[str, Any]) -> dict[str, Any] | None:
    """A point of the frontier, or `None` where no questions were asked."""
    if results["accuracy"] is None:
        return None
    ratio = results["retention"]["perplexity_ratio"]
    return {"name": name, "accuracy": results["accuracy"], "perplexity_ratio": ratio}


def read_point(path: str | os.PathLike) -> dict[str, Any]:
    """The point of the frontier in a report folder, or in a report.json, of another adapter or method.

    Raises:
        ValueError: it was made without questions.
    """
    path = Path(path)
    report = json.loads((path / "report.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    result = point(report["title"], report)
    if result is None:
        raise ValueError(f"{path} has no accuracy: write it again with questions to compare with it.")
    return result


def draw(folder: Path, results: dict[str, Any], points: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Draws the pictures that the results allow; returns {caption: file name}."""
    figures = {}
    if points:
        if results["base_accuracy"] is not None:
            points = [{"name": "base alone", "accuracy": results["base_accuracy"], "perplexity_ratio": 1.0}, *points]
        plot_frontier(points, folder / "frontier.png")
        figures["Accuracy on the new task against forgetting"] = "frontier.png"
    if results["expert_use"]:
        plot_expert_use(results["expert_use"], results["new_experts"], folder / "expert_use.png")
        figures["Use of the experts, by domain and layer"] = "expert_use.png"
    captured = {domain: values["captured"] for domain, values in results["retention"]["domains"].items()}
    if any(captured.values()):
        plot_captured(captured, folder / "captured.png", results["task_captured"])
        figures["Tokens that select a new expert, by domain"] = "captured.png"
    if results["threshold_curve"]:
        plot_threshold_curve(results["threshold_curve"], folder / "threshold.png", results["gate_threshold"])
        figures["What the threshold of the gate trades"] = "threshold.png"
    return figures


# ---------------------------------------------------------------- texts


def result_records(results: dict[str, Any]) -> list[dict[str, str]]:
    """Entries of the results table of report and model card: the base alone and with the adapter."""
    records, retention = [], results["retention"]
    if results["accuracy"] is not None:
        measure = f"{results['metric'].replace('_', ' ')}, {results['questions']:,} questions"
        records.append(record(measure, percent(results["base_accuracy"]), percent(results["accuracy"]), "higher"))
    measure = f"perplexity of the base's own text, {retention['tokens']:,} tokens"
    values = (f"{retention[name]:.2f}" for name in ("perplexity_before", "perplexity_after"))
    records.append(record(measure, *values, "lower"))
    records.append(record("the same, after / before", "", f"{retention['perplexity_ratio']:.4f}", "lower"))
    records.append(record("KL from the base, nats a token", "", f"{retention['kl']:.3g}", "lower"))
    records.append(record("likeliest next token changed", "", percent(retention["top1_changed"]), "lower"))
    if retention["captured_mean"] is not None:
        records.append(record("its tokens that select a new expert", "", percent(retention["captured_mean"]), "lower"))
    if results["task_captured"]:
        share = sum(results["task_captured"].values()) / len(results["task_captured"])
        records.append(record("the questions' tokens that do", "", percent(share), ""))
    return [
        *records,
        record("texts with every logit bit-equal, read in batches", "", percent(results["bit_equal"]), "higher"),
    ]


def record(measure: str, base: str, adapter: str, better: str) -> dict[str, str]:
    return {"measure": measure, "base": base, "with the adapter": adapter, "better": better}


def percent(share: float | None) -> str:
    """0.00034 -> "0.034%"; `None` -> ""."""
    return "" if share is None else f"{100 * share:.3g}%"


def card_metrics(results: dict[str, Any], task: str, text: str) -> list[dict[str, Any]]:
    """What was measured, with the adapter, as `create_card` takes it for the model-index."""
    retention = results["retention"]
    metrics = [
        ("perplexity", "perplexity", text, retention["perplexity_after"]),
        ("perplexity_ratio", "perplexity, after / before", text, retention["perplexity_ratio"]),
        ("kl_divergence", "KL from the base, nats a token", text, retention["kl"]),
    ]
    if results["accuracy"] is not None:
        metrics.insert(0, (results["metric"], results["metric"].replace("_", " "), task, results["accuracy"]))
    return [{"type": kind, "name": name, "dataset": data, "value": value} for kind, name, data, value in metrics]


def domain_records(domains: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of the forgetting table: a domain of the base's own text each."""
    return [
        {
            "domain": domain,
            "perplexity before": f"{values['perplexity_before']:.2f}",
            "after": f"{values['perplexity_after']:.2f}",
            "ratio": f"{values['perplexity_ratio']:.4f}",
            "KL (nats a token)": f"{values['kl']:.3g}",
            "top-1 changed": percent(values["top1_changed"]),
            "captured": percent(values["captured_mean"]),
            "texts": values["documents"],
            "tokens": f"{values['tokens']:,}",
        }
        for domain, values in domains.items()
    ]


def markdown(title: str, results: dict[str, Any], card: dict[str, Any]) -> str:
    """The text of report.md."""
    parts = [f"# {title}", table(card["results"]), "## The base's own text, by domain", table(card["forgetting"])]
    parts += [MEANING]
    if results["threshold_curve"]:
        parts += ["## Threshold of the gate", table([curve_record(point) for point in results["threshold_curve"]])]
    if results["samples"]:
        parts += ["## Some answers", table(results["samples"])]
    if results.get("token_view"):
        parts += [f"[Which tokens of these used new experts, layer by layer]({TOKENS})"]
    parts += [f"![{caption}]({file})" for caption, file in card["figures"].items()]
    return "\n\n".join(parts) + "\n"


MEANING = """\
Perplexity: the number of equally likely tokens that the model chooses among; over domains the geometric mean. KL: how
far the next-token distribution is from the base's, 0 where nothing changed. Captured: the share of tokens that select
a new expert, mean over the extended layers."""


def curve_record(point: dict[str, Any]) -> dict[str, str]:
    """An entry of the threshold table."""
    return {
        "threshold": f"{point['threshold']:g}",
        "accuracy": percent(point["accuracy"]),
        "perplexity ratio": f"{point['perplexity_ratio']:.4f}",
        "KL (nats a token)": f"{point['kl']:.3g}",
        "captured": percent(point["captured_mean"]),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of dicts with equal keys."""
    lines = [list(records[0]), ["---"] * len(records[0]), *[list(values.values()) for values in records]]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


# ---------------------------------------------------------------- in training


class ReportCallback(TrainerCallback):
    """Writes a report folder while a trainer runs: at every evaluation and at the end.

    Adds `eval_base_perplexity_ratio` and, with questions, `eval_accuracy` to the evaluation's metrics, which
    `metric_for_best_model` may name. Every process measures, for a sharded model needs them all; the first one writes.

    Args:
        documents: texts that the base knew, or the file that `read_documents` takes.
        questions: the new task, or the file that `read_questions` takes; default: none.
        folder: where reports go, `step-<number>` for each; default: `report` in the trainer's output folder.
        every_evaluation: `False`: only at the end of training.
        **options: to `evaluate_adapter`: `thresholds`, `metric`, `max_length`, `batch_size`, ...
    """

    def __init__(
        self,
        documents: str | os.PathLike | Sequence[dict[str, Any]],
        questions: str | os.PathLike | Sequence[dict[str, Any]] = (),
        *,
        folder: str | os.PathLike | None = None,
        every_evaluation: bool = True,
        **options: Any,
    ):
        self.documents = read_documents(documents) if isinstance(documents, str | Path) else list(documents)
        self.questions = read_questions(questions) if isinstance(questions, str | Path) else list(questions)
        self.folder, self.every_evaluation, self.options = folder, every_evaluation, options
        self.last_step = self.last_results = None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.every_evaluation:
            is_same_step = self.last_step == state.global_step  # another one of several evaluation sets
            results = self.last_results if is_same_step else self.report(args, state, **kwargs)
            if metrics is not None:
                metrics["eval_base_perplexity_ratio"] = results["retention"]["perplexity_ratio"]
                metrics |= {} if results["accuracy"] is None else {"eval_accuracy": results["accuracy"]}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.last_step != state.global_step:
            self.report(args, state, **kwargs)

    def report(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Measures and writes; returns the results."""
        options = {"progress": not args.disable_tqdm and state.is_world_process_zero, **self.options}
        results = evaluate_adapter(model, processing_class, self.documents, self.questions, **options)
        self.last_step, self.last_results = state.global_step, results
        if state.is_world_process_zero:
            folder = Path(self.folder or Path(args.output_dir, "report"), f"step-{state.global_step}")
            write_report(folder, results, title=f"step {state.global_step}")
        return results
