"""easy-VQA (pip package `easy-vqa`, 64x64 images of one coloured shape) as LLaVA JSON files.

captions.json: one caption an image, from the training split's own answers. train.json: questions of the training
split, as many yes/no questions as open ones. test.json: the test split, on other images.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

import easy_vqa


def questions(split: str) -> list[tuple[str, str, str]]:
    """[(image path, question, answer)] of `split` ("train" or "test")."""
    texts, answers, images = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    return [(paths[image], text, answer) for text, answer, image in zip(texts, answers, images, strict=True)]


def entry(number: int, image: str, question: str, answer: str) -> dict[str, Any]:
    """One LLaVA entry."""
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "image": image, "conversations": turns}


def captions(items: list[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """[(image, "a red circle")] of the images whose colour and shape their own questions tell."""
    facts = {}
    for image, question, answer in items:
        if answer not in ("yes", "no"):
            facts.setdefault(image, {})["colour" if "color" in question else "shape"] = answer
    return [(image, f"a {f['colour']} {f['shape']}") for image, f in sorted(facts.items()) if len(f) == 2]


def balanced(items: list[tuple[str, str, str]], seed: int = 0) -> list[tuple[str, str, str]]:
    """All open questions and as many yes/no ones, shuffled."""
    kinds = [[question for question in items if (question[2] in ("yes", "no")) == closed] for closed in (False, True)]
    generator = random.Random(seed)
    chosen = kinds[0] + generator.sample(kinds[1], min(len(kinds[0]), len(kinds[1])))
    generator.shuffle(chosen)
    return chosen


def write(folder: str | os.PathLike) -> Path:
    """Writes the three files into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = questions("train"), questions("test")
    files = {
        "captions.json": [(image, "What is in the image?", caption) for image, caption in captions(train)],
        "train.json": balanced(train),
        "test.json": test,
    }
    for name, items in files.items():
        entries = [entry(number, *question) for number, question in enumerate(items)]
        (folder / name).write_text(json.dumps(entries), encoding="utf-8")
    return folder
