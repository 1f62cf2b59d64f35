"""What the quickstarts measure: questions about images or audio, readers without them, the base on plain text."""

import os
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import datasets
from PIL.Image import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import files
from ..data.llava import JSON_FILES
from ..evaluation.compare import base_retention, compare_with_base, score
from ..processing_moextend import AUDIO_TOKEN, IMAGE_TOKEN

KINDS = ("open", "yes/no")
KEYS = {"image": IMAGE_TOKEN, "audio": AUDIO_TOKEN}


def read_questions(
    name: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    number: int | None = None,
    split: str = "test",
) -> list[dict[str, Any]]:
    """[{image or audio, question, answer, kind}]: first turns about one, `<image>` or `<audio>` where it stands.

    Args:
        name: LLaVA JSON or JSONL file (images come as paths), or a dataset in TRL's format (Hub id or folder).
        image_folder: what image paths in a file start from; default: the file's own folder.
        number: a random sample of so many (seed 0), as many open as yes/no questions.
        split: which one of a dataset.

    Raises:
        ValueError: no such question there.
    """
    if str(name).endswith(JSON_FILES):
        conversations = file_conversations(name, image_folder)
    else:
        samples = datasets.load_dataset(name, split=split)
        conversations = (
            (sample["messages"], [(kind, one) for kind in KEYS for one in sample.get(f"{kind}s") or ()])
            for sample in samples
        )
    questions = [first_turns(messages, *inputs) for messages, inputs in conversations if len(inputs) == 1]
    if not questions:
        raise ValueError(f"{name} holds no question about an image or clip.")
    if number is None:
        return questions
    generator = random.Random(0)
    kinds = [[question for question in questions if question["kind"] == kind] for kind in KINDS]
    return [question for kind in kinds for question in generator.sample(kind, min(number // 2, len(kind)))]


def file_conversations(
    path: str | os.PathLike, image_folder: str | os.PathLike | None
) -> Iterator[tuple[list[dict[str, Any]], list[tuple[str, str]]]]:
    """(messages, ("image" or "audio", path) of its inputs) of every entry of a LLaVA file."""
    for question in files.read_questions(path, image_folder):
        inputs = [(kind, one) for kind in KEYS for one in question.get(f"{kind}s") or ()]
        yield [*question["prompt"], {"role": "assistant", "content": question["answer"]}], inputs


def first_turns(messages: list[dict[str, Any]], given: tuple[str, str | Image]) -> dict[str, Any]:
    """The first question about an input ("image" or "audio", itself) and its answer."""
    token = KEYS[given[0]]
    turns = [files.as_text(message["content"], *KEYS.values()) for message in messages if message["role"] != "system"]
    question = turns[0] if token in turns[0] else f"{token}{turns[0]}"  # where TRL would put it
    kind = "yes/no" if turns[1].strip().lower() in ("yes", "no") else "open"
    return {given[0]: given[1], "question": question, "answer": turns[1], "kind": kind}


def accuracy(questions: list[dict[str, Any]], answers: list[str]) -> dict[str, float | None]:
    """Exact match by kind, in [0, 1]; `None` for a kind that was not asked. `answers`: one a question."""
    pairs = {kind: [] for kind in KINDS}
    for question, answer in zip(questions, answers, strict=True):
        pairs[question["kind"]].append((answer, question["answer"]))
    return {kind: score(*zip(*part, strict=True)) if part else None for kind, part in pairs.items()}


def blind_readers(known: list[dict[str, Any]], asked: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Accuracies without seeing: always the commonest answer of a kind, and the commonest answer to each question."""
    by_kind, by_question = {kind: Counter() for kind in KINDS}, {}
    for question in known:
        by_kind[question["kind"]][question["answer"]] += 1
        by_question.setdefault(question["question"], Counter())[question["answer"]] += 1
    commonest = {kind: (counts.most_common(1) or [("", 0)])[0][0] for kind, counts in by_kind.items()}
    majority = [commonest[question["kind"]] for question in asked]
    question_only = [
        by_question[question["question"]].most_common(1)[0][0] if question["question"] in by_question else answer
        for question, answer in zip(asked, majority, strict=True)
    ]
    return {"majority answer": accuracy(asked, majority), "question-only reader": accuracy(asked, question_only)}


def base_on_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | os.PathLike
) -> dict[str, Any]:
    """The base on held-out text, alone and under the adapter: is every logit the same, bit for bit?

    Args:
        model: a MoExtend model.
        path: JSON lines {"domain", "text"}; the first 256 tokens of each count.

    Returns:
        perplexity by domain and their geometric mean, "before" (adapter off) and "after" (on), and "bit_equal".
    """
    compared = compare_with_base(model, tokenizer, files.read_documents(path), batch_size=1, progress=False)
    retention, result = base_retention(compared), {"bit_equal": all(document["bit_equal"] for document in compared)}
    for name in ("before", "after"):
        domains = {domain: values[f"perplexity_{name}"] for domain, values in retention["domains"].items()}
        result[name] = {"geometric mean": retention[f"perplexity_{name}"], **domains}
    return result
