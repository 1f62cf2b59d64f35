"""LLaVA-1.5 JSON, read as it is, into TRL's conversational image format.

One entry of a file: {"id": ..., "image": path, list of paths or absent, "audio": the same of clips, "system": text or
absent, "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": ...}, ...]}.
One sample made of it: `messages` whose content is a list of parts, an image or audio part where `<image>` or `<audio>`
stood, and `images` and `audios` in the same order.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from transformers.utils import requires_backends

from ..processing_moextend import AUDIO_TOKEN, IMAGE_TOKEN, to_rgb

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

JSON_FILES = (".json", ".jsonl")  # how their names end
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
KEYS = ("id", "image", "audio", "conversations", "system")  # what is read of an entry
TURN_KEYS = ("from", "value")
METADATA = (  # nothing is trained on it: where an entry comes from, not what it says
    "category", "data_source", "dataset", "dataset_name", "height", "idx", "image_id", "index", "language", "license",
    "metadata", "model", "question_id", "source", "split", "task", "type", "url", "width",
)  # fmt: skip
CHUNK = 1 << 20  # characters read at a time
MAX_ENTRY = 1 << 26  # characters one entry may have: beyond that the file is broken, not long
BATCH = 1000  # samples made into one Arrow table at a time
SHOWN = 5  # skipped samples named in the report
TOKENS = {IMAGE_TOKEN: "image", AUDIO_TOKEN: "audio"}  # in a text -> the kind of part
SEPARATORS = re.compile(r"[\s,]*")


def load_llava(
    json_path: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    streaming: bool = False,
    on_error: str = "raise",
    prompt_completion: bool = False,
    ignore_keys: Sequence[str] = (),
) -> datasets.Dataset | datasets.IterableDataset:
    """A LLaVA-1.5 JSON (or .jsonl) file as a dataset for `MoExtendSFTTrainer` and TRL's `SFTTrainer`.

    Images are opened when a sample is taken, not before, and come as RGB, upright by their EXIF. With `streaming`
    neither the file nor its images are held in memory; a shuffle buffer on top of it does hold decoded images.

    Args:
        json_path: a list of entries, or one entry a line.
        image_folder: what image paths are relative to; default: the file's own folder.
        streaming: an `IterableDataset` that reads the file as it goes.
        on_error: `"raise"`: the first bad sample is an error (without `streaming`: bad entries and missing
            images at once, broken images when they are taken). `"skip"`: bad samples are left out, counted, and the
            first few named in a warning at the end. Without `streaming` every image is decoded once for that, in
            threads, and let go again.
        prompt_completion: columns `prompt` and `completion`, the last turn; earlier turns of the assistant
            are then part of the prompt and not trained on. For chat templates without generation markers.
        ignore_keys: keys of entries or turns to leave unread. A key that is unknown here makes a bad sample unless it
            is empty or named here: it may say what is to be trained on (`tools`, `weight`, `video`, ...).

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: `id`, `images` (list of PIL images, empty for text only),
        `audios` where the file speaks of audio (list of {"path", "array", "sampling_rate"}, one channel) and
        `messages`, or `prompt` and `completion`.

    Raises:
        ValueError: no valid JSON, no sample left, or a bad sample; names the sample's id, its index and what is wrong.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r} is unknown; it must be 'raise' or 'skip'.")
    try:
        import datasets
    except ImportError as error:
        raise ImportError("load_llava needs the datasets library: pip install 'moextend[train]'") from error
    json_path = Path(json_path)
    folder = json_path.parent if image_folder is None else Path(image_folder)
    settings = {"json_path": str(json_path), "folder": str(folder), "prompt_completion": prompt_completion}
    settings |= {"ignore_keys": tuple(ignore_keys), "with_audio": _speaks_of_audio(json_path)}
    if streaming:
        return datasets.IterableDataset.from_generator(_stream, gen_kwargs={**settings, "on_error": on_error})
    features = _features(datasets, prompt_completion, settings["with_audio"])
    samples = _checked_samples(**settings, on_error=on_error)
    tables = []
    while batch := list(islice(samples, BATCH)):
        tables.append(datasets.Dataset.from_list(batch, features=features))
    if not tables:
        raise ValueError(f"{json_path} has no sample to train on.")
    return datasets.concatenate_datasets(tables).with_transform(_open_batch)


# Reading


def read_entries(json_path: str | os.PathLike) -> Iterator[tuple[int, Any]]:
    """Yields (index, entry) of a JSON list, or of a .jsonl file, holding one chunk of it in memory.

    Raises:
        ValueError: the file is no JSON list, or ends within it; names the file and the index it came to.
    """
    with texts_of(json_path), open(json_path, encoding="utf-8-sig") as file:
        yield from (_read_lines if str(json_path).endswith(".jsonl") else _read_list)(file, json_path)


@contextmanager
def texts_of(path: str | os.PathLike) -> Iterator[None]:
    """Names the file, which the block reads, where it is no text, a folder or not there: a `ValueError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file.") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path} is a folder: give a file of JSON or JSON lines.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error


def _read_lines(file, json_path):
    lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    for index, (number, line) in enumerate(lines):
        try:
            yield index, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{json_path}, line {number}, is not valid JSON: {error}") from error


def _read_list(file, json_path):
    decoder, size, index, problem = json.JSONDecoder(), CHUNK, 0, "nothing follows"
    while (buffer := file.read(size)) and buffer.isspace():
        pass
    buffer = buffer.lstrip()
    if not buffer.startswith("["):
        raise ValueError(
            f"{json_path} must hold a list of entries, [{{...}}, ...]; one entry a line is a .jsonl file."
        )
    position = 1
    while True:
        position = SEPARATORS.match(buffer, position).end()
        if buffer.startswith("]", position):
            return
        try:
            entry, position = decoder.raw_decode(buffer, position)
        except json.JSONDecodeError as error:
            problem = error.msg  # or the entry is just not read to its end yet
        else:
            yield index, entry
            index, size = index + 1, CHUNK
            continue
        more = file.read(size) if len(buffer) - position < MAX_ENTRY else ""
        if not more:
            raise ValueError(f"{json_path} is not valid JSON, or cut off, at index {index}: {problem}.")
        # Twice as much each time: an entry over many chunks must not be parsed once for each of them.
        buffer, position, size = buffer[position:] + more, 0, size * 2


# One sample


class _BadSample(ValueError):
    """A sample that cannot be trained on; the text names it."""


def _convert(entry, index, json_path, folder, prompt_completion, ignore_keys, with_audio):
    """One entry as a sample: `id`, `messages` (or `prompt`, `completion`), `images`, `audios` as {"path", "sample"}.

    Each of these carries its sample's name, because trainers drop the `id` column before images are opened.
    """
    name = f"sample {entry.get('id')!r} (index {index} of {json_path})" if isinstance(entry, dict) else None
    try:
        if name is None:
            raise ValueError(f"it must be an object with 'conversations', not {type(entry).__name__}")
        messages = _messages(entry.get("conversations"), entry.get("system"))
        _check_keys(entry, ignore_keys)
        paths = {kind: _paths(entry, kind) for kind in TOKENS.values()}
        _check_counts(messages, paths, prompt_completion)
    except ValueError as error:
        raise _BadSample(f"{name or f'index {index} of {json_path}'}: {error}.") from error
    sample = {"id": None if entry.get("id") is None else str(entry["id"])}
    sample |= {"prompt": messages[:-1], "completion": messages[-1:]} if prompt_completion else {"messages": messages}
    for kind in TOKENS.values() if with_audio else ("image",):
        sample[f"{kind}s"] = [{"path": os.path.join(folder, path), "sample": name} for path in paths[kind]]
    return sample


def _check_keys(entry, ignore_keys):
    """Refuses what would be dropped: a key that is not read here, unless it is empty, metadata or to be ignored."""
    for part, known in [(entry, KEYS + METADATA), *((turn, TURN_KEYS) for turn in entry["conversations"])]:
        for key, value in part.items():
            if key not in (*known, *ignore_keys) and value not in (None, "", [], {}):
                raise ValueError(
                    f"its key {key!r} is not read, and {str(value)[:80]!r} would be dropped. Entries have "
                    f"{', '.join(KEYS)} and metadata ({', '.join(METADATA)}), turns have {' and '.join(TURN_KEYS)}. "
                    f"Take it out of the file, or read the file without it: load_llava(ignore_keys=[{key!r}])"
                )


def _messages(turns, system):
    """LLaVA turns as TRL messages: an optional system turn, or the entry's `system`, then human and gpt in turn, gpt
    last.

    A gpt turn before the first human one is dropped, as LLaVA's own preprocessing does.
    """
    if not isinstance(turns, list) or not turns:
        raise ValueError("'conversations' is missing or empty")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {number} must be an object with 'from' and a text 'value'")
        if turn.get("from") not in ROLES:
            raise ValueError(f"turn {number} is from {turn.get('from')!r}; allowed: {', '.join(map(repr, ROLES))}")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"'system' must be a text, not {system!r}")
    first = 1 if turns[0]["from"] == "system" else 0
    if system and first:
        raise ValueError("it has a 'system' and a turn from 'system': leave out one of the two")
    dropped = 1 if len(turns) > first + 1 and turns[first]["from"] == "gpt" else 0
    turns = turns[:first] + turns[first + dropped :]
    for number, turn in enumerate(turns[first:]):
        expected = ("human", "gpt")[number % 2]
        if turn["from"] != expected:
            number += first + dropped
            raise ValueError(f"turn {number} is from {turn['from']!r}, but {expected!r} must come there")
    if turns[-1]["from"] != "gpt":
        raise ValueError(f"the last turn is from {turns[-1]['from']!r}; it must be from 'gpt', or there is no answer")
    turns = [{"from": "system", "value": system}, *turns] if system else turns
    return [{"role": ROLES[turn["from"]], "content": _parts(turn["value"])} for turn in turns]


def _parts(text):
    """ "<image>\\nWhat?" as content parts; joined again they are the text as it was."""
    pieces = re.split(f"({'|'.join(TOKENS)})", text)
    parts = [
        {"type": TOKENS[piece], "text": None} if piece in TOKENS else {"type": "text", "text": piece}
        for piece in pieces
        if piece
    ]
    return parts or [{"type": "text", "text": ""}]


def _paths(entry, kind):
    paths = entry.get(kind)
    paths = [] if paths is None else paths if isinstance(paths, list) else [paths]
    if not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"{kind!r} must be a path or a list of paths, not {entry[kind]!r}")
    return paths


def _check_counts(messages, paths, prompt_completion):
    for token, kind in TOKENS.items():
        counts = [sum(part["type"] == kind for part in message["content"]) for message in messages]
        name = f"{kind}s" if kind == "image" else "clips"
        if sum(counts) != len(paths[kind]):
            raise ValueError(f"its conversation has {sum(counts)} {token!r} but it has {len(paths[kind])} {name}")
        if prompt_completion and counts[-1]:
            raise ValueError(f"its last turn has {counts[-1]} {token!r}, and a completion takes no {name}")


# Images and clips


def _open_image(path, sample):
    """The whole image as RGB and upright, its file closed again."""
    requires_backends(load_llava, ["vision"])
    _check_exists(path, sample)
    try:
        return to_rgb(path)
    except Exception as error:  # PIL's plugins raise what they like on broken files, SyntaxError among it
        raise _BadSample(f"{sample}: image {path} cannot be read: {type(error).__name__}: {error}") from error


def _check_exists(path, sample, kind="image"):
    if not os.path.isfile(path):
        raise _BadSample(f"{sample}: {kind} {path} does not exist.")


def _open_clip(path, sample):
    """The whole clip as {"path", "array": float32 [samples], "sampling_rate": a second}, its channels averaged."""
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("audio needs the soundfile library: pip install 'moextend[audio]'") from error
    _check_exists(path, sample, "audio")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        if not len(samples) or not numpy.isfinite(samples).all():
            raise ValueError("it has no samples" if not len(samples) else "it has samples that are not finite")
    except Exception as error:  # of libsndfile
        raise _BadSample(f"{sample}: audio {path} cannot be read: {type(error).__name__}: {error}") from error
    return {"path": str(path), "array": samples.mean(axis=1), "sampling_rate": rate}


def _open(column, path, sample):
    """What a column holds: an image or a clip."""
    return (_open_image if column == "images" else _open_clip)(path, sample)


OPENED = ("images", "audios")  # columns of files


def _open_batch(batch):
    """The transform of a map-style dataset: paths to PIL images and clips, where these columns are asked for."""
    return {
        name: [[_open(name, **one) for one in ones] for ones in values] if name in OPENED else values
        for name, values in batch.items()
    }


# Whole files


def _speaks_of_audio(json_path):
    """Whether a file may have entries with audio: their samples have one more column, in every row."""
    with open(json_path, encoding="utf-8-sig", errors="replace") as file:
        end = ""
        while chunk := file.read(CHUNK):
            if '"audio"' in end + chunk:
                return True
            end = chunk[-8:]
    return False


def _stream(json_path, folder, prompt_completion, ignore_keys, with_audio, on_error):
    """Yields samples with opened images, one after the other."""
    skips = _Skips(json_path, on_error)
    try:
        for index, entry in read_entries(json_path):
            with skips:
                sample = _convert(entry, index, json_path, folder, prompt_completion, ignore_keys, with_audio)
                for name in sample.keys() & {*OPENED}:
                    sample[name] = [_open(name, **one) for one in sample[name]]
                yield sample
    finally:
        skips.report()


def _checked_samples(json_path, folder, prompt_completion, ignore_keys, with_audio, on_error):
    """Yields samples with paths of images, in threads: checking one waits for the disk, or decodes outside the GIL.

    With "skip" every image is decoded once and let go; with "raise" it only has to be there.
    """
    skips = _Skips(json_path, on_error)

    def convert(indexed):
        try:
            sample = _convert(indexed[1], indexed[0], json_path, folder, prompt_completion, ignore_keys, with_audio)
            for name in sample.keys() & {*OPENED}:
                kind = name.removesuffix("s")
                for one in sample[name]:
                    _open(name, **one) if on_error == "skip" else _check_exists(**one, kind=kind)
            return sample
        except _BadSample as error:
            return error

    entries = read_entries(json_path)
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(entries, BATCH)):
            for sample in pool.map(convert, batch):
                with skips:
                    if isinstance(sample, _BadSample):
                        raise sample
                    yield sample
    skips.report()


class _Skips:
    """`with skips:` around one sample: a bad one is raised, or counted and left out."""

    def __init__(self, json_path, on_error):
        self.json_path, self.on_error, self.total, self.skipped, self.first = json_path, on_error, 0, 0, []

    def __enter__(self):
        self.total += 1

    def __exit__(self, kind, error, traceback):
        if not isinstance(error, _BadSample) or self.on_error == "raise":
            return False
        self.skipped += 1
        self.first += [str(error)] if self.skipped <= SHOWN else []
        return True

    def report(self) -> None:
        if self.skipped:
            more = f"\n... and {self.skipped - SHOWN} more" if self.skipped > SHOWN else ""
            logger.warning(
                "Skipped %d of %d samples of %s:\n%s%s",
                self.skipped, self.total, self.json_path, "\n".join(self.first), more,
            )  # fmt: skip


def _features(datasets, prompt_completion, with_audio):
    text = datasets.Value("string")
    messages = [{"role": text, "content": [{"type": text, "text": text}]}]
    columns = ("prompt", "completion") if prompt_completion else ("messages",)
    paths = dict.fromkeys(("images", "audios") if with_audio else ("images",), [{"path": text, "sample": text}])
    return datasets.Features({"id": text, **dict.fromkeys(columns, messages), **paths})
