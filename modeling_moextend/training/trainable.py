"""What trains in which stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..attaching.extending import check_no_dependents, describe_adapters

if TYPE_CHECKING:
    from ..modeling_moextend import MoExtendForCausalLM

STAGES = ("align", "finetune")  # that train an adapter


def set_trainable(
    model: MoExtendForCausalLM,
    stage: str = "finetune",
    train_projector: bool | None = None,
    adapter_name: str | None = None,
) -> dict[str, torch.nn.Parameter]:
    """Freezes and unfreezes for a stage, and returns what trains (name -> parameter), in float32.

    Everything but this adapter is frozen, and its config notes on top of which ones it trains. One bf16 AdamW step at
    2e-5 would leave most weights as they were. With exclusive selection a layer's only new expert has a fixed weight,
    so its row has no gradient and stays frozen.

    Raises:
        ValueError: a stage with nothing to train; an adapter that is not active, or that another one depends on.
    """
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r} is not known; allowed: {', '.join(map(repr, STAGES))}.")
    adapter_name = model.resolve_name(adapter_name)
    if adapter_name not in model.passes.current.active:
        raise ValueError(f"Adapter {adapter_name!r} is not active, so it can't train: set_adapter first.")
    check_no_dependents(model.adapters, adapter_name)
    with_projector = stage == "align" or (True if train_projector is None else train_projector)
    trained = {}
    for name, tensor in model.adapter_tensors(adapter_name).items():
        trains = stage == "finetune" and model.learns(name, adapter_name)
        if with_projector if name.split(".")[0].endswith("projector") else trains:
            trained[name] = tensor
    if not trained:
        raise ValueError(
            f"stage={stage!r} has nothing to train: align needs an encoder (from_base(..., encoder=...)), "
            "finetune needs new experts (extended_layers, or model.extend(plan))."
        )
    model.require_gradients([])
    for tensor in trained.values():
        tensor.requires_grad_(True)
        tensor.data = tensor.data.float()
    record_dependencies(model, adapter_name)
    return trained


def record_dependencies(model: MoExtendForCausalLM, adapter_name: str) -> None:
    """Notes that an adapter trains on top of the other active ones."""
    adapter = model.adapters[adapter_name]
    others = [name for name in model.passes.current.active if name != adapter_name]
    earlier = [entry for entry in adapter.config.trained_on if entry["name"] not in others]
    adapter.config.trained_on = earlier + describe_adapters(model, others)
    adapter.depends_on.update(others)
    model.activate(model.passes.current.active)  # which has it on top now
