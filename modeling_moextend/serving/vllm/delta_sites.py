"""Where the deltas of adapters act in vLLM's layers, which may hold several of a base's projections in one."""

import inspect

import torch
from torch import nn

from .serving_pass import DeltaPart, ServingPass


def add_hooks(model: nn.Module, serving: ServingPass) -> None:
    """Has the shared layers of a model add what deltas add. `ValueError`: vLLM has no such layer."""
    for number, adapter in enumerate(serving.adapters):
        for site, delta in adapter.deltas.items():
            module, first, size = find_site(model, site)
            own_size = size if site.endswith(".embedding") else list(delta.parameters())[-1].shape[0]
            if own_size != size:
                raise ValueError(f"The delta {site} has {own_size} outputs, and vLLM's layer there {size}.")
            name = next(name for name, one in model.named_modules() if one is module)
            if name not in serving.sites:
                serving.sites[name] = []
                (add_input_hook if site.endswith(".embedding") else add_output_hook)(module, name)
            serving.sites[name].append(DeltaPart(number, delta, first, size))


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
