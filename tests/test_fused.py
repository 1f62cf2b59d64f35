"""The inference form: the same logits from one tensor a layer, no wait for an accelerator, and what undoes it."""

import copy
import itertools

import pytest
import torch
from conftest import batch, frozen_copy, make_base, make_encoder, shake
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from modeling_moextend import (
    MoExtendForCausalLM,
    base_checks_moextend,
    gate_moextend,
    scope_moextend,
)

PLAN = {0: [1, 4, 2], 1: [2]}  # three new experts, and fewer than a token selects
ALL = {"scope": "all", "calibration": "none", "selection": "compete"}
IMAGE = 96
ROUTINGS = {
    "compete": ALL,
    "paper": {**ALL, "calibration": "all"},
    "routed": {**ALL, "calibration": "routed"},
    "exclusive": {**ALL, "selection": "exclusive"},
    "gate": {"scope": "gate", "selection": "exclusive", "calibration": "none", "gate_threshold": -2.0, "deltas": ()},
    "deltas": {"scope": "gate", "selection": "exclusive", "calibration": "none", "gate_threshold": -2.0},
    "closed": {"scope": "gate", "selection": "exclusive", "calibration": "none", "gate_threshold": 1e9},
    "modality": {"scope": "modality", "selection": "exclusive", "calibration": "none"},
    "low rank": {**ALL, "expert_rank": 4},
}
WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "equal",
)  # operators whose answer is waited for


def make_model(routing="compete", implementation="grouped_mm", base=None, **more):
    base = make_base(_experts_implementation=implementation) if base is None else base
    options = ROUTINGS[routing] | more
    if options["scope"] == "modality":
        options |= {"encoder": make_encoder(), "image_token_id": IMAGE}
    torch.manual_seed(0)
    return shake(MoExtendForCausalLM.from_base(base, PLAN, **options)).eval()


@torch.no_grad()
def logits(model, **inputs):
    return model(**(inputs or batch())).logits


def fused_layers(model):
    return {index: model.moe_layers[index].experts.moextend.fused for index in PLAN}


def runs_fused(model, **inputs):
    """Whether a pass goes through the inference form in every layer."""
    seen, undo = set(), []
    for index, fused in fused_layers(model).items():
        if fused is not None:
            undo.append(fused.twin.register_forward_hook(lambda *_, index=index: seen.add(index)))
    logits(model, **inputs)
    for hook in undo:
        hook.remove()
    return seen == set(PLAN)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_logits_are_the_same_to_the_bit(routing, implementation):
    model = make_model(routing, implementation)
    inputs = batch()
    if routing == "modality":
        inputs["input_ids"][:, 4:8] = IMAGE
        inputs["pixel_values"] = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before = logits(model, **inputs)
    model.fuse()
    assert runs_fused(model, **inputs)
    assert torch.equal(logits(model, **inputs), before)
    model.unfuse()
    assert torch.equal(logits(model, **inputs), before)
    assert set(fused_layers(model).values()) == {None}


def test_names_and_values_stay_and_nothing_is_held_twice():
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.fuse()
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    for index, fused in fused_layers(model).items():
        experts = model.moe_layers[index].experts
        for name, stack in fused.twin.named_parameters():
            parts = experts.get_parameter(name), experts.moextend.adapters["default"].get_parameter(name)
            assert {part.untyped_storage().data_ptr() for part in parts} == {stack.untyped_storage().data_ptr()}
            assert sum(len(part) for part in parts) == len(stack)
        assert not any(fused.twin is module for module in model.modules())


def test_a_batch_without_new_experts_is_the_base():
    base = make_base(_experts_implementation="grouped_mm")
    expected = logits(frozen_copy(base))
    for routing in ("closed", "compete"):
        model = make_model(routing, base=copy.deepcopy(base))
        model.fuse()
        if routing == "closed":
            assert torch.equal(logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model, **batch(), adapter_names=["__base__"] * 3), expected)
    model.unfuse()
    assert torch.equal(logits(model.detach()), expected)


def three_adapters(**routing):
    model = make_model(**routing)
    for seed, name in enumerate(("law", "med"), start=1):
        model.add_adapter(name, {0: [0, 5], 1: [3, 1, 2]}, **{"deltas": (), **ROUTINGS["compete"], **routing})
        model.adapters[name].config.trained_on, model.adapters[name].depends_on = [], set()
        for key, tensor in model.adapter_tensors(name).items():
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed + len(key)))
            tensor.data.add_(noise.to(tensor) * 0.3)
    return model.eval()


@pytest.mark.parametrize("selection", ["compete", "exclusive"])
def test_adapters_are_switched_and_share_a_batch(selection):
    model = three_adapters(selection=selection)
    names = ["default", "law", "med"]
    choices = [list(pair) for size in (1, 2, 3) for pair in itertools.combinations(names, size)]
    rows = [["law", "default", "__base__"], [["default", "med"], "law", "__base__"]]

    def answers():
        found = []
        for chosen in choices:
            model.set_adapter(chosen)
            found.append(logits(model))
        return found + [logits(model, **batch(), adapter_names=one) for one in rows]

    before = answers()
    model.fuse()
    assert all(torch.equal(*pair) for pair in zip(before, answers(), strict=True))
    assert runs_fused(model)


def test_what_was_loaded_or_put_in_place_later_is_computed_the_other_way(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    model.fuse()
    model.load_adapter(tmp_path, "again")
    alone = logits(model)
    model.set_adapter("again")
    assert not runs_fused(model) and torch.equal(logits(model), alone)
    model.fuse()
    assert runs_fused(model) and torch.equal(logits(model), alone)
    model.delete_adapter("again")
    model.load_adapter(tmp_path, "again")  # other modules under a name that was fused
    model.set_adapter("again")
    assert not runs_fused(model) and torch.equal(logits(model), alone)
    model.set_adapter("default")
    assert runs_fused(model) and torch.equal(logits(model), alone)


@pytest.mark.parametrize("routing", ["compete", "low rank"])
def test_values_that_change_are_seen(routing):
    model, other = make_model(routing), make_model(routing)
    model.fuse()
    for one in (model, other):
        for tensor in one.adapter_tensors().values():
            tensor.data.mul_(1.5) if routing == "compete" else tensor.detach().mul_(1.5)
    assert torch.equal(logits(model), logits(other))
    assert runs_fused(model) == (routing == "compete")  # what was merged of a low rank is no longer that


@pytest.mark.parametrize("routing", ["compete", "exclusive", "low rank"])
def test_new_experts_in_float32_are_computed_in_bfloat16_as_without_it(routing):
    model = make_model(routing, base=make_base(dtype=torch.bfloat16, _experts_implementation="grouped_mm"))
    before = logits(model)
    model.fuse()
    assert runs_fused(model) and torch.equal(logits(model), before)
    trained, inputs = model.set_trainable(), batch()
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    after = logits(model.eval())
    assert not runs_fused(model) and not torch.equal(after, before)  # what the tensor holds is a copy
    model.fuse()
    assert runs_fused(model) and torch.equal(logits(model), after)


def test_a_cast_or_a_copy_leaves_no_stale_form_behind():
    model = make_model()
    model.fuse()
    twin = copy.deepcopy(model)
    assert set(fused_layers(twin).values()) == {None} and torch.equal(logits(twin), logits(model))
    for tensor in twin.adapter_tensors().values():
        tensor.data.zero_()
    assert runs_fused(model) and not torch.equal(logits(twin), logits(model))
    expected = logits(make_model().to(torch.bfloat16))
    assert torch.equal(logits(model.to(torch.bfloat16)), expected)
    model.fuse()
    assert runs_fused(model) and torch.equal(logits(model), expected)


def test_saved_while_fused(tmp_path):
    model, plain = make_model(), make_model()
    model.fuse()
    model.save_pretrained(tmp_path / "fused")
    plain.save_pretrained(tmp_path / "plain")
    fused, other = (load_file(tmp_path / name / "moextend_adapter.safetensors") for name in ("fused", "plain"))
    assert fused.keys() == other.keys() and all(torch.equal(fused[name], other[name]) for name in fused)
    again = MoExtendForCausalLM.from_pretrained(
        tmp_path / "fused", base=make_base(_experts_implementation="grouped_mm")
    )
    assert torch.equal(logits(again.eval()), logits(model))
    model.detach().save_pretrained(tmp_path / "base")


@pytest.mark.parametrize("routing", ["compete", "deltas", "low rank"])
def test_training_goes_on_as_without_it(routing):
    steps = []
    for fused in (False, True):
        model = make_model(routing)
        if fused:
            model.fuse()
        trained, inputs = model.set_trainable(), batch()
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
        for _ in range(3):
            model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        steps.append(({name: tensor.detach().clone() for name, tensor in trained.items()}, logits(model.eval())))
    (before, plain), (after, fused) = steps
    assert all(torch.equal(before[name], after[name]) for name in before) and torch.equal(plain, fused)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("other", ["b", "zz"])
def test_what_overflows_in_one_adapter_reaches_no_item_of_another(other, implementation):
    model = make_model("exclusive", implementation)
    model.add_adapter(other, {0: [0, 5], 1: [3]}, **{"deltas": (), **ROUTINGS["exclusive"]})
    model.adapters[other].config.trained_on, model.adapters[other].depends_on = [], set()
    for name, tensor in model.eval().adapter_tensors(other).items():
        if "experts" in name:
            tensor.data.fill_(torch.nan)
    model.fuse()
    items = {**batch(2), "adapter_names": ["default", other]}
    assert logits(model, **items)[0].isfinite().all() and logits(model, **items)[1].isnan().any()
    assert logits(model, input_ids=batch(1)["input_ids"], adapter_names=["default"]).isfinite().all()


def test_a_write_to_the_base_reaches_experts_of_a_low_rank():
    model, other = make_model("low rank"), make_model("low rank")
    logits(model)
    model.fuse()
    parts = [model.moe_layers[layer].experts.moextend.adapters["default"] for layer in PLAN]
    assert all(part.merged is None for part in parts)  # what was merged is held once
    for one in (model, other):
        values = {k: v * 1.5 for k, v in one.base.state_dict().items() if k.endswith("experts.down_proj")}
        one.base.load_state_dict({k: v for k, v in values.items() if "moextend" not in k}, strict=False)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("change", ["train", "cast"])
def test_a_graph_compiled_after_a_change_is_not_stale(change):
    model, inputs = make_model("low rank"), batch()
    model.fuse()
    if change == "train":
        optimizer = torch.optim.SGD(model.set_trainable().values(), lr=1.0)
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        model.eval()
    else:
        model.to(torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        found = compiled(**inputs, use_cache=False).logits
    torch.testing.assert_close(found, logits(model, **inputs, use_cache=False), rtol=0, atol=1e-6)
    torch._dynamo.reset()


# ---------------------------------------------------------------- accelerators, compiled graphs, caches


class Waits(TorchDispatchMode):
    """Counts operators after which the host waits for values."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(getattr(one, "dtype", None) == torch.bool for one in args[1])
        if name in WAITS or by_mask:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    for module in (gate_moextend, scope_moextend, base_checks_moextend):
        monkeypatch.setattr(module, "is_at_hand", lambda tensor: False)


@torch.no_grad()
def waits_of_a_conversation(model):
    waits = Waits()
    with waits:
        cache = model(
            batch()["input_ids"], use_cache=True
        ).past_key_values  # of a mask the base waits to know if it pads
        positions = torch.full((3, 1), 10)
        model(batch()["input_ids"][:, :1], past_key_values=cache, use_cache=True, position_ids=positions)
    return waits.names


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("routing", sorted(ROUTINGS.keys() - {"modality"}))
def test_no_pass_waits_for_an_accelerator(routing, implementation, as_on_an_accelerator):
    model = make_model(routing, implementation)
    assert not waits_of_a_conversation(make_base(_experts_implementation=implementation))
    assert waits_of_a_conversation(model) or routing == "closed"  # it can be counted
    before = logits(model)
    model.fuse()
    waits_of_a_conversation(model)  # tables are made once
    assert waits_of_a_conversation(model) == []
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("routing", "a_layer", "a_pass"), [("closed", 1, 1), ("exclusive", 3, 0), ("deltas", 3, 1)])
def test_what_training_waits_for(routing, a_layer, a_pass, as_on_an_accelerator):
    """Whether a new expert is selected, which pairs are the base's, which are new; whether the gate let any through.
    Backward waits for nothing."""
    model, base = make_model(routing), make_base(_experts_implementation="grouped_mm")
    model.train().set_trainable()
    ids, of_base, forward, backward = batch()["input_ids"], Waits(), Waits(), Waits()
    model(ids, use_cache=False)  # a gate is looked at once
    with of_base:
        base(ids, use_cache=False)
    with forward:
        loss = model(ids, labels=ids, use_cache=False).loss
    with backward:
        loss.backward()
    assert len(forward.names) - len(of_base.names) == a_layer * len(PLAN) + a_pass and not backward.names


def test_a_packed_batch_sees_the_same_gate_on_an_accelerator(monkeypatch):
    inputs = {"input_ids": batch(2, 12)["input_ids"], "position_ids": torch.arange(6).repeat(2, 2)}
    model = make_model("deltas", gate_threshold=0.0)
    with torch.no_grad(), model.record_routing() as here:
        expected = model(**inputs).logits
    for module in (gate_moextend, scope_moextend, base_checks_moextend):
        monkeypatch.setattr(module, "is_at_hand", lambda tensor: False)
    with torch.no_grad(), model.record_routing() as there:
        assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(here[0].gate, there[0].gate)


@pytest.mark.parametrize("routing", ["compete", "exclusive", pytest.param("deltas", marks=pytest.mark.slow)])
def test_one_graph_without_a_break(routing):
    model = make_model(routing)
    model.fuse()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    inputs = batch()
    with torch.no_grad():
        assert torch.equal(compiled(**inputs, use_cache=False).logits, logits(model, **inputs, use_cache=False))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["compete", "exclusive"])
def test_decoding_with_a_static_cache_compiles_whole(routing):
    model, base = make_model(routing), make_base(_experts_implementation="grouped_mm")
    assert not model._can_compile_fullgraph
    model.fuse()
    assert model._can_compile_fullgraph == base._can_compile_fullgraph

    @torch.no_grad()
    def decode(one, step):
        cache, ids = StaticCache(config=base.config, max_cache_len=16), batch(1)["input_ids"]
        one(ids, past_key_values=cache, use_cache=True)
        place = {"past_key_values": cache, "use_cache": True}
        return torch.cat(
            [step(ids[:, n : n + 1], position_ids=torch.tensor([[10 + n]]), **place).logits for n in range(3)]
        )

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(decode(model, compiled), decode(model, model), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("routing", ["compete", "exclusive", "deltas"])
def test_a_static_cache_generates_the_same(routing):
    model = make_model(routing)
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    expected = model.generate(**batch(), **settings)
    model.fuse()
    assert torch.equal(model.generate(**batch(), **settings), expected)
    assert torch.equal(model.generate(**batch(), **settings, cache_implementation="static"), expected)


# ---------------------------------------------------------------- refusals


def test_what_can_not_be_fused_is_refused_and_left_alone():
    with pytest.raises(ValueError, match="nothing to fuse"):
        MoExtendForCausalLM.from_base(make_base(), {}, encoder=make_encoder(), image_token_id=IMAGE).fuse()
    model = make_model(base=make_base(dtype=torch.float16))
    before = logits(model)
    with pytest.raises(ValueError, match=r"layer 0.*'default'.*float32.*float16.*rounded"):
        model.fuse()
    assert set(fused_layers(model).values()) == {None} and torch.equal(logits(model), before)
    model = make_model()
    model.moe_layers[0].experts.moextend.adapters["default"].to(torch.bfloat16)
    with pytest.raises(ValueError, match="computed otherwise"):
        model.fuse()
    model = make_model()
    weight = model.moe_layers[1].experts.down_proj
    model.moe_layers[1].experts.down_proj = torch.nn.Parameter(weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match="layer 1.*meta"):
        model.fuse()
    assert set(fused_layers(model).values()) == {None}
