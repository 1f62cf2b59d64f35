"""Finding the rule by which a base's routers work, for a base that was never extended: see docs/families.md.

No family has a row of its own here. A float32 twin of the router with random rows answers random tokens, and what
explains its answer is its rule. So a family of a newer transformers needs nothing here if it follows a known rule, and
is refused, by name and with the reason, if it does not. What is found is kept with every adapter; loading only checks
that it still holds (families_moextend.check_routers).

Letters: T tokens, E base experts, K experts a token selects, H hidden size.
"""

import math

import torch
from torch.nn import functional as F

from ..families_moextend import (
    CORRECTION,
    SHARED,
    NoRule,
    asked_for,
    bias_path,
    close,
    factor,
    family_of,
    is_top_k,
    num_groups,
    plain_class,
    probe_router,
    shares,
    tensor_at,
)
from ..routing_moextend import INPUTS, SCORES, Rule, choice_keys, rule_weights, scale_logits, sparsemixer

EXPERT_SCALE = "per_expert_scale"
FLOOR, SOFTCAP, JITTER = "norm_min", "router_logit_softcapping", "router_jitter_noise"


def complete_rule(recorded, layers, plan):
    """The `Rule` of a base, with the entries that an adapter has `recorded` (a `dict`) as they are there.

    Without a plan (stage align) it is that of the first layer that follows a known rule.

    Raises:
        ValueError: no known rule.
    """
    found = find_rule(min(plan), layers[min(plan)]) if plan else first_rule(layers)
    return Rule(**{**found._asdict(), **recorded})


def first_rule(layers):
    """The rule of the first layer that follows a known one."""
    errors = []
    for index, layer in layers.items():
        try:
            return find_rule(index, layer)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def find_rule(index, layer):
    """The routing rule of decoder layer `index`, by what its router really does.

    Raises:
        ValueError: the router answers otherwise than any known rule; says which family and layer, and why.
    """
    try:
        with torch.no_grad():
            rule, again = fit_rule(layer, seed=0), fit_rule(layer, seed=1)
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


def fit_rule(layer, seed):
    """The `Rule` that explains what a layer's router answers, or `NoRule`; what is random goes by `seed`."""
    rows, correction = rows_of(layer.router, layer.num_experts), correction_at(layer)
    probe = probe_router(layer, rows, correction, seed)
    scale = EXPERT_SCALE if EXPERT_SCALE in probe.twin._parameters else ""
    shared = len(probe.twin.get_parameter(rows)) - layer.num_experts
    known = Rule("softmax", True, shared=shared, rows=rows, correction=correction, expert_scale=scale)
    return find_weights(probe, *find_link(probe, known))


def find_link(probe, known):
    """How rows make what the router answers first: (`known` with that filled in, logits [T, E]), or `NoRule`."""
    twin, answered = probe.twin, probe.output.router_logits
    weight, bias = twin.get_parameter(known.rows), tensor_at(twin, bias_path(known))
    for inputs, transform in INPUTS.items():
        try:
            products = F.linear(transform(twin, probe.tokens), weight, bias)[:, : answered.shape[-1]]
        except AttributeError:
            continue  # this router has not what the transform needs
        for answers in ("logits", *SCORES):
            rule = known._replace(inputs=inputs, answers="logits" if answers == "logits" else "scores")
            rule = rule._replace(softcap=float(twin.__dict__.get(SOFTCAP, 0.0)))
            if answers == "logits" and not rule.softcap:
                rule = rule._replace(multiplier=factor(products, answered))
            logits = scale_logits(products, rule)
            if close(logits if answers == "logits" else SCORES[answers](logits), answered):
                return rule, logits
    raise NoRule("its logits are not weight @ hidden state (+ bias)")


def find_weights(probe, rule, logits):
    """`rule` with what makes choice and weights filled in, or `NoRule`."""
    twin, weights, index = probe.twin, probe.output.top_k_weights, probe.output.top_k_index
    if rule.expert_scale:
        weights = weights / twin.get_parameter(rule.expert_scale)[index]
    chosen = False
    for score in SCORES:
        for corrected in ("score", "logit") if rule.correction else ("score",):
            tried = rule._replace(score=score, corrected=corrected, floor=float(twin.__dict__.get(FLOOR, 0.0)))
            if not is_top_k(index, choice_keys(logits, tried, probe.correction_bias), num_groups(twin)):
                continue
            chosen = True
            if rule.shared and shares(probe, tried, logits):
                return tried
            for renormalise in () if rule.shared else (True, False):
                found = fitted(tried._replace(renormalise=renormalise), SCORES[score](logits), index, weights)
                if close(rule_weights(SCORES[score](logits), index, found), weights):
                    return found
    jitter = twin.__dict__.get(JITTER)
    if jitter is not None and close(sparsemixer(logits, index, jitter), weights):
        return rule._replace(score="softmax", renormalise=False, jitter=jitter)
    raise NoRule("its weights follow no known rule" if chosen else "it does not choose the top k of any known score")


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
