"""scope="gate": margins against a slow loop, and decisions that no cache, padding, packing or thread changes."""

import copy
import io
import json
import re
import threading
import warnings

import pytest
import torch
from conftest import (
    batch,
    enable_checkpointing,
    frozen_copy,
    in_processes,
    leave_group,
    make_base,
    make_encoder,
    rounding,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_remote_code import START, run
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from modeling_moextend import MoExtendConfig, MoExtendForCausalLM, MoExtendModel
from modeling_moextend.adapter_file_moextend import FILE
from modeling_moextend.families_moextend import find_moe_layers
from modeling_moextend.gate_moextend import CLOSED, GatedPass, TokenGate
from modeling_moextend.scope_moextend import STATE, cached_state, remember
from modeling_moextend.training.resuming import load_adapter_tensors

PLAN = {1: [0, 3], 3: [2]}
LOWEST = min(PLAN)
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
PACKING = ("deepseek_v3", "mixtral", "qwen3_moe")  # whose base keeps packed sequences apart; gpt_oss's does not
SOME = ("mixtral", "deepseek_v3", "gpt_oss")  # softmax; sigmoid, groups and correction bias; biases and other experts
EXCLUSIVE = {"selection": "exclusive", "calibration": "none"}
GATE_NAMES = [f"gate.{part}.{kind}" for part in ("key", "value", "fc1", "fc2") for kind in ("weight", "bias")]
EVERY, NONE = -1e9, 1e9  # thresholds


def gated(family="mixtral", base=None, plan=None, **choices):
    """A model with a closed gate and new experts far from the base's."""
    choices = {**EXCLUSIVE, "gate_hidden_size": 8, "deltas": (), **choices}
    base = make_base(family) if base is None else base
    torch.manual_seed(0)  # after the base, which is made but once
    base.generation_config.eos_token_id = None
    model = MoExtendForCausalLM.from_base(base, PLAN if plan is None else plan, scope="gate", **choices)
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if name.startswith("layers.") and "correction_bias" not in name:
                tensor.add_(torch.randn_like(tensor) * 0.6)
    return model


@torch.no_grad()
def opened(*args, **choices):
    """The same with a random gate that lets through about half of a random text; no margin is near 0 there."""
    return open_gate(gated(*args, **choices))


@torch.no_grad()
def open_gate(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gate = model.gate
    for name, tensor in gate.named_parameters():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * (1.0 if name.startswith("fc2") else 0.5))
    z, _ = margins(model, text(8, 12))
    scale = 3 / z.std()
    gate.fc2.weight.mul_(scale)
    middle = (z * scale).flatten().sort().values[30:66]
    widest = middle.diff().argmax()
    gate.fc2.bias.copy_(scale * gate.fc2.bias - (middle[widest] + middle[widest + 1]) / 2)
    return model


def text(rows=1, length=10, seed=0):
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def margins(model, ids, **inputs):
    """z [B, S] of one pass, and its output."""
    with model.record_routing() as records:
        output = model(ids, **inputs)
    return records[min(model.config.extended_layers)].gate.reshape(ids.shape), output


def routed_share(model, ids, **inputs):
    z, _ = margins(model, ids, **inputs)
    return float((z > model.gate_threshold).float().mean())


def slow_margins(gate, hidden):
    """z [S] of one whole sequence [S, H], token by token, in float64."""
    w = {name: tensor.detach().double() for name, tensor in gate.named_parameters()}
    h, z = hidden.detach().double(), []
    for t in range(len(h)):
        weights = [torch.exp((w["key.weight"] @ h[s] + w["key.bias"]).clamp(-8, 8)) for s in range(t + 1)]
        values = [w["value.weight"] @ h[s] + w["value.bias"] for s in range(t + 1)]
        mean = sum(a * v for a, v in zip(weights, values, strict=True)) / sum(weights)
        inner = F.gelu(w["fc1.weight"] @ torch.cat([h[t], mean]) + w["fc1.bias"])
        z.append((w["fc2.weight"] @ inner + w["fc2.bias"]).squeeze())
    return torch.stack(z)


def listen(model):
    """A list that gets the hidden states [B, S, H] of every pass of the gate."""
    heard = []
    model.gate.register_forward_pre_hook(lambda gate, args: heard.append(args[0].detach().clone()))
    return heard


def random_gate(size=6, inner=5, seed=0, scale=1.0):
    gate = TokenGate(size, inner)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in gate.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return gate


def hidden_states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole_pass(rows, length, starts=None, cached=None, mask=None):
    """A `GatedPass` without padding or resets unless given."""
    real = torch.ones(rows, length, dtype=torch.bool) if mask is None else mask
    return GatedPass(real, torch.full((rows, length), -1) if starts is None else starts, cached)


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- the gate by itself


@torch.no_grad()
def test_margins_are_those_of_a_loop_over_tokens():
    gate, h = random_gate(), hidden_states(3, 9, 6)
    z = gate(h, whole_pass(3, 9))
    assert z.dtype == torch.float32 and z.shape == (3, 9)
    close(z, torch.stack([slow_margins(gate, row) for row in h]))


@torch.no_grad()
def test_an_untrained_gate_is_closed_for_every_token():
    z = TokenGate(6, 5)(hidden_states(2, 40, 6) * 100, whole_pass(2, 40))
    assert torch.equal(z, torch.full((2, 40), CLOSED)) and CLOSED < 0


@torch.no_grad()
def test_scores_are_limited_so_that_margins_stay_finite():
    gate, h = random_gate(), hidden_states(1, 12, 6) * 1e3
    z = gate(h, whole_pass(1, 12))
    assert z.isfinite().all()
    torch.testing.assert_close(z[0].double(), slow_margins(gate, h[0]), rtol=1e-4, atol=1e-1)


@torch.no_grad()
def test_a_token_never_sees_what_follows_it():
    gate, h = random_gate(), hidden_states(1, 9, 6)
    other = h.clone()
    other[:, 5:] = -3
    assert torch.equal(gate(h, whole_pass(1, 9))[:, :5], gate(other, whole_pass(1, 9))[:, :5])


@pytest.mark.parametrize("picture", ["..######", "######..", "##..##.#", ".#.#.#.#"])
@torch.no_grad()
def test_padding_anywhere_counts_for_nothing(picture):
    gate, h = random_gate(), hidden_states(1, len(picture), 6)
    mask = torch.tensor([[sign == "#" for sign in picture]])
    h[~mask] = torch.nan  # whatever stands there
    z = gate(h, whole_pass(1, len(picture), mask=mask))
    close(z[mask], slow_margins(gate, h[mask]))


@torch.no_grad()
def test_packed_sequences_are_judged_apart():
    gate, h = random_gate(), hidden_states(2, 10, 6)
    starts = torch.tensor([[0] * 4 + [4] * 3 + [7] * 3, [-1] * 2 + [2] * 8])
    z = gate(h, whole_pass(2, 10, starts))
    for row, edges in ((0, (0, 4, 7, 10)), (1, (0, 2, 10))):
        for first, last in zip(edges, edges[1:], strict=False):
            close(z[row, first:last], slow_margins(gate, h[row, first:last]))


@torch.no_grad()
def test_a_short_sequence_keeps_its_precision_behind_a_loud_one():
    """Packed sums are differences: float32 would lose a weight of e^-8 behind thousands of e^8."""
    gate = random_gate(1, 5)
    gate.key.weight.fill_(1.0)
    gate.key.bias.zero_()
    h = torch.cat([torch.full((1, 3000, 1), 8.0), -8 - hidden_states(1, 5, 1).abs()], dim=1)
    starts = torch.cat([torch.zeros(1, 3000), torch.full((1, 5), 3000)], dim=1).long()
    torch.testing.assert_close(
        gate(h, whole_pass(1, 3005, starts))[0, 3000:].double(), slow_margins(gate, h[0, 3000:]), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("split", [1, 4, 8])
@torch.no_grad()
def test_cached_sums_continue_a_sequence_and_end_with_it(split):
    gate, h = random_gate(), hidden_states(2, 9, 6)
    first = whole_pass(2, split)
    one = gate(h[:, :split], first)
    starts = torch.full((2, 9 - split), -1)
    starts[1] = 0  # another sequence in row 1
    second = whole_pass(2, 9 - split, starts, cached=first.sums)
    two = gate(h[:, split:], second)
    assert second.sums.shape == (2, 9, 10) and not second.sums.requires_grad
    close(torch.cat([one, two], dim=1)[0], slow_margins(gate, h[0]))
    close(two[1], slow_margins(gate, h[1, split:]))


@torch.no_grad()
def test_a_sequence_that_ends_inside_a_pass_leaves_the_next_one_without_cached_sums():
    gate, h = random_gate(), hidden_states(1, 9, 6)
    first = whole_pass(1, 4)
    gate(h[:, :4], first)
    z = gate(h[:, 4:], whole_pass(1, 5, torch.tensor([[-1, -1, 2, 2, 2]]), cached=first.sums))
    close(z[0, :2], slow_margins(gate, h[0, :6])[4:])
    close(z[0, 2:], slow_margins(gate, h[0, 6:]))


@torch.no_grad()
def test_autocast_changes_no_margin():
    gate, h = random_gate(), hidden_states(2, 9, 6)
    expected = gate(h, whole_pass(2, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate(h, whole_pass(2, 9)), expected)


@torch.no_grad()
def test_weights_kept_in_bf16_decide_as_their_float32_copies_do():
    half = random_gate().bfloat16()
    h = hidden_states(2, 9, 6).bfloat16()
    z = half(h, whole_pass(2, 9))
    assert z.dtype == torch.float32
    assert torch.equal(z, copy.deepcopy(half).float()(h.float(), whole_pass(2, 9)))


def test_no_gradient_leaves_the_gate_towards_the_base():
    h = hidden_states(1, 4, 6).requires_grad_()
    gate = random_gate()
    gate(h, whole_pass(1, 4)).sum().backward()
    assert h.grad is None and all(tensor.grad is not None for tensor in gate.parameters())


# ---------------------------------------------------------------- in the model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_the_model_decides_by_the_slow_loop(family, dtype):
    model = opened(base=make_base(family, dtype))
    heard, inputs = listen(model), batch()
    with model.record_routing() as records:
        model(**inputs)
    mask = inputs["attention_mask"].bool()
    z = records[LOWEST].gate.reshape(mask.shape)
    assert z.dtype == torch.float32 and heard[0].dtype == dtype
    for row in range(3):
        close(z[row, mask[row]], slow_margins(model.gate, heard[0][row, mask[row]]))
    assert 0 < (z[mask] > 0).float().mean() < 1


@torch.no_grad()
def test_the_gate_reads_the_router_input_of_the_lowest_extended_layer():
    """Which no new expert has touched: the base computes the same."""
    base = frozen_copy(make_base())
    seen = []
    find_moe_layers(base.get_decoder())[LOWEST].router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    base(**batch())
    model = opened()
    heard = listen(model)
    model(**batch())
    assert torch.equal(heard[0].reshape(-1, 32), seen[0].reshape(-1, 32))


@torch.no_grad()
def test_one_decision_holds_in_all_extended_layers_and_padding_is_never_in_scope():
    model, inputs = opened(plan={1: [0, 3], 2: [1], 3: [2, 4]}), batch()
    model.gate_threshold = EVERY
    with model.record_routing() as records:
        model(**inputs)
    assert records[1].scope.tolist() == inputs["attention_mask"].bool().flatten().tolist()
    model.gate_threshold = 0
    with model.record_routing() as records:
        model(**inputs)
    expected = (records[1].gate > 0) & inputs["attention_mask"].bool().flatten()
    assert 0 < expected.sum() < len(expected)
    assert {layer: record.gate is None for layer, record in records.items()} == {0: True, 1: False, 2: True, 3: True}
    for layer in (1, 2, 3):
        assert torch.equal(records[layer].scope, expected)
        assert torch.equal((records[layer].index >= 6).any(dim=-1), expected)
    assert records[0].scope is None and records[0].num_new == 0


@pytest.mark.parametrize("choices", [{}, {"selection": "compete"}, {"selection": "compete", "calibration": "all"}])
@torch.no_grad()
def test_only_tokens_in_scope_select_new_experts_whatever_the_selection(choices):
    model = opened(**choices)
    with model.record_routing() as records:
        model(text(4, 12))
    for layer in PLAN:
        new = (records[layer].index >= 6).any(dim=-1)
        assert new.any() and not (new & ~records[layer].scope).any() and not records[layer].scope.all()


@torch.no_grad()
def test_nothing_of_a_pass_stays_behind():
    model = opened()
    margins(model, text())
    assert model.passes.thread.plan is None


@torch.no_grad()
def test_the_base_called_past_the_model_gets_no_new_experts():
    model, ids = opened(), text(2)
    model.gate_threshold = EVERY
    assert torch.equal(model.base(ids).logits, frozen_copy(make_base())(ids).logits)


@torch.no_grad()
def test_the_body_decides_as_the_causal_model_does():
    model, ids = opened(), text(2)
    hidden = model.model(ids).last_hidden_state
    assert torch.equal(model.get_output_embeddings()(hidden), model(ids).logits)


@torch.no_grad()
def test_embeddings_alone_are_judged_like_the_ids_they_come_from():
    model, inputs = opened(), batch()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    found = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(found, model(**inputs).logits)


@torch.no_grad()
def test_images_are_judged_by_their_features():
    model = opened(encoder=make_encoder())
    ids = torch.tensor([[5, 96, 96, 96, 96, 7, 8]])
    heard = listen(model)
    first, _ = margins(model, ids, pixel_values=hidden_states(1, 3, 16, 16))
    second, _ = margins(model, ids, pixel_values=hidden_states(1, 3, 16, 16, seed=1))
    close(first[0], slow_margins(model.gate, heard[0][0]))
    assert torch.equal(first[:, :1], second[:, :1]) and not torch.equal(first[:, 1:], second[:, 1:])


# ---------------------------------------------------------------- guarantee 2: what stays the base's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_of_an_untrained_gate_are_bit_equal_to_the_bases(family, implementation, dtype):
    base = make_base(family, dtype, experts_implementation=implementation)
    model, base = gated(base=copy.deepcopy(base)), frozen_copy(base)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            assert torch.equal(model(**batch()).logits, base(**batch()).logits)
    open_gate(model)
    assert not torch.equal(model(**batch()).logits, base(**batch()).logits), "an open gate changes nothing"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_a_batch_without_a_routed_token_is_bit_equal_whoever_listens(family, implementation):
    base = make_base(family, experts_implementation=implementation)
    model = opened(base=copy.deepcopy(base))
    model.gate_threshold = float(margins(model, **renamed(batch()))[0].max())  # above, not at it
    expected = frozen_copy(base)(**batch()).logits
    assert torch.equal(model(**batch()).logits, expected)
    assert torch.equal(margins(model, **renamed(batch()))[1].logits, expected)


def renamed(inputs):
    return {"ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


def test_experts_and_rows_do_not_run_where_no_token_is_routed():
    model = gated()
    calls = []
    find_moe_layers(model.get_decoder())[LOWEST].router.moextend.extend = lambda *_: calls.append(1)
    with torch.no_grad():
        model(text())
    assert not calls


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_tokens_not_routed_beside_routed_ones_are_the_bases_within_rounding(family, implementation):
    base = make_base(family, experts_implementation=implementation)
    model, base = opened(base=copy.deepcopy(base)), frozen_copy(base)
    outputs = []
    for owner in (base, model):
        experts = find_moe_layers(owner.get_decoder())[LOWEST].experts
        experts.register_forward_hook(lambda _, args, output: outputs.append(output.reshape(-1, 32)))
    ids = text(6, 12)
    base(ids)
    z, _ = margins(model, ids)
    (expected, found), routed = outputs, z.flatten() > 0
    assert 10 < routed.sum() < 62
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error[~routed].max() < rounding(32, 24, 2)  # an expert sums over H, then I, a token over K
    assert error[routed].min() > 1e-2


def test_with_the_adapter_off_and_after_detaching_the_model_is_the_base():
    base = make_base()
    names, expected, off = list(base.state_dict()), base(**batch()).logits, frozen_copy(base)(**batch()).logits
    model = opened(base=base)
    with model.disable_adapter():
        assert torch.equal(model(**batch()).logits, off)
    restored = model.detach()
    assert list(restored.state_dict()) == names and torch.equal(restored(**batch()).logits, expected)


# ---------------------------------------------------------------- the threshold


@torch.no_grad()
def test_the_threshold_is_what_a_margin_must_exceed():
    model, ids = opened(), text(4, 12)
    z, _ = margins(model, ids)
    for threshold in (float(z.median()), 0.0, 2.5, -2):
        model.gate_threshold = threshold
        with model.record_routing() as records:
            model(ids)
        assert model.gate_threshold == model.config.gate_threshold == threshold
        assert torch.equal(records[LOWEST].scope, z.flatten() > threshold)


@torch.no_grad()
def test_a_higher_threshold_routes_a_part_of_the_tokens_of_a_lower_one():
    model, ids, scopes = opened(), text(4, 12), []
    for threshold in (EVERY, -2, 0, 2, NONE):
        model.gate_threshold = threshold
        with model.record_routing() as records:
            model(ids)
        scopes.append(records[3].scope)
    assert scopes[0].all() and not scopes[-1].any()
    for lower, higher in zip(scopes, scopes[1:], strict=False):
        assert not (higher & ~lower).any() and higher.sum() < lower.sum()


@pytest.mark.parametrize("choices", [{}, {"selection": "compete", "calibration": "all"}], ids=["exclusive", "paper"])
@torch.no_grad()
def test_extreme_thresholds_give_the_base_and_scope_all(choices):
    ids = text(3, 9)
    model = opened(**choices)
    every = MoExtendForCausalLM.from_base(make_base(), PLAN, scope="all", **{**EXCLUSIVE, **choices})
    tensors = model.adapter_tensors()
    for name, tensor in every.adapter_tensors().items():
        tensor.copy_(tensors[name])
    model.gate_threshold = EVERY
    assert torch.equal(model(ids).logits, every(ids).logits)
    model.gate_threshold = NONE
    assert torch.equal(model(ids).logits, frozen_copy(make_base())(ids).logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "high", None, True, [1.0]])
def test_a_threshold_that_is_no_finite_number_is_refused_and_nothing_changes(value):
    model = opened(gate_threshold=0.5)
    with pytest.raises(ValueError, match="is no finite number"):
        model.gate_threshold = value
    assert model.gate_threshold == 0.5
    with pytest.raises(ValueError, match="is no finite number"):
        MoExtendConfig(scope="gate", gate_threshold=value)


def test_a_threshold_without_a_gate_is_refused():
    model = MoExtendForCausalLM.from_base(make_base(), PLAN, scope="all")
    with pytest.raises(ValueError, match="belongs to scope='gate', this adapter has scope='all'"):
        model.gate_threshold = 1.0
    assert model.gate is None


# ---------------------------------------------------------------- passes over a cache


def in_chunks(model, ids, sizes, cache=None, mask=None):
    """z and logits of `ids` [B, S], run in several passes over one cache."""
    cache = DynamicCache(config=model.config.text_config) if cache is None else cache
    z, logits, start = [], [], 0
    for size in sizes:
        part = ids[:, start : start + size]
        options = {} if mask is None else {"attention_mask": mask[:, : start + size]}
        if mask is not None:
            options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, start : start + size]
        found, output = margins(model, part, past_key_values=cache, use_cache=True, **options)
        z, logits, start = [*z, found], [*logits, output.logits], start + size
    return torch.cat(z, dim=1), torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("sizes", [(7, 1, 1, 1), (3, 4, 3), (1,) * 10], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left padding"])
def test_a_prompt_in_parts_is_decided_as_the_whole(family, sizes, padded):
    model, inputs = opened(family), batch()
    mask = inputs["attention_mask"] if padded else torch.ones_like(inputs["attention_mask"])
    ids, real = inputs["input_ids"], mask.bool()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    expected, output = margins(model, ids, attention_mask=mask, position_ids=positions)
    z, logits, cache = in_chunks(model, ids, sizes, mask=mask)
    assert 0 < (expected[real] > 0).float().mean() < 1
    torch.testing.assert_close(z[real], expected[real], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits[real], output.logits[real], rtol=1e-3, atol=1e-4)
    assert cached_state(cache, "default").shape == (3, 10, 16)


@pytest.mark.parametrize("at", [0, 1, 50])
@pytest.mark.parametrize("padding", ["left", "right", "middle"])
def test_a_padded_row_is_decided_as_it_is_alone(padding, at):
    """Wherever padding stands, and whatever its position says."""
    model, ids = opened(), text(1, 7)
    alone, output = margins(model, ids)
    columns = {"left": [3, 4, 5, 6, 7, 8, 9], "right": list(range(7)), "middle": [0, 1, 2, 6, 7, 8, 9]}[padding]
    row, mask = torch.zeros(2, 10).long(), torch.zeros(2, 10).long()
    row[0, columns], mask[0, columns] = ids[0], 1
    row[1], mask[1] = text(1, 10, seed=1)[0], 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0).masked_fill(mask == 0, at)
    z, padded = margins(model, row, attention_mask=mask, position_ids=positions)
    close(z[0, columns], alone[0])
    torch.testing.assert_close(padded.logits[0, columns], output.logits[0], rtol=1e-3, atol=1e-4)


def test_right_padding_in_the_cache_counts_for_nothing_later():
    model, ids = opened(), text(1, 8)
    alone, _ = margins(model, ids)
    row = torch.cat([ids[:, :5], torch.zeros(1, 3).long()], dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 3 + [1] * 3])
    cache = DynamicCache()
    positions = torch.tensor([[0, 1, 2, 3, 4, 1, 1, 1]])
    margins(model, row, attention_mask=mask[:, :8], position_ids=positions, past_key_values=cache)
    later = {"attention_mask": mask, "position_ids": torch.tensor([[5, 6, 7]]), "past_key_values": cache}
    close(margins(model, ids[:, 5:], **later)[0], alone[:, 5:])


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_a_cropped_cache_goes_on_as_if_the_cut_tokens_had_never_been(cut):
    model, ids = opened(), text(2, 8)
    other = text(2, 3, seed=5)
    expected, output = margins(model, torch.cat([ids[:, : 8 - cut], other], dim=1))
    _, _, cache = in_chunks(model, ids, (6, 1, 1))
    cache.crop(-cut)
    z, _, cache = in_chunks(model, other, (1, 2), cache=cache)
    close(z, expected[:, 8 - cut :])
    assert cached_state(cache, "default").shape[1] == cache.get_seq_length()


@pytest.mark.parametrize("where", ["off, on", "on, off, on"])
def test_tokens_that_ran_with_the_adapter_off_count_for_nothing(where):
    model, ids = opened(), text(1, 9)
    heard, cache = listen(model), DynamicCache()
    if where == "on, off, on":
        margins(model, ids[:, :3], past_key_values=cache)
    with model.disable_adapter(), torch.no_grad():
        model(ids[:, 3:6], past_key_values=cache)
    z = torch.cat([margins(model, part, past_key_values=cache)[0] for part in (ids[:, 6:8], ids[:, 8:])], dim=1)
    close(z[0], slow_margins(model.gate, torch.cat(heard, dim=1)[0])[-3:])


def test_a_sequence_that_begins_beside_a_cache_hears_its_own_tokens_only():
    model, ids = opened(), text(1, 9)
    heard, cache = listen(model), DynamicCache()
    margins(model, ids[:, :4], past_key_values=cache)
    positions = torch.tensor([[4, 5, 0, 1, 2]])
    z, _ = margins(model, ids[:, 4:], position_ids=positions, past_key_values=cache)
    hidden = torch.cat(heard, dim=1)[0]
    close(z[0, :2], slow_margins(model.gate, hidden[:6])[4:])
    close(z[0, 2:], slow_margins(model.gate, hidden[6:]))


def test_a_crop_behind_a_part_of_the_base_forgets_what_it_cut():
    model, ids = opened(), text(1, 9)
    heard, cache = listen(model), DynamicCache()
    margins(model, ids[:, :3], past_key_values=cache)
    with model.disable_adapter(), torch.no_grad():
        model(ids[:, 3:5], past_key_values=cache)
    margins(model, ids[:, 5:8], past_key_values=cache)
    cache.crop(-2)
    z, _ = margins(model, ids[:, 8:], past_key_values=cache)
    close(z[0], slow_margins(model.gate, torch.cat([heard[0][0], heard[1][0, :1], heard[2][0]]))[-1:])


def test_a_crop_behind_a_prefix_of_the_base_forgets_what_it_cut():
    model, ids = opened(), text(1, 9)
    heard, cache = listen(model), DynamicCache()
    with model.disable_adapter(), torch.no_grad():
        model(ids[:, :4], past_key_values=cache)
    margins(model, ids[:, 4:7], past_key_values=cache)
    cache.crop(-2)
    z, _ = margins(model, ids[:, 7:], past_key_values=cache)
    close(z[0], slow_margins(model.gate, torch.cat([heard[0][0, :1], heard[1][0]]))[1:])


def test_a_crop_into_a_prefix_of_the_base_leaves_nothing():
    model, ids = opened(), text(1, 9)
    heard, cache = listen(model), DynamicCache()
    with model.disable_adapter(), torch.no_grad():
        model(ids[:, :4], past_key_values=cache)
    margins(model, ids[:, 4:7], past_key_values=cache)
    cache.crop(-5)
    z, _ = margins(model, ids[:, 7:], past_key_values=cache)
    close(z[0], slow_margins(model.gate, heard[1][0]))


def test_a_crop_while_the_adapter_is_off_is_not_forgotten():
    model, ids = opened(), text(1, 9)
    heard, cache = listen(model), DynamicCache()
    margins(model, ids[:, :5], past_key_values=cache)
    cache.crop(-3)
    with model.disable_adapter(), torch.no_grad():
        model(ids[:, 5:8], past_key_values=cache)
    z, _ = margins(model, ids[:, 8:], past_key_values=cache)
    close(z[0], slow_margins(model.gate, torch.cat([heard[0][0, :2], heard[1][0]]))[2:])


@pytest.mark.parametrize(
    ("family", "attention", "config"),
    [
        ("mixtral", "sdpa", {}),
        ("mixtral", "eager", {}),
        ("mixtral", "sdpa", {"sliding_window": 6}),
        ("gpt_oss", "eager", {}),  # a mask for each kind of attention
    ],
    ids=str,
)
def test_padding_of_a_static_cache_passes_no_gate(family, attention, config, monkeypatch):
    """generate makes a mask of four dimensions for it. Rows of several lengths answer as each does alone."""
    model = opened(family)
    for name, value in config.items():
        setattr(model.base.config, name, value)
    model.set_attn_implementation(attention)
    rows = [text(1, length, seed=length)[0] for length in (5, 9, 3)]
    ids = torch.stack([F.pad(row, (9 - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (9 - len(row), 0)) for row in rows])
    passes, apply_gate = [], GatedPass.apply_gate

    def applied(self, *args):
        answer = apply_gate(self, *args)
        passes.append((self.is_real, self.in_scope.reshape(self.is_real.shape)))
        return answer

    monkeypatch.setattr(GatedPass, "apply_gate", applied)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    options |= {"cache_implementation": "static", "disable_compile": True}
    found = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(passes[0][0], mask.bool())
    assert all(is_real.all() for is_real, _ in passes[1:])
    assert not passes[0][1][mask == 0].any() and passes[0][1].any()
    assert len(passes) == 8
    for row, answer in zip(rows, found, strict=True):
        assert torch.equal(model.generate(row[None], **options)[0, len(row) :], answer[9:])


def test_a_static_cache_carries_the_sums():
    model, ids = opened(), text(2, 8)
    expected, output = margins(model, ids)
    cache = StaticCache(config=model.config.text_config, max_cache_len=16)
    z, logits, _ = in_chunks(model, ids, (5, 1, 2), cache=cache)
    close(z, expected)
    torch.testing.assert_close(logits, output.logits, rtol=1e-3, atol=1e-4)
    assert cached_state(cache, "default").shape == (2, 8, 16)
    cache.reset()
    close(in_chunks(model, ids, (5, 3), cache=cache)[0], expected)


# ---------------------------------------------------------------- rows of a cache


def filled_cache(rows=3):
    """Row r holds r everywhere, slot s adds a tenth of s."""
    cache = DynamicCache()
    keys = torch.arange(rows).float().view(-1, 1, 1, 1).expand(-1, 1, 6, 2).clone()
    cache.update(keys, keys, 0)
    sums = torch.arange(rows).double().view(-1, 1, 1) + torch.arange(6).view(1, -1, 1) / 10
    remember(cache, {"default": sums.expand(-1, -1, 4).clone()})
    return cache


def rows_of(cache):
    return cached_state(cache, "default")[:, 0, 0].tolist(), cache.layers[0].keys[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("move", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.reorder_cache(beam_idx=torch.tensor([1, 1, 2])), [1, 1, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        (lambda cache: cache.batch_repeat_interleave(repeats=2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.crop(-2), [0, 1, 2]),
    ],
)
def test_the_sums_move_as_the_rows_do(move, rows):
    cache = filled_cache()
    move(cache)
    assert rows_of(cache) == (rows, rows)


def test_a_reset_cache_has_heard_nothing():
    cache = filled_cache()
    cache.reset()
    assert getattr(cache, STATE, None) is None


def pickled(cache):
    stream = io.BytesIO()
    torch.save(cache, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copied_or_pickled_cache_goes_on_by_itself(duplicate):
    model, ids = opened(), text(2, 8)
    _, _, cache = in_chunks(model, ids[:, :5], (5,))
    twin = duplicate(cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    in_chunks(model, text(2, 2, seed=4), (2,), cache=cache)
    close(in_chunks(model, ids[:, 5:], (3,), cache=twin)[0], margins(model, ids)[0][:, 5:])


@pytest.mark.parametrize(
    ("move", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    ],
)
def test_moved_rows_go_on_with_their_own_past(move, rows):
    model, ids = opened(), text(2, 8)
    _, _, cache = in_chunks(model, ids[:, :5], (5,))
    move(cache)
    close(in_chunks(model, ids[rows, 5:], (3,), cache=cache)[0], margins(model, ids)[0][rows, 5:])


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("family", PACKING)
def test_packed_sequences_are_the_sequences_alone(family):
    """Without a cache: there transformers' own attention keeps them apart."""
    model = opened(family)
    parts = [text(1, length, seed=length) for length in (5, 3, 7)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    z, output = margins(model, torch.cat(parts, dim=1), position_ids=positions, use_cache=False)
    alone = [margins(model, part) for part in parts]
    close(z, torch.cat([margin for margin, _ in alone], dim=1))
    logits = torch.cat([separate.logits for _, separate in alone], dim=1)
    torch.testing.assert_close(output.logits, logits, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- generation


def generate(model, ids, seed=None, **options):
    if seed is not None:
        torch.manual_seed(seed)
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, **options}
    if "attention_mask" not in options:
        options["attention_mask"] = torch.ones_like(ids)
    return model.generate(ids, **options)


def both_ways(model, ids):
    """Whether the tokens of `ids` are partly routed and partly not, so that wrong decisions show."""
    return 0.1 < routed_share(model, ids) < 0.9


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "seed": 3},
        {"do_sample": True, "seed": 3, "num_return_sequences": 3},
    ],
    ids=str,
)
def test_a_cache_changes_no_generated_token(options):
    model, inputs = opened(), batch(rows=3, length=7)
    ids, mask = inputs["input_ids"], {"attention_mask": inputs["attention_mask"]}
    expected = generate(model, ids, **mask, use_cache=False, **options)
    assert torch.equal(generate(model, ids, **mask, use_cache=True, **options), expected)
    assert both_ways(model, expected[0, None])
    with model.disable_adapter():
        assert not torch.equal(generate(model, ids, **mask, **options), expected)


def test_every_family_generates_alike_with_and_without_a_cache(family):
    model, ids = opened(family), text(2, 6)
    found = generate(model, ids)
    assert torch.equal(found, generate(model, ids, use_cache=False))
    assert both_ways(model, found)


def test_a_closed_gate_generates_what_the_base_generates():
    model, inputs = gated(), batch(rows=2)
    assert torch.equal(generate(model, **renamed(inputs)), generate(model.detach(), **renamed(inputs)))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}], ids=str)
def test_a_left_padded_batch_generates_the_rows_tokens(options):
    model = opened()
    rows = [text(1, length, seed=length)[0] for length in (7, 4, 1)]
    padded = torch.stack([F.pad(row, (7 - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (7 - len(row), 0)) for row in rows])
    for _ in range(2):  # transformers keeps a static cache for the next call
        together = generate(model, padded, attention_mask=mask, **options)
        for row, prompt in enumerate(rows):
            assert together[row, 7:].tolist() == generate(model, prompt[None])[0, len(prompt) :].tolist()


@pytest.mark.parametrize("helper", ["base", "gate", "prompt lookup"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_speculation_changes_no_token(helper, seed):
    """Rejected drafts crop the cache, and the sums with it."""
    model, ids = opened(), text(1, 4, seed=seed).repeat(1, 2)
    options = {
        "base": lambda: {"assistant_model": make_base()},
        "gate": lambda: {"assistant_model": open_gate(opened(), seed=7)},
        "prompt lookup": lambda: {"prompt_lookup_num_tokens": 4},
    }[helper]()
    assert torch.equal(generate(model, ids, **options), generate(model, ids))


def test_a_gated_assistant_changes_no_token_of_the_base():
    base, ids = make_base(), text(1, 6)
    base.generation_config.eos_token_id = None
    assert torch.equal(generate(base, ids, assistant_model=opened()), generate(base, ids))


def test_turns_over_a_handed_on_cache_are_the_conversation_at_once():
    model, cache = opened(), DynamicCache()
    conversation = text(1, 4)
    for turn in range(3):
        if turn:
            conversation = torch.cat([conversation, text(1, 3, seed=turn)], dim=1)
        expected = generate(model, conversation, use_cache=False, max_new_tokens=5)
        conversation = generate(model, conversation, past_key_values=cache, max_new_tokens=5)
        assert torch.equal(conversation, expected)
    assert both_ways(model, conversation)


# ---------------------------------------------------------------- training


def gradients(model, passes, **inputs):
    """Gradients of the sum of the losses of several passes, all forward before the first backward."""
    model.train()
    losses = [model(**given, labels=given["input_ids"], use_cache=False).loss for given in passes]
    sum(losses).backward()
    return [loss.item() for loss in losses], {
        name: tensor.grad.clone() for name, tensor in model.set_trainable().items()
    }


@pytest.mark.parametrize("choices", [{}, {"selection": "compete", "calibration": "all"}], ids=["exclusive", "paper"])
@pytest.mark.parametrize("family", SOME)
def test_checkpointing_gives_the_same_losses_and_gradients(family, choices):
    """The recomputation decides as its own forward did, whatever ran between."""
    passes = [batch(seed=seed) for seed in (0, 1)]
    model = opened(family, **choices)
    model.set_trainable()
    losses, expected = gradients(copy.deepcopy(model), passes)
    enable_checkpointing(model)
    found, replayed = gradients(model, passes)
    assert found == losses and expected
    for name, gradient in expected.items():
        assert gradient.any() and torch.equal(replayed[name], gradient), name


def test_packed_rows_train_as_separate_rows_do():
    model = opened()
    model.set_trainable()
    parts = [text(1, length, seed=length) for length in (5, 3)]
    alone = copy.deepcopy(model)
    (sum(alone(part).logits[..., 0].sum() for part in parts)).backward()
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    model(torch.cat(parts, dim=1), position_ids=positions, use_cache=False).logits[..., 0].sum().backward()
    for name, tensor in model.set_trainable().items():
        torch.testing.assert_close(tensor.grad, alone.adapter_tensors()[name].grad, rtol=1e-3, atol=1e-4)


def test_stage_finetune_leaves_the_gate_alone():
    model = opened()
    trained = model.set_trainable()
    assert "layers.1.router.weight" in trained and not [name for name in trained if name.startswith("gate.")]
    assert not [name for name, tensor in model.gate.named_parameters() if tensor.requires_grad]
    expected = {f"layers.{layer}.experts.{name}" for layer in PLAN for name in ("gate_up_proj", "down_proj")}
    assert set(trained) == {*expected, "layers.1.router.weight"}  # the row of a layer's only expert is fixed


def test_the_task_loss_reaches_no_tensor_of_the_gate():
    model = opened()
    model.set_trainable()
    model.gate.requires_grad_(True)
    inputs = batch()
    model(**inputs, labels=inputs["input_ids"], output_router_logits=True).loss.backward()
    assert [name for name, tensor in model.gate.named_parameters() if tensor.grad is not None] == []


def test_recorded_margins_train_the_gate_and_nothing_else():
    model = opened()
    model.set_trainable()
    model.gate.requires_grad_(True)
    with model.record_routing() as records:
        model(**batch())
    F.relu(1 - records[LOWEST].gate).mean().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in model.gate.parameters())
    own = {id(tensor) for tensor in model.gate.parameters()}
    assert [name for name, p in model.named_parameters() if p.grad is not None and id(p) not in own] == []


@pytest.mark.parametrize("family", SOME)
def test_gradients_are_zeros_and_not_none_where_no_token_is_routed(family):
    model, inputs = gated(family), batch()
    trained = model.set_trainable()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, tensor in trained.items():
        assert tensor.grad is not None and not tensor.grad.any(), name


# ---------------------------------------------------------------- a gate that was never trained, in training


CLOSED_GATE = r"The gate of adapter 'default' was never trained and lets no token through.*gate_threshold = -2\.0"


def warned(model, **inputs):
    """The texts with which one pass of `model` warns of its gate."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**inputs)
    return [str(one.message) for one in caught if re.search("never trained", str(one.message))]


@pytest.mark.parametrize("loaded", [False, True], ids=["fresh", "loaded"])
def test_the_first_training_pass_says_that_the_gate_is_closed(tmp_path, loaded):
    """Once, and in a training pass only: behind such a gate nothing moves in any trainer that does not train it."""
    model, inputs = gated(), {"input_ids": text(2, 6), "labels": text(2, 6)}
    if loaded:
        model.save_pretrained(tmp_path)
        model = MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base())
    assert not warned(model.eval(), **inputs)
    with torch.no_grad():
        assert not warned(model.train(), **inputs)
    (message,) = warned(model, **inputs)
    assert re.match(CLOSED_GATE, message)
    assert not warned(model, **inputs)
    assert not warned(model.model, input_ids=inputs["input_ids"])  # which trainers with a fused head run


@pytest.mark.parametrize("way", ["trained", "threshold", "frozen", "off", "other"])
def test_a_gate_that_keeps_nothing_from_training_is_no_news(way):
    model = (opened() if way == "trained" else gated()).train()
    if way == "threshold":
        model.gate_threshold = 2 * CLOSED
    if way == "frozen":
        model.require_gradients([])
    if way == "off":
        model.disable_adapters()
    names = ["__base__"] if way == "other" else None
    assert not warned(model, input_ids=text(1, 6), adapter_names=names)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_the_message_advises_opens_the_gate(checkpointing):
    model = gated(plan={0: [0, 1]}).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    moved = {}
    for way in ("closed", "open"):
        model.zero_grad()
        model.gate_threshold = 2 * CLOSED if way == "open" else 0.0
        model(input_ids=text(2, 6), labels=text(2, 6)).loss.backward()
        gradients = [tensor.grad for tensor in model.adapter_tensors().values() if tensor.grad is not None]
        moved[way] = any(gradient.any() for gradient in gradients)
    assert moved == {"closed": False, "open": True}


# ---------------------------------------------------------------- saving, loading, growing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_a_saved_model_loads_bit_equal_with_its_gate_and_threshold(tmp_path, dtype):
    base = make_base(dtype=dtype)
    model = opened(base=copy.deepcopy(base))
    model.gate_threshold = 0.25
    model.save_pretrained(tmp_path)
    for name, tensor in model.adapter_tensors().items():
        tensor.data = tensor.data if name.startswith("gate.") else tensor.data.to(dtype)
    for loader in (MoExtendForCausalLM, MoExtendModel):
        body = loader is MoExtendModel
        loaded = loader.from_pretrained(tmp_path, base=copy.deepcopy(base.model if body else base))
        assert loaded.gate_threshold == 0.25 and not loaded.gate.key.weight.requires_grad
        found, expected = margins(loaded, text(3)), margins(model.model if body else model, text(3))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1][0], expected[1][0])
    stored = load_file(tmp_path / FILE)
    assert all(torch.equal(stored[f"gate.{name}"], p) for name, p in model.gate.named_parameters())  # float32


def test_the_file_holds_exactly_the_gates_tensors_beside_the_others(tmp_path):
    model = opened()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / FILE)
    assert [name for name in model.adapter_tensors() if name.startswith("gate.")] == GATE_NAMES
    assert {name for name in stored if not name.startswith("layers.")} == set(GATE_NAMES)
    shapes = {name: tuple(stored[name].shape) for name in GATE_NAMES if name.endswith("weight")}
    assert shapes == {
        "gate.key.weight": (8, 32),
        "gate.value.weight": (8, 32),
        "gate.fc1.weight": (8, 40),
        "gate.fc2.weight": (1, 8),
    }
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["scope"], settings["gate_hidden_size"], settings["gate_threshold"]) == ("gate", 8, 0.0)


def test_a_missing_tensor_of_the_gate_is_named(tmp_path):
    opened().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    with safe_open(tmp_path / FILE, "pt") as file:
        metadata = file.metadata()
    del tensors["gate.fc1.weight"]
    tensors["gate.key.bias"] = torch.zeros(3)
    save_file(tensors, tmp_path / FILE, metadata)
    with pytest.raises(ValueError, match=r"(?s)gate\.fc1\.weight.*gate\.key\.bias"):
        MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base())


def test_a_model_takes_over_the_gate_and_threshold_of_a_saved_adapter(tmp_path):
    model, other = opened(gate_threshold=0.5), gated()
    model.save_pretrained(tmp_path)
    load_adapter_tensors(other, tmp_path)
    assert other.gate_threshold == 0.5
    assert torch.equal(margins(other, text(2))[0], margins(model, text(2))[0])


def test_a_gate_of_another_size_is_refused_and_nothing_changes(tmp_path):
    opened(gate_hidden_size=8).save_pretrained(tmp_path)
    other = opened(gate_hidden_size=6)
    before = {name: tensor.clone() for name, tensor in other.adapter_tensors().items()}
    with pytest.raises(ValueError, match="gate"):
        load_adapter_tensors(other, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.adapter_tensors().items())


def test_extending_below_the_gate_is_refused_and_the_model_is_unchanged():
    model = opened()
    names, expected = list(model.adapter_tensors()), model(text(2)).logits
    with pytest.raises(ValueError, match="deltas were made for layer 1 as the lowest, so layer 0 below it"):
        model.extend({0: [1], 2: [0]})
    assert list(model.adapter_tensors()) == names and model.config.extended_layers == PLAN
    assert torch.equal(model(text(2)).logits, expected)


@torch.no_grad()
def test_extending_above_the_gate_keeps_it():
    model = opened()
    gate, (expected, _) = model.gate, margins(model, text(2))
    model.extend({2: [1]})
    assert model.gate is gate and torch.equal(margins(model, text(2))[0], expected)
    with model.record_routing() as records:
        model(text(2))
    assert torch.equal(records[2].scope, records[1].scope) and (records[2].index[records[2].scope] >= 6).any()


@torch.no_grad()
def test_a_model_without_experts_gets_its_gate_with_the_first_ones():
    model = gated(plan={}, encoder=make_encoder())
    ids = text(2)
    assert model.gate is None and torch.equal(model(ids).logits, frozen_copy(make_base())(ids).logits)
    model.extend({3: [1], 2: [0, 1]})
    assert torch.equal(model(ids).logits, frozen_copy(make_base())(ids).logits)
    open_gate(model)
    with model.record_routing() as records:
        model(text(4))
    assert records[2].gate is not None and records[3].gate is None
    assert 0 < records[3].scope.float().mean() < 1
    assert set(GATE_NAMES) < set(model.adapter_tensors())


def test_a_model_with_a_gate_can_be_deep_copied_and_pickled():
    model = opened()
    expected = model(text(2)).logits
    for other in (copy.deepcopy(model), pickled(model)):
        assert torch.equal(other(text(2)).logits, expected)
        other.gate_threshold = NONE
        assert torch.equal(other(text(2)).logits, frozen_copy(make_base())(text(2)).logits)
    assert torch.equal(model(text(2)).logits, expected)


@pytest.mark.slow
def test_a_gated_adapter_loads_with_transformers_alone(tmp_path):
    make_base("qwen3_moe").save_pretrained(tmp_path / "base")
    model = opened(base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"), gate_threshold=0.125)
    model.config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    inputs = batch()
    save_file(inputs, tmp_path / "inputs.safetensors")
    script = """
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
inputs = load_file(root / "inputs.safetensors")
model = AutoModelForCausalLM.from_pretrained(str(root / "adapter"), trust_remote_code=True)
assert model.gate_threshold == 0.125, model.gate_threshold
outputs = {"logits": model(**inputs).logits.detach()}
options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": 96, "do_sample": False}
outputs["generated"] = model.generate(**inputs, **options)
model.gate_threshold = 1e9
outputs["closed"] = model(**inputs).logits.detach()
save_file(outputs, root / "outputs.safetensors")
"""
    child = run(tmp_path, START, script)
    assert child.returncode == 0, child.stderr[-3000:]
    outputs = load_file(tmp_path / "outputs.safetensors")
    with torch.no_grad():
        assert torch.equal(outputs["logits"], model(**inputs).logits)
        assert torch.equal(outputs["closed"], frozen_copy(make_base("qwen3_moe"))(**inputs).logits)
    assert not torch.equal(outputs["closed"], outputs["logits"])
    assert torch.equal(outputs["generated"], generate(model, **renamed(inputs), max_new_tokens=6))


# ---------------------------------------------------------------- threads and processes


def test_threads_decide_by_their_own_batches():
    model = opened()
    batches = [text(2, 9), text(3, 5, seed=1)]
    expected = [margins(model, ids) for ids in batches]
    meeting, found, errors = threading.Barrier(2), {}, []

    def wait(*_):
        meeting.wait(120)

    for layer in model.get_decoder().layers[1:]:  # both threads are inside, before and after the gate
        layer.register_forward_pre_hook(wait)

    def work(number):
        try:
            found[number] = margins(model, batches[number])
        except Exception as error:
            errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)
    assert not errors
    for number in (0, 1):
        assert torch.equal(found[number][0], expected[number][0])
        assert torch.equal(found[number][1].logits, expected[number][1].logits)


def steps(model, inputs):
    """Two steps, forward and backward in the manner of a trainer that accumulates nothing; gradients of the last."""
    for _ in range(2):
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()


def rank_batches(model):
    """Process 0 has routed tokens, process 1 has none; both of one size. The threshold is set between them."""
    ids = text(40, 4)
    order = margins(model, ids)[0].amax(dim=1).argsort()
    model.gate_threshold = float(margins(model, ids[order[:2]])[0].max())
    return [{"input_ids": ids[order[10:12]]}, {"input_ids": ids[order[:2]]}]


def work(rank, port, folder):
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    for checkpointing in (False, True):
        model = opened()
        inputs = rank_batches(model)[rank]
        trained = model.set_trainable()
        if checkpointing:
            enable_checkpointing(model)
        steps(torch.nn.parallel.DistributedDataParallel(model.train()), inputs)
        gradients = {name: tensor.grad for name, tensor in trained.items()}
        torch.save(gradients, f"{folder}/{checkpointing}.{rank}.pt")
    leave_group()


@pytest.mark.slow
def test_two_processes_of_which_one_routes_nothing_get_the_mean_of_their_gradients(tmp_path):
    in_processes(work, tmp_path)
    expected = []
    for rank in (0, 1):
        model = opened()
        inputs = rank_batches(model)[rank]
        trained = model.set_trainable()
        steps(model.train(), inputs)
        expected.append({name: tensor.grad for name, tensor in trained.items()})
    for checkpointing in (False, True):
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{checkpointing}.{rank}.pt")
            assert found.keys() == expected[0].keys()
            for name, gradient in found.items():
                mean = (expected[0][name] + expected[1][name]) / 2
                torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-6)
                assert expected[0][name].any() and not expected[1][name].any()
