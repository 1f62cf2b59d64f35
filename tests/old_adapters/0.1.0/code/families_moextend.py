"""Families: where a base keeps its MoE layers, and by which rule each of their routers works.

Letters: T tokens, E base experts, K experts a token selects, H hidden size.

No family has code or a row of its own here. A rule is found by asking: a float32 twin of the router with random rows
answers random tokens, and what explains its answer is its rule. So a family of a newer transformers needs nothing here
if it follows a known rule, and is refused, by name and with the reason, if it does not. See docs/families.md.
"""

import contextlib
import inspect
import math
import re
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .routing_moextend import INPUTS, SCORES, Rule, cap, choice_keys, rule_weights, sparsemixer

EXPERTS_INTERFACE = ("_is_expert_parallel", "has_gate", "is_transposed", "down_proj")
ROUTER_NAMES = ("gate", "router")
GROUPS = ("num_group", "n_group")
CORRECTION = "e_score_correction_bias"
EXPERT_SCALE = "per_expert_scale"
FLOOR, SOFTCAP, JITTER = "norm_min", "router_logit_softcapping", "router_jitter_noise"
SHARED = "n_shared_experts"
NUM_TOKENS = 16  # random tokens of each kind, see `random_tokens`
COLD, FLAT, SHARP = 8.0, 0.05, 4.0
OF_ANY_MODULE = {*nn.Module().__dict__, "forward", "_old_forward", "_hf_hook", "_is_hf_initialized"}

REASONS = {  # families that no rule can carry, and why
    "llama4": "its experts get their input scaled by the score, and all of them run on all tokens, without an index "
    "of the chosen ones (`experts(hidden_states)`)",
    "dbrx": "its router gives bare logits and the block around it chooses, and the weights of all experts lie in one "
    "matrix",
    "jetmoe": "its experts take tokens that its router has sorted by expert, and it shares out attention heads in the "
    "same way",
    "zaya": "its router is a deep network that hands a state on from layer to layer, and one of its choices is to use "
    "no expert: it has no row for an expert that sees the token's hidden state",
    "diffusion_gemma": "it writes whole blocks by diffusion; it is no causal LM",
    "ernie4_5_vl_moe": "each of its layers has a MoE block for text and one for images, and keeps the logits of both "
    "in one table of fixed width",
}


class MoELayer(NamedTuple):
    """The modules of one MoE layer that matter here, and the number E of its base experts."""

    router: nn.Module
    experts: nn.Module
    num_experts: int
    block: nn.Module


def family_of(module):
    """The family a module's class belongs to: its folder in transformers, or its file for code from elsewhere."""
    place = type(module).__module__.split(".")
    return place[2] if place[:2] == ["transformers", "models"] else place[-1].removeprefix("modeling_")


def is_torchs(module):
    """Whether a module is one of torch's own: an `nn.Linear` gates shared experts, but answers no choice."""
    return type(module).__module__.startswith("torch.nn.modules.")


def plain_class(module):
    """The class of `module`, without what extending it mixed in."""
    return vars(type(module)).get("moextend_base", type(module))


def asked_for(router):
    """The parameters of a router's forward after hidden states."""
    return list(inspect.signature(plain_class(router).forward).parameters.values())[2:]


# ---------------------------------------------------------------- finding layers


def find_moe_layers(decoder):
    """The MoE layers of a base: decoder layer index -> `MoELayer`.

    Raises:
        ValueError: the model has no MoE layers, or none with transformers' router/experts interface; it has several in
            one decoder layer; or its family is one of `REASONS`.
    """
    name, family, layers = type(decoder).__name__, family_of(decoder), {}
    if family in REASONS:
        raise ValueError(f"{name} ({family}) can't be extended: {REASONS[family]}.")
    for path, module in decoder.named_modules():
        experts = getattr(module, "experts", None)
        routers = [getattr(module, router, None) for router in ROUTER_NAMES]
        router = next((one for one in routers if isinstance(one, nn.Module) and not is_torchs(one)), None)
        place = re.search(r"(?:^|\.)(\d+)\.", f"{path}.")
        if place and router is not None and all(hasattr(experts, attribute) for attribute in EXPERTS_INTERFACE):
            index = int(place.group(1))
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


# ---------------------------------------------------------------- reading a layer


@contextlib.contextmanager
def materialised(module):
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
    """The tensor `path` ("weight", "wg.weight") of a module that is materialised itself; `None`: there is none."""
    owner, _, name = path.rpartition(".")
    owner = module.get_submodule(owner)
    with contextlib.nullcontext() if owner is module else materialised(owner):
        tensor = owner._parameters.get(name, owner._buffers.get(name))
    return None if tensor is None else tensor.detach()


def sibling(module, parameters, buffers=(), **attributes):
    """A module of the same class and settings with tensors of its own; `module` and its tensors stay untouched."""
    twin = plain_class(module).__new__(plain_class(module))
    nn.Module.__init__(twin)
    own = set(twin.__dict__) | {"forward", "_old_forward", "_hf_hook"}
    twin.__dict__.update({name: value for name, value in module.__dict__.items() if name not in own})
    for name, child in module._modules.items():
        if name != "moextend":
            twin._modules[name] = child  # activations and the like: shared, they have no weights of their own
    for name in {**module._parameters, **parameters}:  # not a set's order: optimiser states are told apart by place
        twin.register_parameter(name, nn.Parameter(parameters[name]) if name in parameters else None)
    for name, tensor in dict(buffers).items():
        twin.register_buffer(name, tensor)
    twin.__dict__.update(attributes)
    return twin


# ---------------------------------------------------------------- the twin


class NoRule(Exception):
    """Says why a router follows no known rule."""


def random_twin(module, generator, **attributes):
    """A float32 twin of `module` and its children on the CPU: every number random, every whole one 0 or 1."""

    def randn(shape):
        values = torch.randn(shape, generator=generator, device="cpu")
        return values / shape[-1] ** 0.5 if len(shape) > 1 else values

    own = {name: randn(p.shape) for name, p in module._parameters.items() if p is not None}
    buffers = {
        name: randn(b.shape) if b.is_floating_point() else torch.randint(2, b.shape, generator=generator).to(b.dtype)
        for name, b in module._buffers.items()
        if b is not None
    }
    twin = sibling(module, own, buffers, **attributes)
    for name, child in list(twin._modules.items()):
        twin._modules[name] = None if child is None else random_twin(child, generator)
    return twin


def rows_of(router, num_experts):
    """The path of the router's rows: its only parameter [E, H], or [E + S, H] with S shared experts."""
    lengths = num_experts, num_experts + router.__dict__.get(SHARED, 0)
    paths = [name for name, p in router.named_parameters() if p.dim() == 2 and len(p) in lengths]
    paths = [path for path in paths if "moextend" not in path.split(".") and CORRECTION not in path]
    if len(paths) != 1:
        raise NoRule(f"it has {len(paths)} parameters with a row for each expert, not one ({', '.join(paths)})")
    return paths[0]


def correction_at(layer):
    """Where a layer keeps its correction bias, as in `Rule.correction`."""
    router, num_experts, block = layer.router, layer.num_experts, layer.block
    tensors = dict(router.named_parameters()) | dict(router.named_buffers())
    for path, tensor in tensors.items():
        if path.split(".")[-1] == CORRECTION and tensor.numel() == num_experts:
            return path
    for name in (parameter.name for parameter in asked_for(router)[:1]):
        tensor = block._parameters.get(name, block._buffers.get(name))
        if tensor is not None and tensor.numel() == num_experts:
            return f"argument:{name}"
    return ""


def correction_of(layer, rule):
    """The layer's correction bias [E], or `None`."""
    if not rule.correction:
        return None
    kind, _, name = rule.correction.rpartition(":")
    with materialised(layer.block if kind else layer.router) as owner:
        return tensor_at(owner, name).reshape(-1)


def given_to(layer, rule):
    """What the layer's router is called with beside hidden states."""
    return (correction_of(layer, rule),) if ":" in rule.correction else ()


def bias_path(rule):
    """Where the rows' bias is, if they have one."""
    return rule.rows.removesuffix("weight") + "bias"


def ask(router, tokens, *given, **named):
    """The router's answer for tokens [T, H]; some routers take them as [1, T, H] only."""
    try:
        return router.forward(tokens, *given, **named)
    except (ValueError, IndexError, RuntimeError):
        return router.forward(tokens.unsqueeze(0), *given, **named)


# ---------------------------------------------------------------- finding a rule


def find_rule(index, layer):
    """The routing rule of decoder layer `index`, by what its router really does.

    A twin with random rows answers, so this needs no weights (meta devices), neither reads nor moves the global random
    state, and can't be fooled by a checkpoint's values.

    Raises:
        ValueError: the router answers otherwise than any known rule; says which family and layer, and why.
    """
    try:
        with torch.device("cpu"), torch.no_grad():
            rule, again = probe(layer, seed=0), probe(layer, seed=1)
        if not same_rule(rule, again):
            raise NoRule("numbers of its rule lie in a tensor of its own, so a new row would not go by them")
        return rule
    except NoRule as error:
        raise ValueError(
            f"Layer {index} of {family_of(layer.router)} can't be extended. {plain_class(layer.router).__name__} "
            f"does not follow the router interface: {error}. See docs/families.md for the rules that are known."
        ) from error


def same_rule(one, other):
    """Whether rules found with other random tensors are one; their numbers are fitted, so the last digits differ."""
    return all(
        math.isclose(*pair, rel_tol=1e-4) if all(isinstance(entry, float) for entry in pair) else pair[0] == pair[1]
        for pair in zip(one, other, strict=True)
    )


def find_rules(layers, indices):
    """The rule of each of the layers `indices`, as `find_rule`; routers of one kind and setting are asked once."""
    seen = {}
    for index in indices:
        kind = settings(layers[index].router), correction_at(layers[index])
        if kind not in seen:
            seen[kind] = find_rule(index, layers[index])
        yield index, seen[kind]


def settings(module):
    """What makes the twin of a module, hashable: class, attributes, shapes, and the same of its children."""
    tensors = (*module._parameters.items(), *module._buffers.items())
    return (
        plain_class(module),
        tuple((name, tuple(tensor.shape)) for name, tensor in tensors if tensor is not None),
        tuple(
            (name, value if isinstance(value, (int, float, str)) else id(value))
            for name, value in sorted(module.__dict__.items())
            if name not in OF_ANY_MODULE
        ),
        tuple(settings(child) for name, child in module._modules.items() if name != "moextend" and child is not None),
    )


def probe(layer, seed):
    """The `Rule` of a layer's router, or `NoRule`; what is random goes by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    rows, correction = rows_of(layer.router, layer.num_experts), correction_at(layer)
    in_group = layer.num_experts // num_groups(layer.router)
    widened = {"top_k": 2} if layer.router.__dict__.get("top_k") == 1 and in_group > 1 else {}
    twin = random_twin(layer.router, generator, **widened).eval()  # renormalised, K = 1 always weighs 1: says nothing
    weight = twin.get_parameter(rows)
    tokens = random_tokens(weight, generator)
    bias = torch.randn(layer.num_experts, generator=generator) / 2 if correction else None
    given = (bias,) if ":" in correction else ()
    if correction and not given:
        tensor = tensor_at(twin, correction)
        tensor.copy_(bias.reshape(tensor.shape))
    scale = EXPERT_SCALE if EXPERT_SCALE in twin._parameters else ""
    shared = len(weight) - layer.num_experts
    known = Rule("softmax", True, shared=shared, rows=rows, correction=correction, expert_scale=scale)
    answer = checked_answer(twin, layer, tokens, given, shared)
    rule, logits = find_link(twin, tokens, answer[0], known)
    return find_weights(twin, tokens, logits, answer, rule, bias)


def random_tokens(weight, generator):
    """Tokens [T, H] whose logits are near zero, cold (all far below it), flat (nearly equal) and sharp, by turns.

    What a rule does to small sums shows where scores are small: an epsilon with sigmoid scores of cold tokens, a floor
    with softmax scores of flat ones. So that there are cold tokens, rows get a direction in common.
    """
    direction = F.normalize(torch.randn(weight.shape[-1], generator=generator), dim=0)
    weight += direction
    tokens = torch.randn(4, NUM_TOKENS, weight.shape[-1], generator=generator)
    tokens[1] -= COLD * direction
    tokens[2] *= FLAT
    tokens[3] *= SHARP
    return tokens.flatten(0, 1)


def goes_by(parameter, twin, tokens, given):
    """Whether an answer depends on a further parameter of the router's forward. An optional one may lie idle in this
    setting: then the answer is the same for an argument that nothing can be done with."""
    if parameter.default is parameter.empty:
        return True
    try:
        answers = ask(twin, tokens, *given), ask(twin, tokens, *given, **{parameter.name: object()})
        return not all(torch.equal(*pair) for pair in zip(*answers, strict=True))
    except Exception:  # whatever a family's code raises
        return True


def checked_answer(twin, layer, tokens, given, shared):
    """The twin's (logits [T, E], weights [T, K], index [T, K], weights [T, S] of shared experts), or `NoRule`."""
    missing = [p.name for p in asked_for(layer.router)[len(given) :] if goes_by(p, twin, tokens, given)]
    if missing:
        raise NoRule(f"its choice also depends on {', '.join(missing)}, where a new row sees the hidden state alone")
    try:
        answer = ask(twin, tokens, *given)
    except Exception as error:
        raise NoRule(f"asked for random tokens it fails ({type(error).__name__}: {error})") from error
    parts = 4 if shared else 3
    if not isinstance(answer, tuple) or len(answer) != parts or not all(torch.is_tensor(part) for part in answer):
        raise NoRule("it does not answer (logits, weights, index)")
    logits, weights, index, *rest = answer
    if logits.shape != (len(tokens), layer.num_experts) or weights.shape != index.shape or len(index) != len(tokens):
        shapes = ", ".join(str(list(part.shape)) for part in answer)
        raise NoRule(f"it answers shapes {shapes}, not [T, E], [T, K], [T, K]")
    if not bool(((index >= 0) & (index < layer.num_experts)).all()):
        raise NoRule(f"it answers indices that are none of its {layer.num_experts} experts")
    return logits.float(), weights.float(), index, *rest


def find_link(twin, tokens, answered, known):
    """How rows make what the router answers first: (`known` with that filled in, logits [T, E]), or `NoRule`."""
    weight, bias = twin.get_parameter(known.rows), tensor_at(twin, bias_path(known))
    for inputs, transform in INPUTS.items():
        try:
            products = F.linear(transform(twin, tokens), weight, bias)[:, : answered.shape[-1]]
        except AttributeError:
            continue  # this router has not what the transform needs
        for answers in ("logits", *SCORES):
            rule = known._replace(inputs=inputs, answers="logits" if answers == "logits" else "scores")
            rule = rule._replace(softcap=float(twin.__dict__.get(SOFTCAP, 0.0)))
            if answers == "logits" and not rule.softcap:
                rule = rule._replace(multiplier=factor(products, answered))
            logits = cap(products, rule)
            if close(logits if answers == "logits" else SCORES[answers](logits), answered):
                return rule, logits
    raise NoRule("its logits are not weight @ hidden state (+ bias)")


def find_weights(twin, tokens, logits, answer, rule, bias):
    """`rule` with what makes choice and weights filled in, or `NoRule`."""
    _, weights, index, *_ = answer
    if rule.expert_scale:
        weights = weights / twin.get_parameter(rule.expert_scale)[index]
    chosen = False
    for score in SCORES:
        for corrected in ("score", "logit") if rule.correction else ("score",):
            tried = rule._replace(score=score, corrected=corrected, floor=float(twin.__dict__.get(FLOOR, 0.0)))
            if not is_top_k(index, choice_keys(logits, tried, bias), num_groups(twin)):
                continue
            chosen = True
            if rule.shared and shares(twin, tokens, logits, answer, tried):
                return tried
            for renormalise in () if rule.shared else (True, False):
                found = fitted(tried._replace(renormalise=renormalise), SCORES[score](logits), index, weights)
                if close(rule_weights(SCORES[score](logits), index, found), weights):
                    return found
    jitter = twin.__dict__.get(JITTER)
    if jitter is not None and close(sparsemixer(logits, index, jitter), weights):
        return rule._replace(score="softmax", renormalise=False, jitter=jitter)
    raise NoRule("its weights follow no known rule" if chosen else "it does not choose the top k of any known score")


def shares(twin, tokens, logits, answer, rule):
    """Whether chosen and shared experts share one sum: all weights over all scores are one number for all tokens."""
    _, weights, index, shared = answer
    rows = twin.get_parameter(rule.rows)[-rule.shared :]
    scores = [SCORES[rule.score](part) for part in (logits, cap(F.linear(tokens, rows), rule))]
    scores = torch.cat([scores[0].gather(-1, index), scores[1]], dim=-1)
    found = scores / scores.sum(dim=-1, keepdim=True)
    answered = torch.cat([weights, shared], dim=-1)
    return close(found * factor(found, answered), answered)


def fitted(rule, scores, index, weights):
    """`rule` with the epsilon and scale that come nearest to the answered weights.

    Per token, the ratio of the answered sum and that of `rule` is scale * sum / (sum + epsilon); its inverse is a
    straight line over 1 / sum.
    """
    if rule.renormalise:
        total = scores.gather(-1, index).double().sum(dim=-1)
        ratio = rule_weights(scores, index, rule).double().sum(dim=-1) / weights.double().sum(dim=-1)
        line = torch.stack([torch.ones_like(total), 1 / total], dim=-1)
        one, slope = torch.linalg.lstsq(line, ratio.unsqueeze(-1)).solution.squeeze(-1).tolist()
        if one and 1e-5 * total.min() < slope / one < 0.1 * total.max():  # between noise and not renormalised at all
            rule = rule._replace(epsilon=float(f"{slope / one:.2g}"))
    return rule._replace(scale=factor(rule_weights(scores, index, rule), weights))


def factor(found, answered):
    """The number that `found` has to be multiplied with to come nearest to `answered`."""
    found, answered = found.double(), answered.double()
    return float(f"{((found * answered).sum() / found.square().sum()).item():.7g}")


def close(found, answered):
    return torch.allclose(found.float(), answered, rtol=1e-4, atol=1e-6 * answered.abs().amax().item())


def num_groups(router):
    """Groups of neighbouring experts that the router first chooses among."""
    return next((router.__dict__[name] for name in GROUPS if router.__dict__.get(name)), 1)


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
