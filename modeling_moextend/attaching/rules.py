"""Finding the rule by which a base's routers work, for a base that was never extended: see docs/families.md.

No family has a rule of its own here. A float32 twin of the router with random rows answers random tokens, and what
explains its answer is its rule. So a family of a newer transformers needs nothing here if it follows a known rule, and
is refused, by name and with the reason, if it does not. What is found is recorded with every adapter; loading only
checks that it still holds (families_moextend.check_routers). It needs no weights, and no checkpoint's values can fool
it.

Letters: T tokens, E base experts, K experts a token selects, H hidden size.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..families_moextend import (
    MoELayer,
    asked_for,
    bias_path,
    call_router,
    close,
    family_of,
    further_inputs,
    is_top_k,
    num_groups,
    plain_class,
    sibling,
    tensor_at,
)
from ..routing_moextend import (
    INPUTS,
    SCORES,
    RouterOutput,
    Rule,
    choice_keys,
    rule_weights,
    scale_logits,
    sparsemixer,
)
from ..tools.base_weights import CORRECTION

EXPERT_SCALE = "per_expert_scale"
SHARED = "n_shared_experts"
FLOOR, SOFTCAP, JITTER = "norm_min", "router_logit_softcapping", "router_jitter_noise"
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


def check_family(decoder: nn.Module) -> None:
    """Refuses a base of one of the families that no rule can carry, with the reason."""
    family = family_of(decoder)
    if family in REASONS:
        raise ValueError(f"{type(decoder).__name__} ({family}) can't be extended: {REASONS[family]}.")


# ---------------------------------------------------------------- the twin


class NoRule(Exception):
    """Says why a router does not work by a rule."""


class Probe(NamedTuple):
    """A float32 twin of a router, random tokens [T, H] and what it answers; its correction bias [E], if it has one."""

    twin: nn.Module
    tokens: torch.Tensor
    output: RouterOutput
    correction_bias: torch.Tensor | None


def probe_router(layer: MoELayer, rows: str, correction: str, seed: int = 0) -> Probe:
    """The `Probe` of a layer's router; what is random goes by `seed` and leaves the global random state alone.

    Args:
        rows, correction: as in `Rule`.

    Raises:
        NoRule: it depends on more than hidden states, or does not answer like a router.
    """
    generator = torch.Generator().manual_seed(seed)
    group_size = layer.num_experts // num_groups(layer.router)
    widened = {"top_k": 2} if layer.router.__dict__.get("top_k") == 1 and group_size > 1 else {}
    with torch.device("cpu"), torch.no_grad():
        twin = random_twin(layer.router, generator, **widened).eval()  # renormalised, K = 1 always weighs 1
        weight = twin.get_parameter(rows)
        tokens = random_tokens(weight, generator)
        bias = torch.randn(layer.num_experts, generator=generator) / 2 if correction else None
        args = (bias,) if ":" in correction else ()
        if correction and not args:
            tensor = tensor_at(twin, correction)
            tensor.copy_(bias.reshape(tensor.shape))
        return Probe(twin, tokens, router_output(layer, twin, tokens, args), bias)


def router_output(layer: MoELayer, router: nn.Module, tokens: torch.Tensor, args: tuple = ()) -> RouterOutput:
    """What `router`, a copy of a layer's, answers for tokens [T, H]: a `RouterOutput`, or `NoRule`.

    `args`: what it is called with beside hidden states.
    """
    missing = further_inputs(layer.router, router, tokens, args)
    if missing:
        raise NoRule(f"its choice also depends on {', '.join(missing)}, where a new row sees the hidden state alone")
    try:
        output = call_router(router, tokens, *args)
    except Exception as error:  # whatever a family's code raises
        raise NoRule(f"asked for random tokens it fails ({type(error).__name__}: {error})") from error
    if not isinstance(output, tuple) or len(output) not in (3, 4) or not all(map(torch.is_tensor, output)):
        raise NoRule("it does not answer (logits, weights, index)")
    logits, weights, index, *_ = output
    if logits.shape != (len(tokens), layer.num_experts) or weights.shape != index.shape or len(index) != len(tokens):
        shapes = ", ".join(str(list(part.shape)) for part in output)
        raise NoRule(f"it answers shapes {shapes}, not [T, E], [T, K], [T, K]")
    if not bool(((index >= 0) & (index < layer.num_experts)).all()):
        raise NoRule(f"it answers indices that are none of its {layer.num_experts} experts")
    return RouterOutput(logits.float(), weights.float(), *output[2:])


def random_twin(module: nn.Module, generator: torch.Generator, **attributes: Any) -> nn.Module:
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


def random_tokens(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
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


# ---------------------------------------------------------------- its rule


def complete_rule(recorded: dict[str, Any], layers: dict[int, MoELayer], plan: dict[int, list[int]]) -> Rule:
    """The `Rule` of a base, with the entries that an adapter has `recorded` (a `dict`) as they are there.

    All layers of the plan follow it. Without a plan (stage align) it is that of the first layer with a known rule.

    Raises:
        ValueError: no known rule, or several.
    """
    if not plan:
        return Rule(**{**first_rule(layers)._asdict(), **recorded})
    rules = dict(find_rules(layers, plan))
    rule = rules[min(plan)]
    for index, other in rules.items():
        if not same_rule(other, rule):
            raise ValueError(
                f"Layer {index} of {family_of(layers[index].router)} routes by {other}, the other extended layers by "
                f"{rule}: an adapter extends layers of one rule. Leave this layer out."
            )
    return Rule(**{**rule._asdict(), **recorded})


def find_rules(layers: dict[int, MoELayer], indices: Iterable[int]) -> Iterator[tuple[int, Rule]]:
    """The rule of each of the layers `indices`, as `find_rule`; routers of one kind and setting are asked once."""
    rules = {}
    for index in indices:
        kind = settings(layers[index].router), correction_path(layers[index])
        if kind not in rules:
            rules[kind] = find_rule(index, layers[index])
        yield index, rules[kind]


def settings(module: nn.Module) -> tuple:
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


def first_rule(layers: dict[int, MoELayer]) -> Rule:
    """The rule of the first layer that follows a known one."""
    errors = []
    for index, layer in layers.items():
        try:
            return find_rule(index, layer)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def find_rule(index: int, layer: MoELayer) -> Rule:
    """The routing rule of decoder layer `index`, by what its router really does.

    Raises:
        ValueError: the router answers otherwise than any known rule; says which family and layer, and why.
    """
    try:
        with torch.device("cpu"), torch.no_grad():
            rule, repeated = fit_rule(layer, seed=0), fit_rule(layer, seed=1)
        if not same_rule(rule, repeated):
            raise NoRule("numbers of its rule lie in a tensor of its own, so a new row would not go by them")
        return rule
    except NoRule as error:
        raise ValueError(
            f"Layer {index} of {family_of(layer.router)} can't be extended. {plain_class(layer.router).__name__} "
            f"does not follow the router interface: {error}. See docs/families.md for the rules that are known."
        ) from error


def same_rule(one: Rule, other: Rule) -> bool:
    """Whether rules found with other random tensors are one; their numbers are fitted, so the last digits differ."""
    return all(
        math.isclose(*pair, rel_tol=1e-4) if all(isinstance(entry, float) for entry in pair) else pair[0] == pair[1]
        for pair in zip(one, other, strict=True)
    )


def rows_of(router: nn.Module, num_experts: int) -> str:
    """The path of the router's rows: its only parameter [E, H], or [E + S, H] with S shared experts."""
    lengths = num_experts, num_experts + router.__dict__.get(SHARED, 0)
    paths = [name for name, p in router.named_parameters() if p.dim() == 2 and len(p) in lengths]
    paths = [path for path in paths if "moextend" not in path.split(".") and CORRECTION not in path]
    if len(paths) != 1:
        raise NoRule(f"it has {len(paths)} parameters with a row for each expert, not one ({', '.join(paths)})")
    return paths[0]


def correction_path(layer: MoELayer) -> str:
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


def fit_rule(layer: MoELayer, seed: int) -> Rule:
    """The `Rule` that explains what a layer's router answers, or `NoRule`; what is random goes by `seed`."""
    rows, correction = rows_of(layer.router, layer.num_experts), correction_path(layer)
    probe = probe_router(layer, rows, correction, seed)
    scale = EXPERT_SCALE if EXPERT_SCALE in probe.twin._parameters else ""
    shared = len(probe.twin.get_parameter(rows)) - layer.num_experts
    rule = Rule("softmax", True, shared=shared, rows=rows, correction=correction, expert_scale=scale)
    return find_weights(probe, *find_logits(probe, rule))


def find_logits(probe: Probe, partial_rule: Rule) -> tuple[Rule, torch.Tensor]:
    """How rows make what the router returns first.

    Returns:
        (`partial_rule` with that filled in, logits [T, E]).

    Raises:
        NoRule: otherwise than any known rule.
    """
    twin, router_logits = probe.twin, probe.output.router_logits
    weight, bias = twin.get_parameter(partial_rule.rows), tensor_at(twin, bias_path(partial_rule))
    for inputs, transform in INPUTS.items():
        try:
            products = F.linear(transform(twin, probe.tokens), weight, bias)[:, : router_logits.shape[-1]]
        except AttributeError:
            continue  # this router has not what the transform needs
        for answers in ("logits", *SCORES):
            rule = partial_rule._replace(inputs=inputs, answers="logits" if answers == "logits" else "scores")
            rule = rule._replace(softcap=float(twin.__dict__.get(SOFTCAP, 0.0)))
            if answers == "logits" and not rule.softcap:
                rule = rule._replace(multiplier=factor(products, router_logits))
            logits = scale_logits(products, rule)
            if close(logits if answers == "logits" else SCORES[answers](logits), router_logits):
                return rule, logits
    raise NoRule("its logits are not weight @ hidden state (+ bias)")


def find_weights(probe: Probe, rule: Rule, logits: torch.Tensor) -> Rule:
    """`rule` with what makes choice and weights filled in, or `NoRule`."""
    twin, weights, index = probe.twin, probe.output.top_k_weights, probe.output.top_k_index
    if rule.expert_scale:
        weights = weights / twin.get_parameter(rule.expert_scale)[index]
    choice_known = False
    for score in SCORES:
        for corrected in ("score", "logit") if rule.correction else ("score",):
            candidate = rule._replace(score=score, corrected=corrected, floor=float(twin.__dict__.get(FLOOR, 0.0)))
            if not is_top_k(index, choice_keys(logits, candidate, probe.correction_bias), num_groups(twin)):
                continue
            choice_known = True
            if rule.shared and shares_sum(probe, candidate, logits):
                return candidate
            for renormalise in () if rule.shared else (True, False):
                fitted_rule = fit_numbers(
                    candidate._replace(renormalise=renormalise), SCORES[score](logits), index, weights
                )
                if close(rule_weights(SCORES[score](logits), index, fitted_rule), weights):
                    return fitted_rule
    jitter = twin.__dict__.get(JITTER)
    if jitter is not None and close(sparsemixer(logits, index, jitter), weights):
        return rule._replace(score="softmax", renormalise=False, jitter=jitter)
    raise NoRule(
        "its weights follow no known rule" if choice_known else "it does not choose the top k of any known score"
    )


def shares_sum(probe: Probe, rule: Rule, logits: torch.Tensor) -> bool:
    """Whether chosen and shared experts share one sum: all weights over all scores are one number for all tokens."""
    rows = probe.twin.get_parameter(rule.rows)[-rule.shared :]
    scores = [SCORES[rule.score](part) for part in (logits, scale_logits(F.linear(probe.tokens, rows), rule))]
    scores = torch.cat([scores[0].gather(-1, probe.output.top_k_index), scores[1]], dim=-1)
    shares = scores / scores.sum(dim=-1, keepdim=True)
    weights = torch.cat([probe.output.top_k_weights, probe.output.shared], dim=-1)
    return close(shares * factor(shares, weights), weights)


def fit_numbers(rule: Rule, scores: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Rule:
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


def factor(values: torch.Tensor, target: torch.Tensor) -> float:
    """The number that `values` has to be multiplied with to come nearest to `target`."""
    values, target = values.double(), target.double()
    return float(f"{((values * target).sum() / values.square().sum()).item():.7g}")
