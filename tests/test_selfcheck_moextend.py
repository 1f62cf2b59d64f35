"""The self-check at attach: silent where all is well, on every device and dtype, and an error by name where not."""

import contextlib

import pytest
import torch
from conftest import FAMILIES, PAPER, batch, make_base, shake
from families import make_family
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.families_moextend import find_moe_layers, find_rule
from modeling_moextend.layers_moextend import RouterExtension
from modeling_moextend.selfcheck_moextend import run, same, sample

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
    assert sample(find_moe_layers(base.get_decoder())[2], find_rule(2, find_moe_layers(base.get_decoder())[2])) is None
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
        return logits, weights * (1.01 if len(self) else 1.0), index

    monkeypatch.setattr(RouterExtension, "forward", leaks)
    with pytest.raises(ValueError, match="Layer 2 of mixtral.*with the new experts off it does not answer as before"):
        attach(make_base())


def test_what_is_compared_is_router_and_experts():
    layer = find_moe_layers(make_base("deepseek_v3").get_decoder())[0]
    rule = find_rule(0, layer)
    tokens = sample(layer, rule)
    told, weights, index, output = run(layer, rule, tokens)
    assert [part.shape for part in (told, weights, index, output)] == [(8, 6), (8, 2), (8, 2), (8, 32)]
    expected = layer.router(tokens[0])
    assert same((told, weights, index), expected)
    assert same((output,), (layer.experts(tokens[1], index, weights),))
    assert same((torch.tensor([torch.nan]),), (torch.tensor([torch.nan]),))
    assert not same((torch.zeros(1),), (torch.ones(1),)) and not same((torch.zeros(1),), (torch.zeros(2),))
