"""The adapter's file: only new tensors, named by role, with a header that says what they belong to."""

import hashlib
import json
import os
import secrets
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from .configuration_moextend import MoExtendConfig
from .folder_moextend import all_or_nothing, check_link, locked
from .tensor_files_moextend import MAX_JSON, UNREADABLE, as_bytes, damaged, parse_json, read_each, read_tensor, shown
from .validation_moextend import short

FILE = "moextend_adapter.safetensors"
INDEX = FILE + ".index.json"
FORMAT = 2  # of an adapter with `expert_rank` or deltas; any other is written as 1, which earlier versions read
MAX_SHARDS = 4096
ONE_FILE = "1000TB"
FORMER = "adapter entries generation hub layouts pretrained selfcheck state switch together".split()
FORMER_CODE = [f"{name}_moextend.py" for name in FORMER]  # of version 0.1.0: goes where the code is written anew


class StoredAdapter(NamedTuple):
    """An adapter as it lies on disk, read once."""

    values: dict  # the config in its header
    tensors: dict  # name -> tensor on the CPU
    metadata: dict  # of the header
    files: tuple = ()  # their names

    def config_for_loading(self) -> MoExtendConfig:
        """Its `MoExtendConfig`, of its size; of the base's own only the kind is read: the base brings the rest."""
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
            raise damaged("The adapter", f"extended_layers names {named} experts, and there are tensors of {stored}")
        return config


def shipped_code():
    return sorted(Path(__file__).parent.glob("*_moextend.py"))


def write_folder(folder, tensors, config, max_shard_size="50GB", with_code=True, trainer_names=()):
    """Writes a whole adapter folder: the shipped code, config.json, and tensors with the config in their header.
    `trainer_names`: what these are called in the model; by them transformers' `Trainer`, which looks for the files of
    a whole model, finds the tensors, and hands them to `load_state_dict`."""
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
        "moextend_format": str(FORMAT if config.expert_rank or config.deltas else 1),
        "config": json.dumps(config.to_dict(), sort_keys=True, default=str),
        "base_fingerprint": config.base_fingerprint or "",
        "encoder_fingerprint": config.encoder_fingerprint or "",
        **({"audio_encoder_fingerprint": known} if (known := config.audio_encoder_fingerprint) else {}),
        "checksum": checksum(tensors),
    }
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
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def read_adapter(name_or_path: str | os.PathLike, **hub_kwargs) -> StoredAdapter:
    """Reads an adapter's files. Whether it fits a model is for `check_tensors` to say. `OSError`: no adapter there, or
    the Hub can't be reached; `ValueError`: a damaged file, a missing shard, a link to elsewhere, or a newer format."""
    check_source("The adapter", name_or_path)
    with locked(name_or_path, alone=False):
        files = find_files(name_or_path, hub_kwargs)
        return joined({path: read_each(path, read_tensor) for path in files})


def joined(contents):
    """The `StoredAdapter` of path -> (tensors, header metadata), the files of one save."""
    tensors, first, paths = {}, None, list(contents)
    for path, (found, metadata) in contents.items():
        check_format(path, metadata)
        if first not in (None, metadata) or tensors.keys() & found.keys():
            raise damaged("The adapter", f"{path} is of another save than {paths[0]}")
        tensors, first = tensors | found, metadata
    values = parse_json(first["config"], f"{paths[0]} is damaged: the config in its header")
    return StoredAdapter(values, tensors, first, tuple(Path(path).name for path in paths))


def check_source(what, given):
    """Refuses what is no name of a folder or a Hub id, as a place where `what` lies."""
    if not isinstance(given, str | os.PathLike):
        raise ValueError(
            f"{what} must be a folder or a Hub id (a base or encoder also a loaded model of transformers; of PEFT's, "
            f"what merge_and_unload() returns), not {type(given).__name__}."
        )
    if os.path.isfile(given):  # of which transformers would read any as a config
        raise ValueError(f"{what} {str(given)!r} is a file: give the folder that it lies in, or a Hub id.")


def check_keywords(function, given, allowed):
    """Refuses unknown keywords: a misspelled option would be lost without a word."""
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        names, known = ", ".join(unknown), ", ".join(allowed) or "none"
        raise TypeError(f"{function}() got unexpected keyword arguments: {names}. Allowed here: {known}.")


def find_files(name_or_path, hub_kwargs):
    """Paths of the adapter's files; the index wins over a single file."""
    optional = {"_raise_exceptions_for_missing_entries": False, **hub_kwargs}
    try:
        index = cached_file(name_or_path, INDEX, **optional)
        paths = {FILE: cached_file(name_or_path, FILE, **hub_kwargs)} if index is None else {}
    except OSError as error:
        why = f"holds no MoExtend adapter: neither {FILE} nor {INDEX} is there"
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            why = "is no folder here, and the Hub can't be reached"
        raise OSError(f"{name_or_path} {why}." + ("" if os.path.isdir(name_or_path) else f" ({error})")) from error
    if index is not None:
        check_link(index, name_or_path)
        paths = {shard: cached_file(name_or_path, shard, **optional) for shard in shards_of(index)}
    missing = [shard for shard, path in paths.items() if path is None]
    if missing:
        names = ", ".join(missing[:8])
        raise ValueError(f"{name_or_path} lacks {len(missing)} of {len(paths)} adapter files: {names}.")
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
        ours = [one for one in shards if one.isprintable() and fnmatch(one, "moextend_adapter*.safetensors")]
        strange = [one for one in shards if one not in ours or Path(one).name != one]
        if strange or not 0 < len(shards) <= MAX_SHARDS:
            raise ValueError(f"no names of adapter files: {short(strange)}, among {len(shards)}")
    except UNREADABLE as error:
        raise damaged(index, repr(error)) from error
    return shards


def check_format(path, metadata):
    """Refuses what is no adapter, one written by a later version, and a damaged header."""
    number = metadata.get("moextend_format", "")
    if not (number.isascii() and number.isdecimal() and len(number) < 10 and int(number)) or "config" not in metadata:
        raise damaged(path, "its header lacks moextend_format or config, so it may be no MoExtend adapter")
    if int(number) > FORMAT:
        raise ValueError(f"{path} has moextend_format {number}; this version reads up to {FORMAT}. Update moextend.")
    if metadata.get("header_checksum") not in (None, header_checksum(metadata)):
        raise damaged(path, "its header does not match the header's checksum")


def check_tensors(shapes: dict, stored: StoredAdapter) -> None:
    """Refuses an adapter whose tensors are not of the shapes that a model needs, all of them named, or are damaged."""
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
        raise damaged("The adapter", "its tensors do not match the checksum in its header")
