"""`moextend compress`: an adapter whose new experts are whole, or of a higher rank, with experts of a low rank."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from ..adapter_file_moextend import write_folder
from ..configuration_moextend import MoExtendConfig
from .base_weights import Checkpoint, skeleton, unusable
from .inspection import read_whole
from .merge import READER, check_fit, copy_files, finder, new_folder, open_part, source_experts

FACTORS = ("lora_A", "lora_B")


def compress(
    adapter: str | os.PathLike,
    output: str | os.PathLike,
    rank: int,
    *,
    base: str | os.PathLike | None = None,
    check_base: bool = True,
    **hub_kwargs: Any,
) -> dict[str, Any]:
    """Writes an adapter with `expert_rank=rank`, whole or not at all; all else of it stays as it is.

    The difference of each new expert to its source is cut to its `rank` largest singular values (Eckart and Young
    1936: no matrix of that rank is nearer), and the factors are stored in the dtype that the experts had. Of the
    base only the source experts are read, one weight of a layer at a time; where there is a rank not even they.

    Args:
        adapter: folder or Hub id.
        output: the new folder; may not exist.
        rank: 1 or more, and at most the smaller side of every expert's weights.
        base: folder or Hub id, if it lies elsewhere than the adapter says.
        check_base: `False` takes another base than the adapter was made on.
        **hub_kwargs: `revision`, `token`, `cache_dir`, ... of the adapter.

    Returns:
        folder, rank, bytes_before and bytes (of tensors), layers (of each: layer; relative, the Frobenius norm of what
        was cut off over that of the whole difference; max_abs, the largest error of a weight).

    Raises:
        FileExistsError: something is at `output` already.
        OSError: adapter or base can't be found.
        Unusable: a damaged adapter or base, or something that is none; the file is named.
        ValueError: no new experts, a rank that is none, too high, or no lower than the adapter's own; another base.
    """
    with new_folder(output) as folder:
        stored = read_whole(adapter, **hub_kwargs)
        config = MoExtendConfig.from_dict(stored.values)
        check_rank(config, rank, adapter)
        with unusable():
            checkpoint = open_part("base", base, config, adapter, hub_kwargs)
            base_config = checkpoint.config()
        check_fit(config, base_config, checkpoint, stored, check_base, "compressed")
        if config.expert_rank is None:
            deltas = whole_deltas(config, stored.tensors, skeleton(base_config), checkpoint, rank)
        else:
            deltas = factored_deltas(config, stored.tensors)
        tensors, errors = dict(stored.tensors), {}
        for layer, role, delta in deltas:
            name = f"layers.{layer}.experts.{role}"
            former = [
                tensors.pop(key) for key in [name, *(f"{name}.{factor}" for factor in FACTORS)] if key in tensors
            ]
            factors = [factor.to(former[0].dtype) for factor in truncated(delta, rank)]
            tensors |= {f"{name}.{key}": factor for key, factor in zip(FACTORS, factors, strict=True)}
            errors.setdefault(layer, []).append(cut_off(delta, *factors))
        config.expert_rank = rank
        write_folder(folder, tensors, config.published())
        copy_files(finder(adapter, hub_kwargs), READER, folder)  # no card: its sizes are those of before
    return {
        "folder": str(output),
        "rank": rank,
        "bytes_before": sum(tensor.nbytes for tensor in stored.tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "layers": [{"layer": layer, **summed(parts)} for layer, parts in errors.items()],
    }


def check_rank(config: MoExtendConfig, rank: int, adapter: str | os.PathLike) -> None:
    """Refuses an adapter that can't be brought to this rank.

    Raises:
        ValueError: no new experts; a rank that is no number from 1 on, or no lower than the adapter's own.
    """
    if not config.extended_layers:
        raise ValueError(f"{adapter} has no new experts, so there is nothing to compress.")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank={rank!r} must be a whole number from 1 on.")
    if config.expert_rank is not None and rank >= config.expert_rank:
        raise ValueError(
            f"{adapter} has expert_rank={config.expert_rank} already, and rank={rank} would lose nothing and save "
            f"nothing: give a rank from 1 to {config.expert_rank - 1}, or keep the adapter as it is."
        )


def whole_deltas(
    config: MoExtendConfig,
    tensors: dict[str, torch.Tensor],
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    rank: int,
) -> Iterator[tuple[int, str, torch.Tensor]]:
    """(layer, role, new - source [n, out, in] in float32) of every weight of experts that are whole."""
    for layer, experts, role, source in source_experts(config, model, checkpoint, rank):
        delta = tensors[f"layers.{layer}.experts.{role}"].float() - source.float()
        yield layer, role, delta.mT if experts.is_transposed else delta


def factored_deltas(
    config: MoExtendConfig, tensors: dict[str, torch.Tensor]
) -> Iterator[tuple[int, str, torch.Tensor]]:
    """The same of experts that have a rank already."""
    for layer in config.extended_layers:
        prefix, suffix = f"layers.{layer}.experts.", ".lora_A"
        for name in [name for name in tensors if name.startswith(prefix) and name.endswith(suffix)]:
            role = name.removeprefix(prefix).removesuffix(suffix)
            lora_B = tensors[f"{prefix}{role}.lora_B"].float()
            yield layer, role, lora_B @ tensors[name].float()


def truncated(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A [n, rank, in] and lora_B [n, out, rank] of the nearest deltas of that rank to [n, out, in]; both take
    half of a singular value, so that neither is far larger than the other."""
    parts = []
    for one in delta:  # the memory of one expert's decomposition at a time
        left, values, right = torch.linalg.svd(one, full_matrices=False)
        root = values[:rank].sqrt()
        parts.append((root[:, None] * right[:rank], left[:, :rank] * root))
    lora_A, lora_B = zip(*parts, strict=True)
    return torch.stack(lora_A), torch.stack(lora_B)


def cut_off(delta: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> tuple[float, float, float]:
    """(squared norm of the error, squared norm of `delta`, largest error) of what is stored for `delta`."""
    error = (delta - lora_B.float() @ lora_A.float()).double()
    return error.square().sum().item(), delta.double().square().sum().item(), error.abs().max().item()


def summed(parts: list[tuple[float, float, float]]) -> dict[str, float]:
    """relative and max_abs of a layer; an expert that is its source still has nothing to lose."""
    lost, size = (sum(part[number] for part in parts) for number in (0, 1))
    return {"relative": (lost / size) ** 0.5 if size else 0.0, "max_abs": max(part[2] for part in parts)}
