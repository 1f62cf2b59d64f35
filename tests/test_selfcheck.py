"""The self-check at attach: silent where all is well, on every device and dtype, and an error by name where not."""

import contextlib
import re

import pytest
import torch
from conftest import FAMILIES, PAPER, batch, make_base, shake
from families import make_family
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.attaching.rules import find_rule
from modeling_moextend.attaching.selfcheck import (
    TOLERANCE,
    bit_equal,
    check_rule,
    run_layer,
    sample_tokens,
    self_checked,
)
from modeling_moextend.attaching.start_values import copy_sources
from modeling_moextend.families_moextend import find_moe_layers, in_order
from modeling_moextend.layers_moextend import RouterExtension, add_experts
from modeling_moextend.routing_moextend import RouterOutput

PLAN = {2: [3, 0]}


def attach(base, plan=None):
    return MoExtendForCausalLM.from_base(base, plan or PLAN, **{**PAPER, "calibration": "none"})


@contextlib.contextmanager
def counted(monkeypatch):
    """Counts how often rows are compared with their sources."""
    compared = []
    original = RouterExtension.logits

    def counting(self, *args):
        compared.append(self.layer)
        return original(self, *args)

    monkeypatch.setattr(RouterExtension, "logits", counting)
    yield compared
    monkeypatch.setattr(RouterExtension, "logits", original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_it_tries_every_extended_layer_and_passes(family, dtype, monkeypatch):
    with counted(monkeypatch) as compared:
        attach(make_base(family, dtype), {1: [0], 3: [2, 2]})
    assert compared == [1, 3]


def test_layers_added_later_are_tried_as_well(monkeypatch):
    model = attach(make_base())
    with counted(monkeypatch) as compared:
        model.extend({3: [1]})
    assert compared == [3]


def test_it_moves_neither_the_random_state_nor_modes(monkeypatch):
    base = make_base().train()
    before = torch.get_rng_state()
    model = attach(base)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.base.modules())


def test_there_is_nothing_to_try_on_the_meta_device(monkeypatch):
    base = make_base().to("meta")
    assert (
        sample_tokens(find_moe_layers(base.get_decoder())[2], find_rule(2, find_moe_layers(base.get_decoder())[2]))
        is None
    )
    with counted(monkeypatch) as compared:
        attach(base)
    assert compared == []


# One family for each place where tensors of a row lie: router, child of the router, block, and what the input goes by.
@pytest.mark.parametrize("family", ["mixtral", "hunyuan_v1_moe", "ernie4_5_moe", "minimax_m2", "gemma4"])
def test_offloaded_layers_are_tried_where_they_compute(family, monkeypatch, tmp_path):
    base = make_family(family)
    base.save_pretrained(tmp_path / "base")
    parts = [f"model.{name}" for name, _ in base.model.named_children() if name != "layers"]
    parts += [f"model.layers.{index}" for index in range(len(base.model.layers))]
    device_map = {**dict.fromkeys([*parts, "lm_head"], "cpu"), "model.layers.1": "disk"}
    options = {"device_map": device_map, "offload_folder": str(tmp_path / "off"), "scope": "all"}
    with counted(monkeypatch) as compared:
        model = MoExtendForCausalLM.from_base(str(tmp_path / "base"), {1: [3, 0]}, **options)
    assert compared == [1] and find_moe_layers(model.get_decoder())[1].experts.down_proj.is_meta
    near = MoExtendForCausalLM.from_base(base, {1: [3, 0]}, scope="all")
    for name, tensor in near.adapter_tensors().items():
        assert torch.equal(tensor, model.adapter_tensors()[name]), name
    shake(near), shake(model)
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, near(**batch()).logits)


def test_a_row_that_is_no_copy_is_refused_by_family_and_layer(monkeypatch):
    original = RouterExtension.logits

    def off(self, router, hidden, told, names):
        base_logits, new = original(self, router, hidden, told, names)
        return base_logits, {name: logits * 1.05 for name, logits in new.items()}

    monkeypatch.setattr(RouterExtension, "logits", off)
    for dtype in (torch.float32, torch.bfloat16):
        base = make_base("olmoe", dtype)
        with pytest.raises(ValueError, match="Layer 2 of olmoe can't be extended: a copied router row gives another"):
            attach(base)
        assert not any("moextend" in module._modules for module in base.modules())


def test_where_a_router_answers_scores_their_logits_are_tried_too(monkeypatch):
    """gemma4's rows and their copies may agree, and yet be no logits of the scores that it answers."""
    original = RouterExtension.logits

    def off(self, *args):
        base_logits, new = original(self, *args)
        return base_logits * 1.5, {name: logits * 1.5 for name, logits in new.items()}

    monkeypatch.setattr(RouterExtension, "logits", off)
    with pytest.raises(ValueError, match="Layer 1 of gemma4 can't be extended: a copied router row gives another"):
        attach(make_family("gemma4"), {1: [3, 0]})


class Numbered(MixtralExperts):
    """Each expert's output is multiplied with a number of its own, kept in `amounts` [E]."""

    def forward(self, hidden_states, index, weights):
        return super().forward(hidden_states, index, weights * self.amounts[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kept_as", ["attribute", "buffer", "parameter"])
def test_experts_that_are_told_apart_by_more_than_parameters_are_refused(kept_as, dtype):
    base = make_base(dtype=dtype)
    experts, amounts = base.model.layers[2].mlp.experts, torch.linspace(0.5, 2.0, base.config.num_local_experts)
    experts.__class__ = Numbered
    put = {"attribute": object.__setattr__, "buffer": nn.Module.register_buffer, "parameter": setattr}[kept_as]
    put(experts, "amounts", nn.Parameter(amounts) if kept_as == "parameter" else amounts)
    if kept_as == "parameter":  # which is copied like the others
        model = attach(base, {2: [5, 3]})
        assert torch.equal(model.adapter_tensors()["layers.2.experts.amounts"], amounts[[5, 3]])
        return
    reason = "a new expert can't run" if kept_as == "buffer" else "a copied expert gives another output"
    with pytest.raises(ValueError, match=f"Layer 2 of .* can't be extended: {reason}"):
        attach(base, {2: [5, 3]})
    assert not any("moextend" in module._modules for module in base.modules())


def with_experts(base, forward):
    """`base`, whose layer 2 has experts with another forward."""
    base.model.layers[2].mlp.experts.__class__ = type("Tomorrows", (MixtralExperts,), {"forward": forward})
    return base


class Routed(MixtralTopKRouter):
    """Sigmoid scores plus a correction bias, in a way that `correct` says; weights times `factor`."""

    correct, factor = staticmethod(lambda bias: bias), 1.0

    def forward(self, hidden_states):
        logits = nn.functional.linear(hidden_states, self.weight)
        scores = logits.float().sigmoid()
        index = (scores + self.correct(self.e_score_correction_bias)).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, index)
        return logits, weights / weights.sum(dim=-1, keepdim=True) * self.factor, index


SUM = MixtralExperts.forward
MIXED = "the output of its experts is not the sum of what each of them gives"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x, index, weights: x + SUM(self, x, index, weights),
        lambda self, x, index, weights: 30 * torch.tanh(SUM(self, x, index, weights) * 100),
        lambda self, x, index, weights: SUM(self, x, index, weights.softmax(dim=-1)),
        lambda self, x, index, weights: SUM(self, x, index, weights * torch.tensor([1.0, 0.5], dtype=weights.dtype)),
    ],
    ids=["residual", "tanh", "softmax over k", "by slot"],
)
def test_experts_whose_output_is_no_sum_over_the_chosen_are_refused(forward, dtype):
    with pytest.raises(ValueError, match=f"Layer 2 of .* can't be extended: {MIXED}"):
        attach(with_experts(make_base(dtype=dtype), forward), {2: [5, 3]})


CHOICE, WEIGHTS = "it does not choose the top k", "numbers of its rule lie in|its weights are made otherwise"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"correct": staticmethod(nn.functional.relu)}, CHOICE),
        ({"correct": staticmethod(torch.abs)}, CHOICE),
        ({"factor": property(lambda self: 2.0**self.level)}, WEIGHTS),
        ({"factor": property(lambda self: 1.0 + self.doubled)}, WEIGHTS),
    ],
    ids=["as found", "relu of bias", "size of bias", "whole number", "truth value"],
)
def test_a_router_that_goes_by_its_numbers_in_another_way_than_the_rule_is_refused(change, reason):
    base = make_base()
    router = base.model.layers[2].mlp.gate
    router.__class__ = type("Tomorrows", (Routed,), change)
    router.register_buffer("e_score_correction_bias", torch.tensor([-0.4, -0.4, 0.3, -0.2, 0.1, -0.3]))
    router.register_buffer("level", torch.tensor(3))
    router.register_buffer("doubled", torch.tensor(False))
    if reason is None:
        assert attach(base).config.routing_rule["correction"] == "e_score_correction_bias"
        return
    with pytest.raises(ValueError, match=f"Layer 2 of .* can't be extended.*({reason})"):
        attach(base)


def test_the_layers_own_numbers_are_held_against_the_rule(monkeypatch):
    """Whatever a search among made-up numbers lets through."""
    rule = find_rule(2, find_moe_layers(make_base().get_decoder())[2])
    for wrong, reason in (
        (rule._replace(score="sigmoid"), "its weights are not those of its rule"),
        (rule._replace(scale=1.01), "its weights are not those of its rule"),
        (rule._replace(multiplier=-1.0), "a copied router row gives another logit"),
    ):
        base = make_base()
        model = attach(base, {1: [0]})
        layers = find_moe_layers(base.get_decoder())
        with pytest.raises(ValueError, match=f"Layer 2 of mixtral can't be extended: {reason}"):
            with self_checked(layers, {2: [3, 0]}, wrong, "b"):
                layers[2].router.moextend.rule = wrong
                add_experts(layers[2], "b", copy_sources(layers[2], [3, 0], model.config), model.config)


def test_a_choice_that_is_not_the_rules_is_refused():
    layer = find_moe_layers(make_base().get_decoder())[2]
    layer.router.__class__ = Routed
    layer.router.register_buffer("e_score_correction_bias", torch.linspace(2, 0, 6))
    rule = find_rule(2, layer)
    tokens = sample_tokens(layer, rule)
    output = RouterOutput(*run_layer(layer, rule, tokens)[:-1])
    tolerance = TOLERANCE[torch.float32]
    check_rule(layer, rule, output.router_logits, output, tolerance)
    with pytest.raises(AssertionError, match="it does not choose the top k by its rule"):
        check_rule(layer, rule._replace(correction=""), output.router_logits, output, tolerance)


class Probabilities(MixtralTopKRouter):
    """Answers softmax scores in place of logits, made by rows of its own."""

    def forward(self, hidden_states):
        logits, weights, index = super().forward(hidden_states)
        return logits.softmax(dim=-1), weights, index


def test_a_router_that_answers_scores_may_have_rows_of_its_own():
    models = []
    for kind in (MixtralTopKRouter, Probabilities):
        base = make_base()
        for layer in base.model.layers:
            layer.mlp.gate.__class__ = kind
        models.append(shake(attach(base)))
    assert models[1].config.routing_rule["answers"] == "scores"
    with torch.no_grad():
        found = [model(**batch(), output_router_logits=True) for model in models]
    torch.testing.assert_close(found[1].logits, found[0].logits)
    for scores, logits in zip(found[1].router_logits, found[0].router_logits, strict=True):
        torch.testing.assert_close(
            scores.softmax(dim=-1), logits.softmax(dim=-1)
        )  # of layers without new experts, too


def test_a_block_may_call_its_experts_by_the_interfaces_names():
    experts = find_moe_layers(attach(make_base()).get_decoder())[2].experts
    x, index, weights = torch.randn(4, 32), torch.tensor([[0, 6]] * 4), torch.full((4, 2), 0.5)
    named = experts(hidden_states=x, top_k_index=index, top_k_weights=weights)
    assert torch.equal(named, experts(x, index, weights))


def test_experts_that_drop_at_random_in_training_are_tried_as_they_evaluate():
    def dropping(self, x, index, weights):
        return SUM(self, nn.functional.dropout(x, 0.5, self.training), index, weights)

    base = with_experts(make_base(), dropping).train()
    attach(base, {2: [5, 3]})
    attach(with_experts(make_base(), dropping), {2: [5, 3]})
    assert all(module.training for module in base.modules())


def test_each_source_is_compared_by_its_own_size():
    """Not by that of the largest, beside which any other would pass."""
    base = make_base()
    base.model.layers[2].mlp.experts.__class__ = Numbered
    object.__setattr__(base.model.layers[2].mlp.experts, "amounts", torch.tensor([1e5, 3.0, 1, 1, 1, 1]))
    with pytest.raises(ValueError, match="a copied expert gives another output"):
        attach(base, {2: [0, 3]})


@pytest.mark.parametrize("shape", [[], [1], [4, 8]])
def test_a_parameter_of_experts_that_is_not_one_an_expert_is_refused_by_name(shape):
    base = make_base()
    base.model.layers[2].mlp.experts.shared = nn.Parameter(torch.ones(shape))
    with pytest.raises(
        ValueError, match=re.escape(f"MixtralExperts.shared has the shape {shape}, not one part for each")
    ):
        attach(base)
    assert not any("moextend" in module._modules for module in base.modules())


def test_a_router_that_draws_at_random_in_training_is_tried_as_it_evaluates():
    base = make_family("phimoe").train()
    router = find_moe_layers(base.get_decoder())[1].router
    router.input_jitter_noise = 0.5
    assert not torch.equal(
        router(torch.ones(8, base.config.hidden_size))[0], router(torch.ones(8, base.config.hidden_size))[0]
    )
    attach(base, {1: [3, 0]})
    assert router.training


def test_a_layer_that_changes_when_it_is_attached_is_refused(monkeypatch):
    original = RouterExtension.forward

    def leaks(self, router, hidden, answer, given=None):
        logits, weights, index = original(self, router, hidden, answer, given)
        return logits, weights * (1.01 if len(self.adapters) else 1.0), index

    monkeypatch.setattr(RouterExtension, "forward", leaks)
    with pytest.raises(ValueError, match="Layer 2 of mixtral.*with the new experts off it does not answer as before"):
        attach(make_base())


def test_what_is_compared_is_router_and_experts():
    layer = find_moe_layers(make_base("deepseek_v3").get_decoder())[0]
    rule = find_rule(0, layer)
    tokens = sample_tokens(layer, rule)
    told, weights, index, output = run_layer(layer, rule, tokens)
    assert [part.shape for part in (told, weights, index, output)] == [(8, 6), (8, 2), (8, 2), (8, 32)]
    expected = in_order(layer.router(tokens[0]))
    assert bit_equal((told, weights, index), expected)
    assert bit_equal((output,), (layer.experts(tokens[1], index, weights),))
    assert bit_equal((torch.tensor([torch.nan]),), (torch.tensor([torch.nan]),))
    assert not bit_equal((torch.zeros(1),), (torch.ones(1),)) and not bit_equal((torch.zeros(1),), (torch.zeros(2),))
