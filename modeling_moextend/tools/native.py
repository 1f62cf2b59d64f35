"""The native form of an extended base: its own architecture with E + n experts a layer, no code of ours.

It exists where the base's own router, with n more rows, chooses and weighs as `routing_moextend.route` does. Letters:
E experts of the base, n new experts a layer.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..configuration_moextend import MoExtendConfig
from ..families_moextend import GROUPS, find_moe_layers
from ..routing_moextend import Rule
from ..tensor_files_moextend import shown
from .base_weights import CORRECTION, EXPERT, Checkpoint, stored_parts
from .files import replace_file, write_text
from .inspection import dtype_name

NUMBER = {  # family -> config entry with its number of experts; measured by tests/test_export.py
    "mixtral": "num_local_experts",
    "olmoe": "num_experts",
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_experts",
    "granitemoe": "num_local_experts",
    "gpt_oss": "num_local_experts",
    "deepseek_v3": "n_routed_experts",
}


def obstacles(
    config: MoExtendConfig,
    base_config: PreTrainedConfig,
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    tensors: dict[str, torch.Tensor],
) -> dict[str, str]:
    """What speaks against a native form: condition -> what is the case. Empty where there is one.

    Args:
        config: the adapter's `MoExtendConfig`.
        base_config, model, checkpoint: of the base; `model` is its `skeleton`.
        tensors: the adapter's, name -> tensor.
    """
    numbers = sorted({len(sources) for sources in config.extended_layers.values()})
    groups = [getattr(base_config, name) for name in GROUPS if getattr(base_config, name, None)]
    missing = sorted(find_moe_layers(model.get_decoder()).keys() - config.extended_layers.keys())
    rule, family = Rule(**config.routing_rule), base_config.model_type
    conditions = [  # condition, whether it fails, what is the case and what would have to be
        ("family", family not in NUMBER, f"{family}; known are {', '.join(NUMBER)}"),
        (
            "groups",
            groups not in ([], [1]),
            f"the base first chooses among {groups} groups of experts; new experts stand outside of them",
        ),
        (
            "weights",
            rule.score == "softmax" and not rule.renormalise,
            "the base does not renormalise its softmax over all experts (norm_topk_prob=False): new rows would change "
            "the weights of tokens that select no new expert",
        ),
        ("layers", missing, f"MoE layers {missing} have no new experts; a native model has as many in each"),
        ("number", len(numbers) > 1, f"layers have {numbers} new experts; a native model has as many in each"),
        ("scope", config.scope != "all", f"{config.scope!r}; native experts are open to every token: 'all'"),
        ("selection", config.selection != "compete", f"{config.selection!r}; a native router knows only 'compete'"),
        ("calibration", config.calibration != "none", f"{config.calibration!r}; a native router knows only 'none'"),
        (
            "deltas",
            bool(config.deltas),
            f"of {', '.join(config.deltas)}; a native model's shared layers are the same for every token",
        ),
        (
            "encoder",
            bool(config.senses),
            "the adapter has one; the base's architecture has no place for it",
        ),
        (
            "quantisation",
            getattr(base_config, "quantization_config", None) is not None,
            "the base is quantised; the new experts would have to be as well, which changes them",
        ),
    ]
    failed = {name: text for name, fails, text in conditions if fails}
    return failed or wider_dtype(model, checkpoint, tensors)


def wider_dtype(model: PreTrainedModel, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """The condition "dtype": new tensors that the base's dtype does not hold exactly."""
    for key, piece in pieces(model, checkpoint, tensors).items():
        base_dtype = checkpoint.empty(piece.base_key).dtype
        if piece.new is not None and torch.promote_types(piece.new.dtype, base_dtype) != base_dtype:
            text = f"new tensors are {piece.new.dtype}, the base's {base_dtype}, which can't hold them exactly"
            dtype = dtype_name(base_dtype)
            return {"dtype": f"{text} ({shown(key)}); save the adapter with adapter_dtype={dtype!r} first"}
    return {}


def check_native(*arguments: Any) -> None:
    """Raises `ValueError` with all `obstacles`, each by the name of its condition."""
    failed = obstacles(*arguments)
    if failed:
        lines = "\n  ".join(f"{name}: {text}" for name, text in failed.items())
        raise ValueError(
            f"This adapter has no native form; nothing was written.\n  {lines}\nA standalone checkpoint (without "
            "--native) holds any adapter."
        )


class Piece(NamedTuple):
    """One tensor of a native checkpoint: the base's, the base's with new experts' parts appended, or a new expert's.

    base_key: of the base's tensor; for a new expert's own key that of the last base expert.
    new: the adapter's tensor [n, ...] or one new expert's; `None` where the base's tensor stays as it is.
    appended: whether it is appended to the base's tensor, rather than stands alone.
    """

    base_key: str
    new: torch.Tensor | None = None
    appended: bool = False

    def tensor(self, checkpoint: Checkpoint) -> torch.Tensor:
        if self.new is None:
            return checkpoint.tensor(self.base_key)
        base = checkpoint.tensor(self.base_key)
        new = self.new.to(base.dtype)
        return torch.cat([base, new]) if self.appended else new.contiguous()

    def num_bytes(self, checkpoint: Checkpoint) -> int:
        base = checkpoint.empty(self.base_key)
        if self.new is None:
            return base.nbytes
        return self.new.numel() * base.itemsize + (base.nbytes if self.appended else 0)


def pieces(model: PreTrainedModel, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> dict[str, Piece]:
    """The native checkpoint, tensor by tensor: key -> `Piece`, new experts right after the last base expert."""
    pieces_by_key = {key: Piece(key) for key in checkpoint.paths}
    followers = {}
    for key, new, num_base in stored_tensors(model, checkpoint, tensors):
        if key in pieces_by_key:
            pieces_by_key[key] = Piece(key, new, appended=True)
        else:
            last = EXPERT.sub(str(num_base - 1), key)
            followers.setdefault(last, {})[key] = Piece(last, new)
    return {
        name: piece
        for key in pieces_by_key
        for name, piece in ({key: pieces_by_key[key]} | followers.get(key, {})).items()
    }


def stored_tensors(
    model: PreTrainedModel, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(key, tensor, E) of every tensor of an adapter, as the base's checkpoint would store it."""
    layers = find_moe_layers(model.get_decoder())
    names = {module: name for name, module in model.named_modules()}
    for name, tensor in tensors.items():
        _, number, part, leaf = name.split(".", 3)
        layer = layers[int(number)]
        owner = layer.experts if part == "experts" else layer.router
        parameter = f"{names[owner]}.{CORRECTION if leaf == 'correction_bias' else leaf}"
        parts = {parameter: tensor}
        if parameter not in checkpoint.paths:
            parts = stored_parts(model, parameter, tensor, layer.num_experts)
        for key, value in parts.items():
            yield key, value, layer.num_experts


def write_native(
    folder: Path,
    config: MoExtendConfig,
    base_config: PreTrainedConfig,
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    tensors: dict[str, torch.Tensor],
    max_shard_size: int | str,
) -> None:
    """Writes weights and config.json; of the weights, one file of at most `max_shard_size` is in memory at a time."""
    plan = pieces(model, checkpoint, tensors)
    split = split_state_dict_into_shards_factory(
        {key: piece.num_bytes(checkpoint) for key, piece in plan.items()},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for name, keys in split.filename_to_tensors.items():
        write = partial(write_shard, {key: plan[key] for key in keys}, checkpoint)
        replace_file(folder / name, write)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_text(folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2))
    num_base = next(iter(find_moe_layers(model.get_decoder()).values())).num_experts
    num_new = len(next(iter(config.extended_layers.values())))
    setattr(base_config, NUMBER[base_config.model_type], num_base + num_new)
    write_text(folder / "config.json", base_config.to_json_string())


def write_shard(pieces: dict[str, Piece], checkpoint: Checkpoint, path: Path) -> None:
    save_file({key: piece.tensor(checkpoint) for key, piece in pieces.items()}, path, {"format": "pt"})
