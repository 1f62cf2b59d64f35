"""Scoped deltas: shared layers that move for tokens in scope alone, in every family, scope and way of running."""

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import PAPER, batch, frozen_copy, make_base, make_encoder, shake
from families import DEFAULT, FAMILIES, VOCAB, make_family
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.adapter_file_moextend import FILE
from modeling_moextend.configuration_moextend import normalise_deltas
from modeling_moextend.deltas_moextend import DeltaSite, LinearDelta, find_sites
from modeling_moextend.families_moextend import find_moe_layers
from modeling_moextend.publishing.facts import folder_card
from modeling_moextend.tensors_moextend import moved_to_layers
from modeling_moextend.tools.inspection import inspect_adapter

DELTAS = {"embedding": 4, "attention": 2, "output": 0}
WHOLE = {"embedding": 0, "attention": 0, "output": 0}
PLAN = {1: [0, 3], 2: [1, 2]}
SCOPES = ("all", "modality", "gate")
IMAGE = 96
OPEN, SHUT = -1e3, 1e3
HYPER_CONNECTED = ("deepseek_v4", "glm5_next", "hy_v4", "qwen4_exp")  # their residual stream is no vector a token


def make_model(scope="gate", deltas=DELTAS, family="mixtral", plan=PLAN, base=None, **options):
    torch.manual_seed(0)
    encoder = make_encoder() if scope == "modality" else None
    base = make_base(family) if base is None else base
    options = {"scope": scope, "encoder": encoder, "deltas": deltas, **options}
    return MoExtendForCausalLM.from_base(base, plan, **options).eval()


def is_delta(name):
    return any(kind in name.split(".") for kind in DELTAS)


def deltas_of(model, adapter_name=None):
    return {name: tensor for name, tensor in model.adapter_tensors(adapter_name).items() if is_delta(name)}


def open_gate(model):
    if model.gate is not None:
        model.gate_threshold = OPEN
    return model


def inputs(scope="gate"):
    given = batch()
    if scope == "modality":
        given["input_ids"][:, 4:8] = IMAGE
        given["pixel_values"] = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return given


@torch.no_grad()
def logits(model, given=None, **options):
    return model(**(batch() if given is None else given), **options).logits


# ---------------------------------------------------------------- what they are, and where they start


def test_kinds_and_ranks_are_normalised_or_refused():
    assert normalise_deltas(None) == {} == normalise_deltas([])
    assert normalise_deltas(["output", "attention"]) == {"attention": 16, "output": 0}
    assert normalise_deltas({"output": 8}) == {"output": 8}
    for wrong in ("output", True, 7, ["head"], [[]], {"output": -1}, {"output": None}, {"attention": True}):
        with pytest.raises(ValueError, match=r"deltas=.* must be any of 'embedding', 'attention', 'output'"):
            make_model(deltas=wrong)


def test_a_gate_brings_all_that_the_base_can_have_and_other_scopes_none():
    assert make_model("gate", None).config.deltas == {"embedding": 0, "attention": 16, "output": 0}
    assert make_model("gate", ()).config.deltas == {} == make_model("modality", None).config.deltas
    assert make_model("all", None).config.deltas == {} == make_model("gate", None, plan={3: [1]}).config.deltas
    of_many = make_model("gate", None, "deepseek_v4", plan={0: [1, 2]})
    assert of_many.config.deltas == {"attention": 16, "output": 0}
    stacked = make_model("gate", ())
    stacked.add_adapter("top", {0: [1]})
    assert stacked.adapters["top"].config.deltas == {"embedding": 0, "attention": 16, "output": 0}


@pytest.mark.parametrize("deltas", [DELTAS, WHOLE], ids=["low rank", "whole"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_new_adapter_computes_as_one_without_deltas(scope, deltas):
    with_deltas, without = (open_gate(make_model(scope, one)) for one in (deltas, {}))
    for model in (with_deltas, without):
        for name, tensor in model.adapter_tensors().items():
            if ".experts." in name:
                tensor.data += torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    assert torch.equal(logits(with_deltas, inputs(scope)), logits(without, inputs(scope)))


def test_names_shapes_and_counts():
    shapes = {name: tuple(tensor.shape) for name, tensor in deltas_of(make_model()).items()}
    assert shapes["layers.2.embedding.lora_A"] == (4, VOCAB) and shapes["layers.2.embedding.lora_B"] == (32, 4)
    assert shapes["layers.3.attention.k_proj.lora_A"] == (2, 32) and shapes["output.weight"] == (32, 32)
    assert not any(name.startswith(("layers.0.", "layers.1.")) for name in shapes)  # the gate sees the base's own
    whole = {name: tuple(tensor.shape) for name, tensor in deltas_of(make_model(deltas=WHOLE)).items()}
    assert whole["layers.2.embedding.weight"] == (VOCAB, 32) and whole["layers.3.attention.k_proj.weight"] == (16, 32)


def test_tokens_that_no_training_saw_keep_the_bases_embedding():
    """Rank r: only the columns of tokens that were seen leave zero."""
    model = open_gate(make_model(deltas={"embedding": 4})).train()
    model.set_trainable()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    model(**batch(), labels=batch()["input_ids"]).loss.backward()
    optimiser.step()
    moved = deltas_of(model)["layers.2.embedding.lora_A"].abs().sum(dim=0) > 0
    seen = torch.zeros(VOCAB, dtype=torch.bool)
    seen[batch()["input_ids"][batch()["attention_mask"].bool()]] = True
    assert moved.any() and not (moved & ~seen).any()


# ---------------------------------------------------------------- who feels them


def site_of(model, name):
    return next(m for m in model.modules() if isinstance(m, DeltaSite) and m.layer == name)


def test_a_token_out_of_scope_is_bit_equal_and_one_in_scope_feels_the_delta():
    model = shake(make_model("all"))
    site, linear = site_of(model, "layers.2.attention.q_proj"), model.get_decoder().layers[2].self_attn.q_proj
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    scope = torch.tensor([True, False, False, True, False] * 2)
    plain = F.linear(hidden, linear.weight)
    with torch.no_grad(), model.passes.using(plan=replace(model.passes.plan, scopes={"default": scope})):
        found = linear(hidden)
    own = site.adapters["default"]
    expected = plain + F.linear(F.linear(hidden, own.lora_A), own.lora_B)
    inside = scope.view(2, 5)
    assert torch.equal(found[~inside], plain[~inside]) and torch.equal(found[inside], expected[inside])
    assert not torch.equal(found[inside], plain[inside])


@pytest.mark.parametrize("scope", SCOPES[1:])
def test_a_batch_out_of_scope_is_the_base_bit_for_bit(scope):
    base = frozen_copy(make_base())
    model = shake(make_model(scope))
    if scope == "gate":
        model.gate_threshold = SHUT
    assert torch.equal(logits(model), logits(base))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("kind", sorted(DELTAS))
@pytest.mark.parametrize("scope", SCOPES)
def test_every_kind_is_felt_in_every_scope(scope, kind):
    model = open_gate(make_model(scope, {kind: DELTAS[kind]}))
    before = logits(model, inputs(scope))
    for name, tensor in deltas_of(model).items():
        tensor.data = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
    moved = ((logits(model, inputs(scope)) - before).abs() > 1e-4).any(dim=-1)  # others are equal up to rounding
    if scope == "modality":  # tokens before the image are no token of its scope
        assert not moved[0, :4].any() and moved[0, 8:].all()
    else:
        assert moved[0].all()


def test_each_token_feels_the_deltas_of_the_adapters_whose_scope_it_is_in():
    """Two adapters, rows of their own, one row for both, one for none: each row as if it were alone."""
    model = shake(make_model("all", selection="exclusive"))
    model.add_adapter("other", {0: [1, 2], 2: [3, 3]}, scope="all", deltas={"attention": 3, "embedding": 0})
    shake(model, seed=1)
    ids = torch.randint(3, VOCAB, (4, 9), generator=torch.Generator().manual_seed(0))
    names = ["default", ["default", "other"], "__base__", "default"]
    together = logits(model, {"input_ids": ids}, adapter_names=names)
    for row, own in enumerate(names):
        alone = logits(model, {"input_ids": ids[row : row + 1]}, adapter_names=[own])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-5)
    assert len({tensor.sum().item() for tensor in together}) == 4


def test_an_embedding_delta_has_no_row_for_image_tokens_and_needs_ids():
    model = shake(make_model("modality", {"embedding": 0}))
    assert logits(model, inputs("modality")).isfinite().all()
    model = open_gate(shake(make_model("gate", {"embedding": 0})))
    embeds = model.get_input_embeddings()(batch()["input_ids"])
    with pytest.raises(ValueError, match=r"deltas=\('embedding', ...\) adds to what input_ids stand for"):
        model(inputs_embeds=embeds)
    with model.disable_adapter():
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="call the model, not its layers"):
        shake(make_model("all", {"embedding": 0})).base(**batch())


# ---------------------------------------------------------------- ways of running


@pytest.mark.parametrize("scope", SCOPES)
def test_a_cache_padding_and_packing_change_nothing(scope):
    model, given = open_gate(shake(make_model(scope))), inputs(scope)
    whole = logits(model, given)
    first = {**given, "input_ids": given["input_ids"][:, :8], "attention_mask": given["attention_mask"][:, :8]}
    with torch.no_grad():
        cached = model(**first, use_cache=True)
        rest = {"input_ids": given["input_ids"][:, 8:], "attention_mask": given["attention_mask"]}
        rest = model(**rest, past_key_values=cached.past_key_values)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(torch.cat([cached.logits, rest.logits], dim=1)[real], whole[real], rtol=1e-4, atol=1e-5)
    if scope == "modality":
        return
    ids = given["input_ids"][:2]
    positions = torch.arange(10).repeat(2).unsqueeze(0)
    packed = logits(model, {"input_ids": ids.reshape(1, -1), "position_ids": positions}, use_cache=False)
    torch.testing.assert_close(packed.view(2, 10, -1), logits(model, {"input_ids": ids}), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_checkpointing_gives_the_same_gradients_and_everything_trains(scope):
    found = []
    for checkpointing in (False, True):
        model = open_gate(shake(make_model(scope))).train()
        model.set_trainable()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs(scope), labels=batch()["input_ids"]).loss.backward()
        found.append({name: tensor.grad for name, tensor in deltas_of(model).items()})
    plain, recomputed = found
    assert plain.keys() == deltas_of(model).keys() and all(grad.any() for grad in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


@pytest.mark.parametrize("scope", SCOPES[1:])
def test_a_step_out_of_scope_leaves_gradients_of_zero_not_none(scope):
    """Else processes with and without such tokens would wait for each other, or step differently."""
    model = shake(make_model(scope)).train()
    model.set_trainable()
    if scope == "gate":
        model.gate_threshold = SHUT
    model(**batch(), labels=batch()["input_ids"]).loss.backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in deltas_of(model).values())


def test_a_half_precision_base_has_deltas_in_float32_and_loads_them_bit_equal(tmp_path):
    model = open_gate(shake(make_model(base=make_base(dtype=torch.bfloat16)))).train()
    model.set_trainable()
    assert {tensor.dtype for tensor in deltas_of(model).values()} == {torch.float32}
    model(**batch(), labels=batch()["input_ids"]).loss.backward()
    assert all(tensor.grad.any() for tensor in deltas_of(model).values())
    model.eval().save_pretrained(tmp_path, adapter_dtype="float32")
    again = MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base(dtype=torch.bfloat16))
    assert torch.equal(logits(again), logits(model))


def test_copies_and_pickles_answer_alike():
    model = open_gate(shake(make_model()))
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected) and torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    deltas_of(twin)["output.weight"].data.zero_()
    assert torch.equal(logits(model), expected) and not torch.equal(logits(twin), expected)


# ---------------------------------------------------------------- saved, switched, taken off


@pytest.mark.parametrize("scope", SCOPES)
def test_saved_and_loaded_they_are_bit_equal_and_the_base_is_untouched(scope, tmp_path):
    base = make_base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = open_gate(shake(make_model(scope, base=base)))
    expected = logits(model, inputs(scope))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / FILE)
    assert stored.keys() == model.adapter_tensors().keys() and set(deltas_of(model)) <= set(stored)
    assert model.detach() is base and base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    hooks = [hook for module in base.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    assert not hooks and not any("moextend" in name for name, _ in base.named_modules())
    again = MoExtendForCausalLM.from_pretrained(tmp_path, base=base, encoder=model.encoder)
    assert torch.equal(logits(again, inputs(scope)), expected)


def test_a_projector_goes_where_ids_go_in_whatever_comes_before_it_in_the_file():
    model = make_model("modality", {"output": 0})
    tensors = {name: tensor.detach() for name, tensor in model.adapter_tensors().items()}
    sites = find_sites(model.config, model.get_decoder())
    for module in (model.get_decoder().norm, *(layer.router for layer in model.moe_layers.values())):
        module.to("meta")  # another device
    moved = moved_to_layers(tensors, model.moe_layers, sites, torch.device("cpu"), torch.float32)
    assert list(moved)[-1].startswith("projector.") and moved["output.weight"].is_meta
    assert not any(tensor.is_meta for name, tensor in moved.items() if name.startswith("projector."))


def test_missing_unexpected_and_misshapen_deltas_are_named(tmp_path):
    make_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    with pytest.raises(ValueError) as caught:
        model = make_model(deltas={"output": 0})
        model.load_state_dict(tensors)
    assert "layers.3.attention.q_proj.lora_A" in str(caught.value)
    tensors.pop("output.weight")
    tensors["layers.2.embedding.lora_A"] = torch.zeros(4, 7)
    with pytest.raises(ValueError) as caught:
        make_model().load_state_dict(tensors)
    assert "output.weight" in str(caught.value) and "layers.2.embedding.lora_A" in str(caught.value)


def test_switching_stacking_and_deleting():
    model = open_gate(shake(make_model()))
    alone = logits(model)
    model.add_adapter("top", {0: [1, 2], 3: [0, 1]}, deltas=["attention", "output"])
    model.gate_threshold = OPEN
    shake(model, seed=3)
    trains = {name for name, tensor in model.adapter_tensors("top").items() if tensor.requires_grad}
    assert set(deltas_of(model, "top")) <= trains
    assert not any(tensor.requires_grad for tensor in model.adapter_tensors("default").values())
    both = logits(model)
    assert not torch.equal(both, alone)
    model.set_adapter("default")
    assert torch.equal(logits(model), alone)
    model.set_adapter(["default", "top"])
    assert torch.equal(logits(model), both)
    model.delete_adapter("top")
    model.set_adapter("default")
    assert torch.equal(logits(model), alone)
    assert not any("top" in name for name, _ in model.named_parameters())


def test_deltas_come_with_the_first_layers_and_need_one_above_them():
    model = make_model("modality", plan={})
    assert not deltas_of(model)
    model.extend(PLAN)
    assert deltas_of(model).keys() == deltas_of(make_model("modality")).keys()
    with pytest.raises(ValueError, match="Gate and deltas were made for layer 1 as the lowest"):
        model.extend({0: [1]})
    before = set(deltas_of(model))
    model.extend({3: [1]})
    assert set(deltas_of(model)) == before
    with pytest.raises(ValueError, match=r"3 is the last: extend a lower layer as well, or use deltas=\('output',\)"):
        make_model(plan={3: [1]})
    assert set(deltas_of(make_model(deltas=["output"], plan={3: [1]}))) == {"output.weight"}
    with pytest.raises(ValueError, match="'deltas': \\['output'\\]"):
        make_model(None, ["output"], paper=True)


def test_a_refused_delta_leaves_the_base_as_it_was():
    base = make_base()
    expected = logits(base)
    with pytest.raises(ValueError, match="is the last"):
        make_model(base=base, plan={3: [1]})
    assert torch.equal(logits(base), expected) and not any("moextend" in name for name, _ in base.named_modules())


def test_inspect_and_card_say_them(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    found = inspect_adapter(tmp_path)
    assert found["deltas"] == DELTAS
    parts = {entry["part"]: entry["num_tensors"] for entry in found["others"]}
    assert parts == {"embedding deltas": 2, "attention deltas": 16, "output deltas": 1, "gate": 8}
    sizes = [entry["num_tensors"] for entry in (*found["layers"], *found["others"])]
    assert sum(sizes) == found["num_tensors"]
    card = str(folder_card(tmp_path, model.config))
    assert "| delta of attention | rank 2 |" in card and "| delta of the last hidden state | whole matrix |" in card


@pytest.mark.slow
def test_without_the_package_a_saved_one_runs_and_trains(tmp_path):
    """What ships is enough: remote code alone, in a process of its own that can't import the package."""
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    model = open_gate(shake(make_model(base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))))
    model.save_pretrained(tmp_path / "adapter", adapter_dtype="float32")
    torch.save(logits(model), tmp_path / "logits.pt")
    script = f"""
import sys, torch
sys.modules["modeling_moextend"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "adapter")!r}, trust_remote_code=True)
given = torch.load({str(tmp_path / "given.pt")!r})
assert torch.equal(model(**given).logits, torch.load({str(tmp_path / "logits.pt")!r}))
model(**given, labels=given["input_ids"]).loss.backward()
assert model.adapter_tensors()["output.weight"].grad.any()
"""
    torch.save(batch(), tmp_path / "given.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)


# ---------------------------------------------------------------- families


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow)
        for name in sorted(FAMILIES)
        if not FAMILIES[name].why
    ],
)
@pytest.mark.parametrize("kind", sorted(DELTAS))
def test_every_family_learns_with_them_or_refuses_them(name, kind):
    """By its own names: every delta gets a gradient; out of scope the base, bit for bit; a cache changes nothing."""
    base = make_family(name).requires_grad_(False)
    given = {"input_ids": torch.randint(3, VOCAB - 2, (2, 8), generator=torch.Generator().manual_seed(0))}
    expected = logits(base, given)
    plan = {layer: [0, 1] for layer in sorted(find_moe_layers(base.get_decoder()))[:2]}
    options = {"family": name, "plan": plan, "deltas": {kind: DELTAS[kind]}}
    if name in HYPER_CONNECTED and kind == "embedding":
        with pytest.raises(ValueError, match="is several vectors a token .hyper-connections., with no place for"):
            make_model(**options)
        return
    if name == "qwen4_exp" and kind == "output":
        with pytest.raises(ValueError, match="qwen4_exp has 0 norms at its end, not one: leave out 'output'"):
            make_model(**options)
        return
    model = make_model(**options, base=base)
    for tensor in deltas_of(model).values():
        tensor.data = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)) * 0.3
    model.gate_threshold = SHUT
    assert torch.equal(logits(model, given), expected)
    open_gate(model)
    found = logits(model, given)
    assert not torch.equal(found, expected)
    if name not in ("jamba",):  # whose base gives other numbers in pieces
        with torch.no_grad():
            first = model(input_ids=given["input_ids"][:, :7], use_cache=True)
            last = model(input_ids=given["input_ids"][:, 7:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(last.logits[:, 0], found[:, -1], rtol=1e-3, atol=1e-4)
    model.train().set_trainable()
    model(**given, labels=given["input_ids"]).loss.backward()
    assert deltas_of(model) and all(tensor.grad.any() for tensor in deltas_of(model).values())


def test_a_layer_that_holds_no_vector_a_token_is_refused_when_it_runs():
    model = make_model("all", {"attention": 2})
    odd = LinearDelta({"weight": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match="which does not hold one vector for each token of this pass"):
        site_of(model, "layers.2.attention.q_proj").check_shapes(odd(torch.zeros(2, 5, 4)), None, torch.zeros(2, 5, 7))


def test_the_papers_choices_have_no_deltas():
    assert make_model(None, {}, paper=True).config.deltas == {}
    assert {name: getattr(make_model(None, {}, paper=True).config, name) for name in PAPER} == PAPER


def test_a_quantised_projection_has_a_delta_as_well():
    """A linear layer of a quantiser's class is one, whatever its weight is kept in."""

    class Packed(nn.Linear):
        pass

    base = make_base()
    for layer in base.get_decoder().layers:
        layer.self_attn.q_proj.__class__ = Packed
    assert "layers.3.attention.q_proj.lora_A" in deltas_of(make_model(base=base))


def test_a_projection_that_carries_a_lora_has_a_delta_as_well():
    base = make_base()
    expected = deltas_of(make_model()).keys()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "v_proj"]), base)
    model = make_model(base=base)
    assert deltas_of(model).keys() == expected
    before = logits(open_gate(model))
    deltas_of(model)["layers.3.attention.q_proj.lora_B"].data.fill_(1.0)
    assert not torch.equal(logits(model), before)
