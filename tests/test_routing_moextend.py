"""Routing as pure functions: hand-computed tables, and the paper's formula in a few lines of plain torch."""

from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, make_base
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_moextend.layers_moextend import find_moe_layers, find_rule
from modeling_moextend.routing_moextend import FAMILIES as FAMILY_RULES
from modeling_moextend.routing_moextend import (
    UNUSED,
    Calibration,
    RoutingRecord,
    Rule,
    balance_loss,
    family_rule,
    probe_rule,
    route,
    rule_weights,
)

SOFTMAX = Rule("softmax", renormalise=True)


def logits_of(*shares):
    """Logits whose softmax is `shares`, one row a token."""
    return torch.tensor(shares).log()


def base_answer(logits, rule, k=2):
    """What a base router of this rule answers: its own top-k."""
    scores = logits.softmax(-1) if rule.score == "softmax" else logits.sigmoid()
    index = scores.topk(k, dim=-1).indices
    return logits, rule_weights(scores, index, rule), index


def call(logits, new_logits, rule=SOFTMAX, k=2, **options):
    options = {"selection": "compete", "calibrate": "none", **options}
    return route(base_answer(logits, rule, k), new_logits, rule, **options)


@pytest.fixture
def constant_calibration():
    """A stand-in for `Calibration` that adds 0.1 to every score."""
    return lambda scores: scores + 0.1


# ---------------------------------------------------------------- weights and rules


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule("softmax", True), [[0.6, 0.4]]),
        (Rule("softmax", False), [[0.3, 0.2]]),
        (Rule("sigmoid", True, 2.5), [[1.5, 1.0]]),
        (Rule("sigmoid", False, 2.0), [[0.6, 0.4]]),
    ],
)
def test_weights_are_gathered_then_renormalised_then_scaled(rule, expected):
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    torch.testing.assert_close(rule_weights(scores, torch.tensor([[2, 1]]), rule), torch.tensor(expected))


def test_scores_that_underflowed_give_zero_weights_and_no_nan():
    assert rule_weights(torch.zeros(1, 3), torch.tensor([[0, 1]]), SOFTMAX).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_probing_finds_the_rule_that_made_an_answer(score, renormalise, scale):
    rule = Rule(score, renormalise, scale)
    answer = base_answer(torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), rule)
    assert probe_rule(answer) == rule


def test_probing_gives_up_on_an_unknown_rule():
    logits, weights, index = base_answer(torch.randn(64, 6), SOFTMAX)
    assert probe_rule((logits, weights.sqrt(), index)) is None


def test_a_familys_rule_takes_the_routers_own_switches():
    router = SimpleNamespace(norm_topk_prob=False, routed_scaling_factor=2.5)
    assert family_rule("olmoe", router) == Rule("softmax", False, 1.0)
    assert family_rule("deepseek_v3", router) == Rule("sigmoid", False, 2.5)
    assert family_rule("mixtral", router) == Rule("softmax", True, 1.0)
    assert family_rule("no_such_family", router) is None


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_rule_probed_from_the_router_is_the_familys(family):
    layer = find_moe_layers(make_base(family).get_decoder())[0]
    expected = {
        "deepseek_v3": Rule("sigmoid", True, 2.5),
        "olmoe": Rule("softmax", False),
        "qwen2_moe": Rule("softmax", False),
    }
    assert find_rule(family, layer) == expected.get(family, SOFTMAX)
    assert find_rule("a family without a row", layer) == expected.get(family, SOFTMAX)


def test_with_one_expert_a_token_a_familys_rule_needs_only_to_explain_the_router():
    """Renormalised, K = 1 always weighs 1: softmax explains it as well as the family's sigmoid."""
    layer = find_moe_layers(make_base("deepseek_v3").get_decoder())[0]
    layer.router.top_k = 1
    assert find_rule("deepseek_v3", layer) == Rule("sigmoid", True, 2.5)


def test_a_familys_row_that_its_router_contradicts_is_an_error(monkeypatch):
    monkeypatch.setitem(FAMILY_RULES, "mixtral", ("softmax", False, 1.0))
    layer = find_moe_layers(make_base().get_decoder())[0]
    with pytest.raises(ValueError, match="FAMILIES says Rule.* of mixtral, but the router does Rule"):
        find_rule("mixtral", layer)


UNSET = {  # what some families' default configs leave open
    "deepseek_v2": {
        "num_experts_per_tok": 2,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
    },
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 2},
}


@pytest.mark.parametrize("family", sorted(FAMILY_RULES.keys() - FAMILIES.keys()))
def test_every_other_row_of_the_table_is_what_the_familys_router_does(family):
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **UNSET.get(family, {})))
    layer = next(iter(find_moe_layers(base.get_decoder()).values()))
    assert find_rule(family, layer) == family_rule(family, layer.router)


# ---------------------------------------------------------------- compete


def test_compete_takes_the_top_k_of_old_and_new_rows_together():
    logits = logits_of([0.4, 0.1, 0.05, 0.05], [0.5, 0.3, 0.05, 0.05])
    new_logits = logits_of([0.3, 0.1], [0.06, 0.04])
    all_logits, weights, index = call(logits, new_logits)
    assert index.tolist() == [[0, 4], [0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.4 / 0.7, 0.3 / 0.7], [0.5 / 0.8, 0.3 / 0.8]]))
    assert torch.equal(all_logits, torch.cat([logits, new_logits], dim=-1))


def test_without_renormalising_a_token_with_a_new_expert_keeps_the_shares_of_the_wider_softmax():
    _, weights, index = call(
        logits_of([0.4, 0.1, 0.05, 0.05]), logits_of([0.3, 0.1]), Rule("softmax", renormalise=False)
    )
    assert index.tolist() == [[0, 4]]
    torch.testing.assert_close(weights, torch.tensor([[0.4, 0.3]]))


@pytest.mark.parametrize("rule", [SOFTMAX, Rule("softmax", False), Rule("sigmoid", True, 2.5)])
@pytest.mark.parametrize("calibrate", ["none", "routed"])
def test_a_token_without_new_experts_keeps_the_bases_answer_bit_for_bit(rule, calibrate, constant_calibration):
    logits = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    new_logits = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    _, old_weights, old_index = base_answer(logits, rule)
    calibration = constant_calibration if calibrate == "routed" else None
    _, weights, index = call(logits, new_logits, rule, calibrate=calibrate, calibration=calibration)
    stays = ~(index >= 6).any(dim=-1)
    assert 20 < int(stays.sum()) < 180
    assert torch.equal(index[stays], old_index[stays])
    assert torch.equal(weights[stays], old_weights[stays])


def test_calibration_all_reweights_every_token_and_routed_only_those_with_a_new_expert(constant_calibration):
    logits = logits_of([0.4, 0.1, 0.05, 0.05], [0.5, 0.3, 0.05, 0.05])
    new_logits = logits_of([0.3, 0.1], [0.06, 0.04])
    calibrated = {
        name: call(logits, new_logits, calibrate=name, calibration=constant_calibration)[1]
        for name in ("all", "routed")
    }
    torch.testing.assert_close(calibrated["all"], torch.tensor([[0.5 / 0.9, 0.4 / 0.9], [0.6, 0.4]]))
    torch.testing.assert_close(calibrated["routed"], torch.tensor([[0.5 / 0.9, 0.4 / 0.9], [0.625, 0.375]]))


def test_experts_are_chosen_by_p_and_not_by_calibrated_weights():
    favours_the_last = lambda scores: scores + torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 5.0])  # noqa: E731
    _, _, index = call(
        logits_of([0.4, 0.1, 0.05, 0.05]), logits_of([0.3, 0.1]), calibrate="all", calibration=favours_the_last
    )
    assert index.tolist() == [[0, 4]]


def test_the_correction_bias_decides_who_wins_and_never_enters_the_weights():
    rule = Rule("sigmoid", True)
    logits = torch.tensor([[0.0, 0.0, 0.0]])  # scores 0.5; the base's winners come from its own router
    answer = (logits, torch.tensor([[0.5, 0.5]]), torch.tensor([[0, 1]]))
    correction = torch.tensor([0.3, 0.1, 0.0, 0.2])
    new_logits = torch.tensor([[-1.0]])  # score 0.269, + 0.2 = 0.469 < 0.6: loses
    options = {"selection": "compete", "calibrate": "none", "correction": correction}
    assert route(answer, new_logits, rule, **options)[2].tolist() == [[0, 1]]
    new_logits = torch.tensor([[-0.2]])  # score 0.450, + 0.2 = 0.650 > 0.6: wins with the smaller score
    _, weights, index = route(answer, new_logits, rule, **options)
    assert index.tolist() == [[0, 3]]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.4502]]) / 0.9502, atol=1e-4, rtol=0)


def test_experts_that_the_bases_groups_ruled_out_stay_out():
    logits = torch.tensor([[2.0, 1.9, 0.0, -1.0]])
    answer = (logits, torch.tensor([[0.6, 0.4]]), torch.tensor([[0, 2]]))  # expert 1's group lost
    _, _, index = route(answer, torch.tensor([[-3.0]]), Rule("sigmoid", True), selection="compete", calibrate="none")
    assert index.tolist() == [[0, 2]]


# ---------------------------------------------------------------- exclusive


@pytest.mark.parametrize(
    ("num_new", "expected_index", "expected_weights"),
    [
        (1, [[4, UNUSED]], [[0.8, 0.0]]),
        (2, [[4, 5]], [[0.6, 0.2]]),
        (3, [[6, 4]], [[0.5, 0.3]]),
    ],
)
def test_exclusive_tokens_share_the_bases_sum_among_the_best_new_experts(num_new, expected_index, expected_weights):
    new_logits = logits_of([0.3, 0.1, 0.5])[:, :num_new]
    answer = (torch.zeros(1, 4), torch.tensor([[0.5, 0.3]]), torch.tensor([[1, 2]]))  # sums to 0.8: olmoe's way
    rule = Rule("softmax", renormalise=False)
    _, weights, index = route(answer, new_logits, rule, selection="exclusive", calibrate="none")
    assert index.tolist() == expected_index
    torch.testing.assert_close(weights, torch.tensor(expected_weights))


def test_exclusive_with_fewer_slots_than_new_experts_uses_k_of_them():
    _, weights, index = call(logits_of([0.7, 0.3]), logits_of([0.1, 0.2, 0.3]), k=1, selection="exclusive")
    assert index.tolist() == [[4]] and weights.tolist() == [[1.0]]


@pytest.mark.parametrize(("selection", "calibrate"), [("compete", "all"), ("compete", "none"), ("exclusive", "none")])
def test_tokens_out_of_scope_keep_the_bases_answer_bit_for_bit(selection, calibrate, constant_calibration):
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    _, old_weights, old_index = base_answer(logits, SOFTMAX)
    scope = torch.arange(50) % 2 == 1
    calibration = constant_calibration if calibrate == "all" else None
    _, weights, index = call(
        logits,
        torch.full((50, 2), 9.0),
        selection=selection,
        calibrate=calibrate,
        calibration=calibration,
        scope=scope,
    )
    assert torch.equal(index[~scope], old_index[~scope]) and torch.equal(weights[~scope], old_weights[~scope])
    assert (index[scope] >= 6).all()


# ---------------------------------------------------------------- calibration


def test_calibration_is_p_plus_a_two_layer_gelu_mlp():
    calibration = Calibration(5, 16)
    with torch.no_grad():
        calibration.fc2.weight.normal_(std=0.05)
    p = torch.rand(7, 5)
    first, second = calibration.fc1.weight, calibration.fc2.weight
    assert first.shape == (16, 5) and second.shape == (5, 16) and len(list(calibration.parameters())) == 2
    torch.testing.assert_close(calibration(p), (p + F.gelu(p @ first.T) @ second.T).clamp_min(1e-6))


@pytest.mark.parametrize("rule", [SOFTMAX, Rule("softmax", False), Rule("sigmoid", True, 2.5)])
def test_a_calibration_far_below_zero_leaves_weights_finite_and_not_negative(rule):
    calibration = Calibration(6, 16)
    with torch.no_grad():
        calibration.fc1.weight.fill_(1.0)
        calibration.fc2.weight.fill_(-100.0)
        calibration.fc2.weight[0].fill_(0.0)
    logits, new_logits = torch.randn(30, 4), torch.randn(30, 2)
    _, weights, _ = call(logits, new_logits, rule, calibrate="all", calibration=calibration)
    assert weights.isfinite().all() and (weights >= 0).all()
    if rule.renormalise:
        torch.testing.assert_close(weights.sum(-1), torch.full((30,), rule.scale))


# ---------------------------------------------------------------- load balancing


def record(logits, index, num_new=0, scope=None):
    num_base = logits.shape[-1] - num_new
    return RoutingRecord(
        logits, torch.tensor(index), None if scope is None else torch.tensor(scope), num_base, num_new
    )


def test_balance_loss_averages_layers_of_different_widths():
    # Layer 0, E = 2: f = (3/4, 1/4), P = (0.7, 0.3): 2 * (0.525 + 0.075) = 1.2
    narrow = record(logits_of([0.8, 0.2], [0.6, 0.4]), [[0, 1], [0, 0]])
    # Layer 1, E = 2, N = 2: f = (1/2, 0, 1/4, 1/4), P = (0.5, 0.1, 0.3, 0.1): 4 * (0.25 + 0.075 + 0.025) = 1.4
    wide = record(logits_of([0.4, 0.1, 0.4, 0.1], [0.6, 0.1, 0.2, 0.1]), [[0, 2], [0, 3]], num_new=2)
    loss = balance_loss({0: narrow, 1: wide}, SOFTMAX, "compete")
    assert loss.item() == pytest.approx(1.3)


def test_balance_loss_is_one_where_selections_are_even():
    even = record(torch.zeros(4, 4), [[0, 1], [2, 3], [0, 1], [2, 3]])
    assert balance_loss({0: even}, SOFTMAX, "compete").item() == pytest.approx(1.0)


def test_balance_loss_leaves_padding_out():
    padded = record(logits_of([0.01, 0.99], [0.8, 0.2], [0.99, 0.01], [0.6, 0.4]), [[1, 1], [0, 1], [0, 0], [0, 0]])
    mask = torch.tensor([[0, 1], [0, 1]])  # [B, S]: tokens 1 and 3 are real: the narrow layer from above
    assert balance_loss({0: padded}, SOFTMAX, "compete", mask).item() == pytest.approx(1.2)


def test_balance_loss_is_zero_and_finite_where_no_token_counts():
    nothing = record(torch.zeros(2, 2), [[0, 1], [0, 1]])
    assert balance_loss({0: nothing}, SOFTMAX, "compete", torch.zeros(1, 2)).item() == 0.0


def test_exclusive_balance_counts_tokens_in_scope_over_the_new_experts_only():
    logits = torch.cat([logits_of(*[[0.7, 0.3]] * 4), logits_of(*[[0.9, 0.1]] * 4)], dim=-1)
    # Out of scope (3 of 4 tokens), over the old: f = (1, 0), P = (0.7, 0.3): 2 * 0.7 = 1.4
    # In scope (1 of 4), over the new: f = (1, 0), P = (0.9, 0.1): 2 * 0.9 = 1.8; empty slots are no one's
    index = [[0, 0], [0, 0], [2, UNUSED], [0, 0]]
    mixed = record(logits, index, num_new=2, scope=[False, False, True, False])
    expected = 0.75 * 1.4 + 0.25 * 1.8
    assert balance_loss({0: mixed}, SOFTMAX, "exclusive").item() == pytest.approx(expected)


def test_exclusive_balance_of_an_unextended_layer_is_the_ordinary_one():
    narrow = record(logits_of([0.8, 0.2], [0.6, 0.4]), [[0, 1], [0, 0]], scope=[True, True])
    assert balance_loss({0: narrow}, SOFTMAX, "exclusive").item() == pytest.approx(1.2)


def test_sigmoid_scores_count_as_shares_of_their_sum():
    scores = torch.tensor([[0.8, 0.2], [0.3, 0.1]])  # shares (0.8, 0.2) and (0.75, 0.25): P = (0.775, 0.225)
    loss = balance_loss({0: record(scores.logit(), [[0], [0]])}, Rule("sigmoid", True), "compete")
    assert loss.item() == pytest.approx(2 * 0.775)
