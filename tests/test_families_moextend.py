"""Finding rules: from routers of known families, from routers made up here, and refusals of those that fit none."""

from types import SimpleNamespace

import pytest
import torch
from conftest import COMMON, FAMILIES, make_base
from families import FAMILIES as EVERY_FAMILY
from families import auto_class, make_config, make_family
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.attaching import rules
from modeling_moextend.attaching.rules import REASONS, find_rule, find_rules
from modeling_moextend.families_moextend import MoELayer, check_routers, family_of, find_moe_layers, is_top_k, sibling
from modeling_moextend.routing_moextend import SCORES, Rule, rule_weights

E_, H, K = 6, 16, 2


class Router(nn.Module):
    """A router of any rule, written out: what `find_rule` is to find from its answers alone."""

    def __init__(self, rule, top_k=K, groups=1, keep=1):
        super().__init__()
        self.__dict__["rule"], self.top_k, self.num_group, self.keep = rule, top_k, groups, keep
        self.weight = nn.Parameter(torch.zeros(E_, H))
        if rule.correction:
            self.register_buffer("e_score_correction_bias", torch.zeros(E_))

    def forward(self, hidden_states):
        rule = self.rule
        logits = F.linear(hidden_states, self.weight) * rule.multiplier
        scores = SCORES[rule.score](logits)
        keys = scores if rule.corrected == "score" else logits
        keys = keys + self.e_score_correction_bias if rule.correction else keys
        if self.num_group > 1:
            groups = keys.unflatten(-1, (self.num_group, -1))
            kept = torch.zeros_like(groups[..., 0]).scatter(-1, groups.amax(-1).topk(self.keep).indices, 1).bool()
            keys = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1)
        index = keys.topk(self.top_k).indices
        weights = scores.gather(-1, index)
        if rule.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + rule.epsilon)
        return logits, weights * rule.scale, index


def layer_of(router, **tensors):
    block = nn.Module()
    for name, tensor in tensors.items():
        block.register_buffer(name, tensor)
    return MoELayer(router, SimpleNamespace(), E_, block)


@pytest.mark.parametrize("score", sorted(SCORES))
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("corrected", ["", "score", "logit"])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_rule_that_made_an_answer_is_found(score, renormalise, scale, corrected, groups):
    rule = Rule(score, renormalise, scale, corrected=corrected or "score")
    rule = rule._replace(correction="e_score_correction_bias" if corrected else "")
    assert find_rule(0, layer_of(Router(rule, groups=groups, keep=2))) == rule


@pytest.mark.parametrize(
    "rule",
    [
        Rule("sigmoid", True, 1.5, epsilon=1e-6),
        Rule("sigmoid", True, epsilon=0.02),
        Rule("sqrtsoftplus", True, multiplier=0.25),
        Rule("softmax", False, multiplier=3.0),
    ],
)
def test_an_epsilon_and_a_multiplier_are_found(rule):
    assert find_rule(0, layer_of(Router(rule))) == rule


@pytest.mark.parametrize("score", sorted(SCORES))
def test_one_expert_a_token_does_not_hide_the_score(score):
    """Renormalised, K = 1 always weighs 1: only with a second expert does the answer say what made it."""
    assert find_rule(0, layer_of(Router(Rule(score, True, 2.5), top_k=1))) == Rule(score, True, 2.5)


def test_rows_may_lie_in_a_child_and_the_correction_bias_in_the_block():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(H, E_)

        def forward(self, hidden_states, some_bias):
            logits = self.inner(hidden_states)
            index = (logits.sigmoid() + some_bias).topk(K).indices
            return logits, logits.sigmoid().gather(-1, index), index

    rule = find_rule(0, layer_of(Asks(), some_bias=torch.zeros(E_)))
    assert rule == Rule("sigmoid", False, rows="inner.weight", correction="argument:some_bias")


def test_the_search_needs_no_weights_and_leaves_the_random_state_alone():
    with torch.device("meta"):
        layer = layer_of(Router(Rule("sigmoid", True, 2.5)))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert find_rule(0, layer) == Rule("sigmoid", True, 2.5)
    assert torch.equal(torch.get_rng_state(), before)


class Sharing(Router):
    """Two shared experts, whose rows come after the others', are weighed together with the chosen ones."""

    def __init__(self, change=1.0):
        super().__init__(Rule("sigmoid", True, 1.5, correction="e_score_correction_bias"))
        self.n_shared_experts, self.change = 2, change
        self.weight = nn.Parameter(torch.zeros(E_ + 2, H))

    def forward(self, hidden_states):
        logits = F.linear(hidden_states, self.weight)
        index = (logits[:, :E_].sigmoid() + self.e_score_correction_bias).topk(K).indices
        scores = torch.cat([logits[:, :E_].sigmoid().gather(-1, index), logits[:, E_:].sigmoid()], dim=-1)
        weights = 1.5 * scores / scores.sum(-1, keepdim=True)
        return logits[:, :E_], weights[:, :K], index, weights[:, K:] * self.change


def test_shared_experts_among_the_rows_are_found():
    rule = find_rule(0, layer_of(Sharing()))
    assert rule == Rule("sigmoid", True, shared=2, correction="e_score_correction_bias")
    with pytest.raises(ValueError, match="its weights follow no known rule"):
        find_rule(0, layer_of(Sharing(change=1.1)))


def test_routers_of_one_kind_and_setting_are_asked_once(monkeypatch):
    base = make_base("qwen3_moe")
    layers, asked = find_moe_layers(base.get_decoder()), []
    rule, ask = find_rule(0, layers[0]), rules.find_rule
    monkeypatch.setattr(rules, "find_rule", lambda index, layer: asked.append(index) or ask(index, layer))
    assert dict(find_rules(layers, [0, 1, 3])) == {0: rule, 1: rule, 3: rule}
    assert asked == [0]
    layers[2].router.norm_topk_prob = False
    assert dict(find_rules(layers, [0, 1, 2, 3])) == {0: rule, 1: rule, 2: rule._replace(renormalise=False), 3: rule}
    assert asked == [0, 0, 2]
    with pytest.raises(ValueError, match="Layer 2 of qwen3_moe can't be extended .*: its weights are made otherwise"):
        check_routers(layers, [0, 1, 2, 3], rule)


# ---------------------------------------------------------------- refusals


def changed(change):
    """A softmax router whose answer goes through `change`."""
    router = Router(Rule("softmax", True))
    forward = type(router).forward
    router.__class__ = type("Changed", (Router,), {"forward": lambda self, x: change(*forward(self, x), x)})
    return router


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda logits, weights, index, x: (logits, weights.sqrt(), index), "its weights follow no known rule"),
        (lambda logits, weights, index, x: (logits + x[:, :1], weights, index), "its logits are not weight @ hidden"),
        (lambda logits, weights, index, x: (logits, weights, 5 - index), "it does not choose the top k"),
        (lambda logits, weights, index, x: (logits, weights), "it does not answer"),
        (lambda logits, weights, index, x: (logits[:, 1:], weights, index), r"it answers shapes \[64, 5\], \[64, 2\]"),
        (lambda logits, weights, index, x: 1 / 0, r"asked for random tokens it fails \(ZeroDivisionError"),
    ],
)
def test_a_router_that_follows_no_known_rule_is_refused_with_the_reason(change, reason):
    with pytest.raises(ValueError, match=f"Layer 7 of .* can't be extended. Changed does not follow .*: {reason}"):
        find_rule(7, layer_of(changed(change)))


def floored():
    """Has the least sum of a rule as an attribute, and does not go by it: renormalised softmax, top 2 of 6."""
    router = Router(Rule("softmax", True))
    router.norm_min = 0.36  # equal scores sum to 1/3, others to more
    return router


@pytest.mark.parametrize(
    ("make", "seen_by"),
    [
        pytest.param(floored, "FLAT", id="flat"),
        pytest.param(
            lambda: changed(lambda logits, weights, *rest: (logits, weights.clamp_min(0.01), *rest[:1])),
            "SHARP",
            id="sharp",
        ),
    ],
)
def test_what_only_flat_or_only_sharp_tokens_show_is_seen(make, seen_by, monkeypatch):
    with pytest.raises(ValueError, match="its weights follow no known rule"):
        find_rule(0, layer_of(make()))
    monkeypatch.setattr(rules, seen_by, 1.0)
    assert find_rule(0, layer_of(make())).renormalise


@pytest.mark.parametrize("changed_bias", [F.relu, torch.abs, lambda bias: bias.clamp(max=0.3)])
def test_a_correction_bias_of_either_sign_is_asked_about(changed_bias):
    rule = Rule("sigmoid", True, correction="e_score_correction_bias")

    def forward(self, hidden_states):
        logits = F.linear(hidden_states, self.weight)
        index = (logits.sigmoid() + changed_bias(self.e_score_correction_bias)).topk(K).indices
        return logits, rule_weights(logits.sigmoid(), index, rule), index

    router = Router(rule)
    router.__class__ = type("Changed", (Router,), {"forward": forward})
    with pytest.raises(ValueError, match="it does not choose the top k"):
        find_rule(0, layer_of(router))


@pytest.mark.parametrize("kind", [torch.long, torch.bool])
def test_whole_numbers_of_a_router_are_asked_about(kind):
    def forward(self, hidden_states):
        logits, weights, index = Router.forward(self, hidden_states)
        return logits, weights * (1 + self.level.sum()), index

    router = Router(Rule("softmax", True))
    router.__class__ = type("Changed", (Router,), {"forward": forward})
    router.register_buffer("level", torch.ones(8, dtype=kind))
    with pytest.raises(ValueError, match="numbers of its rule lie in a tensor of its own"):
        find_rule(0, layer_of(router))


@pytest.mark.parametrize("index", [E_, -1])
def test_an_index_that_is_no_expert_of_the_layer_is_refused(index):
    router = changed(lambda logits, weights, chosen, x: (logits, weights, torch.full_like(chosen, index)))
    with pytest.raises(ValueError, match="it answers indices that are none of its 6 experts"):
        find_rule(0, layer_of(router))


@pytest.mark.parametrize("way", ["attribute", "child", "correction"])
def test_routers_that_differ_in_something_of_their_own_are_asked_each(way, monkeypatch):
    """An attribute whose name begins with an underscore; one of a child; where the correction bias lies."""
    ways = {
        "attribute": lambda layer: setattr(layer.router, "_amount", 3.0),
        "child": lambda layer: setattr(layer.router.inner, "amount", 3.0),
        "correction": lambda layer: layer.block.register_buffer("input_ids", torch.zeros(E_)),
    }
    own, asked = Rule("softmax", True), []
    monkeypatch.setattr(rules, "find_rule", lambda index, layer: asked.append(index))
    layers = {index: layer_of(MayHash(own)) for index in range(3)}
    for layer in layers.values():
        layer.router._amount, layer.router.inner = 2.0, nn.Identity()
        layer.router.inner.amount = 2.0
    ways[way](layers[2])
    list(find_rules(layers, [0, 1, 2]))
    assert asked == [0, 2]


def test_torchs_own_linear_is_no_router():
    """Some blocks weigh a shared expert by a `gate` beside their `router`."""
    base = make_base()
    block = base.model.layers[2].mlp
    block.router, block.gate = block.gate, nn.Linear(32, 1)
    assert find_moe_layers(base.get_decoder())[2].router is block.router


def test_a_router_that_chooses_by_more_than_the_hidden_state_is_refused():
    router = Router(Rule("softmax", True))
    router.__class__ = type("Hash", (Router,), {"forward": lambda self, x, input_ids: None})
    with pytest.raises(ValueError, match="its choice also depends on input_ids"):
        find_rule(0, layer_of(router))


class MayHash(Router):
    """Goes by token ids where its block hands them over, and its setting says so."""

    def forward(self, hidden_states, input_ids=None):
        answer = super().forward(hidden_states)
        if not self.use_ids or input_ids is None:
            return answer
        return answer[0], answer[1], (input_ids.unsqueeze(-1) + torch.arange(K)) % E_


@pytest.mark.parametrize("uses", [True, False])
def test_an_optional_argument_is_refused_where_the_answer_goes_by_it(uses):
    router = MayHash(Rule("softmax", True))
    router.use_ids = uses
    if not uses:
        assert find_rule(0, layer_of(router)) == Rule("softmax", True)
        return
    with pytest.raises(ValueError, match="its choice also depends on input_ids"):
        find_rule(0, layer_of(router))


class Balanced(MixtralTopKRouter):
    """Chooses by scores and a buffer [E] with a name that nobody knows."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("load", torch.linspace(-0.5, 0.5, config.num_local_experts))

    def forward(self, hidden_states):
        logits = F.linear(hidden_states, self.weight)
        scores = logits.sigmoid()
        index = (scores + self.load).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, index)
        return logits, weights / weights.sum(dim=-1, keepdim=True), index


class Learned(MixtralTopKRouter):
    """Weighs by a number of its checkpoint, a parameter."""

    def __init__(self, config):
        super().__init__(config)
        self.amount = nn.Parameter(torch.tensor([2.0]))

    def forward(self, hidden_states):
        logits, weights, index = super().forward(hidden_states)
        return logits, weights * self.amount, index


class Kept(Learned):
    """The same number as a buffer."""

    def __init__(self, config):
        MixtralTopKRouter.__init__(self, config)
        self.register_buffer("amount", torch.tensor(2.0))


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        (Balanced, "it does not choose the top k of any known score"),
        (Learned, "numbers of its rule lie in a tensor of its own"),
        (Kept, "numbers of its rule lie in a tensor of its own"),
    ],
)
def test_a_router_that_goes_by_a_tensor_nobody_knows_is_refused(router, reason):
    base = make_base()
    base.model.layers[2].mlp.gate = router(base.config)
    layers = find_moe_layers(base.get_decoder())
    with pytest.raises(ValueError, match=f"Layer 2 of .* can't be extended. {router.__name__} .*: {reason}"):
        find_rule(2, layers[2])


def test_a_router_without_rows_is_refused():
    router = Router(Rule("softmax", True))
    router.weight = nn.Parameter(torch.zeros(E_ + 1, H))
    with pytest.raises(ValueError, match="it has 0 parameters with a row for each expert, not one"):
        find_rule(0, layer_of(router))


def test_groups_are_those_the_router_chose_from():
    keys = torch.tensor([[0.9, 0.1, 0.8, 0.7]])
    assert is_top_k(torch.tensor([[0, 2]]), keys, 1)
    assert is_top_k(torch.tensor([[2, 3]]), keys, 2) and not is_top_k(torch.tensor([[2, 3]]), keys, 1)
    assert not is_top_k(torch.tensor([[0, 3]]), keys, 2)  # 2 is of the group that 3 was chosen from
    assert not is_top_k(torch.tensor([[0, 0]]), keys, 1)


# ---------------------------------------------------------------- families


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_rule_of_a_family_is_found(family):
    correction = {"correction": "e_score_correction_bias"}
    expected = {
        "deepseek_v3": Rule("sigmoid", True, 2.5, **correction),
        "olmoe": Rule("softmax", False),
        "qwen2_moe": Rule("softmax", False),
    }
    base = make_base(family)
    layer = find_moe_layers(base.get_decoder())[0]
    assert find_rule(0, layer) == expected.get(family, Rule("softmax", True))
    assert family_of(layer.router) == family


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_recorded_rule_is_held_against_the_router(family):
    """As after an update of transformers: each entry that the router goes by is noticed, by its own weights."""
    layers = find_moe_layers(make_base(family).get_decoder())
    rule = find_rule(1, layers[1])
    check_routers(layers, [1], rule)
    changes = [
        {"score": "sigmoid" if rule.score == "softmax" else "softmax"},
        {"renormalise": not rule.renormalise},
        {"scale": 1.001 * rule.scale},
        {"epsilon": 0.01},
        {"multiplier": 0.5},
        {"softcap": 3.0},
        {"inputs": "normed"},
        {"answers": "scores"},
        {"rows": "inner.weight"},
        {"correction": "" if rule.correction else "e_score_correction_bias"},
        {"expert_scale": "per_expert_scale"},
        {"jitter": 0.01},
    ]
    unnoticed = []
    for change in changes:
        if not rule.renormalise and change == {"epsilon": 0.01}:
            continue  # there is no sum
        try:
            check_routers(layers, [1], rule._replace(**change))
            unnoticed.append(change)
        except ValueError as error:
            assert f"Layer 1 of {family} can't be extended by this adapter" in str(error)
    assert not unnoticed


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(EVERY_FAMILY.keys() - REASONS.keys() - {"openai_privacy_filter"}))
def test_rules_are_found_in_every_setting_and_without_weights(family):
    for variant in (None, *EVERY_FAMILY[family].variants):
        layers = find_moe_layers(make_family(family, variant).get_decoder())
        index = max(layers)
        rule = find_rule(index, layers[index])
        with torch.device("meta"):
            config = make_config(family, variant)
            empty = find_moe_layers(auto_class(config).from_config(config).get_decoder())[index]
        assert empty.experts.down_proj.is_meta
        assert find_rule(index, empty) == rule
        check_routers(layers, [index], rule)
        check_routers({index: empty}, [index], rule)


@pytest.mark.parametrize("family", sorted(REASONS))
def test_what_no_rule_can_carry_is_refused_with_the_reason(family):
    with pytest.raises(ValueError, match=rf"\({family}\) can't be extended: {REASONS[family][:30]}"):
        MoExtendForCausalLM.from_base(make_family(family), {1: [0]})


def test_a_layer_with_two_moe_blocks_is_refused():
    base = make_base()
    base.model.layers[1].other = nn.Module()
    base.model.layers[1].other.gate, base.model.layers[1].other.experts = (
        base.model.layers[1].mlp.gate,
        base.model.layers[1].mlp.experts,
    )
    with pytest.raises(
        ValueError, match=r"MixtralModel \(mixtral\) can't be extended: layer 1 has several MoE blocks"
    ):
        find_moe_layers(base.get_decoder())


def test_a_hash_layer_is_refused_by_its_number():
    config = AutoConfig.for_model(
        "deepseek_v4",
        **{**COMMON, "num_hidden_layers": 2, "num_key_value_heads": 1},
        mlp_layer_types=["hash_moe", "moe"],
        layer_types=["sliding_attention"] * 2,
    )
    with torch.device("meta"):
        layers = find_moe_layers(AutoModelForCausalLM.from_config(config).get_decoder())
    with pytest.raises(ValueError, match="Layer 0 of deepseek_v4 can't be extended.*input_ids"):
        find_rule(0, layers[0])
    assert find_rule(1, layers[1]).score == "sqrtsoftplus"


def test_a_siblings_parameters_stand_in_the_modules_order():
    """A set's order would differ from process to process, and an optimiser's saved state goes by place."""
    module = nn.Module()
    for name in "hgfedcba":
        module.register_parameter(name, nn.Parameter(torch.zeros(1)))
    assert list(sibling(module, {name: torch.ones(2) for name in "abcdefghz"})._parameters) == [*"hgfedcba", "z"]
