"""Families: where a base keeps its MoE layers, and whether a router works by a given rule.

Letters: T tokens, E base experts, K experts a token selects, H hidden size.

How a rule is found, for a base that was never extended: docs/families.md. It is recorded with every adapter; here the
router is asked whether it still works by it, for a newer transformers may route otherwise.
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
CORRECTION = "e_score_correction_bias"


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
    """The MoE layers of a base: decoder layer index -> `MoELayer`. `ValueError`: there are none, or none with
    transformers' router/experts interface, or several in one decoder layer."""
    name, family, layers = type(decoder).__name__, family_of(decoder), {}
    for path, module in decoder.named_modules():
        experts = getattr(module, "experts", None)
        routers = [getattr(module, name, None) for name in ROUTER_NAMES]
        routers = [
            one for one in routers if isinstance(one, nn.Module) and not type(one).__module__.startswith(TORCHS)
        ]
        router = next(iter(routers), None)
        number = re.search(r"(?:^|\.)(\d+)\.", f"{path}.")
        if number and router is not None and all(hasattr(experts, attribute) for attribute in EXPERTS_INTERFACE):
            index = int(number.group(1))
            if index in layers:
                raise ValueError(
                    f"{name} ({family}) can't be extended: layer {index} has several MoE blocks, so it is not said "
                    "which of them new experts belong to."
                )
            layers[index] = MoELayer(router, experts, experts.down_proj.shape[0], module)
    if layers:
        return layers
    if any("experts" in type(module).__name__.lower() for module in decoder.modules()):
        raise ValueError(
            f"{name} ({family}) has experts, but not through transformers' router/experts interface (a module with "
            "3-D `down_proj` that is called with top_k_index and top_k_weights), so this family can't be extended."
        )
    raise ValueError(f"{name} has no MoE layers: MoExtend adds experts to a Mixture-of-Experts model.")


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
    """The router's answer for tokens [T, H]; some routers take them as [1, T, H] only."""
    try:
        return router.forward(tokens, *args, **kwargs)
    except (ValueError, IndexError, RuntimeError):
        return router.forward(tokens.unsqueeze(0), *args, **kwargs)


def sibling(module, parameters, buffers=(), **attributes):
    """A module of the same class and settings with tensors of its own; `module` and its tensors stay untouched."""
    twin = plain_class(module).__new__(plain_class(module))
    nn.Module.__init__(twin)
    own = set(twin.__dict__) | {"forward", "_old_forward", "_hf_hook"}
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


class NoRule(Exception):
    """Says why a router does not work by a rule."""


def check_routers(layers, indices, rule):
    """Refuses layers (of those at `indices`) whose router works by another rule than `rule`, the adapter's."""
    for index in indices:
        layer = layers[index]
        try:
            with torch.no_grad():
                check_router(layer, rule)
        except NoRule as error:
            raise ValueError(
                f"Layer {index} of {family_of(layer.router)} can't be extended by this adapter. "
                f"{plain_class(layer.router).__name__} does not follow its rule, {rule}: {error}. Leave it out, "
                "or pass the base that the adapter was made on; a newer transformers may route otherwise."
            ) from error


def check_router(layer, rule):
    """Raises `NoRule` where a router answers random tokens otherwise than `rule` says; computed in float32, whatever
    the base is loaded in. Without weights (meta device) there is nothing to ask."""
    twin, bias = float_twin(layer.router).eval(), correction_of(layer, rule)
    if any(tensor.is_meta for tensor in twin.parameters()):
        return
    if rule.correction and bias is None:
        raise NoRule(f"it has no {rule.correction}")
    bias = None if bias is None else bias.float()
    args = (bias,) if ":" in rule.correction else ()
    try:
        rows, own_bias = twin.get_parameter(rule.rows), tensor_at(twin, bias_path(rule))
        scale = twin.get_parameter(rule.expert_scale) if rule.expert_scale else None
        tokens = sample_tokens(rows)
        missing = [p.name for p in asked_for(layer.router)[len(args) :] if goes_by(p, twin, tokens, args)]
        output = RouterOutput(*call_router(twin, tokens, *args))
        logits = F.linear(INPUTS[rule.inputs](twin, tokens), rows, own_bias)[:, : layer.num_experts]
        logits = scale_logits(logits, rule)
        made_by = rule_with_shared_experts(rule, logits, output) if rule.shared else rule
        answered = logits if rule.answers == "logits" else SCORES[rule.score](logits)
        differs = {
            "it also depends on " + ", ".join(missing): missing,
            "its logits are made otherwise": not close(answered, output.router_logits),
            "it chooses otherwise": not is_top_k(
                output.top_k_index, choice_keys(logits, rule, bias), num_groups(layer.router)
            ),
            "its weights are made otherwise": not close(
                expert_weights(logits, output.top_k_index, made_by, expert_scale=scale), output.top_k_weights
            ),
        }
    except Exception as error:  # a tensor that the rule names is not there; whatever a family's code raises
        raise NoRule(f"it can't be asked ({type(error).__name__}: {error})") from error
    for reason, found in differs.items():
        if found:
            raise NoRule(reason)


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
    """Random tokens [T, H] whose logits are near zero, nearly equal, sharp, and far below zero, by turns: what a rule
    does to small sums shows where scores are small."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 16, rows.shape[-1], generator=generator, device="cpu").to(rows.device)
    tokens[1] *= 0.05
    tokens[2] *= 4.0
    tokens[3] -= 8.0 * F.normalize(rows.mean(dim=0), dim=0)
    return tokens.flatten(0, 1)


def asked_for(router):
    """The parameters of a router's forward after hidden states."""
    return list(inspect.signature(plain_class(router).forward).parameters.values())[2:]


def goes_by(parameter, twin, tokens, args):
    """Whether an answer depends on a further parameter of the router's forward. An optional one may lie idle in this
    setting: then the answer is the same for an argument that nothing can be done with."""
    if parameter.default is parameter.empty:
        return True
    try:
        answers = call_router(twin, tokens, *args), call_router(twin, tokens, *args, **{parameter.name: object()})
        return not all(torch.equal(*pair) for pair in zip(*answers, strict=True))
    except Exception:  # whatever a family's code raises
        return True


def close(found, answered):
    return torch.allclose(found.float(), answered.float(), rtol=1e-4, atol=1e-6 * answered.abs().amax().item())


def is_top_k(index, keys, groups, slack=1e-6):
    """Whether `index` [T, K] holds the best of `keys` [T, E], up to `slack`: the best of all, or of the experts in the
    groups chosen from."""
    chosen = torch.zeros_like(keys, dtype=torch.bool).scatter(-1, index, True)
    if not bool((chosen.sum(dim=-1) == index.shape[-1]).all()):
        return False
    worst_chosen = keys.masked_fill(~chosen, torch.inf).amin(dim=-1)

    def beaten(rivals):
        return bool((worst_chosen >= keys.masked_fill(~rivals, -torch.inf).amax(dim=-1) - slack).all())

    if beaten(~chosen):
        return True
    if groups == 1 or keys.shape[-1] % groups:
        return False
    in_group = chosen.unflatten(-1, (groups, -1)).any(dim=-1, keepdim=True)
    return beaten(in_group.expand(-1, -1, keys.shape[-1] // groups).flatten(1) & ~chosen)
