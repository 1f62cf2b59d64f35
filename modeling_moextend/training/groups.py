"""Optimiser groups: learning rates, and decay, for router rows and deltas apart from those of new experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..tools.inspection import part_of

if TYPE_CHECKING:
    from .config import MoExtendSFTConfig


def kind_of(name: str) -> str:
    """What a tensor of an adapter is to the optimiser: "experts" (calibration and projector as well), "router",
    "embedding" (its delta) or "deltas" (the others)."""
    if part_of(name).endswith(" deltas"):
        return "embedding" if part_of(name).startswith("embedding") else "deltas"
    return "router" if ".router." in name else "experts"


def own_settings(args: MoExtendSFTConfig) -> dict[str, dict[str, float]]:
    """Kind (see `kind_of`) -> entries of its optimiser group that are not the others'."""
    deltas = {"lr": args.delta_learning_rate, "weight_decay": args.delta_weight_decay}
    settings = {"router": {"lr": args.router_learning_rate}, "deltas": deltas, "embedding": dict(deltas)}
    if args.embedding_learning_rate is not None:
        settings["embedding"]["lr"] = args.embedding_learning_rate
    chosen = {kind: {key: one[key] for key in one if one[key] is not None} for kind, one in settings.items()}
    return {kind: entries for kind, entries in chosen.items() if entries}


def split_groups(
    optimizer: torch.optim.Optimizer,
    kinds: Mapping[torch.nn.Parameter, str],
    settings: Mapping[str, Mapping[str, float]],
) -> None:
    """Gives parameters with settings of their own groups of their own, in an optimiser that has not made a step.

    Args:
        kinds: parameter -> kind, of all that train.
        settings: kind (see `kind_of`) -> entries of its groups ("lr", "weight_decay").
    """
    groups = []
    for group in optimizer.param_groups:
        parts = {}
        for parameter in group["params"]:
            kind = kinds.get(parameter)
            parts.setdefault(kind if kind in settings else None, []).append(parameter)
        groups += [{**group, "params": part, **settings.get(kind, {})} for kind, part in parts.items()]
    optimizer.param_groups = groups
