"""Extended layers against the base's own modules and against the paper's formula in plain torch, in every family."""

import contextlib
import copy
import io
import threading

import pytest
import torch
from conftest import FAMILIES, PAPER, batch, frozen_copy, in_scope, make_base, make_encoder, rounding, shake
from families import make_family
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from modeling_moextend import MoExtendForCausalLM, layers_moextend
from modeling_moextend.families_moextend import find_moe_layers, in_order
from modeling_moextend.layers_moextend import keep_in_graph
from modeling_moextend.routing_moextend import SCORES

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
PLAN = {0: [1], 2: [3, 0, 5]}


def extended(family="mixtral", plan=None, shaken=True, base=None, **choices):
    torch.manual_seed(0)
    choices = {**PAPER, "calibration": "none", **choices}
    base = make_base(family) if base is None else base
    model = MoExtendForCausalLM.from_base(base, {2: [3, 0, 5]} if plan is None else plan, **choices)
    return shake(model) if shaken else model


def moe_layer(model, index=2):
    return find_moe_layers(model.get_decoder())[index]


def tokens(count=64, seed=0, dtype=torch.float32):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(layer, x):
    """weights [T, K], index [T, K] and output [T, H] of one MoE layer's router and experts."""
    _, weights, index = in_order(layer.router(x))
    return weights, index, layer.experts(x, index, weights)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


# ---------------------------------------------------------------- guarantee 1: the base's tensors never change


@pytest.mark.parametrize("choices", [{"calibration": "all"}, {"selection": "exclusive"}], ids=["paper", "exclusive"])
def test_base_tensors_are_bit_equal_through_attach_training_saving_and_detach(family, choices, tmp_path):
    base = make_base(family)
    before, classes = snapshot(base), {name: type(module) for name, module in base.named_modules()}
    logits = base(**batch()).logits
    model = extended(family, PLAN, shaken=False, base=base, **choices)
    trained = model.set_trainable()
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    starts = {name: tensor.detach().clone() for name, tensor in trained.items()}
    model.train()
    for seed in range(3):
        inputs = batch(seed=seed)
        model(**inputs, labels=inputs["input_ids"], output_router_logits=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(starts[name], trained[name]) for name in trained), "a trained tensor did not move"
    model.save_pretrained(tmp_path)
    own = {name: tensor for name, tensor in base.state_dict().items() if "moextend" not in name}
    assert_same_tensors(before, own)
    restored = model.detach().eval()
    assert_same_tensors(before, restored.state_dict())
    assert classes == {name: type(module) for name, module in restored.named_modules()}
    assert torch.equal(restored(**batch()).logits, logits)


def test_encoder_tensors_are_bit_equal_after_training():
    encoder = make_encoder()
    before = snapshot(encoder)
    model = MoExtendForCausalLM.from_base(make_base(), {1: [0]}, encoder=encoder)
    optimizer = torch.optim.AdamW(model.set_trainable().values(), lr=1e-2, weight_decay=0.1)
    ids = torch.tensor([[5, 96, 96, 96, 96, 7, 8]])
    model(ids, pixel_values=torch.randn(1, 3, 16, 16), labels=ids).loss.backward()
    optimizer.step()
    assert_same_tensors(before, snapshot(encoder))


# ---------------------------------------------------------------- guarantee 2: what stays the base's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_with_the_adapter_off_are_bit_equal_to_the_base(family, implementation, dtype):
    base = make_base(family, dtype, experts_implementation=implementation)
    model = extended(family, base=copy.deepcopy(base), calibration="all")
    with torch.no_grad():
        expected = frozen_copy(base)(**batch()).logits
        assert not torch.equal(model(**batch()).logits, expected), "the adapter does nothing"
        with model.disable_adapter():
            assert torch.equal(model(**batch()).logits, expected)
        model.disable_adapters()
        assert torch.equal(model(**batch()).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("calibration", ["routed", "none"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_layer_in_which_no_token_selects_a_new_expert_is_bit_equal(family, implementation, calibration, dtype):
    base = make_base(family, dtype, experts_implementation=implementation)
    model, base = extended(family, base=copy.deepcopy(base), calibration=calibration), frozen_copy(base)
    x = torch.cat([tokens(16, dtype=dtype), tokens(16, seed=1, dtype=dtype)])
    reject_all(moe_layer(model), x)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            expected, found = run(moe_layer(base), x), run(moe_layer(model), x)
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def reject_all(layer, x):
    """Gives every new expert a row whose logit is about -60 for each of these tokens (at most as many as H)."""
    extension = layer.router.moextend.adapters["default"]
    with torch.no_grad():
        row = torch.linalg.lstsq(x.float(), torch.full((len(x), 1), -60.0)).solution.squeeze(-1)
        extension.weight.copy_(row.expand_as(extension.weight))
        if extension.correction_bias is not None:
            extension.correction_bias.fill_(-10.0)
        assert (in_order(layer.router(x))[0][:, layer.num_experts :] < -40).all()


@pytest.mark.parametrize("choices", [{}, {"calibration": "routed"}], ids=["none", "routed"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_without_new_experts_beside_tokens_with_some_is_the_bases_within_rounding(
    family, implementation, choices
):
    base = make_base(family, experts_implementation=implementation)
    model, base = extended(family, base=copy.deepcopy(base), **choices), frozen_copy(base)
    x = tokens(200)
    with torch.no_grad():
        (old_weights, old_index, expected), (weights, index, found) = run(moe_layer(base), x), run(moe_layer(model), x)
    stays = ~(index >= 6).any(dim=-1)
    assert 10 < int(stays.sum()) < 190
    assert torch.equal(index[stays], old_index[stays]) and torch.equal(weights[stays], old_weights[stays])
    error = (found[stays] - expected[stays]).norm(dim=-1) / expected[stays].norm(dim=-1)
    assert error.max() < rounding(32, 24, 2)  # an expert sums over H, then I, a token over K
    assert not torch.allclose(found[~stays], expected[~stays], rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------- the formula


def formula(family, layer, sources_of_new, x, *, selection, calibration, scope=None):
    """One extended block in plain torch: rows, scores, top-k, calibrated weights, weighted sum of experts."""
    router, new, experts = layer.router, layer.router.moextend.adapters["default"], layer.experts
    num_base, num_new, k = layer.num_experts, len(sources_of_new), 2
    rows = torch.cat([router.weight, new.weight])
    bias = torch.cat([router.bias, new.bias]) if family == "gpt_oss" else None
    logits = F.linear(x, rows, bias)
    p = logits.sigmoid() if family == "deepseek_v3" else logits.softmax(-1)
    keys = p
    if family == "deepseek_v3":  # 3 groups of 2 base experts, of which 2 stay; then the correction bias decides
        keys = p + torch.cat([router.e_score_correction_bias, new.correction_bias])
        groups = keys[:, :num_base].view(-1, 3, 2).sum(-1)
        lost = groups.argmin(-1)
        ruled_out = torch.arange(num_base) // 2 == lost.unsqueeze(-1)
        keys = torch.cat([keys[:, :num_base].masked_fill(ruled_out, -9), keys[:, num_base:]], dim=-1)
    renormalise = family not in ("olmoe", "qwen2_moe")
    scale = 2.5 if family == "deepseek_v3" else 1.0

    def weigh(scores, chosen, denominator):
        w = scores.gather(-1, chosen)
        return (w / w.sum(-1, keepdim=True) if denominator else w) * scale

    old_keys = keys[:, :num_base]
    old_chosen = old_keys.topk(k, dim=-1).indices
    old_p = p if family == "deepseek_v3" else logits[:, :num_base].softmax(-1)
    old_w = weigh(old_p, old_chosen, renormalise)
    if selection == "exclusive":
        new_p = p[:, num_base:] if family == "deepseek_v3" else logits[:, num_base:].softmax(-1)
        chosen = keys[:, num_base:].topk(min(k, num_new), dim=-1).indices
        w = weigh(new_p, chosen, True) / scale * old_w.sum(-1, keepdim=True)
        chosen = chosen + num_base
    else:
        mlp = new.calibration
        calibrated = p if mlp is None else p + F.gelu(p @ mlp.fc1.weight.T) @ mlp.fc2.weight.T
        chosen = keys.topk(k, dim=-1).indices
        w = weigh(calibrated, chosen, renormalise)
    output = torch.zeros_like(x)
    for token in range(len(x)):
        uses_new = bool((chosen[token] >= num_base).any()) or calibration == "all"
        uses_new = uses_new and (scope is None or bool(scope[token]))
        picks, shares = (chosen, w) if uses_new else (old_chosen, old_w)
        for expert, share in zip(picks[token].tolist(), shares[token], strict=True):
            module, place = (
                (experts, expert) if expert < num_base else (experts.moextend.adapters["default"], expert - num_base)
            )
            output[token] += share * one_expert(family, module, place, x[token])
    return output


def keep_above_zero(layer):
    """A calibration that only adds, so that no weight comes near the floor that keeps them positive."""
    calibration = layer.router.moextend.adapters["default"].calibration
    for tensor in [] if calibration is None else calibration.parameters():
        tensor.abs_()


def one_expert(family, experts, place, x):
    up, down = experts.gate_up_proj[place], experts.down_proj[place]
    if family == "gpt_oss":
        both = x @ up + experts.gate_up_proj_bias[place]
        gate, linear = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return ((linear + 1) * gate * torch.sigmoid(1.702 * gate)) @ down + experts.down_proj_bias[place]
    gate, linear = (up @ x).chunk(2)
    return down @ (F.silu(gate) * linear)


def assert_formula(layer, x, found, expected):
    """Equal but for rounding: of a router's logit, a sum over H that changes a score by as much in relation to it; of
    experts, which sum over H, then I; of the sum over K of them."""
    largest = in_order(layer.router(x))[0].abs().max().item()
    bound = rounding(32) * largest + rounding(32, 24, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=bound * expected.abs().max().item())


CHOICES = {
    "paper": {"calibration": "all"},
    "routed": {"calibration": "routed"},
    "none": {"calibration": "none"},
    "exclusive": {"calibration": "none", "selection": "exclusive"},
}


@pytest.mark.parametrize("sources", [[3], [3, 0, 5]], ids=["N=1", "N=3"])
@pytest.mark.parametrize("choice", sorted(CHOICES))
@torch.no_grad()
def test_an_extended_block_computes_the_papers_formula(family, choice, sources):
    model = extended(family, {2: sources}, **CHOICES[choice])
    layer, x = moe_layer(model), 1.5 * tokens(48)
    keep_above_zero(layer)
    options = {"selection": "compete", **CHOICES[choice]}
    expected = formula(family, layer, sources, x, **options)
    assert_formula(layer, x, run(layer, x)[2], expected)


@pytest.mark.parametrize("choice", ["paper", "exclusive"])
@torch.no_grad()
def test_tokens_out_of_scope_compute_the_bases_formula(family, choice):
    model = extended(family, **CHOICES[choice])
    layer, x = moe_layer(model), tokens(48)
    keep_above_zero(layer)
    scope = torch.arange(48) % 3 == 0
    with in_scope(model, {"default": scope}):
        found = run(layer, x)[2]
    options = {"selection": "compete", **CHOICES[choice]}
    assert_formula(layer, x, found, formula(family, layer, [3, 0, 5], x, scope=scope, **options))


@torch.no_grad()
def test_exclusive_weights_sum_to_the_bases_own_and_new_experts_alone_are_used(family):
    base = make_base(family)
    model = extended(family, selection="exclusive", base=copy.deepcopy(base))
    x = tokens(50)
    old_weights, _, _ = run(moe_layer(base), x)
    weights, index, _ = run(moe_layer(model), x)
    assert (index >= 6).all()
    torch.testing.assert_close(weights.sum(-1), old_weights.sum(-1))


@torch.no_grad()
def test_a_calibration_driven_below_zero_leaves_the_output_finite(family):
    model = extended(family, calibration="all")
    layer, x = moe_layer(model), tokens(50)
    layer.router.moextend.adapters["default"].calibration.fc2.weight.fill_(-50.0)
    weights, _, output = run(layer, x)
    assert (weights >= 0).all() and weights.isfinite().all() and output.isfinite().all()


# ---------------------------------------------------------------- start values


def test_new_tensors_start_as_exact_copies_of_their_sources(family):
    model = extended(family, PLAN, shaken=False, calibration="all")
    for index, sources in PLAN.items():
        layer = moe_layer(model, index)
        new = layer.router.moextend.adapters["default"]
        own_experts = layer.experts.moextend.adapters["default"]
        pairs = [(layer.experts._parameters[name], own) for name, own in own_experts._parameters.items()]
        pairs.append((layer.router.weight, new.weight))
        if family == "gpt_oss":
            pairs.append((layer.router.bias, new.bias))
        if family == "deepseek_v3":
            pairs.append((layer.router.e_score_correction_bias, new.correction_bias))
        assert len(pairs) == {"gpt_oss": 6, "deepseek_v3": 4}.get(family, 3)
        for old, own in pairs:
            assert own.dtype == torch.float32 and torch.equal(own, old[sources])
            assert own.untyped_storage().data_ptr() != old.untyped_storage().data_ptr()
        assert new.calibration.fc1.weight.shape == (16, 6 + len(sources))
        assert new.calibration.fc1.weight.any() and not new.calibration.fc2.weight.any()
    assert list(model.config.extended_layers) == [0, 2]


@torch.no_grad()
def test_at_the_start_calibration_is_the_identity(family):
    with_calibration = extended(family, PLAN, shaken=False, calibration="all")
    without = extended(family, PLAN, shaken=False, calibration="none")
    x = tokens(48)
    found, plain = run(moe_layer(with_calibration), x), run(moe_layer(without), x)
    assert torch.equal(found[1], plain[1])
    layer = moe_layer(with_calibration)
    options = {"selection": "compete", "calibration": "all"}
    assert_formula(layer, x, found[2], formula(family, layer, PLAN[2], x, **options))


def test_one_source_may_give_two_new_experts():
    model = extended(plan={1: [1, 1]}, shaken=False)
    experts = moe_layer(model, 1).experts.moextend.adapters["default"]
    assert torch.equal(experts.down_proj[0], experts.down_proj[1])
    with torch.no_grad():
        experts.down_proj[0] += 1
    assert not torch.equal(experts.down_proj[0], experts.down_proj[1])


def test_attaching_without_calibration_neither_reads_nor_moves_the_global_random_state():
    models = []
    for seed in (1, 2):
        base = make_base()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        models.append(MoExtendForCausalLM.from_base(base, PLAN, **{**PAPER, "calibration": "none"}))
        assert torch.equal(torch.get_rng_state(), before)
    assert_same_tensors(models[0].state_dict(), models[1].state_dict())


def test_calibration_follows_the_seed():
    def first(seed):
        torch.manual_seed(seed)
        model = MoExtendForCausalLM.from_base(make_base(), PLAN, paper=True)
        return moe_layer(model).router.moextend.adapters["default"].calibration.fc1.weight

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("choice", ["paper", "exclusive"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_run_only_for_the_tokens_that_chose_them(family, implementation, choice, monkeypatch):
    model = extended(family, base=make_base(family, experts_implementation=implementation), **CHOICES[choice])
    layer, x = moe_layer(model), tokens(60)
    scope = torch.arange(60) < 30
    rows = {"base": 0, "new": 0}
    base_class = type(layer.experts.moextend.adapters["default"])
    original = base_class.forward

    def counting(self, hidden_states, index, weights):
        rows["new" if self is layer.experts.moextend.adapters["default"] else "base"] += index.numel()
        return original(self, hidden_states, index, weights)

    monkeypatch.setattr(base_class, "forward", counting)
    with torch.no_grad(), in_scope(model, {"default": scope}):
        _, index, _ = run(layer, x)
    assert rows == {"base": int(((index >= 0) & (index < 6)).sum()), "new": int((index >= 6).sum())}
    assert rows["new"] > 0 and rows["base"] >= 60
    if choice == "exclusive":
        assert rows == {"base": 60, "new": 60}


def test_new_experts_do_not_run_at_all_where_no_token_chose_one():
    layer = moe_layer(extended())
    calls = []
    layer.experts.moextend.adapters["default"].register_forward_hook(lambda *_: calls.append(1))
    x = tokens(32)
    run(layer, x)
    assert calls
    calls.clear()
    reject_all(layer, x)
    run(layer, x)
    assert not calls


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_zeros_and_not_none_where_no_token_selects_a_new_expert(family, implementation):
    model = extended(family, base=make_base(family, experts_implementation=implementation), calibration="routed")
    trained = {name: tensor for name, tensor in model.set_trainable().items() if name.startswith("layers.2")}
    layer, x = moe_layer(model), tokens(32)
    reject_all(layer, x)
    (run(layer, x)[2].sum() + 0.0).backward()
    for name, tensor in trained.items():
        assert tensor.grad is not None and not tensor.grad.any(), name


def test_every_new_tensor_gets_a_gradient_and_no_base_tensor_does(family):
    model = extended(family, PLAN, calibration="all")
    trained = model.set_trainable()
    inputs = batch()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [name for name, tensor in trained.items() if tensor.grad is None or not tensor.grad.any()] == []
    own = {id(tensor) for tensor in trained.values()}
    assert [name for name, p in model.named_parameters() if p.grad is not None and id(p) not in own] == []


# ---------------------------------------------------------------- finding, swapping, copying


def test_attaching_keeps_the_bases_names_classes_by_isinstance_and_router_logits(family):
    base = make_base(family)
    names = list(base.state_dict())
    expected = None
    if "router_logits" in base.model._can_record_outputs:
        expected = frozen_copy(base)(**batch(), output_router_logits=True).router_logits
    router_class = type(moe_layer(base).router)
    model = extended(family, base=base)
    assert [name for name in base.state_dict() if "moextend" not in name] == names
    assert isinstance(moe_layer(model).router, router_class)
    if expected is not None:  # the base's own recorder still finds the router
        with model.disable_adapter():
            found = base.model(**batch(), output_router_logits=True).router_logits
        assert len(found) == 4 and all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_moe_layers_are_found_by_decoder_layer_in_every_family(family):
    layers = find_moe_layers(make_base(family).get_decoder())
    assert sorted(layers) == [0, 1, 2, 3] and {layer.num_experts for layer in layers.values()} == {6}


def test_a_model_without_experts_is_refused():
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(ValueError, match="LlamaModel \\(llama\\) has no MoE layers"):
        MoExtendForCausalLM.from_base(LlamaForCausalLM(config), {0: [0]})


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("llama4_text", r"Llama4ForCausalLM \(llama4\) can't be extended: its experts get their input scaled"),
        ("dbrx", r"DbrxModel \(dbrx\) can't be extended: its router gives bare logits"),
        ("jetmoe", r"JetMoeModel \(jetmoe\) can't be extended: its experts take tokens that its router has sorted"),
    ],
)
def test_a_family_without_the_experts_interface_is_refused(model_type, reason):
    small = {
        "llama4_text": {
            "hidden_size": 32,
            "intermediate_size": 16,
            "intermediate_size_mlp": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": 4,
        },
        "dbrx": {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        },
        "jetmoe": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "intermediate_size": 16,
            "num_local_experts": 4,
        },
    }
    config = AutoConfig.for_model(model_type, vocab_size=96, **small[model_type])
    base = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=reason):
        MoExtendForCausalLM.from_base(base, {0: [0]})


def test_a_newer_family_without_the_experts_interface_is_refused(monkeypatch):
    monkeypatch.setattr("modeling_moextend.families_moextend.EXPERTS_INTERFACE", ("an attribute of tomorrow",))
    message = r"MixtralModel \(mixtral\) has experts, but not through transformers' router/experts interface"
    with pytest.raises(ValueError, match=message):
        MoExtendForCausalLM.from_base(make_base(), {0: [0]})


def test_a_router_that_follows_no_known_rule_is_refused(monkeypatch):
    base = make_base()
    router_class = type(moe_layer(base).router)
    original = router_class.forward

    def odd(self, hidden_states):
        logits, weights, index = original(self, hidden_states)
        return logits, weights.sqrt(), index

    monkeypatch.setattr(router_class, "forward", odd)
    with pytest.raises(ValueError, match="Layer 0 of mixtral can't be extended. MixtralTopKRouter does not follow"):
        MoExtendForCausalLM.from_base(base, {0: [0]})


def test_an_extended_model_can_be_deep_copied_and_pickled():
    model = extended(plan=PLAN)
    expected = model(**batch()).logits
    twin = copy.deepcopy(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.add_(1)
    for other in (twin, loaded):
        assert torch.equal(other(**batch()).logits, expected)
        assert other.passes is not model.passes
        assert moe_layer(other).router.moextend.passes is other.passes
        parts = other.passes.current.adapters["default"].layers
        assert all(part.rows is moe_layer(other, i).router.moextend.adapters["default"] for i, part in parts.items())


def test_rebinding_reaches_the_forward_that_an_accelerate_hook_kept():
    from accelerate.hooks import ModelHook, add_hook_to_module

    base = make_base()
    expected = extended(base=copy.deepcopy(base))(**batch()).logits
    for layer in find_moe_layers(base.get_decoder()).values():
        add_hook_to_module(layer.router, ModelHook())
        add_hook_to_module(layer.experts, ModelHook())
    logits = base(**batch()).logits
    model = extended(base=base)
    assert torch.equal(model(**batch()).logits, expected)
    assert torch.equal(model.detach()(**batch()).logits, logits)


@pytest.mark.parametrize("context", [contextlib.nullcontext(), torch.device("meta")], ids=["outside", "inside"])
def test_a_base_on_the_meta_device_can_be_extended_and_sized(context):
    with torch.device("meta"):
        base = MixtralForCausalLM(MixtralConfig(num_hidden_layers=32))  # its defaults are Mixtral-8x7B's
    with context:
        model = MoExtendForCausalLM.from_base(base, {layer: [0] for layer in range(16)}, paper=True)
    experts = sum(t.numel() for name, t in model.adapter_tensors().items() if ".experts." in name)
    assert experts == 16 * 3 * 4096 * 14336  # the paper's 2.82B
    rows_and_calibration = 16 * (4096 + 2 * 16 * 9)
    assert model.adapter_bytes(torch.bfloat16) == 2 * (experts + rows_and_calibration)
    assert all(tensor.is_meta for tensor in model.adapter_tensors().values())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_bf16_routing_of_new_rows_is_done_in_float32(family):
    model = extended(family, base=make_base(family, torch.bfloat16))
    x = tokens(40, dtype=torch.bfloat16)
    layer = moe_layer(model)
    logits = in_order(layer.router(x))[0]
    new = layer.router.moextend.adapters["default"]
    assert logits.dtype == torch.float32 and new.weight.dtype == torch.float32
    expected = F.linear(x.float(), new.weight, new.bias)
    torch.testing.assert_close(logits[:, 6:], expected)


# ---------------------------------------------------------------- correction biases, wherever a family keeps them

CORRECTED = {  # family -> whether its block hands the correction bias to the router, which has none of its own
    "ernie4_5_moe": False,
    "laguna": False,
    "lfm2_moe": True,
    "minimax_m2": True,
}


@pytest.mark.parametrize("family", sorted(CORRECTED))
def test_a_copy_wins_beside_its_source_wherever_the_correction_bias_lies(family):
    model = extended(plan={1: list(range(6))}, shaken=False, base=make_family(family))
    layer, x = moe_layer(model, 1), tokens(200)
    tensors = (*layer.block.named_parameters(), *layer.block.named_buffers())
    bias = next(t.reshape(-1) for name, t in tensors if name.endswith(("e_score_correction_bias", "expert_bias")))
    given = (bias,) if CORRECTED[family] else ()
    with model.disable_adapter():
        winners = in_order(layer.router(x, *given))[2]
    found = in_order(layer.router(x, *given))[2].sort().values
    scores = SCORES[model.config.routing_rule["score"]](F.linear(x, layer.router.weight).repeat(1, 2))
    beaten = torch.ones(200, 6, dtype=torch.bool).scatter(1, winners, False)
    keys = (scores + bias.repeat(2)).masked_fill(torch.cat([beaten, torch.zeros_like(beaten)], dim=1), -torch.inf)
    torch.testing.assert_close(keys.gather(1, found).sort().values, keys.topk(2).values.sort().values)
    assert (found[:, 0] + 6 == found[:, 1]).float().mean() > 0.5  # the winner and its copy
    row = model.adapter_tensors()["layers.1.router.correction_bias"]
    assert torch.equal(row, bias) and row.any() and not row.requires_grad
    assert "layers.1.router.correction_bias" not in model.set_trainable()


@torch.no_grad()
def test_a_scale_for_each_expert_is_copied_frozen_and_named_by_role():
    base = make_family("gemma4")
    model = extended(plan={1: [3, 0, 3]}, shaken=False, base=base)
    scale = moe_layer(model, 1).router.per_expert_scale
    tensors = model.adapter_tensors()
    assert torch.equal(tensors["layers.1.router.scale"], scale[[3, 0, 3]])
    assert "layers.1.router.scale" not in model.set_trainable() and "layers.1.router.weight" in model.set_trainable()
    told, weights, index = in_order(moe_layer(model, 1).router(tokens()))
    torch.testing.assert_close(told.sum(dim=-1), torch.ones(64))  # this router answers shares, of nine experts now
    shares = told.gather(-1, index)
    every = torch.cat([scale, scale[[3, 0, 3]]])
    torch.testing.assert_close(weights, shares / shares.sum(-1, keepdim=True) * every[index])
    with model.record_routing() as records:
        model(**batch())
    assert records[0].logits.shape == (30, 6) and records[1].logits.shape == (30, 9)
    with model.disable_adapter(), model.record_routing() as off:
        model(**batch())
    torch.testing.assert_close(records[0].logits.softmax(-1), off[0].logits.softmax(-1))


def test_a_router_that_chooses_by_something_else_than_its_scores_is_refused():
    base = make_base()

    class Worst(type(moe_layer(base).router)):
        def forward(self, hidden_states):
            logits = F.linear(hidden_states, self.weight)
            index = (-logits).topk(2).indices
            weights = logits.softmax(dim=-1).gather(-1, index)
            return logits, weights / weights.sum(dim=-1, keepdim=True), index

    for layer in find_moe_layers(base.get_decoder()).values():
        layer.router.__class__ = Worst
    with pytest.raises(ValueError, match="does not follow the router interface"):
        MoExtendForCausalLM.from_base(base, {2: [0]})


def test_layers_of_different_rules_are_refused_together_and_extended_apart():
    base = make_base("qwen3_moe")
    base.model.layers[2].mlp.gate.norm_topk_prob = False
    with pytest.raises(
        ValueError,
        match="Layer 2 of qwen3_moe routes by Rule.*renormalise=False.*, the other .*layers by .*renormalise=True",
    ):
        MoExtendForCausalLM.from_base(base, {1: [0], 2: [0]})
    model = MoExtendForCausalLM.from_base(base, {2: [0]})
    assert not model.config.routing_rule["renormalise"]
    with pytest.raises(ValueError, match="Layer 3 of qwen3_moe can't be extended by this adapter"):
        model.extend({3: [0]})
    assert model.config.extended_layers == {2: [0]}


# ---------------------------------------------------------------- shared experts among the rows


@pytest.mark.parametrize("selection", ["compete", "exclusive"])
@torch.no_grad()
def test_inkling_weighs_new_experts_together_with_its_shared_ones(selection):
    base = make_family("inkling")
    base_router = find_moe_layers(base.get_decoder())[1].router
    base_router.global_scale.fill_(0.7)
    model = extended(plan={1: [3, 0, 5]}, base=copy.deepcopy(base), selection=selection)
    router, x = moe_layer(model, 1).router, tokens(60)
    logits, weights, index, shared = router(x)
    _, base_weights, _, base_shared = base_router(x)
    changed = (index >= 6).any(dim=-1)
    for found, before in ((weights, base_weights), (shared, base_shared)):
        assert torch.equal(found[~changed], before[~changed])
    assert changed.any() and (selection == "exclusive" or not changed.all())
    rows = torch.cat([router.weight[:6], router.moextend.adapters["default"].weight])
    scores, of_shared = F.linear(x, rows).sigmoid(), F.linear(x, router.weight[6:]).sigmoid()
    torch.testing.assert_close(logits, F.linear(x, rows))
    if selection == "exclusive":
        new_keys = scores[:, 6:] + router.moextend.adapters["default"].correction_bias
        assert torch.equal(index, new_keys.topk(2).indices + 6)
        picked = scores.gather(-1, index)
        torch.testing.assert_close(weights, picked / picked.sum(-1, keepdim=True) * base_weights.sum(-1, keepdim=True))
        torch.testing.assert_close(shared, base_shared)
        return
    keys = scores + torch.cat([router.e_score_correction_bias, router.moextend.adapters["default"].correction_bias])
    assert torch.equal(index[changed].sort().values, keys.topk(2).indices[changed].sort().values)
    together = torch.cat([scores.gather(-1, index), of_shared], dim=-1)
    together = together / together.sum(-1, keepdim=True) * router.route_scale * 0.7
    torch.testing.assert_close(weights[changed], together[:, :2][changed], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shared[changed], together[:, 2:][changed], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- threads, ties


def test_threads_do_not_see_each_others_passes():
    model = extended()
    inside, done = threading.Event(), threading.Event()

    def switch_off():
        with model.disable_adapter(), model.record_routing():
            inside.set()
            done.wait(120)

    expected = model(**batch()).logits
    other = threading.Thread(target=switch_off, daemon=True)
    other.start()
    assert inside.wait(120)
    assert model.active_adapters() == ["default"] and model.passes.thread.records is None
    assert torch.equal(model(**batch()).logits, expected)
    done.set()
    other.join()
    model.disable_adapters()
    seen = []
    other = threading.Thread(target=lambda: seen.append(model.active_adapters()), daemon=True)
    other.start()
    other.join()
    assert seen == [[]] and copy.deepcopy(model).active_adapters() == []


def test_a_tie_to_an_infinite_parameter_is_no_nan():
    parameter = torch.nn.Parameter(torch.full((2, 2), torch.inf))
    output = keep_in_graph(torch.ones(3), [parameter])
    output.sum().backward()
    assert torch.equal(output, torch.ones(3)) and torch.equal(parameter.grad, torch.zeros(2, 2))


def test_new_experts_over_a_bfloat16_base_are_computed_as_it_is_and_lose_no_update():
    torch.manual_seed(0)
    base = make_base(dtype=torch.bfloat16)
    model = shake(MoExtendForCausalLM.from_base(base, {1: [0, 3]}, scope="all", deltas={"output": 0}))
    seen = []
    watched = layers_moextend.in_one_dtype

    def watch(experts, tokens):
        found = watched(experts, tokens)
        seen.extend((found[0].down_proj.dtype, found[1].dtype))
        return found

    trained, inputs = model.set_trainable(), batch()
    before = {name: tensor.detach().clone() for name, tensor in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-5, weight_decay=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers_moextend, "in_one_dtype", watch)
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    assert set(seen) == {torch.bfloat16}
    for name, tensor in trained.items():
        assert tensor.dtype == tensor.grad.dtype == torch.float32
        moved = (tensor.detach() != before[name])[tensor.grad != 0]
        assert moved.all() and (len(moved) or "router" in name), name  # in bfloat16 most would stay where they were
