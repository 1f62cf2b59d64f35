"""Safetensors files, read tensor by tensor, each to where it stays.

Nothing here maps a file into memory, as safetensors does ("pread" too): where one is cut short meanwhile, as by a copy
over the old file, that would end the process (SIGBUS).
"""

import json
import math
import os
from collections import Counter
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from .validation_moextend import short

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # an adapter's
MAX_JSON = 8 * 2**20  # bytes of an index or of a config, many times what a large base needs
MAX_DEPTH = 32
UNREADABLE = (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, OverflowError)


class FileHeader(NamedTuple):
    """The header of a safetensors file."""

    entries: dict  # tensor's name -> {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}
    metadata: dict
    start: int  # of the data in the file
    state: tuple  # of the file when the header was read; see `state_of`


def read_header(file, longest=2 * MAX_JSON):
    """The header of an open safetensors file, which fits the file's size. `ValueError`: it does not, or is longer than
    `longest` bytes."""
    state, size = state_of(file), int.from_bytes(file.read(8), "little")
    if size > longest:
        raise ValueError(f"a header of {size} bytes")
    entries = parse_json(file.read(size).decode(), "its header", longest)
    metadata, end = entries.pop("__metadata__", None) or {}, 0
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are no texts")
    for begin, stop in sorted(entry["data_offsets"] for entry in entries.values()):
        if begin != end or stop < begin:
            raise ValueError(f"a tensor begins at byte {begin}, not at {end}")
        end = stop
    if 8 + size + end != state[1]:
        raise ValueError(f"{8 + size + end} bytes are needed, and it has {state[1]}")
    return FileHeader(entries, metadata, 8 + size, state)


def find_tensor(header, name, dtypes=DTYPES):
    """(dtype, shape, first byte) of a tensor in its file. `ValueError`: a dtype that is not among `dtypes`, by
    safetensors' names; a shape that is none, or does not fit the tensor's bytes."""
    entry = header.entries[name]
    dtype, shape, (begin, end) = dtypes.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise ValueError(f"wrong dtype: {shown(name)} is {short(entry['dtype'])}; allowed: {', '.join(dtypes)}")
    if len(shape) > 64 or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"{shown(name)} has the shape {short(shape)}")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{shown(name)} has {end - begin} bytes, which are not {short(shape)} of {dtype}")
    return dtype, shape, header.start + begin


def read_tensor(file, header, name, dtypes=DTYPES, index=None, size=()):
    """A tensor of an open file, in memory of its own; or, from `index` of the flattened one on, a part of that `size`:
    one value if none is given. `ValueError`: as `find_tensor`; or overwritten since its header was read."""
    dtype, shape, first = find_tensor(header, name, dtypes)
    tensor = torch.empty(shape if index is None else size, dtype=dtype, device="cpu")  # whatever the default device is
    file.seek(first + (index or 0) * dtype.itemsize)
    count = file.readinto(as_bytes(tensor))
    if count != tensor.nbytes or state_of(file) != header.state:
        raise ValueError("it was overwritten while it was read")
    return tensor


def read_each(path, read):
    """(name -> what `read(file, header, name)` makes of each tensor, header metadata) of one of an adapter's files.
    `ValueError`: it is damaged, truncated, or overwritten while it is read."""
    try:
        with open(path, "rb") as file:
            header = read_header(file)
            return {name: read(file, header, name) for name in sorted(header.entries)}, header.metadata
    except UNREADABLE as error:
        raise damaged(path, short(str(error))) from error


def as_bytes(tensor):
    """The bytes of a tensor, as an array: no copy of one that lies whole on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def state_of(file):
    """What is another where an open file was written to."""
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


def damaged(what, why):
    return ValueError(f"{what} is damaged or truncated: {why}. Nothing was loaded; fetch or save the adapter again.")


def parse_json(text, what, longest=MAX_JSON):
    try:
        if len(text) > longest:
            raise ValueError(f"it is longer than {longest} characters")
        value = json.loads(text, object_pairs_hook=without_twins)
        if not isinstance(value, dict) or depth(value) > MAX_DEPTH:
            raise ValueError(f"it is no mapping, or nested deeper than {MAX_DEPTH} levels")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} can't be read: {short(str(error))}. Nothing was loaded.") from error
    return value


def without_twins(pairs):
    """A `dict` of JSON's pairs; which of two equal keys counts would be the parser's choice."""
    twice = [key for key, number in Counter(key for key, _ in pairs).items() if number > 1]
    if twice:
        raise ValueError(f"given twice: {short(twice)}")
    return dict(pairs)


def depth(value):
    """How deep lists and mappings are nested: copying and printing would not end well without a limit."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(depth, inner), default=0)


def shown(name):
    """A tensor's name from a file, where it may hold anything."""
    return name if name.isprintable() else short(name)
