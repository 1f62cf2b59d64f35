"""Taking up a saved state of the adapter that a model has."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from ..adapter_file_moextend import check_tensors, read_adapter
from ..attaching.extending import check_no_dependents
from ..configuration_moextend import MODALITIES, MoExtendConfig
from ..tensors_moextend import DTensor, check_finite, same_fingerprint
from ..validation_moextend import CHOSEN

if TYPE_CHECKING:
    from ..modeling_moextend import MoExtendForCausalLM

HOW_TO_READ = (  # entries of the config without which the tensors of an adapter mean something else
    "extended_layers",
    "expert_rank",
    "scope",
    "selection",
    "calibration",
    *(f"{prefix}{name}" for prefix in MODALITIES.values() for name in CHOSEN),
)


def load_adapter_tensors(
    model: MoExtendForCausalLM, name_or_path: str | os.PathLike, *, check_base: bool = True, **hub_kwargs: Any
) -> None:
    """Replaces the tensors of the adapter that trains by a saved adapter's; nothing changes unless all of them fit.

    Raises:
        ValueError: a damaged file, NaN or infinity in a tensor, or an adapter of another plan, other choices or
            (unless `check_base=False`) another base or encoder.
    """
    stored, name = read_adapter(name_or_path, **hub_kwargs), model.resolve_name()
    check_no_dependents(model.adapters, name)
    config, other = model.adapters[name].config, stored.config_for_loading()
    check_same_kind(config, other, name_or_path, check_base)
    live = model.adapter_tensors()
    check_tensors({name: tensor.shape for name, tensor in live.items()}, stored)
    check_finite(stored.tensors, "loaded")
    with torch.no_grad():
        for name, tensor in stored.tensors.items():
            live[name].copy_(shard_like(tensor, live[name]))
    config.gate_threshold = other.gate_threshold


def check_same_kind(config: MoExtendConfig, other: MoExtendConfig, name: str | os.PathLike, check_base: bool) -> None:
    """Refuses an adapter, with config `other`, that is no other state of the one that `config` describes.

    Raises:
        ValueError: one message with every difference.
    """
    problems = [
        f"{entry}: the adapter's {getattr(other, entry)!r}, the model's {getattr(config, entry)!r}"
        for entry in HOW_TO_READ
        if getattr(other, entry) != getattr(config, entry)
    ]
    fingerprints = [[entry["fingerprint"] for entry in owner.trained_on] for owner in (other, config)]
    if len(fingerprints[0]) != len(fingerprints[1]) or not all(
        None in pair or same_fingerprint(*pair) for pair in zip(*fingerprints, strict=True)
    ):
        names = [[entry["name"] for entry in owner.trained_on] for owner in (other, config)]
        problems.append(f"trained_on: the adapter depends on {names[0]}, the model's on {names[1]} as they are now")
    for role in ("base", "encoder", "audio_encoder") if check_base else ():
        pair = [getattr(owner, f"{role}_fingerprint") for owner in (other, config)]
        if all(pair) and not same_fingerprint(*pair):
            problems.append(f"{role}_fingerprint: made on a different {role}; check_base=False loads it all the same")
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"The adapter {name} does not belong to this model; nothing was loaded.\n  {lines}")


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on every process, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # only where torch has it are there such tensors

    mesh = like.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements).to(like.device)
