"""Routing: how a token chooses among base experts and new experts.

Letters: T tokens, E base experts, N new experts of a layer, K experts a token selects, H hidden size.

A base router answers a `RouterOutput`. `route` extends it by N new rows and keeps the base's own, bit for bit, for
every token that selects no new expert.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

WEIGHT_FLOOR = 1e-6  # p + MLP(p) may leave (0, 1]; below this floor a weight could flip sign or the sum could vanish
TINY = 1e-20  # keeps a sum of sigmoid scores that underflowed from dividing by zero
UNUSED = -1  # index of a slot that holds no expert: an exclusive token has only N < K of them to fill


class RouterOutput(NamedTuple):
    """What a router answers for T tokens."""

    router_logits: torch.Tensor  # [T, E]; scores in families whose `Rule.answers` is "scores"
    top_k_weights: torch.Tensor  # [T, K]
    top_k_index: torch.Tensor  # [T, K]
    shared: torch.Tensor | None = None  # [T, S] weights of experts that every token uses, where it gives these too


class Rule(NamedTuple):
    """How a base's routers work: all that new experts need to know of them. How it is found: docs/families.md."""

    # What a token gets of the experts it chose. With a correction bias (DeepSeek-V3, arXiv 2412.19437, Eq. 16), score
    # + bias decides which experts win; the weights are made from the score alone.
    score: str  # function in `SCORES` that makes scores of logits
    renormalise: bool  # weights are divided by their sum; a softmax over only the chosen logits is the same function
    scale: float = 1.0  # factor on the weights (DeepSeek's `routed_scaling_factor`)
    epsilon: float = 0.0  # added to the sum that renormalises (lfm2_moe: 1e-6); 0 where it is too small to matter
    floor: float = 0.0  # the least sum that renormalises (ernie4_5_moe's `moe_norm_min`)
    jitter: float | None = None  # of routers that weigh by SparseMixer (phimoe)
    shared: int = 0  # experts that every token uses, which share one sum with the chosen ones (inkling)
    corrected: str = "score"  # what the correction bias is added to, "score" or "logit" (kolibri1)
    # How a row makes a logit.
    inputs: str = "plain"  # function in `INPUTS` that makes what rows are multiplied with of the hidden state
    multiplier: float = 1.0  # factor on the logits (muse_spark)
    softcap: float = 0.0  # logits are softcap * tanh(logits / softcap); 0: as they are (laguna)
    answers: str = "logits"  # what the router returns first, "logits" or "scores" (gemma4)
    # Where a router keeps what there is one of for every expert; "": nowhere.
    rows: str = "weight"  # parameter [E, H]; its bias, if any, is beside it
    correction: str = ""  # tensor [E], or "argument:name": handed to the router, and kept in its block under that name
    expert_scale: str = ""  # factor [E] on an expert's weight after all else (gemma4)


SCORES = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}

INPUTS = {
    "plain": lambda router, hidden: hidden,
    "normed": lambda router, hidden: router.norm(hidden) * router.scale * router.scalar_root_size,
}


class RoutingRecord(NamedTuple):
    """What one MoE layer decided in one forward pass."""

    logits: torch.Tensor  # [T, E + N], base columns first
    index: torch.Tensor  # [T, K] of the selected experts, `UNUSED` where a slot is empty
    scope: torch.Tensor | None  # [T] bool: tokens in the scope of at least one adapter; `None`: every token
    num_base: int  # E
    num_new: int  # N, of all adapters of the pass
    margins: dict = {}  # adapter name -> [T] routing margins of its gate, in the layer that decides for all
    selections: dict = {}  # adapter name -> how it selects, of all adapters of the pass

    @property
    def selects_new(self) -> torch.Tensor:
        """[T] bool: tokens that select at least one new expert."""
        return (self.index >= self.num_base).any(dim=-1)

    @property
    def gate(self) -> torch.Tensor | None:
        """[T] routing margins of the one gate that decides in this layer; `None` where there is none, or several."""
        return next(iter(self.margins.values())) if len(self.margins) == 1 else None


class Calibration(nn.Module):
    """`w = p + MLP(p)`: gives back what new rows took from the old probabilities (paper, section 3.3; additive form).

    fc1 [hidden, E + N], fc2 [E + N, hidden], no bias; fc2 starts at zero, so that w = p at first.
    """

    def __init__(self, num_experts: int, hidden_size: int, dtype: torch.dtype = torch.float32, device=None):
        super().__init__()
        self.fc1 = nn.Linear(num_experts, hidden_size, bias=False, dtype=dtype, device=device)
        self.fc2 = nn.Linear(hidden_size, num_experts, bias=False, dtype=dtype, device=device)

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """[T, E + N] -> [T, E + N], positive."""
        hidden = F.gelu(self.fc1(scores.to(self.fc1.weight.dtype)))
        return (scores + self.fc2(hidden)).clamp_min(WEIGHT_FLOOR)


def scale_logits(logits, rule):
    """Logits of plain products row @ input: what the family makes of them before scoring."""
    logits = logits if rule.multiplier == 1 else logits * rule.multiplier
    return torch.tanh(logits / rule.softcap) * rule.softcap if rule.softcap else logits


def choice_keys(logits, rule, correction_bias=None, scores=None):
    """[T, E] -> [T, E]: whoever has the highest keys is chosen. `scores`: of the logits, where they are known."""
    scores = SCORES[rule.score](logits) if scores is None and rule.corrected != "logit" else scores
    keys = logits if rule.corrected == "logit" else scores
    return keys if correction_bias is None else keys + correction_bias


def rule_weights(scores, index, rule):
    """Weights [T, K] of the experts `index` [T, K], from scores (or calibrated scores) [T, E + N]."""
    return weights_of_chosen(scores.gather(-1, index), rule)


def weights_of_chosen(scores, rule):
    """Weights [T, K] of chosen experts, from their scores [T, K]."""
    if rule.renormalise:
        total = scores.sum(dim=-1, keepdim=True).clamp_min(max(rule.floor, TINY))
        scores = scores / (total + rule.epsilon if is_set(rule.epsilon, 0) else total)
    return scores * rule.scale if is_set(rule.scale, 1) else scores


def is_set(value, neutral):
    """Whether a number or tensor of a `Rule` is anything but the number that changes nothing."""
    return isinstance(value, torch.Tensor) or value != neutral


def rule_with_shared_experts(rule, base_logits, base):
    """`rule` for the tokens of a base's output whose chosen experts share their sum with shared experts (inkling).

    With weights w of the chosen experts and g of the shared ones, w_i = c s_i / D and g_j = c s_j / D, where D is the
    sum of all those scores s. So c = sum w + sum g, and the shared experts' part of D is sum s_i * sum g / sum w: to
    other experts that are chosen it is an epsilon, and c their scale; [T, 1] each.
    """
    chosen = SCORES[rule.score](base_logits.float()).gather(-1, base.top_k_index).sum(dim=-1, keepdim=True)
    total, rest = (part.float().sum(dim=-1, keepdim=True) for part in (base.top_k_weights, base.shared))
    return rule._replace(epsilon=chosen * rest / total.clamp_min(TINY), scale=total + rest)


def shared_expert_weights(base, weights):
    """Weights [T, S] of the shared experts where chosen ones now weigh `weights` [T, K]: the sum of all stays."""
    same = (weights == base.top_k_weights).all(dim=-1, keepdim=True)
    total, rest = (part.float().sum(dim=-1, keepdim=True) for part in (base.top_k_weights, base.shared))
    left = rest + total - weights.float().sum(dim=-1, keepdim=True)
    return torch.where(same, base.shared, (base.shared.float() * left / rest.clamp_min(TINY)).to(base.shared.dtype))


def sparsemixer(logits, index, jitter):
    """Weights [T, K] by SparseMixer (arXiv 2409.12136) as in evaluation, without its sampling.

    The k-th expert weighs its softmax among those not chosen before it that come near the best of them: not further
    below than 2 * jitter of the larger of the two.
    """
    weights, left = [], logits
    for chosen in index.split(1, dim=-1):
        best = left.amax(dim=-1, keepdim=True)
        far = (best - logits) / torch.maximum(logits.abs(), best) > 2 * jitter
        weights.append(left.masked_fill(far, -torch.inf).softmax(dim=-1).gather(-1, chosen))
        left = left.scatter(-1, chosen, -torch.inf)
    return torch.cat(weights, dim=-1)


def route(
    base: RouterOutput,
    new_logits: torch.Tensor,
    rule: Rule,
    *,
    selection: str,
    calibrate: str,
    calibration: Calibration | None = None,
    correction_bias: torch.Tensor | None = None,
    scope: torch.Tensor | list | None = None,
    expert_scale: torch.Tensor | None = None,
    sizes: tuple | list = (),
) -> RouterOutput:
    """Extends a base router's output by the new rows of one adapter, or of several that share tokens.

    Candidates are the base's own K winners and the N new experts: whatever limited the base's choice (groups,
    correction bias) stays in force, and the top K of these are the top K of all. With several adapters each row is a
    candidate for the tokens in its own adapter's scope, and a token's weights are made as if there were only adapters
    of which it selects an expert.

    Args:
        base: `RouterOutput` of the base's router, with logits [T, E].
        new_logits: [T, N].
        selection, calibrate: `config.selection`, `config.calibration`; several adapters take only `"none"`.
        calibration: the module, unless `calibrate` is `"none"`.
        correction_bias, expert_scale: [E + N], of the families that have one.
        scope: [T] bool, tokens that may use new experts; `None` for every token. With several adapters a list.
        sizes: with several adapters, how many of the N rows belong to each, in order.

    Returns:
        `RouterOutput` with logits [T, E + N]; new experts are E ... E + N - 1.
    """
    num_base = base.router_logits.shape[-1]
    logits = torch.cat([base.router_logits.to(new_logits.dtype), new_logits], dim=-1)
    choose, closed = exclusive if selection == "exclusive" else compete, None
    if len(sizes) > 1:
        every = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        scopes = torch.stack([every if one is None else one for one in scope], dim=-1)  # [T, adapters]
        owner = torch.arange(len(sizes), device=logits.device).repeat_interleave(torch.tensor(sizes).to(logits.device))
        _, index = choose(logits, base, rule, None, correction_bias, None, ~scopes[:, owner])
        closed, scope = ~selected_owners(index, num_base, owner, len(sizes))[:, owner], scopes.any(dim=-1)
    weights, index = choose(logits, base, rule, calibration, correction_bias, expert_scale, closed)
    weights, changed = weights.to(base.top_k_weights.dtype), None if scope is None else scope.unsqueeze(-1)
    # A token is changed where it selects a new expert, as it does by exclusive selection; calibration="all" reweights
    # every token in scope.
    if calibrate != "all" and (selection != "exclusive" or closed is not None):
        selects_new = (index >= num_base).any(dim=-1, keepdim=True)
        changed = selects_new if changed is None else selects_new & changed
    if changed is not None:
        weights = torch.where(changed, weights, base.top_k_weights)
        index = torch.where(changed, index, base.top_k_index)
    return RouterOutput(logits, weights, index)


def selected_owners(index, num_base, owner, num_adapters):
    """[T, adapters] bool: of which adapters a token's `index` [T, K] holds an expert; owner [N]: whose each row is."""
    owners = torch.where(index >= num_base, owner[(index - num_base).clamp(min=0)], num_adapters)
    hits = torch.zeros(len(index), num_adapters + 1, dtype=torch.bool, device=index.device)
    return hits.scatter(-1, owners, True)[:, :num_adapters]


def mask_closed(tensor, closed, value):
    """`tensor` [T, E + N] with `value` in the new columns that are `closed` [T, N] to a token; `None`: none is."""
    if closed is None:
        return tensor
    return tensor.masked_fill(F.pad(closed, (tensor.shape[-1] - closed.shape[-1], 0)), value)


def compete(logits, base, rule, calibration, correction_bias, expert_scale, closed=None):
    """The paper's selection (Eq. 7-10): old and new rows share one top-k. Returns weights and index, [T, K] each."""
    num_base, own = base.router_logits.shape[-1], base.top_k_index
    logits = mask_closed(logits, closed, torch.finfo(logits.dtype).min)
    scores = SCORES[rule.score](logits)
    keys = mask_closed(choice_keys(logits, rule, correction_bias, scores), closed, -torch.inf)
    new_index = torch.arange(num_base, logits.shape[-1], device=logits.device)
    best = torch.cat([keys.gather(-1, own), keys[:, num_base:]], dim=-1).topk(own.shape[-1], dim=-1)  # of [T, K + N]
    index = torch.cat([own, new_index.expand(len(own), -1)], dim=-1).gather(-1, best.indices)
    if keys is scores and calibration is None and rule.jitter is None:
        weights = weights_of_chosen(best.values, rule)
        return weights if expert_scale is None else weights * expert_scale[index], index
    return expert_weights(logits, index, rule, calibration, expert_scale), index


def expert_weights(logits, index, rule, calibration=None, expert_scale=None):
    """Weights [T, K] that the rule gives the experts `index` [T, K], from logits [T, E + N]."""
    if rule.jitter is not None:
        return sparsemixer(logits, index, rule.jitter)
    scores = SCORES[rule.score](logits)
    weights = rule_weights(scores if calibration is None else calibration(scores), index, rule)
    return weights if expert_scale is None else weights * expert_scale[index]


def exclusive(logits, base, rule, calibration, correction_bias, expert_scale, closed=None):
    """New experts only: the best min(K, N), their weights sharing what the base's own weights sum to.

    Families differ in that sum (some do not renormalise, some scale, some have a scale for every expert, which
    therefore counts through the base's sum and not again). Slots past min(K, N) stay `UNUSED`.
    """
    num_base, num_slots = base.router_logits.shape[-1], base.top_k_index.shape[-1]
    new_logits = mask_closed(logits[:, num_base:], closed, torch.finfo(logits.dtype).min)
    new_bias = None if correction_bias is None else correction_bias[num_base:]
    scores = SCORES[rule.score](new_logits)
    keys = mask_closed(choice_keys(new_logits, rule, new_bias, scores), closed, -torch.inf)
    best = keys.topk(min(num_slots, new_logits.shape[-1]), dim=-1)
    chosen = best.values if keys is scores else scores.gather(-1, best.indices)
    weights = weights_of_chosen(chosen, Rule(rule.score, renormalise=True))
    weights, index = weights * base.top_k_weights.float().sum(dim=-1, keepdim=True), best.indices + num_base
    if closed is not None:
        index = index.masked_fill(best.values == -torch.inf, UNUSED)
    empty = num_slots - index.shape[-1]
    return (F.pad(weights, (0, empty)), F.pad(index, (0, empty), value=UNUSED)) if empty else (weights, index)


def balance_loss(
    records: dict[int, RoutingRecord], rule: Rule, selection: str, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Load-balancing loss: mean over MoE layers of E_l * sum_i f_i * P_i (Switch Transformer, 2101.03961, Eq. 4).

    f_i is the share of all selections that fell on expert i, P_i its mean score; 1 when perfectly even, 0 where no
    token counts. With exclusive selection, tokens in scope count over the new experts only.

    `records`: layer index -> `RoutingRecord`; `attention_mask`: [B, S], 0 for padding, `None`: nothing is padded.
    """
    return torch.stack([layer_balance(record, rule, selection, attention_mask) for record in records.values()]).mean()


def layer_balance(record, rule, selection, attention_mask):
    """E_l * sum_i f_i * P_i of one layer, over the tokens that count; groups of experts weighted by their tokens."""
    logits = record.logits.float()
    real = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    if attention_mask is not None:
        real = attention_mask.reshape(-1).to(logits.device).bool()
    if selection == "compete" or record.num_new == 0:
        return group_balance(logits, record.index, real, rule)
    scope = torch.ones_like(real) if record.scope is None else record.scope
    new = group_balance(logits[:, record.num_base :], record.index - record.num_base, real & scope, rule)
    old = group_balance(logits[:, : record.num_base], record.index, real & ~scope, rule)
    share = (real & scope).sum() / real.sum().clamp(min=1)
    return share * new + (1 - share) * old


def group_balance(logits, index, tokens, rule):
    """E * sum_i f_i * P_i over `tokens` [T] and the E experts of `logits` [T, E]; any other `index` is no one's."""
    num_experts = logits.shape[-1]
    weight = tokens.to(logits.dtype)
    scores = SCORES[rule.score](logits)
    if rule.score != "softmax":
        scores = scores / scores.sum(dim=-1, keepdim=True)  # DeepSeek-V3, Eq. 19: shares, so that layers compare
    mean_score = (scores * weight.unsqueeze(-1)).sum(dim=0) / weight.sum().clamp(min=1)
    picks = F.one_hot(torch.where((index >= 0) & (index < num_experts), index, num_experts), num_experts + 1)
    counts = (picks.sum(dim=1)[:, :num_experts] * weight.unsqueeze(-1)).sum(dim=0)
    return num_experts * (counts / counts.sum().clamp(min=1) * mean_score).sum()
