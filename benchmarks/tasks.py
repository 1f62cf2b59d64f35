"""The tasks of the benchmark, the base's own text that methods may replay, and the text that forgetting is read from.

Everything is made from what is installed: sources of Python packages (read by `assets/text_data.py`, never imported),
rules (`generated.py`), easy-VQA. The same packages give the same records on every machine; a record's side of a split
is a hash.

    library    the first sentence of a docstring -> which library it is from. No instruction; the base's own vocabulary
               and style. A module is on one side of the split with all of its docstrings.
    types      what a parameter is for, in a docstring's words -> its type. The question begins as questions of the
               base's own chats do, and is in their vocabulary and style. A module is on one side of the split.
    numbers    a number in digits -> in English words. No instruction, no word in the prompt.
    calendar   an appointment in words -> a recurrence rule, a format that the base has never seen. A rule is on one
               side of the split, in whatever words.
    follow_up  a dialogue of three or four questions, the first of which names a day, month, number or letter and the
               others "that one" -> the last answer, which was not said before. What is asked, from first to last, is
               on one side of the split; single steps (Monday -> Tuesday) are on all of them.
    easy_vqa   an image of one coloured shape and a question about it -> the answer. Open questions are asked.
"""

import ast
import hashlib
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "assets"), str(ROOT / "examples")]

import text_data  # noqa: E402
from generated import appointments, dialogues, in_words  # noqa: E402

BASE, ENCODER = "assets/tiny-moe", "assets/tiny-clip"  # from ROOT
OTHER_BASE = "BENCHMARK_BASE"  # environment variable with the folder of another base, see `base_folder`
MADE_BY = (Path(__file__), Path(__file__).with_name("generated.py"), ROOT / "assets/text_data.py")
SPLITS = ("train", "validation", "test")
LIBRARIES = {"stdlib": "Python", "torch": "PyTorch", "matplotlib": "Matplotlib", "sympy": "SymPy"}
KINDS = {  # how a documented type begins -> the answer
    "bool": "boolean",
    "int": "number",
    "float": "number",
    "str": "string",
    "array": "array",
    "ndarray": "array",
    "tuple": "sequence",
    "list": "sequence",
    "sequence": "sequence",
    "iterable": "sequence",
}
DOCUMENTED = (  # packages that document types
    *("numpy", "scipy", "sklearn", "matplotlib", "sympy", "pandas", "networkx", "torch"),
    *("transformers", "trl", "peft", "datasets", "accelerate"),
)
MODULE_RECORDS = 25  # of `types` from one module: under 5% of each split
RETENTION_DOMAINS = ("code", "manual", "chat")  # of the base's own domains; science is left out


@dataclass(frozen=True)
class Task:
    """What is fixed for all methods: optimiser steps, records a step, records asked, tokens an answer may have."""

    name: str
    steps: int
    batch: int
    validation: int
    test: int
    max_new_tokens: int
    vision: bool = False


TASKS = {
    task.name: task
    for task in (
        Task("library", steps=150, batch=16, validation=400, test=640, max_new_tokens=6),
        Task("types", steps=150, batch=16, validation=640, test=640, max_new_tokens=6),
        Task("numbers", steps=300, batch=16, validation=400, test=1000, max_new_tokens=24),
        Task("calendar", steps=500, batch=16, validation=400, test=500, max_new_tokens=56),
        Task("follow_up", steps=500, batch=16, validation=400, test=640, max_new_tokens=6),
        Task("easy_vqa", steps=150, batch=32, validation=400, test=1000, max_new_tokens=6, vision=True),
    )
}


def side(key: object, buckets: int = 10, held_out: int = 1) -> str:
    """Which split a key (a module, a number, an image) is in: `held_out` of so many buckets are validation, as many
    test; default: 80% train, 10% validation, 10% test."""
    bucket = text_data.digest(f"split of {key}") % buckets
    return SPLITS[max(0, (bucket - buckets) // held_out + 3)]


# ---------------------------------------------------------------- the base


def base_folder() -> Path:
    """Where the base lies: the small one of this repository, unless `forgetting.py --base` says another folder."""
    return Path(os.environ.get(OTHER_BASE) or ROOT / BASE)


@cache
def other_base() -> dict[str, str]:
    """Name and checksum of a base that is not the small one, for settings and data; empty for that."""
    if not os.environ.get(OTHER_BASE):
        return {}
    folder, checksum = base_folder(), hashlib.sha1()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".jinja")):
        checksum.update(path.name.encode())
        with path.open("rb") as file:
            checksum.update(hashlib.file_digest(file, "sha1").digest())
    return {"base": f"{folder.name} {checksum.hexdigest()[:10]}"}


# ---------------------------------------------------------------- records: {"question", "answer", "image"}, "turns"


def record(question: str, answer: str, image: str | None = None, turns: Sequence[str] = ()) -> dict[str, Any]:
    """`turns`: what user and assistant said before, in turn."""
    return {"question": question, "answer": answer, "image": image, **({"turns": turns} if turns else {})}


def library_records(sources: dict[str, list[text_data.Source]]) -> dict[str, list[dict[str, Any]]]:
    """{split: records} from {package: sources}, as many records of each library; no sentence comes twice.

    Only modules of the base's training text are used, so that all records are equally known to the base. A sentence
    that names a library would give the answer away and is left out.
    """
    names = [name.lower() for name in (*LIBRARIES, *LIBRARIES.values())]
    records = {split: {package: [] for package in LIBRARIES} for split in SPLITS}
    seen = Counter(sentence for package in LIBRARIES for source in sources[package] for sentence in sentences(source))
    for package, answer in LIBRARIES.items():
        for source in sources[package]:
            for sentence in sentences(source) if not source.held_out else ():
                if seen[sentence] == 1 and not any(name in sentence.lower() for name in names):
                    records[side(source.key)][package].append(record(sentence, answer))
    return {split: balanced(list(groups.values()), split) for split, groups in records.items()}


def sentences(source: text_data.Source) -> list[str]:
    """First sentences of a file's docstrings, 25 to 140 characters long."""
    first_sentences = {text_data.first_sentence(definition.doc) for definition in source.definitions}
    return sorted(sentence for sentence in first_sentences if 25 <= len(sentence) <= 140)


def type_records(sources: dict[str, list[text_data.Source]]) -> dict[str, list[dict[str, Any]]]:
    """{split: records} from {package: sources}: as many parameters of each kind.

    70% of the modules are train, 15% validation, 15% test. No description comes twice, whatever its case and
    punctuation; one that is documented with two kinds never.
    """
    found = {}  # description without case and punctuation -> {answer: (module, description)}
    for package in DOCUMENTED:
        for source in sources[package]:
            for definition in source.definitions if not source.held_out else ():
                for description, answer in parameters(definition.doc):
                    words = " ".join(re.findall(r"[a-z0-9]+", description.lower()))
                    found.setdefault(words, {}).setdefault(answer, (source.key, description))
    records, used = {split: {answer: [] for answer in KINDS.values()} for split in SPLITS}, Counter()
    for words in sorted(found, key=text_data.digest):
        (answer, (module, description)), *others = found[words].items()
        if not others and used[module] < MODULE_RECORDS:
            used[module] += 1
            question = f"What type is this parameter? {description}"
            records[side(module, buckets=20, held_out=3)][answer].append(record(question, answer))
    return {split: balanced(list(groups.values()), split) for split, groups in records.items()}


def parameters(doc: str) -> Iterator[tuple[str, str]]:
    """(first line of a description, kind) of the parameters of a docstring in numpy's style or in Google's."""
    found = re.findall(r"^\w+ ?: (.+)\n +(\S.+)$", doc, re.MULTILINE)
    found += re.findall(r"^ +\w+ \((.+?)\):\s+(\S.+)$", doc, re.MULTILINE)
    for kind, description in found:
        kind = kind.lower().lstrip("`~:. ")
        answer = next((answer for start, answer in KINDS.items() if kind.startswith(start)), None)
        if answer is not None and 15 <= len(description) <= 120:
            yield description.strip(), answer


def balanced(groups: list[list], seed: int | str) -> list:
    """As many members of each group, shuffled."""
    generator = random.Random(seed)
    number = min(map(len, groups))
    chosen = [member for group in groups for member in generator.sample(group, number)]
    generator.shuffle(chosen)
    return chosen


def in_digits(number: int, generator: random.Random) -> str:
    """4207 -> "4207", "4,207", "4 207" or "04207"."""
    return generator.choice((f"{number}", f"{number:,}", f"{number:,}".replace(",", " "), f"0{number}"))


def number_records(highest: int = 9999) -> dict[str, list[dict[str, Any]]]:
    """{split: records}: every number from 0 to `highest` once, written in one way."""
    records = {split: [] for split in SPLITS}
    for number in range(highest + 1):
        records[side(number)].append(record(in_digits(number, random.Random(number)), in_words(number)))
    for split in SPLITS:
        random.Random(split).shuffle(records[split])
    return records


def calendar_records(number: int = 6000) -> dict[str, list[dict[str, Any]]]:
    """{split: records}: appointments and their recurrence rules."""
    records = {split: [] for split in SPLITS}
    for sentence, rule in appointments(number):
        records[side(rule)].append(record(sentence, rule))
    return records


def follow_up_records(number: int = 8000) -> dict[str, list[dict[str, Any]]]:
    """{split: records}: dialogues whose last answer is asked."""
    records = {split: [] for split in SPLITS}
    for (*turns, question, answer), asked in dialogues(number):
        records[side(asked)].append(record(question, answer, turns=turns))
    return records


def easy_vqa_records() -> dict[str, list[dict[str, Any]]]:
    """{split: records}: training questions on 90% of the training images, open ones on the rest and on the test's."""
    from modeling_moextend.quickstart.easy_vqa_data import balanced as half_open
    from modeling_moextend.quickstart.easy_vqa_data import questions

    known = [entry for entry in questions("train") if side(Path(entry[0]).name) != "test"]
    asked = [entry for entry in questions("train") if side(Path(entry[0]).name) == "test"]
    parts = {"train": half_open(known), "validation": open_ones(asked), "test": open_ones(questions("test"))}
    return {
        split: [record(f"<image>\n{question}", answer, str(image)) for image, question, answer in part]
        for split, part in parts.items()
    }


def caption_records() -> list[dict[str, Any]]:
    """Records of stage align: captions of training images that no question of `validation` is about."""
    from modeling_moextend.quickstart.easy_vqa_data import captions, questions

    known = [entry for entry in questions("train") if side(Path(entry[0]).name) != "test"]
    return [record("<image>\nWhat is in the image?", caption, str(image)) for image, caption in captions(known)]


def open_ones(entries: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    chosen = [entry for entry in entries if entry[2] not in ("yes", "no")]
    random.Random(0).shuffle(chosen)
    return chosen


def training_records(records: list, number: int, seed: int | str) -> list:
    """`number` records in the order that every method sees: shuffled anew for every pass."""
    generator, order = random.Random(seed), []
    while len(order) < number:
        order += generator.sample(records, len(records))
    return order[:number]


def majority(records: list[dict[str, Any]]) -> float:
    """Accuracy of the commonest answer."""
    return Counter(entry["answer"] for entry in records).most_common(1)[0][1] / len(records)


def messages(entry: dict[str, Any], answer: bool = True) -> list[dict[str, str]]:
    """A record as chat messages, with the assistant's last answer or without."""
    contents = [*entry.get("turns", ()), entry["question"], entry["answer"]]
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]
    return turns if answer else turns[:-1]


def render_chat(tokenizer: PreTrainedTokenizerBase, talk: list[dict[str, str]]) -> str:
    """Messages as text, without what the tokenizer puts in front of a text by itself (bos, or nothing)."""
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    return text.removeprefix(tokenizer.decode(tokenizer("").input_ids))


# ---------------------------------------------------------------- the base's own text


def retention_texts(
    sources: list[text_data.Source],
    render_chat: Callable[[list[dict[str, str]]], str],
    number: int = 900,
    max_chars: int = 500,
) -> list[dict[str, str]]:
    """Text for replay and for the gate: [{"domain", "text"}], at most `number` a domain, of the standard library.

    Only training-side modules, and none that the task `library` validates or tests on. Half of the texts begin where
    a document begins (chats: or at a later question), half anywhere.

    Args:
        sources: the standard library's.
        render_chat: messages -> text, without the leading bos.
    """
    known = [source for source in sources if not source.held_out and side(source.key) == "train"]
    unique = text_data.Deduplicator()
    documents = {
        "code": [text for source in known for text in text_data.pieces(text_data.clean(source.code))],
        "manual": [text for source in known for text in text_data.pieces(text_data.prose(source))],
        "chat": [talk for source in known for talk in text_data.dialogues(source, unique)],
    }
    texts = []
    for domain in RETENTION_DOMAINS:
        generator = random.Random(domain)
        chosen = generator.sample(documents[domain], min(number, len(documents[domain])))
        for index, document in enumerate(chosen):
            if domain == "chat":
                document = render_chat(from_a_question(document, generator))
            text = document if index % 2 else cut_anywhere(document, generator)
            texts.append({"domain": domain, "text": text[:max_chars]})
    random.Random(0).shuffle(texts)
    return texts


def from_a_question(talk: list[dict[str, str]], generator: random.Random) -> list[dict[str, str]]:
    """Half of the time the dialogue as it is, else from one of its questions on."""
    starts = [index for index, message in enumerate(talk) if message["role"] == "user"]
    return talk if generator.random() < 0.5 else talk[generator.choice(starts) :]


def cut_anywhere(text: str, generator: random.Random, shortest: int = 200) -> str:
    """`text` from a random word on, at least `shortest` characters of it where it has them."""
    start = generator.randrange(max(1, len(text) - shortest))
    return text[start:].split(" ", 1)[-1] if start else text


def evaluation_documents(
    tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int] = (128, 256), windows: int = 16, documents: int = 24
) -> list[dict[str, str]]:
    """What forgetting is read from, all of it held out from the small base's training: [{"domain", "text"}].

    Domains are named `kind/domain`. `windows`: windows of the concatenated text of a domain, anywhere, of so many
    tokens; half of them of each length. `aligned`: documents from their own start, and as `aligned/questions` held-out
    chats that start, as the tasks' prompts do, with a user's question.
    """
    result, length = [], max(lengths)
    for domain in text_data.DOMAINS:
        generator, texts = random.Random(domain), text_data.held_out_texts(domain)
        ids = tokenizer(tokenizer.eos_token.join(texts), add_special_tokens=False).input_ids
        for number in range(windows):
            size = lengths[number % len(lengths)]
            start = generator.randrange(len(ids) - size)
            result.append({"domain": f"windows/{domain}", "text": tokenizer.decode(ids[start : start + size])})
        chosen = generator.sample(texts, min(documents, len(texts)))
        result += [{"domain": f"aligned/{domain}", "text": shorten(text, tokenizer, length)} for text in chosen]
        if domain == "chat":
            starts = [text[start_index:] for text in texts for start_index in questions_in(text)]
            for text in generator.sample(starts, 2 * documents):
                result.append({"domain": "aligned/questions", "text": shorten(text, tokenizer, length)})
    return result


def questions_in(text: str, mark: str = "<|user|>") -> list[int]:
    """Where in a rendered chat a user's turn starts, with at least 100 characters to come."""
    starts, start = [], text.find(mark)
    while start >= 0:
        starts += [start] * (len(text) - start >= 100)
        start = text.find(mark, start + 1)
    return starts


def shorten(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> str:
    return tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[:length])


# ---------------------------------------------------------------- files


def data_folder() -> Path:
    """Where the data lie; another folder for every version of the code that makes them, however it is laid out."""
    code = "".join(ast.dump(ast.parse(path.read_text(encoding="utf-8"))) for path in MADE_BY)
    return ROOT / f"outputs/benchmarks/data-{text_data.digest(code + ''.join(other_base().values())):016x}"


def prepare(tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike | None = None) -> Path:
    """Writes records of all tasks, retention texts and evaluation documents to `folder`, unless it has them."""
    folder = Path(folder or data_folder())
    done = folder / "done"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    sources = {package: text_data.read_sources(package) for package in {**LIBRARIES, **dict.fromkeys(DOCUMENTED)}}

    parts = {
        "library": library_records(sources),
        "types": type_records(sources),
        "numbers": number_records(),
        "calendar": calendar_records(),
        "follow_up": follow_up_records(),
        "easy_vqa": easy_vqa_records(),
        "captions": caption_records(),
        "retention": retention_texts(sources["stdlib"], partial(render_chat, tokenizer)),
        "documents": evaluation_documents(tokenizer),
    }
    for name, part in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    done.touch()
    return folder


def read(name: str, folder: str | os.PathLike | None = None) -> Any:
    """What `prepare` wrote: records of a task by split, or the list of `captions`, `retention` or `documents`."""
    folder = Path(folder or data_folder())
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def held_out_records(task: Task, split: str) -> list[dict[str, Any]]:
    """The records of `split` that are asked: the first ones of its fixed order."""
    return read(task.name)[split][: getattr(task, split)]
