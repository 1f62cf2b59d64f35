"""The adapter's file: only new tensors, named by role, with a header that says what they belong to.

Reading checks everything before any model is touched; writing leaves either the old adapter or the new one, whenever
the process dies.
"""

import base64
import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils import cached_file

from .entries_moextend import FINGERPRINT_SIZE, short
from .families_moextend import materialised
from .folder_moextend import all_or_nothing, locked

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, distribute_tensor
else:
    FSDPModule = DTensor = ()

FILE = "moextend_adapter.safetensors"
INDEX = FILE + ".index.json"
FORMAT = 1
PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_JSON = 8 * 2**20  # bytes of an index or of a config, many times what a large base needs
MAX_SHARDS = 4096
MAX_DEPTH = 32


# ---------------------------------------------------------------- fingerprint


def fingerprint(module):
    """1,024 values at fixed places over the weights of `module` (matrices and stacks), float32, base64.

    Quantised tensors are left out (NaN in their places). `None` where the weights are on the meta device.
    """
    owners = {name: owner for name, owner in owned_parameters(module) if owner[1].dim() >= 2}

    def read(name):
        owner, _, key = owners[name]
        with materialised(owner):
            return owner._parameters[key].detach()

    return sampled(owners, read)


def tensors_fingerprint(tensors):
    """`fingerprint` of tensors by name: which adapter this is, whatever dtype it was saved in."""
    return sampled(
        [name for name, tensor in tensors.items() if tensor.dim() >= 2], lambda name: tensors[name].detach()
    )


def sampled(names, read):
    """The values of a fingerprint; `read` gives the tensor of a name, all of them together having one place each."""
    names = sorted(names)
    step = max(1, -(-len(names) // FINGERPRINT_SIZE))
    names = names[::step]
    values = torch.full((FINGERPRINT_SIZE,), torch.nan)
    for place, name in enumerate(names):
        slots = torch.arange(place, FINGERPRINT_SIZE, len(names))
        tensor = read(name)
        if tensor.is_meta:
            return None
        if is_plain(tensor):
            spots = torch.linspace(0, tensor.numel() - 1, len(slots) + 2, dtype=torch.float64)[1:-1].long()
            values[slots] = tensor.reshape(-1)[spots.to(tensor.device)].float().cpu()
    return base64.b64encode(values.numpy().tobytes()).decode()


def is_plain(tensor):
    """Whether a weight is an ordinary tensor of floating-point numbers: not quantised, packed or sharded."""
    return tensor.dtype in PLAIN and not is_traceable_wrapper_subclass(tensor)


def owned_parameters(module):
    """(name, (owner module, parameter, its key)) of every base parameter, new ones left out."""
    for prefix, owner in module.named_modules():
        if "moextend" in prefix.split("."):
            continue
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{key}".lstrip("."), (owner, parameter, key)


def same_fingerprint(one, other):
    """Whether two fingerprints can be of one checkpoint.

    Two loads in one dtype give the same values. Loads in two dtypes differ by half a step of the coarser one (and by a
    rounding of the finer one before it); fp16 has a smallest step besides, 6e-8.
    """
    one, other = decode_fingerprint(one), decode_fingerprint(other)
    both = ~(one.isnan() | other.isnan())
    if not both.any():
        return True
    steps = rounding(one[both]), rounding(other[both])
    relative = 0.0 if steps[0] == steps[1] else 0.6 * max(steps)
    return torch.allclose(one[both], other[both], rtol=relative, atol=6e-8 if max(steps) > 1e-6 else 0.0)


def decode_fingerprint(text):
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)


def rounding(values):
    """The relative step of the coarsest dtype that holds `values` exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).float(), values):
            return torch.finfo(dtype).eps
    return torch.finfo(torch.float32).eps


def base_tensors_hash(model):
    """name -> sha256 of every base and encoder tensor of a MoExtend model (new tensors and projectors left out).

    Where tensors are sharded, of this process's shards.
    """
    reshard(model)
    encoders = {f"adapters.{name}.encoder": adapter.encoder for name, adapter in model.adapters.items()}
    parts, hashes = {"base": model.base, **encoders}, {}
    for part, module in parts.items():
        for prefix, owner in module.named_modules() if module is not None else ():
            if "moextend" in prefix.split("."):
                continue
            with materialised(owner):
                for key, tensor in (*owner._parameters.items(), *owner._buffers.items()):
                    if tensor is not None:
                        hashes[f"{part}.{prefix}.{key}"] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
    return hashes


def tensor_bytes(tensor):
    if isinstance(tensor, DTensor):
        return tensor_bytes(tensor.to_local())
    if is_traceable_wrapper_subclass(tensor):  # torchao's values and scales
        return b"".join(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------- sharded tensors (FSDP2)


def reshard(model):
    """Puts shards back in the place of whole tensors.

    After a forward pass FSDP2 leaves the root module's parameters whole: copies, in the dtype of the pass. What is
    read from them may be rounded, and what is written to them is lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def stored_dtype(name, dtype):
    """What a tensor is stored in: the gate always in float32, for its rounding would move tokens across the line."""
    return torch.float32 if name.startswith("gate.") else dtype


def gather(tensors, dtype, keep=True):
    """name -> whole tensor in `dtype` (see `stored_dtype`) on the CPU; empty where not `keep`.

    Every process has to call this, for sharded tensors are made whole by all of them together.
    """
    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # from the CPU, where offloaded
        if keep:
            whole[name] = tensor.to("cpu", stored_dtype(name, dtype))
    return whole


def laid_out(tensor, like):
    """A whole tensor, the same on every process, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements).to(like.device)


# ---------------------------------------------------------------- writing


def shipped_code():
    """Paths of the files that go with every adapter."""
    return sorted(Path(__file__).parent.glob("*_moextend.py"))


def write_folder(folder, tensors, config, max_shard_size="50GB"):
    """Writes a whole adapter folder, that is the shipped code, config.json and the adapter: see `write_adapter`."""
    with all_or_nothing(folder) as put:
        for source in shipped_code():
            target = Path(folder) / source.name
            if not target.exists() or not source.samefile(target):
                put(source.name, lambda path, source=source: shutil.copyfile(source, path))
        text = config.to_json_string(use_diff=False)
        put("config.json", lambda path: path.write_text(text, encoding="utf-8"))
        put_adapter(put, tensors, config, max_shard_size)


def write_adapter(folder, tensors, config, max_shard_size="50GB"):
    """Writes tensors (name -> tensor) with the config in the header; atomic, whatever was there before.

    A single file is put in place by one rename. Shards get names of their own, and the rename of the index puts them
    all in place at once; what the old index named is removed after that.

    Raises:
        OSError: no room, or no right to write; the adapter that was there is untouched.
    """
    with all_or_nothing(folder) as put:
        put_adapter(put, tensors, config, max_shard_size)


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


# ---------------------------------------------------------------- reading


def read_adapter(name_or_path, **hub_kwargs):
    """Reads an adapter: (config as `dict`, name -> tensor on the CPU, header metadata). See `check_tensors` next.

    Raises:
        OSError: no adapter there.
        ValueError: a damaged or truncated file, a missing shard, a link to elsewhere, or a newer format; nothing was
            loaded.
    """
    with locked(name_or_path, alone=False) if os.path.isdir(name_or_path) else contextlib.nullcontext():
        files = find_files(name_or_path, hub_kwargs)
        contents = [read_file(path) for path in files]
    tensors, first = {}, None
    for path, (found, metadata) in zip(files, contents, strict=True):
        check_format(path, metadata)
        if first not in (None, metadata) or tensors.keys() & found.keys():
            raise ValueError(f"The adapter is damaged: {path} is of another save than {files[0]}. Nothing was loaded.")
        tensors, first = tensors | found, metadata
    return parse_json(first["config"], f"{files[0]} is damaged: the config in its header"), tensors, first


def read_file(path):
    """Tensors and header metadata of one safetensors file."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > 2 * MAX_JSON:
            raise OSError(f"a header of {size} bytes")
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or truncated ({short(str(error))}). Nothing was loaded; fetch or save the adapter "
            "again."
        ) from error


def parse_json(text, what):
    """The mapping that JSON `text` holds.

    Raises:
        ValueError: begins with `what`; for anything else, a key given twice, and more than anybody would write.
    """
    try:
        if len(text) > MAX_JSON:
            raise ValueError(f"it is longer than {MAX_JSON} characters")
        value = json.loads(text, object_pairs_hook=without_twins)
        if not isinstance(value, dict) or is_deep(value):
            raise ValueError(f"it is no mapping, or nested deeper than {MAX_DEPTH} levels")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} can't be read: {short(str(error))}. Nothing was loaded.") from error
    return value


def without_twins(pairs):
    """A `dict` of JSON's pairs; which of two equal keys counts would be the parser's choice."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError(
            f"given twice: {short([key for key, n in Counter(key for key, _ in pairs).items() if n > 1])}"
        )
    return entries


def is_deep(value):
    """Whether lists and mappings are nested deeper than `MAX_DEPTH`: copying and printing would not end well."""
    level = [value]
    for _ in range(MAX_DEPTH):
        nested = [item for item in level if isinstance(item, (dict, list))]
        level = [inner for item in nested for inner in (item.values() if isinstance(item, dict) else item)]
    return any(isinstance(item, (dict, list)) for item in level)


def find_files(name_or_path, hub_kwargs):
    """Paths of the adapter's files; the index wins over a single file."""
    optional = {"_raise_exceptions_for_missing_entries": False, **hub_kwargs}
    index = cached_file(name_or_path, INDEX, **optional)
    if index is None:
        single = cached_file(name_or_path, FILE, **optional)
        if single is None:
            raise OSError(f"{name_or_path} holds no MoExtend adapter: neither {FILE} nor {INDEX} is there.")
        check_place(single, name_or_path)
        return [single]
    check_place(index, name_or_path)
    shards = shards_of(index)
    paths = {shard: cached_file(name_or_path, shard, **optional) for shard in shards}
    missing = [shard for shard, path in paths.items() if path is None]
    if missing:
        names = ", ".join(missing[:8])
        raise ValueError(f"{name_or_path} lacks {len(missing)} of {len(shards)} adapter files: {names}.")
    for path in paths.values():
        check_place(path, name_or_path)
    return list(paths.values())


def shards_of(index):
    """Names of the files that an index names, sorted.

    Raises:
        ValueError: a damaged index, or one that names other files.
    """
    try:
        if os.path.getsize(index) > MAX_JSON:
            raise ValueError(f"it has more than {MAX_JSON} bytes")
        weight_map = parse_json(Path(index).read_text(encoding="utf-8"), "it")["weight_map"]
        shards = sorted(set(weight_map.values()))
        strange = [shard for shard in shards if not is_shard(shard)]
        if strange or not 0 < len(shards) <= MAX_SHARDS:
            raise ValueError(f"no names of adapter files: {short(strange)}, among {len(shards)}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(
            f"{index} is damaged ({error!r}). Nothing was loaded; fetch or save the adapter again."
        ) from error
    return shards


def is_shard(name):
    """Whether `name` is that of a file beside the index."""
    ours = name.startswith("moextend_adapter") and name.endswith(".safetensors")
    return ours and name.isprintable() and Path(name).name == name


def check_place(path, folder):
    """Refuses links that lead out of the adapter's folder; in a Hub cache, to elsewhere than the blobs beside it."""
    if not os.path.isdir(folder):
        return
    home = Path(folder).resolve()
    homes = [home, *(parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots")]
    place = Path(path).resolve()
    if not any(place.is_relative_to(home) for home in homes):
        raise ValueError(f"{path} is a link to {place}, outside the adapter's folder: put a copy there instead.")


def check_format(path, metadata):
    """Refuses what is no adapter, one written by a later version, and a damaged header."""
    number = metadata.get("moextend_format", "")
    if not (number.isascii() and number.isdecimal() and len(number) < 10 and int(number)) or "config" not in metadata:
        raise ValueError(f"{path} is damaged or no MoExtend adapter: its header lacks moextend_format or config.")
    if int(number) > FORMAT:
        raise ValueError(f"{path} has moextend_format {number}; this version reads up to {FORMAT}. Update moextend.")
    if metadata.get("header_checksum") not in (None, header_checksum(metadata)):
        raise ValueError(
            f"{path} is damaged: its header does not match the header's own checksum. Nothing was loaded."
        )


def shown(name):
    """A tensor's name from a file, where it may hold anything."""
    return name if name.isprintable() else short(name)


def check_tensors(expected, given, metadata):
    """Compares name -> tensor of a model with those of a file, then the file with its own checksum.

    Raises:
        ValueError: one message with every missing, unexpected and wrongly shaped or typed tensor; or a damaged file.
    """
    problems = [f"missing: {name}" for name in sorted(expected.keys() - given.keys())]
    problems += [f"unexpected: {shown(name)}" for name in sorted(given.keys() - expected.keys())]
    problems += [
        f"wrong shape: {name} is {tuple(given[name].shape)}, the model needs {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & given.keys())
        if given[name].shape != expected[name].shape
    ]
    problems += [
        f"wrong dtype: {shown(name)} is {tensor.dtype}; allowed: {', '.join(map(str, PLAIN))}"
        for name, tensor in sorted(given.items())
        if tensor.dtype not in PLAIN
    ]
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"The adapter does not fit the model; nothing was loaded.\n  {lines}")
    if metadata.get("checksum") not in (None, checksum(given)):
        raise ValueError(
            "The adapter is damaged: its tensors do not match the checksum in its header. Nothing was loaded; fetch "
            "or save the adapter again."
        )


@torch.no_grad()
def put_tensors(live, tensors, metadata, base_dtype=None):
    """Copies tensors of a file into those of a model (name -> tensor), once all of them are checked.

    They keep the model's dtype; with `base_dtype` they take the file's or that one, whichever is wider.
    """
    check_tensors(live, tensors, metadata)
    for name, tensor in tensors.items():
        if base_dtype is None:
            live[name].copy_(laid_out(tensor, live[name]))
        else:
            wide = torch.promote_types(tensor.dtype, base_dtype)
            live[name].data = tensor.to(live[name].device, wide, copy=True)  # out of the file's map, and aligned
