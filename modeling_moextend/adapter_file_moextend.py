"""The adapter's file: only new tensors, named by role, with a header that says what they belong to.

Reading checks everything before any model is touched; writing leaves either the old adapter or the new one, whenever
the process dies.
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from .configuration_moextend import MoExtendConfig
from .folder_moextend import all_or_nothing, check_link, locked
from .validation_moextend import short

FILE = "moextend_adapter.safetensors"
INDEX = FILE + ".index.json"
FORMAT = 1
MAX_JSON = 8 * 2**20  # bytes of an index or of a config, many times what a large base needs
MAX_SHARDS = 4096
ONE_FILE = "1000TB"
MAX_DEPTH = 32
UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, OverflowError)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FORMER_CODE = tuple(  # files that shipped with version 0.1.0 and no longer do: removed where the code is written anew
    f"{name}_moextend.py"
    for name in "adapter entries generation hub layouts pretrained selfcheck state switch together".split()
)


class StoredAdapter(NamedTuple):
    """An adapter as it lies on disk, read once."""

    values: dict  # the config in its header
    tensors: dict  # name -> tensor on the CPU
    metadata: dict  # of the header
    files: tuple = ()  # their names

    def config_for_loading(self) -> MoExtendConfig:
        """Its `MoExtendConfig`, checked against the sizes of its tensors.

        Of the base's own config only the kind is read: the base that is loaded brings the rest.
        """
        base_config = self.values.get("text_config")
        if isinstance(base_config, dict):
            base_config = {name: base_config[name] for name in ("model_type",) if name in base_config}
        config = MoExtendConfig.from_dict({**self.values, "text_config": base_config})
        rows = {}  # of the tensors that have one row an expert
        for name, tensor in self.tensors.items():
            part = name.split(".")
            if part[0] == "layers" and part[2:3] in (["experts"], ["router"]) and tensor.dim():
                rows[part[1]] = max(rows.get(part[1], 0), len(tensor))
        named, stored = sum(map(len, config.extended_layers.values())), sum(rows.values())
        if named > 2 * stored + 16:  # what little is missing gets named later, beside the new experts of the model
            raise ValueError(
                f"The adapter does not fit itself; nothing was loaded: extended_layers names {named} new experts, and "
                f"the file has tensors of {stored}."
            )
        return config


def shipped_code():
    """Paths of the files that go with every adapter."""
    return sorted(Path(__file__).parent.glob("*_moextend.py"))


def write_folder(folder, tensors, config, max_shard_size="50GB", with_code=True, trainer_names=()):
    """Writes a whole adapter folder: the shipped code, config.json, and tensors with the config in their header.
    Shards get names of their own, and the rename of the index puts them all in place at once.
    `trainer_names`: what they are called in the model; by them transformers' `Trainer` finds the tensors, which looks
    for the files of a whole model, and hands them to `load_state_dict`."""
    with all_or_nothing(folder, stale=FORMER_CODE if with_code else ()) as put:
        for source in shipped_code() if with_code else ():
            target = Path(folder) / source.name
            if not target.exists() or not source.samefile(target):
                put(source.name, lambda path, source=source: shutil.copyfile(source, path))
        text = config.to_json_string(use_diff=False)
        put("config.json", lambda path: path.write_text(text, encoding="utf-8"))
        put_adapter(put, tensors, config, ONE_FILE if trainer_names else max_shard_size)
        if trainer_names:
            index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(trainer_names, FILE)})
            put(SAFE_WEIGHTS_INDEX_NAME, lambda path: path.write_text(index, encoding="utf-8"))


def put_adapter(put, tensors, config, max_shard_size):
    """The adapter's files, through `put` of `all_or_nothing`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    metadata = header(config, tensors)
    pattern = FILE.replace(".safetensors", f"-{secrets.token_hex(4)}{{suffix}}.safetensors")
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=max_shard_size)
    if not split.is_sharded:
        put(FILE, lambda path: save_file(tensors, path, metadata))
        return
    for name, keys in split.filename_to_tensors.items():
        put(name, lambda path, keys=keys: save_file({key: tensors[key] for key in keys}, path, metadata))
    index = {"metadata": {**split.metadata, **metadata}, "weight_map": split.tensor_to_filename}
    put(INDEX, lambda path: path.write_text(json.dumps(index, indent=2), encoding="utf-8"))


def header(config, tensors):
    """Header metadata; every value a string. `checksum` covers the tensors, `header_checksum` everything else here."""
    metadata = {
        "format": "pt",
        "moextend_format": str(FORMAT),
        "config": json.dumps(config.to_dict(), sort_keys=True, default=str),
        "base_fingerprint": config.base_fingerprint or "",
        "encoder_fingerprint": config.encoder_fingerprint or "",
    }
    metadata["checksum"] = checksum(tensors)
    return metadata | {"header_checksum": header_checksum(metadata)}


def header_checksum(metadata):
    """sha256 over all other entries of the header."""
    entries = sorted(item for item in metadata.items() if item[0] != "header_checksum")
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def checksum(tensors):
    """sha256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_adapter(name_or_path: str | os.PathLike, **hub_kwargs) -> StoredAdapter:
    """Reads an adapter's files: -> `StoredAdapter`. Whether it fits a model is for `check_tensors` to say.

    Raises:
        OSError: no adapter there, or the Hub can't be reached.
        ValueError: a damaged or truncated file, a missing shard, a link to elsewhere, or a newer format.
    """
    check_source("The adapter", name_or_path)
    with locked(name_or_path, alone=False) if os.path.isdir(name_or_path) else contextlib.nullcontext():
        files = find_files(name_or_path, hub_kwargs)
        return joined({path: read_file(path) for path in files})


def joined(contents):
    """The `StoredAdapter` of path -> (tensors, header metadata), the files of one save."""
    tensors, first, paths = {}, None, list(contents)
    for path, (found, metadata) in contents.items():
        check_format(path, metadata)
        if first not in (None, metadata) or tensors.keys() & found.keys():
            raise ValueError(f"The adapter is damaged: {path} is of another save than {paths[0]}. Nothing was loaded.")
        tensors, first = tensors | found, metadata
    values = parse_json(first["config"], f"{paths[0]} is damaged: the config in its header")
    return StoredAdapter(values, tensors, first, tuple(Path(path).name for path in paths))


class FileHeader(NamedTuple):
    """The header of a safetensors file."""

    entries: dict  # tensor's name -> {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}
    metadata: dict
    start: int  # of the data in the file
    state: tuple  # of the file when the header was read; see `state_of`


def state_of(file):
    """What is another where an open file was written to."""
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_header(file, longest=2 * MAX_JSON):
    """The `FileHeader` of an open safetensors file. Nothing here maps a file into memory, as safetensors does ("pread"
    too): where one is cut short meanwhile, as by a copy over the old file, that would end the process (SIGBUS)."""
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
    """(dtype, shape, first byte) of a tensor in its file; `dtypes`: allowed ones, by safetensors' names."""
    entry = header.entries[name]
    dtype, shape, (begin, end) = dtypes.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise ValueError(f"wrong dtype: {shown(name)} is {short(entry['dtype'])}; allowed: {', '.join(dtypes)}")
    if len(shape) > 64 or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"{shown(name)} has the shape {short(shape)}")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{shown(name)} has {end - begin} bytes, which are not {short(shape)} of {dtype}")
    return dtype, shape, header.start + begin


def read_tensor(file, header, name, dtypes=DTYPES):
    """A tensor of an open file, in memory of its own."""
    dtype, shape, first = find_tensor(header, name, dtypes)
    tensor = torch.empty(shape, dtype=dtype, device="cpu")  # whatever the default device is
    fill(file, header, first, tensor)
    return tensor


def fill(file, header, first, tensor):
    """Reads a tensor's values, which begin at a byte of an open file."""
    file.seek(first)
    count = file.readinto(tensor.reshape(-1).view(torch.uint8).numpy())
    if count != tensor.nbytes or state_of(file) != header.state:
        raise ValueError("it was overwritten while it was read")


def read_file(path, read=read_tensor):
    """(tensors, header metadata) of one safetensors file; `read`: makes a tensor, as `read_tensor` does."""
    try:
        with open(path, "rb") as file:
            header = read_header(file)
            return {name: read(file, header, name) for name in sorted(header.entries)}, header.metadata
    except UNREADABLE as error:
        reason = f"{path} is damaged or truncated ({short(str(error))})."
        raise ValueError(f"{reason} Nothing was loaded; fetch or save the adapter again.") from error


def parse_json(text, what, longest=MAX_JSON):
    """The mapping that JSON `text` holds."""
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


def check_given(what, given):
    """Refuses what is no name of a folder or a Hub id, as a place where `what` lies."""
    if not isinstance(given, str | os.PathLike):
        raise ValueError(
            f"{what} must be a folder or a Hub id (a base or encoder also a loaded model of transformers; of PEFT's, "
            f"what merge_and_unload() returns), not {type(given).__name__}."
        )


def check_source(what, given):
    """Refuses what can be neither a folder nor a Hub id."""
    check_given(what, given)
    if not os.path.exists(given):
        try:
            validate_repo_id(str(given))
        except HFValidationError as error:
            raise OSError(f"{what} {str(given)!r} is no folder here, and no Hub id like owner/name.") from error


def check_keywords(function, given, allowed):
    """Refuses unknown keywords: a misspelled option would be lost without a word."""
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        names, known = ", ".join(unknown), ", ".join(allowed) or "none"
        raise TypeError(f"{function}() got unexpected keyword arguments: {names}. Allowed here: {known}.")


def find_files(name_or_path, hub_kwargs):
    """Paths of the adapter's files; the index wins over a single file."""
    optional = {"_raise_exceptions_for_missing_entries": False, **hub_kwargs}
    index = cached_file(name_or_path, INDEX, **optional)
    if index is None:
        try:
            single = cached_file(name_or_path, FILE, **hub_kwargs)
        except OSError as error:
            if isinstance(error.__cause__, LocalEntryNotFoundError):
                raise OSError(f"{name_or_path} is no folder here, and the Hub can't be reached. ({error})") from error
            raise OSError(f"{name_or_path} holds no MoExtend adapter: neither {FILE} nor {INDEX} is there.") from error
        check_link(single, name_or_path)
        return [single]
    check_link(index, name_or_path)
    shards = shards_of(index)
    paths = {shard: cached_file(name_or_path, shard, **optional) for shard in shards}
    missing = [shard for shard, path in paths.items() if path is None]
    if missing:
        names = ", ".join(missing[:8])
        raise ValueError(f"{name_or_path} lacks {len(missing)} of {len(shards)} adapter files: {names}.")
    for path in paths.values():
        check_link(path, name_or_path)
    return list(paths.values())


def shards_of(index):
    """Names of the files that an index names, sorted."""
    try:
        if os.path.getsize(index) > MAX_JSON:
            raise ValueError(f"it has more than {MAX_JSON} bytes")
        weight_map = parse_json(Path(index).read_text(encoding="utf-8"), "it")["weight_map"]
        shards = sorted(set(weight_map.values()))
        strange = [shard for shard in shards if not is_shard(shard)]
        if strange or not 0 < len(shards) <= MAX_SHARDS:
            raise ValueError(f"no names of adapter files: {short(strange)}, among {len(shards)}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = f"{index} is damaged ({error!r})."
        raise ValueError(f"{reason} Nothing was loaded; fetch or save the adapter again.") from error
    return shards


def is_shard(name):
    """Whether `name` is that of a file beside the index."""
    ours = name.startswith("moextend_adapter") and name.endswith(".safetensors")
    return ours and name.isprintable() and Path(name).name == name


def check_format(path, metadata):
    """Refuses what is no adapter, one written by a later version, and a damaged header."""
    number = metadata.get("moextend_format", "")
    if not (number.isascii() and number.isdecimal() and len(number) < 10 and int(number)) or "config" not in metadata:
        raise ValueError(f"{path} is damaged or no MoExtend adapter: its header lacks moextend_format or config.")
    if int(number) > FORMAT:
        raise ValueError(f"{path} has moextend_format {number}; this version reads up to {FORMAT}. Update moextend.")
    if metadata.get("header_checksum") not in (None, header_checksum(metadata)):
        raise ValueError(f"{path} is damaged: its header does not match the header's checksum. Nothing was loaded.")


def shown(name):
    """A tensor's name from a file, where it may hold anything."""
    return name if name.isprintable() else short(name)


def check_tensors(shapes: dict, stored: StoredAdapter) -> None:
    """Compares name -> shape of what a model needs with the tensors of a `StoredAdapter`, then these with their own
    checksum. `ValueError`: a message with every missing, unexpected and wrongly shaped tensor; or damage."""
    given = stored.tensors
    problems = [f"missing: {name}" for name in sorted(shapes.keys() - given.keys())]
    problems += [f"unexpected: {shown(name)}" for name in sorted(given.keys() - shapes.keys())]
    problems += [
        f"wrong shape: {name} is {tuple(given[name].shape)}, the model needs {tuple(shapes[name])}"
        for name in sorted(shapes.keys() & given.keys())
        if given[name].shape != shapes[name]
    ]
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"The adapter does not fit the model; nothing was loaded.\n  {lines}")
    if stored.metadata.get("checksum") not in (None, checksum(given)):
        raise ValueError(
            "The adapter is damaged: its tensors do not match the checksum in its header. Nothing was loaded; fetch "
            "or save the adapter again."
        )
