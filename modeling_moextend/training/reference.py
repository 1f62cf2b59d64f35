"""The reference model of preference training: the model that trains, without what trains."""

from __future__ import annotations

import copy
import hashlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..compatibility_moextend import check_complete, check_together, listed_names
from ..scope_moextend import Selection
from ..tensors_moextend import tensors_of
from ..tools.hashes import base_tensors_hash, bytes_of
from ..tools.modes import evaluation_mode

if TYPE_CHECKING:
    from transformers import Trainer

    from ..modeling_moextend import MoExtendForCausalLM


class Reference(nn.Module):
    """The modules of a model with other adapters: `ref_model=` of TRL's trainers, without a second base in memory.

    A pass through it is one of the model's own passes, in evaluation mode and without gradients, by the adapters that
    were chosen when it was made. It has none of the model's parameters, so that nothing is moved, sharded, saved or
    counted twice; of its own it has at most a copy of a projector that trains.

    Args:
        model: the MoExtend model that trains.
        adapter_names: the adapters that take part, or one; default: the active ones except the one that trains. With
            an encoder, that one's images are still seen, through a copy of its projector as it is now.

    Raises:
        ValueError: unknown names; adapters that can't be active together; one that trains; several active ones of
            which none is on top, and no names.
    """

    def __init__(self, model: MoExtendForCausalLM, adapter_names: str | list[str] | None = None):
        super().__init__()
        names = below_trained(model) if adapter_names is None else listed_names(adapter_names, model.adapters)
        check_names(model, names)
        self.config = model.config
        adapters, seeing = dict(model.passes.current.adapters), list(names)
        trained = model.passes.current.trained
        self.projectors = nn.ModuleDict()
        if adapter_names is None and adapters[trained].encoders:
            seeing.append(trained)
            adapters[trained] = without_experts(adapters[trained])
            self.projectors.update(adapters[trained].projectors)
        thresholds = {name: one.config.gate_threshold for name, one in adapters.items() if one.config.scope == "gate"}
        selection = Selection(adapters, tuple(sorted(seeing)), (tuple(sorted(names)),), thresholds=thresholds)
        self.__dict__.update(model=model, selection=selection)  # no children: the model's tensors stay the model's
        self.eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call, with what a trainer has put around that: a fused head, autocast, hooks of shards. What
        it has put around this one's `forward` would ask for all of that a second time."""
        with torch.no_grad(), evaluation_mode(self.model):
            with self.model.passes.using(selection=self.selection, enabled=None, records=None, thresholds={}):
                return self.model(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    def get_extra_state(self) -> torch.Tensor:
        """[32] uint8, sha256 of every tensor that takes part: TRL tells by the state dict of a reference whether log
        probabilities on disk are this one's."""
        names, adapters = self.selection.names, self.selection.adapters
        parts = [base_tensors_hash(self.model), names, self.selection.groups, self.selection.thresholds]
        tensors = [tensor for name in names for tensor in tensors_of(adapters[name]).values()]
        parts += [hashlib.sha256(bytes_of(tensor)).digest() for tensor in tensors]
        return torch.frombuffer(bytearray(hashlib.sha256(repr(parts).encode()).digest()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Nothing: it has no state to load."""


def below_trained(model: MoExtendForCausalLM) -> list[str]:
    """The active adapters without the one that trains."""
    current = model.passes.current
    if current.trained is None:
        raise ValueError(
            f"Active adapters are {list(current.active)}, and none is on top of the others: say which ones the "
            "reference has, model.reference([...]), or which one trains, model.set_trainable(adapter_name=...)."
        )
    return [name for name in current.active if name != current.trained]


def check_names(model: MoExtendForCausalLM, names: list[str]) -> None:
    """Refuses adapters that can't take part together, or that would move along with what trains."""
    adapters = model.passes.current.adapters
    check_complete(adapters, names)
    check_together({name: adapters[name].config for name in names}, model)
    moving = [name for name in names if any(tensor.requires_grad for tensor in model.adapter_tensors(name).values())]
    if moving:
        raise ValueError(
            f"Adapters {moving} train, and a reference would move along with them. For the adapter as it was, load it "
            "once more, frozen, and name that one: model.load_adapter(folder, 'start'), model.reference('start')."
        )


def without_experts(adapter: nn.Module) -> nn.Module:
    """An `Adapter` with the encoders of this one and frozen copies of its projectors, and without new experts."""
    projectors = {m: copy.deepcopy(one).requires_grad_(False) for m, one in adapter.projectors.items()}
    return type(adapter)(adapter.config, adapter.encoders, projectors)


def use_reference(trainer: Trainer, beta: float, reference: Reference | None = None) -> None:
    """Gives a reference to a trainer of TRL's that takes no `ref_model`: GRPO and RLOO, made with `beta=0.0`.

    Args:
        beta: weight of the divergence from the reference.
        reference: default: the trained model's own, `model.reference()`.

    Raises:
        ValueError: a trainer that has a reference or makes one otherwise; a `beta` that is not above 0.
    """
    if getattr(trainer, "beta", None) != 0 or getattr(trainer, "ref_model", trainer) is not None:
        raise ValueError(
            f"use_reference is for a GRPOTrainer or RLOOTrainer made with beta=0.0, which has no reference yet; this "
            f"is a {type(trainer).__name__} with beta={getattr(trainer, 'beta', None)!r}. DPOTrainer and KTOTrainer "
            "take ref_model=model.reference()."
        )
    if not (isinstance(beta, int | float) and beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta={beta!r} must be above 0 and finite; without a reference, leave use_reference out.")
    model = trainer.accelerator.unwrap_model(trainer.model)
    trainer.ref_model = model.reference() if reference is None else reference
    trainer.beta = trainer.args.beta = float(beta)
