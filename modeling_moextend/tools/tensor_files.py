"""Safetensors files, read tensor by tensor: of none more than its header and one tensor is in memory.

Nothing here maps a file into memory, as safetensors does ("pread" too): where one is cut short meanwhile, as by a copy
over the old file, that would end the process (SIGBUS).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple

import torch

from ..adapter_file_moextend import MAX_JSON, UNREADABLE, damaged, parse_json, shown, state_of
from ..validation_moextend import short

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # an adapter's


class FileHeader(NamedTuple):
    """The header of a safetensors file."""

    entries: dict[str, dict[str, Any]]  # tensor's name -> {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}
    metadata: dict[str, str]
    start: int  # of the data in the file
    state: tuple[int, int, int]  # of the file when the header was read; see `state_of`


def read_header(file: BinaryIO, longest: int = 2 * MAX_JSON) -> FileHeader:
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


def find_tensor(
    header: FileHeader, name: str, dtypes: dict[str, torch.dtype] = DTYPES
) -> tuple[torch.dtype, list[int], int]:
    """(dtype, shape, first byte) of a tensor in its file.

    Args:
        dtypes: allowed ones, by safetensors' names.

    Raises:
        ValueError: another dtype; a shape that is none, or does not fit the tensor's bytes.
    """
    entry = header.entries[name]
    dtype, shape, (begin, end) = dtypes.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise ValueError(f"wrong dtype: {shown(name)} is {short(entry['dtype'])}; allowed: {', '.join(dtypes)}")
    if len(shape) > 64 or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"{shown(name)} has the shape {short(shape)}")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{shown(name)} has {end - begin} bytes, which are not {short(shape)} of {dtype}")
    return dtype, shape, header.start + begin


def read_tensor(
    file: BinaryIO,
    header: FileHeader,
    name: str,
    dtypes: dict[str, torch.dtype] = DTYPES,
    index: int | None = None,
    size: Sequence[int] = (),
) -> torch.Tensor:
    """A tensor of an open file, in memory of its own; or, from `index` of the flattened one on, a part of that `size`:
    one value if none is given.

    Raises:
        ValueError: as `find_tensor`; or the file was overwritten since its header was read.
    """
    dtype, shape, first = find_tensor(header, name, dtypes)
    tensor = torch.empty(shape if index is None else size, dtype=dtype, device="cpu")  # whatever the default device is
    file.seek(first + (index or 0) * dtype.itemsize)
    count = file.readinto(tensor.reshape(-1).view(torch.uint8).numpy())
    if count != tensor.nbytes or state_of(file) != header.state:
        raise ValueError("it was overwritten while it was read")
    return tensor


def without_data(file: BinaryIO, header: FileHeader, name: str) -> torch.Tensor:
    """A tensor of an open safetensors file, on the meta device."""
    dtype, shape, _ = find_tensor(header, name)
    return torch.empty(shape, dtype=dtype, device="meta")


def read_each(
    path: str, read: Callable[[BinaryIO, FileHeader, str], torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(name -> what `read` makes of each tensor, header metadata) of one of an adapter's files.

    Raises:
        ValueError: the file is damaged, truncated, or overwritten while it is read.
    """
    try:
        with open(path, "rb") as file:
            header = read_header(file)
            return {name: read(file, header, name) for name in sorted(header.entries)}, header.metadata
    except UNREADABLE as error:
        raise damaged(path, short(str(error))) from error
