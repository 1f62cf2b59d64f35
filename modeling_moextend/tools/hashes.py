"""Hashes of every tensor that must never change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..configuration_moextend import MODALITIES
from ..families_moextend import onloaded
from ..tensor_files_moextend import as_bytes
from ..tensors_moextend import DTensor, reshard

if TYPE_CHECKING:
    from ..modeling_moextend import MoExtendPreTrainedModel


def base_tensors_hash(model: MoExtendPreTrainedModel, without: Iterable[nn.Module] = ()) -> dict[str, str]:
    """name -> sha256 of every base and encoder tensor of a MoExtend model (new tensors and projectors left out), but
    for those of the modules `without`.

    Where tensors are sharded, of this process's shards.
    """
    reshard(model)
    skipped = {part for module in without for part in module.modules()}
    encoders = {
        f"adapters.{name}.{MODALITIES[modality]}encoder": encoder
        for name, adapter in model.adapters.items()
        for modality, encoder in adapter.encoders.items()
    }
    parts, hashes = {"base": model.base, **encoders}, {}
    for part, module in parts.items():
        for prefix, owner in module.named_modules() if module is not None else ():
            if owner in skipped or "moextend" in prefix.split("."):
                continue
            with onloaded(owner):
                for key, tensor in (*owner._parameters.items(), *owner._buffers.items()):
                    if tensor is not None:
                        hashes[f"{part}.{prefix}.{key}"] = hashlib.sha256(bytes_of(tensor)).hexdigest()
    return hashes


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor; of a sharded one, those of this process's shard."""
    if isinstance(tensor, DTensor):
        return bytes_of(tensor.to_local())
    if is_traceable_wrapper_subclass(tensor):  # torchao's values and scales
        return b"".join(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return as_bytes(tensor).tobytes()
