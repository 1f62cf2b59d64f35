"""What the quickstart measures: questions about images, readers that can't see, the base on plain text.

    python examples/measure.py --train outputs/easy-vqa/train.json --questions outputs/easy-vqa/test.json

As a script it prints what readers that can't see get on the questions.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

KINDS = ("open", "yes/no")


def read_questions(name, image_folder=None, number=None, split="test"):
    """[{image, question, answer, kind}]: first turns about one image.

    Args:
        name: LLaVA JSON or JSONL file (images come as paths), or a dataset in TRL's format (Hub id or folder).
        image_folder: what image paths in a file start from; default: the file's own folder.
        number: a random sample of so many (seed 0), as many open as yes/no questions.
        split: which one of a dataset.

    Raises:
        ValueError: no such question there.
    """
    is_file = str(name).endswith((".json", ".jsonl"))
    rows = list(file_questions(name, image_folder) if is_file else dataset_questions(name, split))
    if not rows:
        raise ValueError(f"{name} holds no question about an image.")
    for row in rows:
        row["kind"] = "yes/no" if row["answer"].strip().lower() in ("yes", "no") else "open"
    if number is None:
        return rows
    generator = random.Random(0)
    kinds = [[row for row in rows if row["kind"] == kind] for kind in KINDS]
    return [row for kind in kinds for row in generator.sample(kind, min(number // 2, len(kind)))]


def file_questions(path, image_folder):
    """Questions of a LLaVA file, `<image>` where the image stands."""
    text = Path(path).read_text(encoding="utf-8")
    entries = [json.loads(line) for line in text.splitlines() if line] if str(path).endswith("l") else json.loads(text)
    for entry in entries:
        if isinstance(entry.get("image"), str):
            question, answer = (turn["value"] for turn in entry["conversations"][:2])
            image = str(Path(image_folder or Path(path).parent, entry["image"]))
            yield {"image": image, "question": question, "answer": answer}


def dataset_questions(name, split):
    """Questions of a dataset with `images` and `messages`, as TRL takes them."""
    import datasets

    for sample in datasets.load_dataset(name, split=split):
        if len(sample["images"]) == 1:
            question, answer = (as_text(message["content"]) for message in sample["messages"][:2])
            question = question if "<image>" in question else f"<image>{question}"  # where TRL would put it
            yield {"image": sample["images"][0], "question": question, "answer": answer}


def as_text(content):
    """A message's content as text, whether it is a string or a list of parts."""
    if isinstance(content, str):
        return content
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in content)


def accuracy(rows, given):
    """Exact match by kind, in [0, 1]; `None` for a kind that was not asked. `given`: an answer a row."""
    hits = {kind: [] for kind in KINDS}
    for row, text in zip(rows, given, strict=True):
        hits[row["kind"]].append(text.strip().lower() == row["answer"].strip().lower())
    return {kind: sum(part) / len(part) if part else None for kind, part in hits.items()}


def blind_readers(known, asked):
    """Accuracies without seeing: always the commonest answer of a kind, and the commonest answer to each question."""
    by_kind, by_question = {kind: Counter() for kind in KINDS}, {}
    for row in known:
        by_kind[row["kind"]][row["answer"]] += 1
        by_question.setdefault(row["question"], Counter())[row["answer"]] += 1
    commonest = {kind: (counts.most_common(1) or [("", 0)])[0][0] for kind, counts in by_kind.items()}
    majority = [commonest[row["kind"]] for row in asked]
    question_only = [
        by_question[row["question"]].most_common(1)[0][0] if row["question"] in by_question else commonest[row["kind"]]
        for row in asked
    ]
    return {"majority answer": accuracy(asked, majority), "question-only reader": accuracy(asked, question_only)}


def base_on_text(model, tokenizer, path):
    """The base on held-out text, alone and under the adapter: is every logit the same, bit for bit?

    Args:
        model: a MoExtend model in evaluation mode.
        path: JSON lines {"domain", "text"}; the first 256 tokens of each count.

    Returns:
        perplexity by domain and their geometric mean, "before" (adapter off) and "after" (on), and "bit_equal".
    """
    import torch

    sums, equal = {"before": {}, "after": {}}, True
    for row in map(json.loads, Path(path).read_text(encoding="utf-8").splitlines()):
        ids = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=256).input_ids.to(model.device)
        with torch.inference_mode():
            after = model(input_ids=ids, labels=ids)
            with model.disable_adapter():
                before = model(input_ids=ids, labels=ids)
        equal = equal and torch.equal(before.logits, after.logits)
        for name, output in (("before", before), ("after", after)):
            nats, tokens = sums[name].get(row["domain"], (0.0, 0))
            sums[name][row["domain"]] = (nats + output.loss.item() * (ids.shape[1] - 1), tokens + ids.shape[1] - 1)
    result = {"bit_equal": equal}
    for name, domains in sums.items():
        logs = {domain: nats / tokens for domain, (nats, tokens) in domains.items()}
        mean = sum(logs.values()) / len(logs)
        result[name] = {"geometric mean": mean, **logs}
        result[name] = {domain: torch.tensor(value).exp().item() for domain, value in result[name].items()}
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="LLaVA JSON file the readers know")
    parser.add_argument("--questions", required=True, help="LLaVA JSON file with what is asked")
    arguments = parser.parse_args()
    print(
        json.dumps(
            blind_readers(read_questions(arguments.train, split="train"), read_questions(arguments.questions)),
            indent=2,
        )
    )
