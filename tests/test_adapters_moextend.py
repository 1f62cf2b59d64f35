"""Several adapters on one base: switching leaves no trace, sharing a token keeps guarantee 3, rows have their own."""

import copy
import threading
import time

import pytest
import torch
from conftest import PAPER, batch, frozen_copy, make_base, make_encoder, new_spans, rounding, shake
from families import make_family
from safetensors.torch import load_file
from test_gate_moextend import open_gate
from transformers import DynamicCache

from modeling_moextend import MoExtendForCausalLM, MoExtendModel
from modeling_moextend.adapter_file_moextend import FILE
from modeling_moextend.families_moextend import find_moe_layers, in_order, plain_class
from modeling_moextend.layers_moextend import Extension
from modeling_moextend.routing_moextend import RouterOutput, Rule, choice_keys, route
from modeling_moextend.scope_moextend import IMAGES, STATE, cached_state, merge_overlapping
from modeling_moextend.tools.hashes import base_tensors_hash

IMAGE = 96
NONE = {"calibration": "none"}
COMPETE = {"scope": "all", "selection": "compete", **NONE}
EXCLUSIVE = {"scope": "all", "selection": "exclusive", **NONE}
GATED = {"scope": "gate", "selection": "exclusive", "gate_hidden_size": 8, "deltas": (), **NONE}
GATED_COMPETE = {**GATED, "selection": "compete"}
SEEING = {"scope": "modality", "selection": "exclusive", **NONE}
SEEING_COMPETE = {**SEEING, "selection": "compete"}
SEEING_ALL = {"encoder": True, **EXCLUSIVE}
DELTAS = {"deltas": {"embedding": 4, "attention": 2, "output": 0}}
PLANS = {"a": {1: [0, 3], 3: [2, 5]}, "b": {0: [1, 4], 1: [2, 0], 3: [4]}, "c": {1: [5, 1], 2: [3, 3]}}
SOME = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss")  # one a rule: softmax that renormalises, and one that does
# not; sigmoid with groups and correction bias; biases and other experts
TOGETHER = {  # what two adapters are that may be active together
    "compete": (COMPETE, COMPETE),
    "exclusive": (EXCLUSIVE, EXCLUSIVE),
    "gates": (GATED, GATED),
    "gate and all": (GATED_COMPETE, COMPETE),
    "images and gate": (SEEING, GATED),
    "images and all": (SEEING_COMPETE, COMPETE),
    "deltas": ({**SEEING, **DELTAS}, {**GATED, **DELTAS}),
}


def make_once(tmp_path_factory):
    """`made("a", choices, family)`: the folder of an adapter with new experts far from the base's, made once."""
    folders = {}

    def make(name, choices, family="mixtral"):
        key = name, str(choices), family
        if key not in folders:
            torch.manual_seed(ord(name))
            given = {**choices, "encoder": make_encoder() if sees(choices) else None}
            model = MoExtendForCausalLM.from_base(make_base(family), PLANS[name], **given)
            shake(model, seed=ord(name), std=0.6)
            if choices["scope"] == "gate":
                open_gate(model, seed=ord(name))
            folders[key] = tmp_path_factory.mktemp(name)
            model.save_pretrained(folders[key])
        return folders[key]

    return make


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_once(tmp_path_factory)


def sees(choices):
    return choices["scope"] == "modality" or "encoder" in choices


def load(made, *adapters, family="mixtral", **base):
    """A model with the adapters (name, choices) on one base, loaded in this order; the first one is active."""
    (first, choices), *others = adapters
    eyes = {"encoder": make_encoder()}
    given = eyes if sees(choices) else {}
    folder = made(first, choices, family)
    model = MoExtendForCausalLM.from_pretrained(folder, base=make_base(family, **base), adapter_name=first, **given)
    for name, choices in others:
        given = eyes if sees(choices) else {}
        model.load_adapter(made(name, choices, family), adapter_name=name, **given)
    return model


def text(rows=4, length=12, seed=0):
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def inputs(seed=0, images=True):
    """Four rows; with images, one image each in the first and the third."""
    ids = text(seed=seed)
    if not images:
        return {"input_ids": ids}
    ids[0, 2:6] = ids[2, 5:9] = IMAGE
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "pixel_values": pixels}


def given_to(choices, seed=0):
    return inputs(seed, images=any(map(sees, choices)))


@torch.no_grad()
def logits(model, given, **options):
    return model(**given, **options).logits


def moe_layer(model, index):
    return find_moe_layers(model.get_decoder())[index]


def tokens(count=300, seed=0):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(layer, x):
    """weights [T, K], index [T, K] and output [T, H] of one MoE layer's router and experts."""
    _, weights, index = in_order(layer.router(x))
    return weights, index, layer.experts(x, index, weights)


# ---------------------------------------------------------------- guarantee 2: off is the base, one is one


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [*((kind, "eager") for kind in sorted(TOGETHER)), ("compete", "batched_mm"), ("exclusive", "grouped_mm")],
)
def test_off_with_several_loaded_is_the_base_bit_for_bit(kind, implementation, made):
    a, b = TOGETHER[kind]
    model = load(made, ("a", a), ("b", b), experts_implementation=implementation)
    expected = logits(frozen_copy(make_base(experts_implementation=implementation)), batch())
    model.set_adapter(["a", "b"])
    assert not torch.equal(logits(model, given_to([a, b])), logits(make_base(), inputs(images=False)))
    with model.disable_adapter():
        assert torch.equal(logits(model, batch()), expected)
        assert model.active_adapters() == []
    model.disable_adapters()
    assert torch.equal(logits(model, batch()), expected)
    model.enable_adapters()
    assert model.active_adapters() == ["a", "b"]


@pytest.mark.parametrize("kind", sorted(TOGETHER))
@pytest.mark.parametrize("name", ["a", "b"])
def test_one_active_adapter_is_as_if_no_other_were_loaded(kind, name, made):
    choices = dict(zip("ab", TOGETHER[kind], strict=True))
    model = load(made, ("a", choices["a"]), ("b", choices["b"]), ("c", EXCLUSIVE))
    model.set_adapter("c")
    model.set_adapter(name)
    alone = load(made, (name, choices[name]))
    given = given_to([choices[name]])
    assert torch.equal(logits(model, given), logits(alone, given))
    assert model.config.to_dict() == alone.config.to_dict()


@pytest.mark.parametrize("family", SOME)
def test_one_active_adapter_is_as_if_no_other_were_loaded_in_every_rule(family, made):
    model = load(made, ("a", COMPETE), ("b", COMPETE), family=family)
    assert torch.equal(logits(model, batch()), logits(load(made, ("a", COMPETE), family=family), batch()))


@pytest.mark.parametrize("kind", sorted(TOGETHER))
def test_the_order_of_loading_and_of_setting_does_not_matter(kind, made):
    a, b = TOGETHER[kind]
    c = b if b["scope"] != "modality" else a
    loaded, found = {"a": a, "b": b, "c": c}, []
    for order in ("abc", "cab", "bca"):
        model = load(made, *((name, loaded[name]) for name in order))
        model.set_adapter(list(order))
        found.append(logits(model, given_to([a, b])))
    assert all(torch.equal(found[0], other) for other in found[1:])


# ---------------------------------------------------------------- guarantee 3


@pytest.mark.parametrize("choices", [COMPETE, EXCLUSIVE], ids=["compete", "exclusive"])
@pytest.mark.parametrize("family", SOME)
def test_a_token_that_selects_no_expert_of_b_is_as_if_b_were_not_loaded(family, choices, made):
    both, x = load(made, ("a", choices), ("b", choices), family=family), tokens()
    both.set_adapter(["a", "b"])
    alone = load(made, ("a", choices), family=family)
    with both.record_routing() as records:
        weights, index, found = run(moe_layer(both, 1), x)
    assert records[1].num_new == 4 and records[1].logits.shape == (300, 10)
    expected_weights, expected_index, expected = run(moe_layer(alone, 1), x)
    b = (index >= 8).any(dim=-1)  # base 0-5, a 6 and 7, b 8 and 9
    assert 20 < int(b.sum()) < 280 and (index[b] < 8).any()  # some tokens use experts of both
    assert ((index >= 6) & (index < 8)).any(dim=-1)[~b].any()
    assert torch.equal(index[~b].sort().values, expected_index[~b].sort().values)
    bound = rounding(10, 2) * records[1].logits.abs().max().item()  # exp(logit - max), sums over E + N and K
    torch.testing.assert_close(weights[~b].sort().values, expected_weights[~b].sort().values, rtol=bound, atol=0)
    error = (found[~b] - expected[~b]).norm(dim=-1) / expected[~b].norm(dim=-1)
    assert error.max() < bound + rounding(32, 24, 2)  # an expert sums over H, then I, a token over K
    assert not torch.allclose(found[b], expected[b], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("choices", [COMPETE, EXCLUSIVE], ids=["compete", "exclusive"])
@pytest.mark.parametrize("family", SOME)
@torch.no_grad()
def test_a_layer_in_which_no_token_selects_an_expert_of_b_is_bit_equal_to_one_without_b(family, choices, made):
    both, x = load(made, ("a", choices), ("b", choices), family=family), tokens()
    both.set_adapter(["a", "b"])
    alone = load(made, ("a", choices), family=family)
    x = x[~(run(moe_layer(both, 1), x)[1] >= 8).any(dim=-1)]
    assert len(x) > 20
    for context in (torch.no_grad(), torch.enable_grad(), both.record_routing()):
        with context:
            assert all(map(torch.equal, run(moe_layer(both, 1), x), run(moe_layer(alone, 1), x)))


@pytest.mark.parametrize("kind", ["compete", "gates", "gate and all", "images and gate", "images and all"])
def test_a_batch_that_selects_no_expert_of_b_gives_the_logits_of_a_model_without_b(kind, made):
    a, b = TOGETHER[kind]
    both, alone = load(made, ("a", a), ("b", b)), load(made, ("a", a))
    both.set_adapter(["a", "b"])
    with torch.no_grad():  # b turns up seldom
        for name, tensor in both.adapter_tensors("b").items():
            if name.endswith("router.weight"):
                tensor.mul_(0.1)
        if b["scope"] == "gate":
            moe_layer(both, 0).router.moextend.adapters["b"].gate.fc2.bias.sub_(2.0)
    used = []
    for seed in range(24):
        given = given_to([a, b], seed)
        given = {name: tensor[:1, :6] if name == "input_ids" else tensor[:1] for name, tensor in given.items()}
        with both.record_routing() as records:
            logits(both, given)
        used.append(any(selects(records, both, "b")))
        same = torch.equal(logits(both, given), logits(alone, given))
        assert same or used[-1]
    assert 3 <= sum(used) <= 21


def selects(records, model, name):
    """For each layer that `name` extends: whether a token of the pass selected one of its experts."""
    for layer, record in records.items():
        spans = new_spans(model, layer)
        if name in spans:
            first, stop = spans[name]
            yield bool(((record.index >= first) & (record.index < stop)).any())


def test_each_adapters_experts_are_used_in_its_own_scope_only(made):
    model = load(made, ("a", GATED), ("b", GATED), ("c", SEEING))
    model.set_adapter(["a", "b", "c"])
    with model.record_routing() as records, torch.no_grad():
        model(**inputs())
    gates = {"a": records[1].margins["a"] > 0, "b": records[0].margins["b"] > 0}
    image = torch.zeros(4, 12, dtype=torch.bool)
    image[0, 2:], image[2, 5:] = True, True
    scopes = {**gates, "c": image.reshape(-1)}
    assert records[1].gate is not None and records[1].scope.equal(scopes["a"] | scopes["b"] | scopes["c"])
    seen = set()
    for layer, record in records.items():
        for name, (first, stop) in new_spans(model, layer).items():
            uses = ((record.index >= first) & (record.index < stop)).any(dim=-1)
            assert uses.any() and not (uses & ~scopes[name]).any()
            seen.add((name, layer))
        union = torch.stack([scopes[n] for n in new_spans(model, layer)]).any(dim=0)
        assert ((record.index >= 6).any(dim=-1) == union).all()  # exclusive: in scope of any, new experts only
    assert len(seen) == sum(len(plan) for plan in PLANS.values())


# ---------------------------------------------------------------- the rule itself, by hand


SOFTMAX, FLAT, SIGMOID = Rule("softmax", True), Rule("softmax", False), Rule("sigmoid", True, 2.0)
# E = 2 base experts with probability 0.4 and 0.2 beside a's 0.3 and b's 0.1, and K = 1 or 2
LOGITS = torch.tensor([[0.4, 0.2, 0.3, 0.1]]).log()


def answer(rule, k):
    scores = LOGITS[:, :2].softmax(-1) if rule.score == "softmax" else LOGITS[:, :2].sigmoid()
    weights, index = scores.topk(k)
    weights = weights / weights.sum() if rule.renormalise else weights
    return LOGITS[:, :2], weights * rule.scale, index


def shared(rule, k, scope, selection="compete"):
    new = LOGITS[:, 2:]
    scope = [None if one is None else torch.tensor([one]) for one in scope]
    options = {"selection": selection, "calibrate": "none", "scope": scope, "sizes": [1, 1]}
    return route(RouterOutput(*answer(rule, k)), new, rule, **options)[1:3]


def test_weights_are_made_without_the_adapters_that_a_token_does_not_use():
    weights, index = shared(FLAT, 2, (None, None))
    assert index.tolist() == [[0, 2]]  # base 0.4 and a 0.3; b's 0.1 is not among the best two
    torch.testing.assert_close(weights, torch.tensor([[0.4, 0.3]]) / 0.9)  # so b is not in the sum of the softmax


@pytest.mark.parametrize(
    ("rule", "scope", "index", "weights"),
    [
        (FLAT, (False, True), [0, 1], [2 / 3, 1 / 3]),  # b is no better than the base: the base's own
        (FLAT, (True, False), [0, 2], [4 / 9, 3 / 9]),
        (FLAT, (False, False), [0, 1], [2 / 3, 1 / 3]),
        (SOFTMAX, (True, True), [0, 2], [4 / 7, 3 / 7]),
        # sigmoid(log p) = p / (1 + p): 2/7 and 3/13, made to sum to 2
        (SIGMOID, (True, True), [0, 2], [2 * (2 / 7) / (47 / 91), 2 * (3 / 13) / (47 / 91)]),
    ],
)
def test_selection_and_weights_of_two_adapters_by_hand(rule, scope, index, weights):
    found, chosen = shared(rule, 2, scope)
    assert chosen.tolist() == [index]
    torch.testing.assert_close(found, torch.tensor([weights]))


def test_exclusive_adapters_share_the_bases_sum_in_their_own_scopes():
    weights, index = shared(FLAT, 2, (None, None), "exclusive")
    assert index.tolist() == [[2, 3]]
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25]]))
    weights, index = shared(FLAT, 1, (None, None), "exclusive")
    assert index.tolist() == [[2]]
    torch.testing.assert_close(weights, torch.tensor([[2 / 3]]))  # what the base's best one weighs
    weights, index = shared(FLAT, 2, (False, None), "exclusive")
    assert index.tolist() == [[3, -1]]
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0]]))
    assert shared(FLAT, 2, (False, False), "exclusive")[1].tolist() == [[0, 1]]


def test_a_closed_row_is_not_chosen_for_its_correction_bias():
    correction, scope = torch.tensor([0.0, 0.0, 5.0, 0.0]), [torch.tensor([False]), torch.tensor([True])]
    for selection, expected in (("compete", [[0, 1]]), ("exclusive", [[3, -1]])):
        found = route(
            RouterOutput(*answer(SIGMOID, 2)),
            LOGITS[:, 2:],
            SIGMOID,
            selection=selection,
            calibrate="none",
            correction_bias=correction,
            scope=scope,
            sizes=[1, 1],
        )
        assert found[2].tolist() == expected


RULES = {
    "softmax": Rule("softmax", True),
    "softmax, not renormalised": Rule("softmax", False),
    "sigmoid": Rule("sigmoid", True, 2.5),
    "sigmoid, corrected": Rule("sigmoid", True, correction="bias"),
    "sigmoid, corrected logits": Rule("sigmoid", True, epsilon=1e-6, corrected="logit", correction="bias"),
    "sqrtsoftplus, corrected": Rule("sqrtsoftplus", False, 1.5, correction="bias"),
    "a scale for every expert": Rule("softmax", True, expert_scale="scale"),
    "sparsemixer": Rule("softmax", True, jitter=0.01),
}


@pytest.mark.parametrize("selection", ["compete", "exclusive"])
@pytest.mark.parametrize("name", sorted(RULES))
def test_under_every_rule_a_token_that_selects_none_of_b_is_routed_as_without_b(name, selection):
    """Base: 6 experts, K = 2. a: 3 new ones, b: 2, in the scope of two thirds of the tokens each."""
    rule, generator = RULES[name], torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(400, 11, generator=generator)
    bias = torch.randn(11, generator=generator) / 3 if rule.correction else None
    scale = 1 + torch.rand(11, generator=generator) if rule.expert_scale else None
    a, b = torch.arange(400) % 3 < 2, torch.arange(400) % 3 > 0

    def cut(tensor, stop):
        return None if tensor is None else tensor[..., :stop]

    index = choice_keys(logits[:, :6], rule, cut(bias, 6)).topk(2, dim=-1).indices
    weights = torch.rand(400, 2, generator=generator)
    given = {"selection": selection, "calibrate": "none"}

    def routed(stop, **options):
        options |= {"correction_bias": cut(bias, stop), "expert_scale": cut(scale, stop), **given}
        return route(RouterOutput(logits[:, :6], weights, index), logits[:, 6:stop], rule, **options)[1:3]

    found_weights, found = routed(11, scope=[a, b], sizes=[3, 2])
    expected_weights, expected = routed(9, scope=a)
    uses_a, uses_b = ((found >= 6) & (found < 9)).any(-1), (found >= 9).any(-1)
    assert not (uses_a & ~a).any() and not (uses_b & ~b).any() and (uses_a & uses_b).any()
    assert 30 < int((~uses_b).sum()) < 370 and (uses_a & ~uses_b).any()
    assert torch.equal(found[~uses_b], expected[~uses_b])
    bound = rounding(11, 2) * logits.abs().max().item()  # exp(logit - max), sums over E + N and K
    torch.testing.assert_close(found_weights[~uses_b], expected_weights[~uses_b], rtol=bound, atol=0)
    assert found_weights.isfinite().all()


def test_rows_of_others_would_decide_under_softmax_with_a_correction_bias_so_it_is_refused(made):
    base = make_family("ernie4_5_moe")
    model = MoExtendForCausalLM.from_base(base, {1: [0, 3]}, **COMPETE)
    with pytest.raises(ValueError, match=r"can't be active together on this base \(ernie4_5_moe\).*adapter_names"):
        model.add_adapter("b", {1: [2]}, **COMPETE)
    # Why: with b's row in the sum of the softmax the base's second expert beats a's, though b itself is not selected.
    logits, bias = torch.tensor([[4.0, 1.0, 3.0, 8.0]]).log(), torch.tensor([0.0, 0.2, 0.0, -9.0])
    one, both = logits[:, :3].softmax(-1) + bias[:3], logits.softmax(-1) + bias
    assert one.topk(2).indices.tolist() == [[0, 2]] and both.topk(2).indices.tolist() == [[1, 0]]


# ---------------------------------------------------------------- switching


def test_switching_is_quick_and_touches_no_base_tensor(made):
    model = load(made, ("a", GATED), ("b", GATED), ("c", SEEING))
    hashes = base_tensors_hash(model)
    storage = {name: tensor.data_ptr() for name, tensor in model.base.state_dict().items()}
    versions = {name: p._version for name, p in model.named_parameters()}
    longest = 0.0
    for names in ("b", ["a", "c"], ["a", "b", "c"], "a"):
        start = time.thread_time()  # of this thread alone, however busy the machine is
        model.set_adapter(names)
        longest = max(longest, time.thread_time() - start)
        logits(model, inputs(images="c" in names))
    assert longest < 0.05
    assert storage == {name: tensor.data_ptr() for name, tensor in model.base.state_dict().items()}
    assert versions == {name: p._version for name, p in model.named_parameters()}
    assert base_tensors_hash(model) == hashes
    assert sorted(make_base().state_dict()) == sorted(name for name in storage if "moextend" not in name)


def own_modules(model):
    """name -> class of the base's modules, without what extending mixes in: that stays until `detach`, for passes of
    other threads. And the names of the adapters that have a module anywhere in it."""
    extensions = [module for module in model.modules() if isinstance(module, Extension)]
    names = {name: plain_class(module) for name, module in model.named_modules() if "moextend" not in name}
    return names, {name for extension in extensions for name in extension.adapters}


def test_a_deleted_adapter_leaves_nothing_behind(made):
    model = load(made, ("a", COMPETE), ("b", COMPETE))
    alone = load(made, ("a", COMPETE))
    model.set_adapter(["a", "b"])
    model.delete_adapter("b")
    assert model.active_adapters() == ["a"] and list(model.adapters) == ["a"]
    assert sorted(model.state_dict()) == sorted(alone.state_dict())
    assert own_modules(model) == own_modules(alone)
    assert torch.equal(logits(model, batch()), logits(alone, batch()))
    model.load_adapter(made("b", COMPETE), adapter_name="b")
    model.set_adapter("a")
    with pytest.warns(UserWarning, match="No active adapter was left, so 'b' is set"):
        model.delete_adapter(["a"])
    assert model.active_adapters() == ["b"] and model.leading == "b"
    assert all(tensor.requires_grad for tensor in model.adapter_tensors().values())
    assert torch.equal(logits(model, batch()), logits(load(made, ("b", COMPETE)), batch()))
    with pytest.raises(ValueError, match=r"are all adapters of this model.*model.detach\(\)"):
        model.delete_adapter("b")


def test_detaching_takes_all_adapters_off(made):
    model = load(made, ("a", COMPETE), ("b", COMPETE))
    model.set_adapter(["a", "b"])
    base = model.detach()
    assert sorted(base.state_dict()) == sorted(make_base().state_dict())
    assert torch.equal(logits(base, batch()), logits(make_base(), batch()))


def test_copies_and_threads_have_a_choice_of_their_own(made):
    model = load(made, ("a", COMPETE), ("b", COMPETE))
    twin = copy.deepcopy(model)
    model.set_adapter(["a", "b"])
    assert twin.active_adapters() == ["a"]
    assert torch.equal(logits(twin, batch()), logits(load(made, ("a", COMPETE)), batch()))
    expected, found = logits(model, batch()), []
    with model.passes.using(selection=model.select_adapters(["b"] * 3, range(3))):
        thread = threading.Thread(target=lambda: found.append(logits(model, batch())), daemon=True)
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)


def test_an_encoder_stands_in_memory_once_for_all_that_see_with_it(made, tmp_path):
    model = load(made, ("a", SEEING), ("b", COMPETE))
    other = MoExtendForCausalLM.from_base(make_base(), PLANS["c"], encoder=make_encoder(), **SEEING)
    other.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, adapter_name="c")  # it does not say where its encoder lies
    assert model.adapters["c"].encoder is model.adapters["a"].encoder
    assert model.adapters["c"].projector is not model.adapters["a"].projector
    model.set_adapter("c")
    assert torch.equal(logits(model, inputs()), logits(other, inputs()))
    model.set_adapter("b")
    assert model.encoder is None
    with pytest.raises(ValueError, match="its active adapters have none"):
        logits(model, inputs())


def test_the_body_switches_with_the_model(made):
    model = load(made, ("a", COMPETE), ("b", EXCLUSIVE))
    body = model.model
    assert isinstance(body, MoExtendModel)
    model.set_adapter("b")
    alone = load(made, ("b", EXCLUSIVE)).model
    with torch.no_grad():
        assert torch.equal(model.model(**batch()).last_hidden_state, alone(**batch()).last_hidden_state)
    assert body.active_adapters() == ["b"] and model.model.config.selection == "exclusive"


def test_saving_takes_the_adapter_that_is_named(made, tmp_path):
    model = load(made, ("a", COMPETE), ("b", COMPETE))
    model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match=r"Active adapters are \['a', 'b'\], so it takes a name"):
        model.save_pretrained(tmp_path / "which")
    with pytest.raises(ValueError, match="so it takes a name"):
        model.adapter_tensors()
    model.save_pretrained(tmp_path / "b", adapter_name="b")
    again = MoExtendForCausalLM.from_pretrained(tmp_path / "b", base=make_base())
    assert torch.equal(logits(again, batch()), logits(load(made, ("b", COMPETE)), batch()))
    model.set_adapter("a")
    model.save_pretrained(tmp_path / "a")
    stored = [load_file(folder / FILE) for folder in (tmp_path / "a", made("a", COMPETE))]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())


# ---------------------------------------------------------------- an adapter a row


@pytest.mark.parametrize("kinds", [(COMPETE, EXCLUSIVE), (PAPER, GATED), (SEEING, {**PAPER, "calibration": "routed"})])
def test_each_row_has_its_own_adapter(kinds, made):
    """Also of adapters that can't be active together on one token."""
    model, given = load(made, ("a", kinds[0]), ("b", kinds[1])), given_to(kinds)
    names = ["a", "__base__", "a", "b"]
    with model.record_routing() as records:
        found = logits(model, given, adapter_names=names)
    assert records[1].logits.shape[-1] == 10 and not (records[1].index.view(4, 12, -1)[1] >= 6).any()
    for name, rows in (("a", [0, 2]), ("b", [3])):
        alone = load(made, (name, dict(zip("ab", kinds, strict=True))[name]))
        seen = given if "pixel_values" in given and name == "a" else {"input_ids": given["input_ids"] % 96}
        expected = logits(alone, seen)
        torch.testing.assert_close(found[rows], expected[rows], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected[rows], logits(make_base(), inputs(images=False))[rows], atol=1e-2)
    expected = logits(make_base(), {"input_ids": given["input_ids"] % 96})
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    only_base = logits(model, inputs(images=False), adapter_names=["__base__"] * 4)
    assert torch.equal(only_base, logits(frozen_copy(make_base()), inputs(images=False)))
    assert model.active_adapters() == ["a"]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_generate_serves_each_prompt_with_its_own_adapter(options, made):
    model = load(made, ("a", COMPETE), ("b", GATED))
    ids = text(3, 6)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}

    def generate(of, **names):
        torch.manual_seed(0)
        return of.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings, **names)

    found, repeats = generate(model, adapter_names=["b", "__base__", "a"]), options.get("num_return_sequences", 1)
    if "do_sample" in options:  # rows share random numbers: only the count of rows and the first tokens compare
        assert len(found) == 3 * repeats
        return
    singles = {"a": load(made, ("a", COMPETE)), "b": load(made, ("b", GATED)), "base": make_base()}
    for row, name in enumerate(["b", "base", "a"]):
        assert torch.equal(found[row], generate(singles[name])[row])
    assert torch.equal(generate(model, adapter_names=["a"] * 3), generate(singles["a"]))


@pytest.mark.parametrize("choices", [COMPETE, EXCLUSIVE, GATED], ids=["compete", "exclusive", "gate"])
def test_a_row_may_have_several_adapters_that_share_its_tokens(choices, made):
    model = load(made, ("a", choices), ("b", choices), ("c", COMPETE))
    names = [["b", "a"], "a", "__base__", "c"]
    found, wanted = logits(model, inputs(images=False), adapter_names=names), [["a", "b"], ["a"], None, ["c"]]
    generating = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    said = model.generate(**inputs(images=False), **generating, adapter_names=names)
    for row, active in enumerate(wanted):
        alone = make_base() if active is None else model
        if active is not None:
            model.set_adapter(active)
        expected = logits(alone, inputs(images=False))
        torch.testing.assert_close(found[row], expected[row], rtol=1e-4, atol=1e-5)
        assert torch.equal(said[row], alone.generate(**inputs(images=False), **generating)[row])


def test_eyes_may_join_adapters_in_their_rows_that_select_otherwise(made, tmp_path):
    MoExtendForCausalLM.from_base(make_base(), {}, encoder=make_encoder(), **SEEING).save_pretrained(tmp_path)
    model = load(made, ("a", COMPETE), ("b", EXCLUSIVE))
    model.load_adapter(tmp_path, adapter_name="see", encoder=make_encoder())
    given, names = inputs(), [["a", "see"], "__base__", ["b", "see"], "a"]
    found = logits(model, given, adapter_names=names)
    for row, active in ((0, ["a", "see"]), (2, ["b", "see"])):
        model.set_adapter(active)
        torch.testing.assert_close(found[row], logits(model, given)[row], rtol=1e-4, atol=1e-5)


def test_labels_of_the_image_tokens_that_the_rows_see_do_not_count(made):
    model = load(made, ("a", SEEING), ("b", COMPETE))
    model.adapters["a"].config.image_token_id = 5
    ids = text()
    ids[ids == 5] = 6
    ids[:, 2:6] = 5
    given = {"input_ids": ids, "pixel_values": torch.randn(4, 3, 16, 16), "adapter_names": ["a"] * 4}
    model.set_adapter("b")
    with torch.no_grad():
        found = model(**given, labels=ids).loss
        expected = model(**given, labels=ids.masked_fill(ids == 5, -100)).loss
        every = model(**{**given, "adapter_names": ["b"] * 4, "pixel_values": None}, labels=ids).loss
        masked = model(input_ids=ids, adapter_names=["b"] * 4, labels=ids.masked_fill(ids == 5, -100)).loss
    assert torch.equal(found, expected) and not torch.isclose(every, masked)


def test_a_gate_counts_no_tokens_of_rows_that_others_served(made):
    """Whatever adapter the other rows of that pass had."""
    model, ids, margins = load(made, ("a", GATED), ("b", GATED)), text(2, 9), []
    for other in ("a", "b", "__base__"):
        cache = DynamicCache()
        logits(model, {"input_ids": ids[:, :5]}, past_key_values=cache, adapter_names=["b", other])
        with model.record_routing() as records:
            logits(model, {"input_ids": ids[:, 5:]}, past_key_values=cache, adapter_names=["a", "a"])
        margins.append(records[1].margins["a"].view(2, 4)[0])
    assert torch.allclose(margins[0], margins[1], atol=1e-4) and torch.allclose(margins[1], margins[2], atol=1e-4)


def test_the_config_that_leads_has_the_bases_implementations(made):
    model = load(made, ("a", COMPETE), ("b", COMPETE), attn_implementation="sdpa")
    model.set_attn_implementation("eager")
    before = model.config._attn_implementation, model.config._experts_implementation
    model.set_adapter("b")
    assert (model.config._attn_implementation, model.config._experts_implementation) == before
    model.load_adapter(made("c", EXCLUSIVE), adapter_name="aa")
    model.set_adapter(["a", "b"])
    assert model.leading == "a"


def test_two_pairs_of_eyes_do_not_look_at_one_batch(made, tmp_path):
    model = load(made, ("a", SEEING), ("b", SEEING))
    with pytest.raises(ValueError, match=r"Adapters \['a', 'b'\] have an encoder each, and the inputs of a batch"):
        model(**inputs(), adapter_names=["a", "a", "b", "b"])


def test_adapters_that_meet_in_a_row_form_one_group():
    assert merge_overlapping([("a",), ("b",), ()]) == (("a",), ("b",))
    assert merge_overlapping([("d",), ("a", "b"), ("c",), ("b", "c")]) == (("a", "b", "c"), ("d",))
    assert merge_overlapping([(), ()]) == ()


def test_the_balance_loss_is_that_of_the_adapters_of_the_rows(made):
    """Not of the active ones, which select otherwise."""
    model = load(made, ("a", EXCLUSIVE), ("b", COMPETE))
    model.config.text_config.router_aux_loss_coef = model.adapters["b"].config.text_config.router_aux_loss_coef = 0.5
    given = {**inputs(images=False), "output_router_logits": True}
    with torch.no_grad():
        found = model(**given, adapter_names=["b"] * 4).aux_loss
        other = model(**given).aux_loss
        model.set_adapter("b")
        expected = model(**given).aux_loss
    assert torch.equal(found, expected) and not torch.isclose(other, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_prompts_with_images_generate_beside_prompts_of_other_adapters(options, made):
    model, given = load(made, ("a", SEEING), ("b", COMPETE)), inputs()
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    mask = {"attention_mask": torch.ones_like(given["input_ids"])}
    model.set_adapter("b")
    found = model.generate(**given, **mask, **settings, adapter_names=["a", "b", "a", "__base__"])
    assert model.active_adapters() == ["b"] and model.encoder is None
    seen = load(made, ("a", SEEING)).generate(**given, **mask, **settings)
    text_only = {"input_ids": given["input_ids"] % 96, **mask}
    expected = {0: seen, 1: model.generate(**text_only, **settings), 2: seen}
    expected[3] = frozen_copy(make_base()).generate(**text_only, **settings)
    for row, output in expected.items():
        assert torch.equal(found[row, 12:], output[row, 12:])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], "adapter_names has 2 names, but the batch has 4 items"),
        (["a", "law", "b", "a"], r"Adapters \['law'\] are not loaded; this model has \['a', 'b'\]"),
        (["a", "b", "b", "a"], "Item 2 of the batch has image tokens, but its adapter 'b' can't see"),
        (["__base__", "b", "a", "a"], "Item 0 of the batch has image tokens, but its adapter '__base__' can't see"),
        ("abba", "adapter_names='abba' must be a list with an entry for each item"),
        (["a", None, "a", "b"], "None names no adapters"),
        (["a", ["b", "b"], "a", "b"], r"\['b', 'b'\] names an adapter twice"),
        ([["a", "b"], "b", "a", "b"], "must select alike, but these do not: {'a': 'exclusive', 'b': 'compete'}"),
    ],
)
def test_rows_that_cannot_be_served_are_refused(names, message, made):
    model = load(made, ("a", SEEING), ("b", COMPETE))
    with pytest.raises(ValueError, match=message):
        model(**inputs(), adapter_names=names)
    with pytest.raises(ValueError, match="adapter_names has 1 names, but the batch has 4 items"):
        model.generate(**inputs(), adapter_names=["a"])
    with (
        pytest.raises(ValueError, match="adapter_names was given while the adapters are off"),
        model.disable_adapter(),
    ):
        model(**inputs(images=False), adapter_names=["b"] * 4)
    assert model.passes.thread.selection is None


# ---------------------------------------------------------------- what the cache remembers


@pytest.mark.parametrize("sizes", [(5, 7), (6, 1, 1, 4), (5, 1, 6)])
def test_every_adapters_scope_lives_in_the_cache(sizes, made):
    model = load(made, ("a", GATED), ("b", GATED), ("c", SEEING))
    model.set_adapter(["a", "b", "c"])
    ids, pixels = text(3, 12), torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    ids[0, 1:5] = IMAGE
    expected = logits(model, {"input_ids": ids, "pixel_values": pixels})
    cache, found, eyes = DynamicCache(), [], {"pixel_values": pixels}
    for part in ids.split(sizes, dim=1):
        found.append(logits(model, {"input_ids": part, **eyes}, past_key_values=cache))
        eyes = {}
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-3, atol=1e-4)
    assert getattr(cache, STATE).keys() == {"a", "b", IMAGES}


@torch.no_grad()
def test_cropping_and_reordering_move_every_adapters_state(made):
    model = load(made, ("a", GATED), ("b", GATED))
    model.set_adapter(["a", "b"])
    ids, later = text(3, 8), text(3, 4, seed=7)
    expected = logits(model, {"input_ids": torch.cat([ids[:, :6], later], dim=1)})[:, 6:]
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.crop(-2)
    assert {key: state.shape[1] for key, state in getattr(cache, STATE).items()} == {"a": 6, "b": 6}
    found = logits(model, {"input_ids": later[[2, 0, 1]]}, past_key_values=cache)
    torch.testing.assert_close(found, expected[[2, 0, 1]], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("first", [SEEING, SEEING_ALL], ids=["modality", "all"])
@torch.no_grad()
def test_an_adapter_that_joins_later_knows_where_the_images_are(first, made):
    model = load(made, ("a", first), ("b", SEEING))
    given, later = inputs(), text(4, 3, seed=3)
    cache = DynamicCache()
    model(**given, past_key_values=cache)
    model.set_adapter("b")
    with model.record_routing() as records:
        model(later, past_key_values=cache)
    assert records[1].scope.view(4, 3).tolist() == [[True] * 3, [False] * 3] * 2
    assert cached_state(cache, IMAGES).tolist()[0] == 2


@torch.no_grad()
def test_a_gate_judges_from_the_tokens_of_passes_in_which_its_adapter_took_part(made):
    model, ids = load(made, ("a", GATED), ("b", GATED)), text(2, 9)
    cache = DynamicCache()
    model(ids[:, :4], past_key_values=cache)
    sums = cached_state(cache, "a").clone()
    model.set_adapter("b")
    model(ids[:, 4:7], past_key_values=cache)
    assert torch.equal(cached_state(cache, "a"), sums)  # b's pass left them alone
    model.set_adapter(["a", "b"])
    with model.record_routing() as records:
        model(ids[:, 7:], past_key_values=cache)
    assert cached_state(cache, "a").shape[1] == cached_state(cache, "b").shape[1] == 9
    assert torch.equal(cached_state(cache, "a")[:, :4], sums)
    assert torch.equal(cached_state(cache, "a")[:, 4:7], sums[:, -1:].expand(-1, 3, -1))
    assert not cached_state(cache, "b")[:, :4].any() and set(records[1].margins) == {"a"}


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (COMPETE, EXCLUSIVE, r"must select alike, but these do not: {'a': 'compete', 'b': 'exclusive'}"),
        ({**PAPER}, COMPETE, r"Adapters \['a'\] are calibrated for their own new experts.*beside \['b'\]"),
        ({**PAPER}, {**PAPER}, r"Adapters \['a', 'b'\] are calibrated .*beside each other"),
        (SEEING, SEEING, r"Adapters \['a', 'b'\] have an encoder each, and an input goes through one"),
    ],
)
def test_combinations_without_meaning_are_refused_by_name(one, other, message, made):
    model = load(made, ("a", one), ("b", other))
    with pytest.raises(ValueError, match=f"(?s){message}.*adapter_names"):
        model.set_adapter(["a", "b"])
    assert model.active_adapters() == ["a"]
    model.set_adapter("b")


WORDS = (
    "num_base",
    "passes",
    "state",
    "spans",
    "layer",
    "rule",
    "decide",
    "in_use",
    "scope",
    "logits",
    "extend",
    "share",
)


def test_words_of_the_extended_layers_can_be_names(made):
    model, expected = load(made, ("a", COMPETE)), {}
    for word in (*WORDS, "choose", "placed", "adapters", "law", "selection"):
        model.load_adapter(made("b", COMPETE), adapter_name=word)
        model.set_adapter(["a", word])
        expected[word] = logits(model, batch())
        model.delete_adapter(word)
    assert all(torch.equal(found, expected["law"]) for found in expected.values())


def test_names_are_checked(made, tmp_path):
    model = load(made, ("a", COMPETE))
    before = sorted(model.state_dict())
    with pytest.raises(ValueError, match=r"An adapter 'a' is loaded already: choose another name"):
        model.load_adapter(made("b", COMPETE), adapter_name="a")
    for name in ("law.v2", "__base__", "", "keys", 3, "train", "training", "9"):
        with pytest.raises(ValueError, match="can't be the name of an adapter"):
            model.load_adapter(made("b", COMPETE), adapter_name=name)
    for action in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match=r"Adapters \['law'\] are not loaded; this model has \['a'\]"):
            action("law")
    for given in (None, 3, [["a"]], [None], {"a": 1}):
        for action in (model.set_adapter, model.delete_adapter):
            with pytest.raises(ValueError, match="names no adapters: give a name, or a list of names"):
                action(given)
    with pytest.raises(ValueError, match="names an adapter twice"):
        model.set_adapter(["a", "a"])
    with pytest.raises(ValueError, match="needs at least one adapter"):
        model.set_adapter([])
    with pytest.raises(ValueError, match=r"Adapters \['law'\] are not loaded"):
        model.save_pretrained(tmp_path, adapter_name="law")
    assert sorted(model.state_dict()) == before


def test_an_adapter_of_another_base_is_refused(made):
    base = make_base()
    with torch.no_grad():
        base.model.layers[0].mlp.experts.down_proj.add_(0.01)
    model = MoExtendForCausalLM.from_base(base, {1: [0]}, **COMPETE)
    before = sorted(model.state_dict())
    with pytest.raises(ValueError, match="different base than the adapter was made on.*check_base=False"):
        model.load_adapter(made("b", COMPETE), adapter_name="b")
    assert sorted(model.state_dict()) == before
    model.load_adapter(made("b", COMPETE), adapter_name="b", check_base=False)
    model.set_adapter(["default", "b"])
    assert logits(model, batch()).isfinite().all()


def test_an_adapter_that_cannot_be_loaded_leaves_the_model_as_it_was(made, tmp_path):
    model = load(made, ("a", COMPETE))
    expected, modules = logits(model, batch()), own_modules(model)
    other = MoExtendForCausalLM.from_base(make_base(), PLANS["b"], **COMPETE)
    other.adapters["default"].config.extended_layers = {0: [1, 4], 1: [2, 0], 3: [4, 4]}  # one more than there are
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="wrong shape: layers.3"):
        model.load_adapter(tmp_path, adapter_name="b")
    with pytest.raises(OSError, match="holds no MoExtend adapter"):
        model.load_adapter(tmp_path / "..", adapter_name="b")
    assert own_modules(model) == modules
    assert torch.equal(logits(model, batch()), expected)


def asking(model):
    """Names of the adapters whose tensors ask for gradients."""
    return [n for n in model.adapters if any(t.requires_grad for t in model.adapter_tensors(n).values())]


def test_the_active_adapters_ask_for_gradients_as_in_peft(made):
    model = load(made, ("a", COMPETE), ("b", COMPETE), ("c", COMPETE))
    for given, expected in (("b", ["b"]), (["c", "a"], ["a", "c"]), ("a", ["a"])):
        model.set_adapter(given)
        assert asking(model) == expected
        logits_of_all = model(**batch()).logits
        assert logits_of_all.requires_grad
    model.set_adapter(["a", "b"], inference_mode=True)
    assert asking(model) == [] and model.active_adapters() == ["a", "b"]
    assert not any(p.requires_grad for p in model.base.parameters())


def test_loaded_adapters_are_frozen_unless_asked_otherwise(made):
    model = load(made, ("a", COMPETE), ("b", COMPETE))
    model.load_adapter(made("c", COMPETE), adapter_name="c", is_trainable=True)
    assert asking(model) == ["a", "c"]
