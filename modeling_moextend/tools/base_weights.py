"""A base's checkpoint as it lies on disk, read tensor by tensor: nothing here holds a whole model.

Checkpoints name tensors otherwise than models do: mixtral's fused `mlp.experts.gate_up_proj` [E, 2I, H] lies on disk
as `block_sparse_moe.experts.{e}.w1.weight` and `.w3.weight`. transformers knows the way back (it saves by it), so the
names here come from it, family by family, and no table of ours has to follow.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..configuration_moextend import MoExtendConfig
from ..loading_moextend import SHARED_HUB_KWARGS, auto_class_for, check_no_adapter, location_of
from ..tensor_files_moextend import DTYPES, UNREADABLE, FileHeader, find_tensor, read_header, read_tensor, shown
from ..tensors_moextend import PLAIN, named_owners, sample_values

TOKENIZER = (  # files of a tokenizer
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
BASE_DTYPES = DTYPES | {  # by safetensors' names; torch has F8_E8M0 since 2.7
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"F8_{kind}": getattr(torch, f"float8_{kind.lower()}") for kind in ("E4M3FNUZ", "E5M2", "E5M2FNUZ")},
    "F8_E4M3": torch.float8_e4m3fn,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
CORRECTION = "e_score_correction_bias"  # what families call it that hold it in the router
LONGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")  # the expert's number in a key that holds one expert


class Unusable(ValueError):
    """What was given can't be read (damaged, of a later version), or is something else than it has to be."""


@contextlib.contextmanager
def unusable() -> Iterator[None]:
    """Any `ValueError` of the block becomes an `Unusable`."""
    try:
        yield
    except ValueError as error:
        raise error if isinstance(error, Unusable) else Unusable(str(error)) from error


@contextlib.contextmanager
def readable(path: str | os.PathLike) -> Iterator[None]:
    """Errors of the block, which reads the safetensors file at `path`, tell its name.

    Raises:
        Unusable: the file is damaged, truncated, or overwritten while it is read.
    """
    try:
        yield
    except UNREADABLE as error:
        raise Unusable(f"{path} is damaged or truncated ({shown(str(error))}). Fetch or save it again.") from error


class Checkpoint:
    """The safetensors files of one model in a folder or on the Hub.

    Attributes:
        files: file name -> path, of every file with weights and of the index, if there is one.
        paths: key -> path of the file that holds the tensor.
        headers: path -> header of the file, read once: a file that is overwritten later is refused.

    Raises:
        OSError: no weights in safetensors there.
        Unusable: a damaged file, or an index that names something else than files beside it.
    """

    def __init__(self, name_or_path: str | os.PathLike, **hub_kwargs: Any):
        self.name, self.hub_kwargs = str(name_or_path), hub_kwargs
        index = self.find(SAFE_WEIGHTS_INDEX_NAME)
        names = [SAFE_WEIGHTS_NAME] if index is None else shard_names(index)
        files = {name: self.find(name) for name in names}
        missing = [name for name, path in files.items() if path is None]
        if missing:
            raise OSError(f"{self.name} lacks weights in safetensors: {', '.join(missing[:8])}.")
        self.paths: dict[str, str] = {}
        self.headers: dict[str, FileHeader] = {}
        for path in files.values():
            with readable(path), open(path, "rb") as file:
                self.headers[path] = read_header(file, LONGEST_HEADER)
            self.paths |= dict.fromkeys(sorted(self.headers[path].entries), path)
        self.files: dict[str, str] = files | ({} if index is None else {SAFE_WEIGHTS_INDEX_NAME: index})

    def find(self, name: str) -> str | None:
        """Path of a file of the checkpoint, or `None`."""
        return cached_file(self.name, name, _raise_exceptions_for_missing_entries=False, **self.hub_kwargs)

    def config(self) -> PreTrainedConfig:
        return AutoConfig.from_pretrained(self.name, trust_remote_code=False, **self.hub_kwargs)

    def header_of(self, key: str) -> FileHeader:
        """The header of the file that holds a tensor.

        Raises:
            Unusable: the checkpoint has no such key.
        """
        if key not in self.paths:
            raise Unusable(
                f"{self.name} has no tensor {key}: it is stored otherwise than transformers itself would save it "
                "(quantised, or of an older layout). Load it, save it with save_pretrained, and give that folder."
            )
        return self.headers[self.paths[key]]

    def empty(self, key: str, shape: Sequence[int] | None = None) -> torch.Tensor:
        """A tensor on the meta device that is as the one stored: nothing but the header is looked at.

        Raises:
            Unusable: the checkpoint has no such key, or it is not of the `shape` that the model needs.
        """
        header = self.header_of(key)
        with readable(self.paths[key]):
            dtype, found, _ = find_tensor(header, key, BASE_DTYPES)
        if shape is not None and tuple(found) != tuple(shape):
            raise Unusable(f"{self.name} has {key} as {tuple(found)}, the model needs {tuple(shape)}.")
        return torch.empty(found, dtype=dtype, device="meta")

    def tensor(self, key: str, shape: Sequence[int] | None = None) -> torch.Tensor:
        """One tensor, read into memory of its own.

        Raises:
            Unusable: as `empty`; or its file was overwritten since the checkpoint was opened.
        """
        self.empty(key, shape)
        with readable(self.paths[key]), open(self.paths[key], "rb") as file:
            return read_tensor(file, self.header_of(key), key, BASE_DTYPES)

    def values_of(self, key: str, shape: Sequence[int], indices: torch.Tensor) -> torch.Tensor:
        """Values of one flattened tensor at `indices`: no others are read.

        Raises:
            Unusable: as `tensor`.
        """
        self.empty(key, shape)
        header = self.header_of(key)
        with readable(self.paths[key]), open(self.paths[key], "rb") as file:
            return torch.stack([read_tensor(file, header, key, BASE_DTYPES, index) for index in indices.tolist()])

    def values(self, model: PreTrainedModel, name: str, shape: torch.Size, indices: torch.Tensor) -> torch.Tensor:
        """Single values of a parameter as `model` holds it, each read from what the checkpoint has in its place.

        Args:
            model: causal LM, on the meta device or not.
            name, shape: of the parameter, e.g. "model.layers.0.mlp.experts.gate_up_proj" [E, 2I, H].
            indices: of the values in the flattened parameter. Of experts that have a key each, those without
                any are not read: all of a layer can be many times a file.
        """
        parameter = torch.empty(shape, device="meta")
        parts = self.parts(model, name, parameter)
        key, part = next(iter(parts.items()))
        if part is parameter:  # under another name at most
            return self.values_of(key, shape, indices)
        by_expert = any(EXPERT.search(key) for key in parts)  # else, say, one matrix of two projections
        size = shape[1:].numel() if by_expert else shape.numel()
        values = torch.empty(len(indices), dtype=self.empty(key).dtype)
        for expert in (indices // size).unique().tolist():
            stack = torch.empty((1, *shape[1:]) if by_expert else shape, dtype=values.dtype)
            self.fill(stack, partial(stored_parts, model, name, first=expert))
            inside = indices // size == expert
            values[inside] = stack.view(-1)[indices[inside] % size]
        return values

    def experts(self, model: PreTrainedModel, name: str, shape: torch.Size, numbers: Sequence[int]) -> torch.Tensor:
        """Some experts [n, ...] of a stack, in the dtype of the file, others left unread where they lie apart.

        Args:
            model, name, shape: as in `values`.
            numbers: of the experts, n of them.
        """
        parameter = torch.empty(shape, device="meta")
        parts = self.parts(model, name, parameter)
        key, part = next(iter(parts.items()))
        if part is parameter:
            self.empty(key, shape)
            header, size = self.header_of(key), shape[1:]
            with readable(self.paths[key]), open(self.paths[key], "rb") as file:
                starts = (number * size.numel() for number in numbers)
                return torch.stack([read_tensor(file, header, key, BASE_DTYPES, start, size) for start in starts])
        dtype, split = self.empty(key).dtype, partial(stored_parts, model, name)
        if not any(EXPERT.search(key) for key in parts):
            stack = torch.empty(shape, dtype=dtype, device="cpu")
            self.fill(stack, split)
            return stack[list(numbers)]
        found = [torch.empty((1, *shape[1:]), dtype=dtype, device="cpu") for _ in numbers]
        for number, stack in zip(numbers, found, strict=True):
            self.fill(stack, partial(split, first=number))
        return torch.cat(found)

    def parts(self, model: PreTrainedModel, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the checkpoint has in the place of a `parameter` on the meta device: key -> part of it."""
        return {name: parameter} if name in self.paths else stored_parts(model, name, parameter)

    def fill(self, tensor: torch.Tensor, split: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> None:
        """Fills `tensor`, a parameter or some experts of one, from its parts in the checkpoint.

        Args:
            split: tensor -> {key: part}, as `stored_parts`.
        """
        parts, storage = split(tensor), tensor.untyped_storage().data_ptr()
        if all(part.untyped_storage().data_ptr() == storage for part in parts.values()):  # views of it
            for key, part in parts.items():
                part.copy_(self.tensor(key, part.shape))
            return
        # Copies can't be written through; of numbered elements each part tells where its own go.
        for key, indices in split(torch.arange(tensor.numel()).reshape(tensor.shape)).items():
            tensor.view(-1)[indices.reshape(-1)] = self.tensor(key, indices.shape).reshape(-1)


def location_of_part(
    role: str,
    requested: str | os.PathLike | None,
    config: MoExtendConfig,
    location: tuple[str | os.PathLike, dict[str, Any]],
) -> tuple[str | os.PathLike, dict[str, Any]]:
    """Where the "base" or "encoder" of an adapter lies, once a base is known to be no adapter itself.

    Args:
        requested: where the user says; `None`: where the adapter's `config` says.
        location: (folder or Hub id, keywords for the Hub) of the adapter.

    Returns:
        (folder or Hub id, keywords for the Hub), those included that adapter and base share.
    """
    path, options = location_of(role, requested, config, location)
    options = {**{key: location[1][key] for key in SHARED_HUB_KWARGS if key in location[1]}, **options}
    if role == "base":
        check_no_adapter(path, options)
    return path, options


def shard_names(index: str | os.PathLike) -> list[str]:
    """Names of the files that an index (its path) speaks of."""
    try:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        strange = [shown(name) for name in names if Path(name).name != name or not name.isprintable()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unusable(f"{index} is damaged ({error!r}). Fetch or save it again.") from error
    if strange:
        raise Unusable(f"{index} names files outside the checkpoint's folder: {', '.join(strange[:8])}.")
    return names


def stored_parts(model: PreTrainedModel, name: str, tensor: torch.Tensor, first: int = 0) -> dict[str, torch.Tensor]:
    """How a checkpoint stores `tensor`, the parameter `name` of a model or some experts of it: key -> part.

    Where each expert has a key of its own, `tensor` begins with expert `first`. Parts of a single expert are views.
    """
    parts = revert_weight_conversion(model, {name: tensor})
    return {EXPERT.sub(lambda number: str(int(number[0]) + first), key): part for key, part in parts.items()}


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal LM of `config` on the meta device: names and shapes, no weights."""
    with torch.device("meta"):
        return auto_class_for(config, AutoModelForCausalLM).from_config(config, trust_remote_code=False).eval()


def checkpoint_fingerprint(checkpoint: Checkpoint, model: PreTrainedModel) -> str | None:
    """`tensors_moextend.fingerprint` of the decoder of `model`, a `skeleton`, by the values that `checkpoint` has on
    disk."""
    names = {module: name for name, module in model.named_modules()}
    shapes, full_names = {}, {}
    for name, owner, key in named_owners(model.get_decoder()):
        if owner._parameters[key].dim() >= 2:
            shapes[name], full_names[name] = owner._parameters[key].shape, f"{names[owner]}.{key}"

    def read(name, indices):
        parts = checkpoint.parts(model, full_names[name], torch.empty(shapes[name], device="meta"))
        if checkpoint.empty(next(iter(parts))).dtype not in PLAIN:
            return torch.full((len(indices),), torch.nan)
        return checkpoint.values(model, full_names[name], shapes[name], indices)

    return sample_values({name: shape.numel() for name, shape in shapes.items()}, read)
