"""What is in an adapter, and how two of them differ: read from their files, without any base."""

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import SafetensorsParsingError
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from ..adapter_file_moextend import (
    FILE,
    INDEX,
    StoredAdapter,
    check_source,
    check_tensors,
    find_files,
    joined,
    shards_of,
)
from ..configuration_moextend import DELTAS, MoExtendConfig
from ..folder_moextend import locked
from ..tensor_files_moextend import DTYPES, FileHeader, as_bytes, find_tensor, read_each, read_tensor
from ..validation_moextend import short
from .base_weights import unusable

ROUTING = ("scope", "selection", "calibration")
OTHERS = (
    *(f"{kind} deltas" for kind in DELTAS),
    "gate",
    "projector",
    "audio_projector",
)  # parts of an adapter that are no layer's
# What huggingface_hub and torch make of a header that is no header; what the network does is none of these.
BROKEN_HEADER = (SafetensorsParsingError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)


def read_whole(name_or_path: str | os.PathLike, **hub_kwargs: Any) -> StoredAdapter:
    """Reads an adapter that is found whole, by its own checksums: -> `StoredAdapter`.

    Raises:
        OSError: no adapter there.
        Unusable: a damaged one, or one of a newer format.
    """
    with unusable():
        check_source("The adapter", name_or_path)
        with locked(name_or_path, alone=False):  # tensor by tensor: an adapter stands in memory once
            paths = find_files(name_or_path, hub_kwargs)
            stored = joined({path: read_each(path, read_tensor) for path in paths})
        check_tensors({name: tensor.shape for name, tensor in stored.tensors.items()}, stored)
        MoExtendConfig.from_dict(stored.values)  # its values are allowed ones
        return stored


def inspect_adapter(name_or_path: str | os.PathLike, **hub_kwargs: Any) -> dict[str, Any]:
    """What an adapter holds, as a JSON-ready `dict`; of a repository on the Hub only the headers are fetched.

    Keys: adapter, format, base, encoder (`None`: none), audio_encoder (where there is one), scope, selection,
    calibration, deltas (kind -> rank),
    expert_rank (`None`: whole experts), gate_threshold (`None`: no gate), num_tensors, num_parameters, num_bytes (of
    tensors), not_finite (names of tensors that hold NaN or infinity; `None`: on the Hub, not fetched), files, layers
    (an entry for each extended layer), others (the same for deltas, gate and projector), tensors (an entry for each).

    Raises:
        OSError: no adapter there.
        ValueError: a damaged header, or a newer format.
    """
    stored = read_headers(name_or_path, hub_kwargs)
    config, tensors = MoExtendConfig.from_dict(stored.values), stored.tensors
    return {
        "adapter": str(name_or_path),
        "format": int(stored.metadata["moextend_format"]),
        "base": describe_part(config, "base", config.text_config),
        "encoder": describe_part(config, "encoder", config.encoder_config) if config.encoder_config else None,
        **{
            f"{modality}_encoder": describe_part(config, f"{modality}_encoder", sense.encoder_config)
            for modality, sense in config.senses.items()
            if modality != "image"
        },
        **{name: getattr(config, name) for name in (*ROUTING, "deltas", "expert_rank")},
        "gate_threshold": config.gate_threshold if config.scope == "gate" else None,
        **size_of(tensors),
        "not_finite": read_not_finite(name_or_path, hub_kwargs),
        "files": list(stored.files),
        "layers": [
            {"layer": layer, "source_experts": sources, **size_of(in_part(tensors, str(layer)))}
            for layer, sources in config.extended_layers.items()
        ],
        "others": [{"part": part, **size_of(own)} for part in OTHERS if (own := in_part(tensors, part))],
        "tensors": [
            {"name": name, "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
            for name, tensor in sorted(tensors.items())
        ],
    }


def describe_part(config: MoExtendConfig, role: str, own_config: PreTrainedConfig | None) -> dict[str, str | None]:
    """Where the "base" or "encoder" of an adapter lies, and of what kind it is."""
    entry = "base_model" if role == "base" else role
    return {
        "name_or_path": getattr(config, f"{entry}_name_or_path"),
        "subfolder": getattr(config, f"{role}_subfolder"),
        "revision": config.base_model_revision if role == "base" else None,
        "model_type": own_config.model_type if own_config is not None else None,
    }


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> "float32"."""
    return str(dtype).removeprefix("torch.")


def part_of(name: str) -> str:
    """The part of an adapter that a tensor belongs to: a decoder layer's number, or one of `OTHERS`."""
    first, *rest = name.split(".")
    kind = next((kind for kind in DELTAS if kind in (first, *rest[1:2])), None)
    return f"{kind} deltas" if kind else rest[0] if rest and first == "layers" else first


def in_part(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if part_of(name) == part}


def size_of(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """num_tensors, num_parameters, num_bytes of name -> tensor."""
    return {
        "num_tensors": len(tensors),
        "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "num_bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }


def read_headers(name_or_path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> StoredAdapter:
    """A `StoredAdapter` whose tensors have no data, on the meta device.

    Of a repository on the Hub only the headers are fetched, unless the user is offline (then: from the cache).

    Raises:
        OSError, ValueError: see `inspect_adapter`.
    """
    if not is_local(name_or_path, hub_kwargs):
        return joined(remote_headers(name_or_path, hub_kwargs))
    return joined({path: read_each(path, without_data) for path in find_files(name_or_path, hub_kwargs)})


def without_data(file: BinaryIO, header: FileHeader, name: str) -> torch.Tensor:
    """A tensor of an open safetensors file, on the meta device."""
    dtype, shape, _ = find_tensor(header, name)
    return torch.empty(shape, dtype=dtype, device="meta")


def is_local(name_or_path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> bool:
    """Whether an adapter's files are read from this machine: a folder, or what the cache has for those offline."""
    return bool(Path(name_or_path).is_dir() or hub_kwargs.get("local_files_only") or constants.HF_HUB_OFFLINE)


def read_not_finite(name_or_path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> list[str] | None:
    """Names of an adapter's tensors that hold NaN or infinity, one tensor in memory at a time; `None`: on the Hub."""
    if not is_local(name_or_path, hub_kwargs):
        return None
    checked = {}
    for path in find_files(name_or_path, hub_kwargs):
        checked |= read_each(path, lambda *where: read_tensor(*where).isfinite().all())[0]
    return sorted(name for name, finite in checked.items() if not finite)


def empty(dtype: str, shape: list[int]) -> torch.Tensor:
    """A tensor on the meta device; `dtype` in safetensors' word."""
    if dtype not in DTYPES:
        raise ValueError(f"an adapter holds tensors of {', '.join(DTYPES)}, not {dtype}")
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


def remote_headers(
    repo_id: str, hub_kwargs: dict[str, Any]
) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]:
    """File name -> (tensors without data, header metadata) of every file of an adapter on the Hub."""
    index = cached_file(repo_id, INDEX, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    api, headers = HfApi(token=hub_kwargs.get("token")), {}
    for name in [FILE] if index is None else shards_of(index):
        path = "/".join(filter(None, (hub_kwargs.get("subfolder"), name)))
        try:
            header = api.parse_safetensors_file_metadata(repo_id, path, revision=hub_kwargs.get("revision"))
            tensors = {key: empty(tensor.dtype, tensor.shape) for key, tensor in header.tensors.items()}
            headers[name] = tensors, texts(header.metadata)
        except BROKEN_HEADER as error:
            raise ValueError(f"{repo_id}/{path} is damaged ({short(str(error))}).") from error
    return headers


def texts(metadata: object) -> dict[str, str]:
    """`metadata` of a header, or {} for `None`, if it maps texts to texts: huggingface_hub hands on whatever is there.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(metadata or {}, dict) or not all(isinstance(value, str) for value in (metadata or {}).values()):
        raise ValueError("its metadata is no mapping to texts")
    return metadata or {}


def diff_adapters(one: str | os.PathLike, other: str | os.PathLike, **hub_kwargs: Any) -> dict[str, Any]:
    """How two adapters differ, as a JSON-ready `dict`.

    Keys: adapters (the two names), equal (nothing differs), config (of each difference: entry, values), only_in (for
    each of the two, tensors that the other lacks), shapes (of each difference: name, values), tensors (of those in
    both: name, equal (bit by bit), max_abs (largest |a - b|), relative (|a - b| / |a|, Euclidean)); `None` where a
    number of a tensor is not finite.

    Raises:
        OSError: an adapter is not there.
        ValueError: a damaged one.
    """
    pair = []
    for name in (one, other):
        stored = read_whole(name, **hub_kwargs)
        pair.append((flat(stored.values), stored.tensors))
    (config, tensors), (other_config, other_tensors) = pair
    shared = sorted(tensors.keys() & other_tensors.keys())
    same_shape = [name for name in shared if tensors[name].shape == other_tensors[name].shape]
    entries = sorted(config.keys() | other_config.keys())
    result = {
        "config": [
            {"entry": ".".join(entry), "values": [config.get(entry), other_config.get(entry)]}
            for entry in entries
            if config.get(entry) != other_config.get(entry)
        ],
        "only_in": [sorted(tensors.keys() - other_tensors.keys()), sorted(other_tensors.keys() - tensors.keys())],
        "shapes": [
            {"name": name, "values": [list(tensors[name].shape), list(other_tensors[name].shape)]}
            for name in shared
            if name not in same_shape
        ],
        "tensors": [{"name": name, **distance(tensors[name], other_tensors[name])} for name in same_shape],
    }
    differ = result["config"] or any(result["only_in"]) or result["shapes"]
    equal = not differ and all(tensor["equal"] for tensor in result["tensors"])
    return {"adapters": [str(one), str(other)], "equal": equal, **result}


def flat(values: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Nested mappings as one: path of keys -> value, as JSON has it."""
    entries = {}
    for key, value in values.items():
        entries |= flat(value, (*path, key)) if isinstance(value, dict) and value else {(*path, key): as_json(value)}
    return entries


def as_json(value: Any) -> Any:
    """`value` with texts in the place of numbers that JSON lacks: "NaN", "Infinity", "-Infinity"."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    return [as_json(inner) for inner in value] if isinstance(value, list) else value


def distance(one: torch.Tensor, other: torch.Tensor) -> dict[str, bool | float | None]:
    """equal, max_abs and relative of two tensors of one shape; see `diff_adapters`."""
    equal = one.dtype == other.dtype and bool((as_bytes(one) == as_bytes(other)).all())
    gap = one.double() - other.double()
    largest, size, length = (value.item() for value in (gap.abs().max(), one.double().norm(), gap.norm()))
    relative = length / size if size else (math.inf if length else 0.0)
    return {"equal": equal, "max_abs": finite(largest), "relative": finite(relative)}


def finite(value: float) -> float | None:
    """`value`, or `None` where JSON has no number for it."""
    return value if math.isfinite(value) else None
