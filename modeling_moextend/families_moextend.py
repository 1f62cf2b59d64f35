"""Families: where a base keeps its MoE layers, and whether a router still works by the rule recorded with an adapter.

Letters: T tokens, E base experts, K experts a token selects, H hidden size.
"""

import contextlib
import inspect
import re
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .routing_moextend import (
    INPUTS,
    SCORES,
    RouterOutput,
    choice_keys,
    expert_weights,
    rule_with_shared_experts,
    scale_logits,
)

EXPERTS_INTERFACE = ("_is_expert_parallel", "has_gate", "is_transposed", "down_proj")
ROUTER_NAMES = ("gate", "router")
TORCHS = "torch.nn.modules."  # modules of torch's own are no routers: an `nn.Linear` gates shared experts
GROUPS = ("num_group", "n_group")


class MoELayer(NamedTuple):
    """The modules of one MoE layer that matter here, and the number E of its base experts."""

    router: nn.Module
    experts: nn.Module
    num_experts: int
    block: nn.Module


def family_of(module):
    """The family a module's class belongs to: its folder in transformers, or its file for code from elsewhere."""
    path = type(module).__module__.split(".")
    return path[2] if path[:2] == ["transformers", "models"] else path[-1].removeprefix("modeling_")


def plain_class(module):
    """The class of `module`, without what extending it mixed in."""
    return vars(type(module)).get("moextend_base", type(module))


def find_moe_layers(decoder: nn.Module) -> dict[int, MoELayer]:
    """The MoE layers of a base, decoder layer index -> `MoELayer`. `ValueError`: there are none, or two in a layer."""
    name, layers = f"{type(decoder).__name__} ({family_of(decoder)})", {}
    for path, module in decoder.named_modules():
        experts, named = getattr(module, "experts", None), [getattr(module, name, None) for name in ROUTER_NAMES]
        routers = [one for one in named if isinstance(one, nn.Module) and not type(one).__module__.startswith(TORCHS)]
        router = next(iter(routers), None)
        number = re.search(r"(?:^|\.)(\d+)\.", f"{path}.")
        if number and router is not None and all(hasattr(experts, attribute) for attribute in EXPERTS_INTERFACE):
            index = int(number.group(1))
            if index in layers:
                raise ValueError(f"{name} can't be extended: layer {index} has several MoE blocks, not one.")
            layers[index] = MoELayer(router, experts, experts.down_proj.shape[0], module)
    if not layers:
        has_experts = any("experts" in type(module).__name__.lower() for module in decoder.modules())
        raise ValueError(
            f"{name} has {'experts, but not' if has_experts else 'no MoE layers, so none'} through transformers' "
            "router/experts interface (3-D `down_proj`, called with top_k_index and top_k_weights): can't be extended."
        )
    return layers


@contextlib.contextmanager
def onloaded(module):
    """Makes offloaded weights of `module` readable inside the `with` block, by its own accelerate hook."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
    try:
        yield module
    finally:
        if hook is not None:
            hook.post_forward(module, torch.empty(0))


def tensor_at(module, path):
    """The tensor `path` ("weight", "wg.weight") of a module that is onloaded itself; `None`: there is none."""
    owner, _, name = path.rpartition(".")
    owner = module.get_submodule(owner)
    with contextlib.nullcontext() if owner is module else onloaded(owner):
        tensor = owner._parameters.get(name, owner._buffers.get(name))
    return None if tensor is None else tensor.detach()


def bias_path(rule):
    """Where the rows' bias is, if they have one."""
    return rule.rows.removesuffix("weight") + "bias"


def correction_of(layer, rule):
    """The layer's correction bias [E], or `None`."""
    if not rule.correction:
        return None
    kind, _, name = rule.correction.rpartition(":")
    with onloaded(layer.block if kind else layer.router) as owner:
        tensor = tensor_at(owner, name)
    return None if tensor is None else tensor.reshape(-1)


def num_groups(router):
    """Groups of neighbouring experts that the router first chooses among."""
    return next((router.__dict__[name] for name in GROUPS if router.__dict__.get(name)), 1)


def call_router(router, tokens, *args, **kwargs):
    """The router's answer for tokens [T, H], in `RouterOutput`'s order; some take them as [1, T, H] only."""
    try:
        return in_order(router.forward(tokens, *args, **kwargs))
    except (ValueError, IndexError, RuntimeError):
        return in_order(router.forward(tokens.unsqueeze(0), *args, **kwargs))


def in_order(answer):
    """A router's answer, logits first; in transformers 5.19 those of aria and granitemoe's kind have them last."""
    return answer[::-1] if isinstance(answer, tuple) and getattr(answer[0], "dtype", None) == torch.long else answer


def sibling(module, parameters, buffers=(), **attributes):
    """A module of the same class and settings with tensors of its own; `module` and its tensors stay untouched."""
    twin = plain_class(module).__new__(plain_class(module))
    nn.Module.__init__(twin)
    own = {*twin.__dict__, *module._parameters, "forward", "_old_forward", "_hf_hook"}
    twin.__dict__.update({name: value for name, value in module.__dict__.items() if name not in own})
    for name, child in module._modules.items():
        if name != "moextend":
            twin._modules[name] = child  # activations and the like: shared, they have no weights of their own
    for name in {**module._parameters, **parameters}:  # not a set's order: optimiser states go by it
        twin.register_parameter(name, nn.Parameter(parameters[name]) if name in parameters else None)
    for name, tensor in dict(buffers).items():
        twin.register_buffer(name, tensor)
    twin.__dict__.update(attributes)
    return twin


def check_routers(layers, indices, rule):
    """Refuses layers (of those at `indices`) whose router works by another rule than the adapter's."""
    for index in indices:
        layer = layers[index]
        reason = other_rule(layer, rule)
        if reason:
            raise ValueError(
                f"Layer {index} of {family_of(layer.router)} can't be extended by this adapter. "
                f"{plain_class(layer.router).__name__} does not follow its rule, {rule}: {reason}. Leave it out, "
                "or pass the base that the adapter was made on; a newer transformers may route otherwise."
            )


@torch.no_grad()
def other_rule(layer, rule):
    """In which way a router, in float32, does not follow `rule`; `None`: in none, or it has no weights (on meta)."""
    twin, bias = float_twin(layer.router).eval(), correction_of(layer, rule)
    if any(tensor.is_meta for tensor in twin.parameters()):
        return None
    if rule.correction and bias is None:
        return f"it has no {rule.correction}"
    bias = None if bias is None else bias.float()
    args = (bias,) if ":" in rule.correction else ()
    try:
        rows, own_bias = twin.get_parameter(rule.rows), tensor_at(twin, bias_path(rule))
        scale = twin.get_parameter(rule.expert_scale) if rule.expert_scale else None
        tokens = sample_tokens(rows)
        missing = further_inputs(layer.router, twin, tokens, args)
        output = RouterOutput(*call_router(twin, tokens, *args))
        logits = F.linear(INPUTS[rule.inputs](twin, tokens), rows, own_bias)[:, : layer.num_experts]
        logits = scale_logits(logits, rule)
        made_by = rule_with_shared_experts(rule, logits, output) if rule.shared else rule
        answered = logits if rule.answers == "logits" else SCORES[rule.score](logits)
        keys = choice_keys(logits, rule, bias)
        weights = expert_weights(logits, output.top_k_index, made_by, expert_scale=scale)
        differs = {
            "it also depends on " + ", ".join(missing): missing,
            "its logits are made otherwise": not close(answered, output.router_logits),
            "it chooses otherwise": not is_top_k(output.top_k_index, keys, num_groups(layer.router)),
            "its weights are made otherwise": not close(weights, output.top_k_weights),
        }
    except Exception as error:  # a tensor that the rule names is not there; whatever a family's code raises
        return f"it can't be asked ({type(error).__name__}: {error})"
    return next((reason for reason, found in differs.items() if found), None)


def float_twin(module):
    """A float32 copy of a router and its children, without new rows."""

    def copied(tensors):
        own = {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in own.items()}

    with onloaded(module):
        twin = sibling(module, copied(module._parameters), copied(module._buffers))
    for name, child in list(twin._modules.items()):
        twin._modules[name] = None if child is None else float_twin(child)
    return twin


def sample_tokens(rows):
    """Random tokens [T, H] whose logits are near zero, nearly equal, sharp, and far below zero, by turns."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 16, rows.shape[-1], generator=generator, device="cpu").to(rows.device)
    tokens[1] *= 0.05
    tokens[2] *= 4.0
    tokens[3] -= 8.0 * F.normalize(rows.mean(dim=0), dim=0)
    return tokens.flatten(0, 1)


def asked_for(router):
    """The parameters of a router's forward after hidden states."""
    return list(inspect.signature(plain_class(router).forward).parameters.values())[2:]


def further_inputs(router, twin, tokens, args):
    """Names of a router's parameters, after hidden states and `args`, by which its answer goes. An optional one may
    lie idle in this setting: then the answer is the same for an argument that is of no use."""

    def idle(parameter):
        try:
            answers = call_router(twin, tokens, *args), call_router(twin, tokens, *args, **{parameter.name: object()})
            return all(torch.equal(*pair) for pair in zip(*answers, strict=True))
        except Exception:  # whatever a family's code raises
            return False

    return [one.name for one in asked_for(router)[len(args) :] if one.default is one.empty or not idle(one)]


def close(found, answered):
    return torch.allclose(found.float(), answered.float(), rtol=1e-4, atol=1e-6 * answered.abs().amax().item())


def is_top_k(index, keys, groups, slack=1e-6):
    """Whether `index` [T, K] holds the best of `keys` [T, E], up to `slack`: of all, or of the groups chosen from."""
    chosen = torch.zeros_like(keys, dtype=torch.bool).scatter(-1, index, True)
    worst_chosen = keys.masked_fill(~chosen, torch.inf).amin(dim=-1)

    def beaten(rivals):
        return bool((worst_chosen >= keys.masked_fill(~rivals, -torch.inf).amax(dim=-1) - slack).all())

    grouped = groups if keys.shape[-1] % groups == 0 else 1
    in_group = chosen.unflatten(-1, (grouped, -1)).any(dim=-1, keepdim=True)
    in_group = in_group.expand(-1, -1, keys.shape[-1] // grouped).flatten(1)
    twice = chosen.sum(dim=-1) != index.shape[-1]
    return not bool(twice.any()) and (beaten(~chosen) or beaten(in_group & ~chosen))
