"""Optimiser groups: learning rates, and decay, for router rows and deltas apart from those of new experts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list
from trl import SFTTrainer

from ..deltas_moextend import decoder_layers
from ..layers_moextend import input_device
from ..tools.inspection import part_of
from ..tools.modes import evaluation_mode
from .gate import task_samples
from .retention import FORWARD_KEYS, closed_gate

if TYPE_CHECKING:
    from .config import MoExtendSFTConfig


EMBEDDING_RATE = 5.0  # of the embedding's delta, for a residual stream of size 1: each row has few steps
ALIGN_RATE = 1e-3  # LLaVA-1.5's, arXiv 2310.03744
RATE = 0.6  # of all that trains in stage "finetune", for a hidden size of 1
SAMPLES = 8


def default_rate(stage: str, hidden_size: int) -> float:
    """The learning rate of a stage where none is given.

    The best of a sweep on a base of hidden size 192, carried to other sizes as Adam's rates of hidden weights are
    (arXiv 2203.03466, table 8).
    """
    return ALIGN_RATE if stage == "align" else RATE / hidden_size


def kind_of(name: str) -> str:
    """What a tensor of an adapter is to the optimiser: "experts" (calibration and projector as well), "router",
    "embedding" (its delta) or "deltas" (the others)."""
    if part_of(name).endswith(" deltas"):
        return "embedding" if part_of(name).startswith("embedding") else "deltas"
    return "router" if ".router." in name else "experts"


def own_settings(args: MoExtendSFTConfig, stream_size: float) -> dict[str, dict[str, float]]:
    """Kind (see `kind_of`) -> entries of its optimiser group that are not the others'.

    Args:
        stream_size: see `stream_size`. An optimiser of Adam's kind moves a weight by about its rate a step, whatever
            the gradient's size, and what the embedding's delta is added to differs by orders of magnitude from base to
            base: its rate goes by that, where none is given.
    """
    rate = args.learning_rate if args.delta_learning_rate is None else args.delta_learning_rate
    embedding = args.embedding_learning_rate
    embedding = EMBEDDING_RATE * stream_size * rate if embedding is None else embedding
    deltas = {"lr": args.delta_learning_rate, "weight_decay": args.delta_weight_decay}
    settings = {"router": {"lr": args.router_learning_rate}, "deltas": deltas}
    settings["embedding"] = deltas | {"lr": embedding}
    chosen = {kind: {key: one[key] for key in one if one[key] is not None} for kind, one in settings.items()}
    return {kind: entries for kind, entries in chosen.items() if entries}


@torch.no_grad()
def stream_size(trainer: SFTTrainer) -> float:
    """Root mean square of the residual stream, per channel, where the embedding's delta is added to it: of the base on
    a few training samples. 1 without such a delta. One process measures it, for all."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    sites = [site for site in model.adapters[model.leading].deltas if site.endswith(".embedding")]
    if not sites:
        return 1.0
    found = []
    if trainer.accelerator.is_main_process:
        layer = decoder_layers(model.get_decoder())[int(sites[0].split(".")[1])]
        batch = trainer.data_collator(list(islice(task_samples(trainer), SAMPLES)))
        batch = {name: batch[name].to(input_device(model.base)) for name in FORWARD_KEYS if name in batch}

        def measure(module, args, kwargs):
            hidden = (args[0] if args else kwargs["hidden_states"]).float()
            real = batch.get("attention_mask", torch.ones(hidden.shape[:2])).bool().to(hidden.device)
            found.append(hidden[real.reshape(hidden.shape[:2])].square().mean().sqrt().item())

        handle = layer.register_forward_pre_hook(measure, with_kwargs=True)
        try:
            with evaluation_mode(model), closed_gate(model):
                model(**batch, use_cache=False)
        finally:
            handle.remove()
    return broadcast_object_list([found[0] if found else None])[0]


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
        parts = {} if group["params"] else {None: []}  # an empty one stays, as checkpoints have it
        for parameter in group["params"]:
            kind = kinds.get(parameter)
            parts.setdefault(kind if kind in settings else None, []).append(parameter)
        groups += [{**group, "params": part, **settings.get(kind, {})} for kind, part in parts.items()]
    optimizer.param_groups = groups
