"""Files with what an adapter is measured on: texts that the base knew, and questions of the new task."""

import json
import os
import random
from pathlib import Path
from typing import Any

from .llava import load_llava, read_entries, texts_of
from .rows import messages_problem


def read_documents(path: str | os.PathLike) -> list[dict[str, Any]]:
    """[{"domain", "text"}] of JSON lines; a document may hold "messages" (a chat) in place of "text".

    Raises:
        ValueError: names the line that is no JSON, holds neither, or no domain; an empty file.
    """
    documents = []
    with texts_of(path):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                document = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {path} is not valid JSON: {error}") from error
            if not is_document(document):
                raise ValueError(f'Line {number} of {path} must be {{"domain": ..., "text": ... or "messages": ...}}.')
            documents.append(document)
    if not documents:
        raise ValueError(f"{path} holds no document.")
    return documents


def is_document(document: Any) -> bool:
    """Whether it names its domain and holds a text or a chat."""
    if not isinstance(document, dict) or not isinstance(document.get("domain"), str):
        return False
    if "messages" in document:
        return messages_problem(document["messages"], "messages", False) is None
    return isinstance(document.get("text"), str)


def read_questions(
    path: str | os.PathLike, image_folder: str | os.PathLike | None = None, number: int | None = None
) -> list[dict[str, Any]]:
    """[{"prompt": messages, "answer": str, "images": [paths], "audios": [paths]}]: the last message
    is the answer, the others ask.

    Args:
        path: JSON or JSON lines, either with `messages` and, if need be, `images`, `audios`, or one `image` or `audio`
            (TRL's), or with `conversations` (LLaVA's). With `messages`, `answers` may list what several people
            answered, for VQA accuracy.
        image_folder: what image paths start from; default: the file's own folder.
        number: a random sample of so many (seed 0); default: all.

    Raises:
        ValueError: an empty file; an entry whose last message is not the assistant's; no such file or folder.
    """
    if image_folder is not None and not os.path.isdir(image_folder):
        raise ValueError(f"image_folder={str(image_folder)!r}: there is no such folder.")
    records, folder = [entry for _, entry in read_entries(path)], image_folder or Path(path).parent
    if records and isinstance(records[0], dict) and "conversations" in records[0]:
        samples = load_llava(path, folder, prompt_completion=True).with_format(None)  # images stay files
        records = [{**sample, "messages": [*sample["prompt"], *sample["completion"]]} for sample in samples]
        folder = ""  # is in the paths already
    if not records:
        raise ValueError(f"{path} holds no question.")
    questions = [question(index, record, path, folder) for index, record in enumerate(records)]
    return questions if number is None else random.Random(0).sample(questions, min(number, len(questions)))


def question(index: int, record: dict[str, Any], path: str | os.PathLike, folder: str | os.PathLike) -> dict[str, Any]:
    """One record with `messages` as {"prompt", "answer", "images"} and, where it has them, "answers".

    Raises:
        ValueError: names the record's index, and what is wrong: no answer at its end, or an image that is not there.
    """
    messages = record.get("messages") if isinstance(record, dict) else None
    problem = messages_problem(messages, "messages", True)
    if problem is not None or len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise ValueError(
            f"Entry {index} of {path} must hold `messages` that end with the assistant's, the reference answer, or "
            f"LLaVA's `conversations`{'' if problem is None else f'; {problem}'}."
        )
    result = {"prompt": messages[:-1], "answer": as_text(messages[-1]["content"])}
    for kind, name in (("image", "images"), ("audio", "audios")):
        given = [one for one in (record.get(kind), *(record.get(name) or [])) if one is not None]
        inputs = [one.get("path") if isinstance(one, dict) else one for one in given]
        if not all(isinstance(one, str) for one in inputs):
            raise ValueError(f"Entry {index} of {path} must hold the paths of its {name}, not {str(inputs)[:200]}.")
        result |= {name: [str(Path(folder, one)) for one in inputs]} if inputs or name == "images" else {}
        missing = [one for one in result.get(name, ()) if not os.path.isfile(one)]
        if missing:
            raise ValueError(f"Entry {index} of {path}: {kind} {missing[0]} does not exist (paths begin at {folder}).")
    return result | ({"answers": record["answers"]} if record.get("answers") else {})


def as_text(content: str | list[dict[str, Any]], image_token: str = "", audio_token: str = "") -> str:
    """A message's content as text, whether it is a string or a list of parts, with tokens where images and clips
    stand."""
    tokens = {"image": image_token, "audio": audio_token}
    if isinstance(content, str):
        return content
    return "".join(tokens.get(part.get("type"), part.get("text") or "") for part in content)
