"""The inference form: all experts of a layer in one tensor, run by one call of the base's own implementation.

The base's parameters and those of new experts keep their names and become views of it: nothing is held twice but what
is computed otherwise than it is kept (a low rank, float32 over a bfloat16 base). No layer asks which experts were
selected, which an accelerator would be waited for.

Letters: E base experts, N new experts of a layer, of all its adapters, K experts a token selects, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..families_moextend import MoELayer, sibling
from ..layers_moextend import in_one_dtype
from ..low_rank_moextend import state_of

if TYPE_CHECKING:
    from ..modeling_moextend import MoExtendForCausalLM

LEAVES_OUT = "grouped_mm"  # the implementation of transformers that takes index E + N for none


def fuse(model: MoExtendForCausalLM) -> None:
    """Brings the new experts of all loaded adapters into the inference form; see `AdapterSwitch.fuse`.

    Raises:
        ValueError: a layer's new experts have another dtype or device than the base's, or tensors are offloaded or
            sharded; nothing has changed then.
    """
    with model.passes.lock:
        layers = {index: layer for index, layer in model.moe_layers.items() if new_experts(layer)}
        if not layers:
            raise ValueError("There is nothing to fuse: no loaded adapter has new experts.")
        for index, layer in layers.items():
            check_fusible(index, layer)
        unfuse(model)
        for layer in layers.values():
            layer.experts.moextend.fused = FusedExperts(layer.experts, new_experts(layer), has_empty_slots(layer))
        model.passes.change(fused=True)


def unfuse(model: MoExtendForCausalLM) -> None:
    """Gives every parameter memory of its own again; does nothing to a model that is not fused."""
    with model.passes.lock:
        model.passes.change(fused=False)
        for layer in model.moe_layers.values():
            extension = layer.experts._modules.get("moextend")
            if extension is not None and extension.fused is not None:
                extension.fused.release()
                extension.fused = None


class FusedExperts:
    """The E + N experts of one layer; passes without gradient use those of their adapters.

    Args:
        experts: the base's module, extended.
        new: adapter name -> its new experts; of those of a low rank, or that are kept in float32 and computed in the
            base's bfloat16, a copy is held.
        empty_slots: whether a token may have slots that hold no expert, index -1.
    """

    def __init__(self, experts: nn.Module, new: Mapping[str, nn.Module], empty_slots: bool):
        self.experts, self.new, self.empty_slots = experts, dict(new), empty_slots
        self.num_base, self.places, self.tables, self.stale = len(experts.down_proj), {}, {}, False
        with torch.inference_mode(False), torch.no_grad():
            whole = [part.whole(experts, keep=False) if is_low_rank(part) else part for part in self.new.values()]
            like = torch.empty(0, dtype=experts.down_proj.dtype, device=experts.down_proj.device)
            whole = [in_one_dtype(part, like)[0] for part in whole]
            self.copied = [part for part, own in zip(self.new.values(), whole, strict=True) if part is not own]
            stacks = {name: joined([getattr(one, name) for one in (experts, *whole)]) for name in stacks_of(experts)}
        self.num_experts = self.num_base
        for name, part in zip(self.new, whole, strict=True):
            self.places[name] = range(self.num_experts, self.num_experts + len(part.down_proj))
            self.num_experts = self.places[name].stop
        self.twin = sibling(experts, stacks, num_experts=self.num_experts).requires_grad_(False)
        self.twin._is_expert_parallel = empty_slots  # transformers' word for: index E + N is none
        for part in filter(is_low_rank, self.copied):
            part.merged = None  # it keeps another copy, of its last pass
        self.state = self.current_state()

    def serves(self, parts: Mapping[str, Any]) -> bool:
        """Whether a pass with these `NewExperts` by adapter is computed here: without gradient, all of them as they
        were when fused. Otherwise it is computed the other way, with the same result."""
        if torch.is_grad_enabled():
            self.stale |= any(parameter.requires_grad for part in self.copied for parameter in part.parameters())
            return False
        if self.stale or any(self.new.get(name) is not part.experts for name, part in parts.items()):
            return False
        return torch.compiler.is_compiling() or self.state == self.current_state()

    def run(
        self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, names: Iterable[str]
    ) -> torch.Tensor:
        """[T, H], [T, K], [T, K] -> [T, H]; `index` counts new experts over the adapters `names`.

        An empty slot leads past all experts, which one implementation leaves out; elsewhere to the token's own first
        expert, whose part in the sum is then its weight of 0.
        """
        if self.empty_slots and self.twin.config._experts_implementation != LEAVES_OUT:
            index = torch.where(index < 0, index[:, :1], index)
        table = self.table(tuple(names))
        return self.twin(hidden_states, index if table is None else table[index], weights)

    @torch.inference_mode(False)
    def table(self, names: tuple[str, ...]) -> torch.Tensor | None:
        """[E + N of these adapters + 1]: where the experts of a pass with them are here, and last what an index of -1
        leads to. `None`: all are where they are counted, and no slot is empty."""
        if names not in self.tables:
            places = [*range(self.num_base), *(place for name in names for place in self.places[name])]
            as_counted = places == list(range(len(places))) and not self.empty_slots
            table = torch.tensor([*places, self.num_experts], device=self.experts.down_proj.device)
            self.tables[names] = None if as_counted else table
        return self.tables[names]

    def moved_by(self, function: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Whether what `Module.to` and the like do to each tensor gives another dtype or device."""
        stack = self.twin.down_proj
        moved = function(stack.detach()[:0])
        return (moved.dtype, moved.device) != (stack.dtype, stack.device)

    def current_state(self) -> list[Any]:
        """What is another where a parameter lies elsewhere than in the tensor or, of which that holds a copy, was
        written to."""
        base = stacks_of(self.experts).values()
        state = [state_of(parameter) if self.copied else parameter.data_ptr() for parameter in base]
        for part in self.new.values():
            if part in self.copied:
                state += map(state_of, part.parameters())
            else:
                state += (parameter.data_ptr() for parameter in stacks_of(part).values())
        return state

    def release(self) -> None:
        """Gives the parameters memory of their own again."""
        with torch.inference_mode(False):
            for module in (self.experts, *self.new.values()):
                for parameter in stacks_of(module).values():
                    parameter.data = parameter.data.clone()


def is_low_rank(part: nn.Module) -> bool:
    """Whether new experts are deltas of low rank; their class may be the one that came with an adapter."""
    return hasattr(part, "whole")


def stacks_of(experts: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> what there is one of for each expert of a module."""
    return {name: parameter for name, parameter in experts._parameters.items() if parameter is not None}


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The experts of all `parts` in one tensor, of which the parts become views."""
    stack = torch.cat([part.detach() for part in parts])
    for part, own in zip(parts, stack.split([len(part) for part in parts]), strict=True):
        part.data = own
    return stack


def new_experts(layer: MoELayer) -> dict[str, nn.Module]:
    """Adapter name -> new experts of a layer."""
    extension = layer.experts._modules.get("moextend")
    return {} if extension is None else dict(extension.adapters.items())


def has_empty_slots(layer: MoELayer) -> bool:
    """Whether a token may select fewer experts than it has slots: of an adapter with exclusive selection, those that
    an adapter with fewer new experts than the base selects leaves over."""
    slots = getattr(layer.router, "top_k", None)
    exclusive = [rows for rows in layer.router.moextend.adapters.values() if rows.config.selection == "exclusive"]
    return any(slots is None or rows.num_new < slots for rows in exclusive)


def check_fusible(index: int, layer: MoELayer) -> None:
    """Refuses a layer whose experts can't lie in one tensor, or not without being rounded."""
    base, parts = layer.experts.down_proj, {repr(name): part for name, part in new_experts(layer).items()}
    for name, part in {"the base": layer.experts, **parts}.items():
        for tensor in part.parameters() if is_low_rank(part) else stacks_of(part).values():
            found = f"In layer {index}, experts of {name} are"
            kind = type(tensor.data).__name__
            if type(tensor) is not nn.Parameter or tensor.is_meta or tensor.device != base.device:
                raise ValueError(
                    f"{found} a {kind} on {tensor.device}, those of the base on {base.device}: fuse() needs them "
                    "whole and in one memory, not offloaded, sharded or quantised. Without it all works as before."
                )
            if tensor.is_inference():
                raise ValueError(
                    f"{found} made under torch.inference_mode(): load the model outside of it to fuse it."
                )
            as_base = (tensor.dtype, base.dtype) == (torch.float32, torch.bfloat16)  # computed so: `in_one_dtype`
            fits = torch.promote_types(tensor.dtype, base.dtype) if is_low_rank(part) else tensor.dtype
            if fits != base.dtype and not as_base:
                raise ValueError(
                    f"{found} in {tensor.dtype}, those of the base in {base.dtype}: in one tensor they would be "
                    "rounded, or computed otherwise. Save the adapter (adapter_dtype: by default as the base), load "
                    "it again, and fuse that."
                )
