"""Routing as pure functions: hand-computed tables, and the paper's formula in a few lines of plain torch."""

import math

import pytest
import torch
from torch.nn import functional as F

from modeling_moextend.routing_moextend import (
    SCORES,
    UNUSED,
    Calibration,
    RouterOutput,
    RoutingRecord,
    Rule,
    balance_loss,
    choice_keys,
    route,
    rule_weights,
    rule_with_shared_experts,
    scale_logits,
    shared_expert_weights,
    sparsemixer,
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


def routed(base, new_logits, rule, **options):
    """(logits, weights, index) of `route`."""
    return route(RouterOutput(*base), new_logits, rule, **options)[:3]


def call(logits, new_logits, rule=SOFTMAX, k=2, **options):
    options = {"selection": "compete", "calibrate": "none", **options}
    return routed(base_answer(logits, rule, k), new_logits, rule, **options)


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


def test_an_epsilon_is_added_to_the_sum_and_a_floor_is_its_least_value():
    scores, index = torch.tensor([[0.1, 0.3, 0.2]]), torch.tensor([[1, 0]])  # they sum to 0.4
    weights = rule_weights(scores, index, Rule("sigmoid", True, scale=2.0, epsilon=0.1))
    torch.testing.assert_close(weights, torch.tensor([[1.2, 0.4]]))  # 2 * (0.3, 0.1) / 0.5
    weights = rule_weights(scores, index, Rule("softmax", True, floor=0.8))
    torch.testing.assert_close(weights, torch.tensor([[0.375, 0.125]]))  # (0.3, 0.1) / 0.8


def test_every_score_function_is_what_its_name_says():
    logits = torch.tensor([[0.0, math.log(3.0)]])
    expected = {
        "softmax": [[0.25, 0.75]],
        "sigmoid": [[0.5, 0.75]],
        "sqrtsoftplus": [[math.sqrt(math.log(2.0)), math.sqrt(math.log(4.0))]],  # softplus(x) = log(1 + e^x)
    }
    assert expected.keys() == SCORES.keys()
    for name, value in expected.items():
        torch.testing.assert_close(SCORES[name](logits), torch.tensor(value))


def test_logits_are_multiplied_then_capped():
    products = torch.tensor([1.0, -6.0])
    assert torch.equal(scale_logits(products, Rule("sigmoid", True)), products)
    torch.testing.assert_close(
        scale_logits(products, Rule("sigmoid", True, multiplier=0.5)), torch.tensor([0.5, -3.0])
    )
    capped = [2 * math.tanh(1.0), 2 * math.tanh(-6.0)]  # 2 tanh(2 x / 2)
    torch.testing.assert_close(
        scale_logits(products, Rule("sigmoid", True, multiplier=2.0, softcap=2.0)), torch.tensor(capped)
    )


def test_the_correction_bias_is_added_to_scores_or_to_logits():
    logits, correction = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([0.5, 0.0])
    keys = choice_keys(logits, Rule("sigmoid", True), correction)
    torch.testing.assert_close(keys, torch.tensor([[1.0, 0.75]]))
    keys = choice_keys(logits, Rule("sigmoid", True, corrected="logit"), correction)
    torch.testing.assert_close(keys, torch.tensor([[0.5, math.log(3.0)]]))


def test_sparsemixer_weighs_each_expert_among_those_that_come_near_the_best_that_is_left():
    # jitter 0.1: near means (best - l) / max(|l|, best) <= 0.2.
    # First, 2.0: 1.7 is near (0.15), 1.2 is not (0.4): e^2 / (e^2 + e^1.7) = 0.57444.
    # Then, without it, 1.7: 1.2 is far (0.29): weight 1.
    logits = torch.tensor([[1.2, 2.0, 1.7]])
    weights = sparsemixer(logits, torch.tensor([[1, 2]]), jitter=0.1)
    torch.testing.assert_close(weights, torch.tensor([[0.57444, 1.0]]), atol=1e-5, rtol=0)
    # jitter 0.15, limit 0.3: then 1.2 is near 1.7: e^1.7 / (e^1.7 + e^1.2) = 0.62246.
    weights = sparsemixer(logits, torch.tensor([[1, 2]]), jitter=0.15)
    torch.testing.assert_close(weights, torch.tensor([[0.57444, 0.62246]]), atol=1e-5, rtol=0)


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
    options = {"selection": "compete", "calibrate": "none", "correction_bias": correction}
    assert routed(answer, new_logits, rule, **options)[2].tolist() == [[0, 1]]
    new_logits = torch.tensor([[-0.2]])  # score 0.450, + 0.2 = 0.650 > 0.6: wins with the smaller score
    _, weights, index = routed(answer, new_logits, rule, **options)
    assert index.tolist() == [[0, 3]]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.4502]]) / 0.9502, atol=1e-4, rtol=0)


def test_experts_that_the_bases_groups_ruled_out_stay_out():
    logits = torch.tensor([[2.0, 1.9, 0.0, -1.0]])
    answer = (logits, torch.tensor([[0.6, 0.4]]), torch.tensor([[0, 2]]))  # expert 1's group lost
    _, _, index = routed(answer, torch.tensor([[-3.0]]), Rule("sigmoid", True), selection="compete", calibrate="none")
    assert index.tolist() == [[0, 2]]


def test_the_top_k_is_taken_over_logit_plus_correction_where_the_family_does_so():
    rule = Rule("sigmoid", False, corrected="logit")
    answer = (torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([[0.8808, 0.7311]]), torch.tensor([[0, 1]]))
    correction = torch.tensor([0.0, 0.0, 0.0, 0.5])
    options = {"selection": "compete", "calibrate": "none", "correction_bias": correction}
    assert routed(answer, torch.tensor([[0.4]]), rule, **options)[2].tolist() == [
        [0, 1]
    ]  # 0.9 < 1.0; scores: 1.1 > 0.7
    _, weights, index = routed(answer, torch.tensor([[0.6]]), rule, **options)
    assert index.tolist() == [[0, 3]]
    torch.testing.assert_close(weights, torch.tensor([[0.8808, 0.6457]]), atol=1e-4, rtol=0)


def test_a_scale_for_each_expert_multiplies_its_weight_after_all_else():
    logits, new_logits = logits_of([0.4, 0.1, 0.05, 0.05]), logits_of([0.3, 0.1])
    scale = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.5, 1.0])
    _, weights, index = call(logits, new_logits, expert_scale=scale)
    assert index.tolist() == [[0, 4]]
    torch.testing.assert_close(weights, torch.tensor([[2.0 * 0.4 / 0.7, 0.5 * 0.3 / 0.7]]))


def test_sparsemixer_weighs_new_experts_among_all():
    answer = (torch.tensor([[1.2, 2.0, 1.7]]), torch.tensor([[0.57444, 1.0]]), torch.tensor([[1, 2]]))
    rule = Rule("softmax", False, jitter=0.1)
    _, weights, index = routed(answer, torch.tensor([[1.9]]), rule, selection="compete", calibrate="none")
    assert index.tolist() == [[1, 3]]
    # First, 2.0: 1.9 and 1.7 are near. Then 1.9: 1.7 is near (0.105), 1.2 is not (0.37).
    first = 1 / (1 + math.exp(-0.1) + math.exp(-0.3))
    second = 1 / (1 + math.exp(-0.2))
    torch.testing.assert_close(weights, torch.tensor([[first, second]]))


def test_new_experts_share_one_sum_with_the_experts_that_every_token_uses():
    # Scores 0.6 and 0.3 of the chosen, 0.1 of the shared one, c = 2: over their sum, 1, weights 1.2, 0.6 and 0.2.
    logits = torch.tensor([[0.6, 0.3, 0.2]]).logit()
    answer = RouterOutput(logits, torch.tensor([[1.2, 0.6]]), torch.tensor([[0, 1]]), torch.tensor([[0.2]]))
    rule = rule_with_shared_experts(Rule("sigmoid", True, shared=1), logits, answer)
    torch.testing.assert_close(rule.epsilon, torch.tensor([[0.1]]))
    torch.testing.assert_close(rule.scale, torch.tensor([[2.0]]))
    new_logits, options = torch.tensor([[0.9]]).logit(), {"selection": "compete", "calibrate": "none"}
    _, weights, index = routed(answer[:3], new_logits, rule, **options)
    assert index.tolist() == [[2 + 1, 0]]  # 0.9 and 0.6, with 0.1 a sum of 1.6
    torch.testing.assert_close(weights, torch.tensor([[2 * 0.9 / 1.6, 2 * 0.6 / 1.6]]))
    torch.testing.assert_close(shared_expert_weights(answer, weights), torch.tensor([[2 * 0.1 / 1.6]]))
    _, weights, _ = routed(answer[:3], new_logits, rule, **{**options, "selection": "exclusive"})
    torch.testing.assert_close(weights, torch.tensor([[1.8, 0.0]]))  # what the base's chosen ones weigh
    torch.testing.assert_close(shared_expert_weights(answer, weights), answer[3])
    assert torch.equal(shared_expert_weights(answer, answer[1]), answer[3])


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
    _, weights, index = routed(answer, new_logits, rule, selection="exclusive", calibrate="none")
    assert index.tolist() == expected_index
    torch.testing.assert_close(weights, torch.tensor(expected_weights))


def test_exclusive_with_fewer_slots_than_new_experts_uses_k_of_them():
    _, weights, index = call(logits_of([0.7, 0.3]), logits_of([0.1, 0.2, 0.3]), k=1, selection="exclusive")
    assert index.tolist() == [[4]] and weights.tolist() == [[1.0]]


def test_exclusive_counts_a_scale_for_each_expert_once_in_the_bases_sum():
    answer = (torch.zeros(1, 2), torch.tensor([[0.9, 0.3]]), torch.tensor([[0, 1]]))  # the base's scales are in it
    scale = torch.tensor([1.8, 0.6, 5.0, 7.0])
    _, weights, _ = routed(
        answer, logits_of([0.3, 0.1]), SOFTMAX, selection="exclusive", calibrate="none", expert_scale=scale
    )
    torch.testing.assert_close(weights, torch.tensor([[0.9, 0.3]]))


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
