"""What the router of every family computes with E base rows and N new ones, in plain torch.

The sweep's reference. It is written from the families' own modeling files and takes nothing from the library.

Letters: T tokens, E base experts, N new experts, K experts a token selects, H hidden size. Logits are [T, E + N], base
columns first.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

SCORES = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


class Routing(NamedTuple):
    """A family's rule. A string stands for the entry of the config that holds the value, a function is asked.

    words: the rule in the words of the table of families.
    score: name in `SCORES`, or the config's entry with that name.
    norm: whether the weights of the chosen experts are divided by their sum (plus `eps`, at least `floor`).
    rows: where the router keeps its rows. bias: where the correction bias lies, if there is one.
    bias_on: what the correction bias is added to, `"score"` or `"logit"`.
    groups: experts whose keys add up to a group's, 0 where a family has no groups.
    prepare, bend: what is done to hidden states before the rows, and to logits after them.
    choose: the choice and the weights of a rule that is no top-k of scores.
    shared: whether the router has rows of shared experts, which take part in the sum that normalises.
    """

    words: str
    score: str = "softmax"
    norm: bool | str | Callable = True
    scale: float | str | torch.Tensor = 1.0
    rows: str = "weight"
    bias: str = ""
    bias_on: str = "score"
    groups: int = 0
    eps: float | torch.Tensor = 0.0
    floor: float | str = 0.0
    prepare: Callable = lambda router, hidden: hidden
    bend: Callable = lambda logits, config: logits
    choose: Callable | None = None
    shared: bool = False


def value(config, entry):
    """What `entry` of a `Routing` stands for: an entry of the config, a function of the config, or itself."""
    if isinstance(entry, str):
        return getattr(config, entry)
    return entry(config) if callable(entry) else entry


def scores_of(routing, config, logits):
    return SCORES[getattr(config, routing.score, routing.score)](logits)


def keys_of(routing, config, logits, bias):
    """score + correction bias, [T, E + N]: the best of these win."""
    if routing.bias_on == "logit":
        return logits + bias
    scores = scores_of(routing, config, logits)
    return scores if bias is None else scores + bias


def group_count(routing, config):
    """(number of groups, how many of them a token may choose from)."""
    limited = routing.groups and getattr(config, "topk_method", "") != "greedy" and config.n_group
    return (config.n_group, config.topk_group) if limited else (1, 1)


def top_k(routing, config, keys, k):
    """index [T, K] of the best of `keys` [T, E], in the best groups only."""
    count, kept = group_count(routing, config)
    if count > 1:
        groups = keys.unflatten(-1, (count, -1))
        best = groups.topk(routing.groups, dim=-1).values.sum(dim=-1).topk(kept, dim=-1).indices
        allowed = torch.zeros(len(keys), count, dtype=torch.bool).scatter(1, best, True)
        keys = groups.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(1)
    return keys.topk(k, dim=-1).indices


def weigh(routing, config, logits, index, expert_scale):
    """weights [T, K] of the chosen experts; `expert_scale` [E + N] or `None`."""
    weights = scores_of(routing, config, logits).gather(-1, index)
    if value(config, routing.norm):
        weights = weights / (weights.sum(dim=-1, keepdim=True) + routing.eps).clamp(min=value(config, routing.floor))
    weights = weights * value(config, routing.scale)
    return weights if expert_scale is None else weights * expert_scale[index]


def own_choice(routing, config, logits, bias, k, expert_scale):
    """weights [T, K] and index [T, K] of the family's rule over the base's own columns, [T, E]."""
    if routing.choose:
        return routing.choose(config, logits, k)
    index = top_k(routing, config, keys_of(routing, config, logits, bias), k)
    return weigh(routing, config, logits, index, expert_scale), index


def compete(routing, config, logits, bias, num_base, k, expert_scale=None):
    """One top-k of the base's K winners and the new experts, which belong to no group.

    A token that selects no new expert keeps the base's own weights.
    """
    own_bias = None if bias is None else bias[:num_base]
    base_weights, base_index = own_choice(routing, config, logits[:, :num_base], own_bias, k, expert_scale)
    if routing.choose:
        weights, index = routing.choose(config, logits, k)
    else:
        beaten = torch.ones(len(logits), num_base, dtype=torch.bool).scatter(1, base_index, False)
        beaten = F.pad(beaten, (0, logits.shape[-1] - num_base), value=False)
        index = keys_of(routing, config, logits, bias).masked_fill(beaten, -torch.inf).topk(k, dim=-1).indices
        weights = weigh(routing, config, logits, index, expert_scale)
    new = (index >= num_base).any(dim=-1, keepdim=True)
    return torch.where(new, weights, base_weights), torch.where(new, index, base_index)


def exclusive(routing, config, logits, bias, num_base, k, expert_scale=None):
    """New experts only, weighted as their scores, with the sum of the base's own weights. Empty slots: weight 0."""
    own, new_bias = (None, None) if bias is None else (bias[:num_base], bias[num_base:])
    total = own_choice(routing, config, logits[:, :num_base], own, k, expert_scale)[0].sum(dim=-1, keepdim=True)
    new = logits[:, num_base:]
    index = keys_of(routing, config, new, new_bias).topk(min(k, new.shape[-1]), dim=-1).indices
    weights = scores_of(routing, config, new).gather(-1, index)
    weights = total * weights / weights.sum(dim=-1, keepdim=True)
    empty = k - index.shape[-1]
    return F.pad(weights, (0, empty)), F.pad(index + num_base, (0, empty), value=num_base)


# ---------------------------------------------------------------- rules of their own


def sparsemixer(config, logits, k):
    """phimoe, evaluating: a choice's weight is its softmax among the logits near it, without earlier choices."""
    rest, weights, index = logits, [], []
    for _ in range(k):
        best, chosen = rest.max(dim=-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * config.router_jitter_noise
        weights.append(rest.masked_fill(far, -torch.inf).softmax(dim=-1).gather(-1, chosen))
        index.append(chosen)
        rest = rest.scatter(-1, chosen, -torch.inf)
    return torch.cat(weights, dim=-1), torch.cat(index, dim=-1)


def beside_shared(routing, config, router, shared_logits):
    """inkling: (its routing with the shared experts' scores in the sum, what makes their weights of the chosen's)."""
    scores = shared_logits.sigmoid()
    rest, total = scores.sum(dim=-1, keepdim=True), config.route_scale * router.global_scale
    return routing._replace(eps=rest, scale=total), lambda weights: scores / rest * (total - weights.sum(-1, True))


def gemma_input(router, hidden):
    """gemma4 norms and scales what its router reads."""
    normed = hidden * (hidden.pow(2).mean(dim=-1, keepdim=True) + router.eps).rsqrt()
    return normed * router.scale * hidden.shape[-1] ** -0.5


def softcap(logits, config):
    cap = config.moe_router_logit_softcapping
    return cap * torch.tanh(logits / cap) if cap else logits


SOFTMAX = Routing("softmax → top-k → renormalise")
SOFTMAX_SWITCH = SOFTMAX._replace(words="softmax → top-k → renormalise if `norm_topk_prob`", norm="norm_topk_prob")
SOFTMAX_BIAS = SOFTMAX._replace(
    words="softmax → top-k of score + bias → renormalise", bias="moe_statics", floor="moe_norm_min"
)
SOFTMAX_GROUPS = Routing(
    "softmax → top-k in the best groups → renormalise if `norm_topk_prob` → scale",
    norm="norm_topk_prob",
    scale="routed_scaling_factor",
    groups=2,
)
SOFTMAX_PLAIN = Routing("softmax → top-k", norm=False)
SOFTMAX_PLAIN_GROUPS = Routing(
    "softmax → top-k (in the best groups) → scale", norm=False, scale="routed_scaling_factor", groups=1
)
CHOSEN = Routing("top-k → softmax over the chosen")
SIGMOID = Routing(
    "sigmoid → top-k of score + bias (in the best groups) → renormalise if `norm_topk_prob` → scale",
    score="sigmoid",
    norm="norm_topk_prob",
    scale="routed_scaling_factor",
    bias="router",
    groups=2,
)
SIGMOID_BIAS = Routing("sigmoid → top-k of score + bias → renormalise → scale", score="sigmoid", bias="router")
ARGUMENT = SIGMOID_BIAS._replace(bias="block")

ROUTING = {  # family -> rule
    **dict.fromkeys(("mixtral", "minimax", "qwen3_5_moe", "qwen3_vl_moe"), SOFTMAX),
    "hunyuan_v1_moe": SOFTMAX._replace(rows="wg.weight"),
    **dict.fromkeys(
        ("olmoe", "flex_olmo", "mellum", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen4_exp"),
        SOFTMAX_SWITCH,
    ),
    "ernie4_5_moe": SOFTMAX_BIAS,
    "mistral4": SOFTMAX_GROUPS,
    "mistral_large4": SOFTMAX_GROUPS._replace(
        words="softmax → top-k in the best groups → renormalise → scale", norm=True
    ),
    "jamba": SOFTMAX_PLAIN,
    **dict.fromkeys(("deepseek_v2", "deepseek_ocr2", "unlimited_ocr"), SOFTMAX_PLAIN_GROUPS),
    **dict.fromkeys(
        ("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "aria", "gpt_oss"), CHOSEN
    ),
    "cohere2_moe": Routing(
        "top-k → softmax over the chosen, or sigmoid → renormalise if `norm_topk_prob`",
        score="expert_selection_fn",
        norm=lambda config: config.expert_selection_fn == "softmax" or config.norm_topk_prob,
    ),
    **dict.fromkeys(
        (
            *("axk1", "axk2", "bailing_hybrid", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note", "exaone_moe"),
            *("glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm_moe_dsa", "hy_v4", "kimi_linear"),
            *("mimo_v2_flash", "nemotron_h", "solar_open"),
        ),
        SIGMOID,
    ),
    "beam": SIGMOID._replace(
        words="sigmoid → top-k of score + bias (in the best groups) → renormalise if `norm_topk_prob`", scale=1.0
    ),
    "minimax_m3_vl": SIGMOID_BIAS,
    "laguna": SIGMOID_BIAS._replace(bend=softcap),
    "inkling2": SIGMOID_BIAS._replace(score="scoring_func", scale="route_scale"),
    "flint": Routing("sigmoid → top-k → renormalise if `norm_topk_prob`", score="sigmoid", norm="norm_topk_prob"),
    "minimax_m2": ARGUMENT,
    "hy_v3": ARGUMENT._replace(scale="router_scaling_factor"),
    "afmoe": ARGUMENT._replace(rows="gate.weight", scale="route_scale"),
    "lfm2_moe": ARGUMENT._replace(
        words="sigmoid → top-k of score + bias → renormalise if `norm_topk_prob` → scale",
        norm="norm_topk_prob",
        scale="routed_scaling_factor",
        eps=1e-6,
    ),
    "deepseek_v4": Routing(
        "√softplus → top-k of score + bias → renormalise → scale (not in hash layers)",
        score="scoring_func",
        scale="routed_scaling_factor",
        bias="router",
    ),
    "kolibri1": Routing(
        "top-k of logit + bias → sigmoid → renormalise if `norm_topk_prob`",
        score="sigmoid",
        norm="norm_topk_prob",
        bias="router",
        bias_on="logit",
    ),
    "muse_spark": SIGMOID_BIAS._replace(
        words="logits × `output_multiplier` → sigmoid → top-k of score + bias → renormalise → scale",
        scale="routed_scaling_factor",
        bend=lambda logits, config: logits * config.output_multiplier,
    ),
    "gemma4": SOFTMAX._replace(
        words="normed input → softmax → top-k → renormalise → × scale of each expert",
        rows="proj.weight",
        prepare=gemma_input,
    ),
    "phimoe": Routing("sparsemixer", choose=sparsemixer),
    "inkling": SIGMOID_BIAS._replace(
        words="sigmoid → top-k of score + bias → renormalise together with the shared experts → scale", shared=True
    ),
}
