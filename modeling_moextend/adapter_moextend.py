"""The adapter's file: only new tensors, named by role, with a header that says what they belong to.

Reading checks everything before any model is touched; writing leaves either the old adapter or the new one, whenever
the process dies.
"""

import base64
import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils import cached_file

from .layers_moextend import materialised

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, distribute_tensor
else:
    FSDPModule = DTensor = ()

FILE = "moextend_adapter.safetensors"
INDEX = FILE + ".index.json"
FORMAT = 1
FINGERPRINT_SIZE = 1024
PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    if is_traceable_wrapper_subclass(tensor):  # of a sharded one this process's shard, of torchao's values and scales
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


def write_adapter(folder, tensors, config, max_shard_size="50GB"):
    """Writes tensors (name -> tensor) with the config in the header; atomic, whatever was there before.

    A single file is put in place by one rename. Shards get names of their own, and the rename of the index puts them
    all in place at once; what the old index named is removed after that.
    """
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    metadata = header(config, tensors)
    old = existing_files(folder)
    token = secrets.token_hex(4)
    pattern = FILE.replace(".safetensors", f"-{token}{{suffix}}.safetensors")
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=max_shard_size)
    if split.is_sharded:
        for name, keys in split.filename_to_tensors.items():
            replace_file(
                folder / name, lambda path, keys=keys: save_file({k: tensors[k] for k in keys}, path, metadata)
            )
        index = {"metadata": {**split.metadata, **metadata}, "weight_map": split.tensor_to_filename}
        write_text(folder / INDEX, json.dumps(index, indent=2))
        new = {*split.filename_to_tensors, INDEX}
    else:
        replace_file(folder / FILE, lambda path: save_file(tensors, path, metadata))
        new = {FILE}
    for name in sorted(old - new, key=lambda name: name != INDEX):  # the index first: it wins over a single file
        (folder / name).unlink(missing_ok=True)


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


def existing_files(folder):
    """Names of adapter files already in `folder`, and of what a killed process left unfinished."""
    patterns = ("moextend_adapter*", "config.json.*.tmp", "*_moextend.py.*.tmp")
    return {path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()}


def replace_file(path, write):
    """Writes beside `path` and renames over it, so that `path` is never half a file."""
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    unfinished.touch()
    mode = unfinished.stat().st_mode  # the user's own default: safetensors would let nobody else read the file
    try:
        write(unfinished)
        unfinished.chmod(mode)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def copy_file(source, target):
    """Copies a file of the shipped code."""
    replace_file(Path(target), lambda unfinished: shutil.copyfile(source, unfinished))


def write_text(path, text):
    replace_file(Path(path), lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


# ---------------------------------------------------------------- reading


def read_adapter(name_or_path, **hub_kwargs):
    """Reads an adapter: (config as `dict`, name -> tensor on the CPU, header metadata). See `check_tensors` next.

    Raises:
        OSError: no adapter there.
        ValueError: a damaged or truncated file, a missing shard, or a newer format; nothing was loaded.
    """
    files = find_files(name_or_path, hub_kwargs)
    tensors, metadata = {}, None
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors.update({key: file.get_tensor(key) for key in file.keys()})
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(
                f"{path} is damaged or truncated ({error}). Nothing was loaded; fetch or save the adapter again."
            ) from error
        check_format(path, metadata)
    try:
        return json.loads(metadata["config"]), tensors, metadata
    except json.JSONDecodeError as error:
        raise ValueError(f"{files[0]} is damaged: the config in its header is no JSON ({error}).") from error


def find_files(name_or_path, hub_kwargs):
    """Paths of the adapter's files; the index wins over a single file."""
    optional = {"_raise_exceptions_for_missing_entries": False, **hub_kwargs}
    index = cached_file(name_or_path, INDEX, **optional)
    if index is None:
        single = cached_file(name_or_path, FILE, **optional)
        if single is None:
            raise OSError(f"{name_or_path} holds no MoExtend adapter: neither {FILE} nor {INDEX} is there.")
        return [single]
    try:
        shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        strange = [shard for shard in shards if not shard.startswith("moextend_adapter") or Path(shard).name != shard]
        if strange:
            raise ValueError(f"no names of adapter files: {strange}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is damaged ({error!r}). Nothing was loaded; fetch or save the adapter again."
        ) from error
    paths = {shard: cached_file(name_or_path, shard, **optional) for shard in shards}
    missing = [shard for shard, path in paths.items() if path is None]
    if missing:
        raise ValueError(f"{name_or_path} lacks {len(missing)} of {len(shards)} adapter files: {', '.join(missing)}.")
    return list(paths.values())


def check_format(path, metadata):
    """Refuses what is no adapter, one written by a later version, and a damaged header."""
    if not str(metadata.get("moextend_format", "")).isdecimal() or "config" not in metadata:
        raise ValueError(f"{path} is damaged or no MoExtend adapter: its header lacks moextend_format or config.")
    if int(metadata["moextend_format"]) > FORMAT:
        raise ValueError(
            f"{path} has moextend_format {metadata['moextend_format']}; this version reads up to {FORMAT}. "
            "Update moextend."
        )
    if metadata.get("header_checksum") not in (None, header_checksum(metadata)):
        raise ValueError(
            f"{path} is damaged: its header does not match the header's own checksum. Nothing was loaded."
        )


def check_tensors(expected, given, metadata):
    """Compares name -> tensor of a model with those of a file, then the file with its own checksum.

    Raises:
        ValueError: one message with every missing, unexpected and wrongly shaped tensor; or a damaged file.
    """
    problems = [f"missing: {name}" for name in sorted(expected.keys() - given.keys())]
    problems += [f"unexpected: {name}" for name in sorted(given.keys() - expected.keys())]
    problems += [
        f"wrong shape: {name} is {tuple(given[name].shape)}, the model needs {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & given.keys())
        if given[name].shape != expected[name].shape
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
