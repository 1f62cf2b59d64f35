"""Where the deltas of adapters act in vLLM's layers, which may hold several of a base's projections in one."""

import inspect

import torch
from torch import nn
from torch.nn import functional as F

from ...deltas_moextend import LinearDelta
from .serving_pass import ServingPass


def add_hooks(model: nn.Module, serving: ServingPass) -> None:
    """Has the shared layers of a model add what deltas add. `ValueError`: vLLM has no such layer, or a delta is of
    another size."""
    names = {module: name for name, module in model.named_modules()}
    for number, adapter in enumerate(serving.adapters):
        found = {}  # layer of vLLM's -> first column of its output -> (site, number of columns)
        for site, delta in adapter.deltas.items():
            module, first, size = find_site(model, site)
            own_size = size if is_input(site) else list(delta.parameters())[-1].shape[0]
            if own_size != size:
                raise ValueError(f"The delta {site} has {own_size} outputs, and vLLM's layer there {size}.")
            found.setdefault(module, {})[first] = site, size
        for module, by_column in found.items():
            name, sites = names[module], [site for _, (site, _) in sorted(by_column.items())]
            size = sum(size for _, size in by_column.values())
            if size != getattr(module, "output_size", size):
                outputs = f"{size} outputs, and vLLM's layer there {module.output_size}"
                raise ValueError(f"The deltas {', '.join(sites)} have {outputs}.")
            if name not in serving.sites:
                serving.sites[name] = {}
                (add_input_hook if is_input(sites[0]) else add_output_hook)(module, name)
            deltas = [adapter.deltas.pop(site) for site in sites]
            serving.sites[name][number] = deltas[0] if is_input(sites[0]) else JoinedDelta(deltas)


class JoinedDelta:
    """Linear deltas of one adapter, whose outputs lie side by side in one layer of vLLM's.

    In a step of few tokens a call costs more than what it computes: one product has the lora_A of all.
    """

    def __init__(self, deltas: list[LinearDelta]):
        first, *others = zip(*(delta.parameters() for delta in deltas), strict=True)
        self.first = first[0] if len(first) == 1 else torch.cat(first)  # [sum of r, in], or [sum of out, in]
        self.others = [factor.T for factor in others[0]] if others else []  # [r, out] each
        self.ranks, self.sizes = ([factor.shape[side] for factor in self.others] for side in (0, 1))

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, sum of out]"""
        inner = F.linear(inputs.to(self.first.dtype), self.first)
        if not self.others:
            return inner
        output = inner.new_empty(len(inner), sum(self.sizes))
        parts = zip(inner.split(self.ranks, -1), self.others, output.split(self.sizes, -1), strict=True)
        for part, factor, columns in parts:
            torch.mm(part, factor, out=columns)
        return output


def is_input(site: str) -> bool:
    return site.endswith(".embedding")


def find_site(model: nn.Module, site: str) -> tuple[nn.Module, int, int]:
    """Module of vLLM's, with the first column and the number of columns of its output that a site stands for."""
    decoder = model.model
    if site == "output":
        return decoder.norm, 0, decoder.norm.weight.shape[0]
    _, layer, *_, name = site.split(".")
    layer = decoder.layers[int(layer)]
    if name == "embedding":
        return layer, 0, decoder.norm.weight.shape[0]
    by_name = {path.rpartition(".")[2]: module for path, module in layer.named_modules()}
    if name in by_name:
        return by_name[name], 0, by_name[name].output_size
    for packed, names in model.packed_modules_mapping.items():
        if name in names and packed in by_name:
            sizes, place = by_name[packed].output_sizes, names.index(name)
            return by_name[packed], sum(sizes[:place]), sizes[place]
    raise ValueError(f"vLLM has no layer for the delta {site} of the adapter.")


def add_output_hook(module: nn.Module, name: str) -> None:
    """On a projection, or on the last norm, which may get the residual stream in two parts and answers their sum."""
    normed = not hasattr(module, "output_size")

    def hook(module, args, output):
        output, *others = output if isinstance(output, tuple) else (output,)
        torch.ops.vllm.moextend_deltas(output, others[0] if others and normed else args[0], name)

    module.register_forward_hook(hook)


def add_input_hook(layer: nn.Module, name: str) -> None:
    """On a decoder layer: its input is (a part of) the residual stream."""
    place = list(inspect.signature(layer.forward).parameters).index("hidden_states")

    def hook(layer, args, kwargs):
        hidden_states = args[place] if len(args) > place else kwargs["hidden_states"]
        torch.ops.vllm.moextend_deltas(hidden_states, None, name)

    layer.register_forward_pre_hook(hook, with_kwargs=True)
