"""New experts of a low rank: at first the source, then source and delta, whatever runs, trains or loads them."""

import copy
import json
import pickle

import pytest
import torch
from conftest import batch, frozen_copy, make_base, make_encoder, rounding, shake
from families import make_family
from safetensors.torch import load_file
from test_adapter_file_moextend import rewrite
from test_adapters_moextend import inputs as image_inputs
from test_adapters_moextend import open_gate
from test_families import FAST, IMPLEMENTATIONS, SUPPORTED, plan_of
from test_sft_trainer import assert_equal, make_model, make_trainer, tensors
from transformers import MixtralConfig, MixtralForCausalLM

from modeling_moextend import MoExtendConfig, MoExtendForCausalLM
from modeling_moextend.adapter_file_moextend import FILE, read_adapter
from modeling_moextend.low_rank_moextend import LowRankExperts, expert_shapes, whole_weights

PLAN = {1: [0, 3], 2: [2]}
COMPETE = {"scope": "all", "selection": "compete", "calibration": "none"}
EXCLUSIVE = {"scope": "all", "selection": "exclusive", "calibration": "none"}
SCOPES = {
    "paper": {"scope": "all", "selection": "compete", "calibration": "all"},
    "routed": {"scope": "all", "selection": "compete", "calibration": "routed"},
    "exclusive": EXCLUSIVE,
    "deltas": {**EXCLUSIVE, "deltas": ("embedding", "attention", "output")},
    "gate": {"scope": "gate", "selection": "exclusive", "gate_hidden_size": 8},
    "modality": {"scope": "modality", "selection": "exclusive"},
}
RANK = 4


def extended(family="mixtral", rank=RANK, plan=PLAN, base=None, shaken=True, **choices):
    torch.manual_seed(0)
    base = make_base(family) if base is None else base
    model = MoExtendForCausalLM.from_base(base, plan, expert_rank=rank, **(choices or COMPETE))
    return (shake(model) if shaken else model).eval()


def low_rank_experts(model):
    return [module for module in model.modules() if isinstance(module, LowRankExperts)]


@torch.no_grad()
def logits(model, given=None, **options):
    return model(**(given or batch()), **options).logits


def with_whole_experts(model, base, plan=PLAN, **choices):
    """The same adapter with whole experts, sources and products made here, over `base`."""
    torch.manual_seed(0)
    other = MoExtendForCausalLM.from_base(base, plan, **(choices or COMPETE)).eval()
    own, given = other.adapter_tensors(), model.adapter_tensors()
    with torch.no_grad():
        for name, tensor in own.items():
            if name in given:
                tensor.copy_(given[name])
                continue
            delta = torch.einsum("nor,nri->noi", given[f"{name}.lora_B"].float(), given[f"{name}.lora_A"].float())
            layer = other.moe_layers[int(name.split(".")[1])]
            tensor += delta.mT if layer.experts.is_transposed else delta
    return other


# ---------------------------------------------------------------- the start, and what is computed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_start_is_that_of_whole_experts_bit_for_bit(family, implementation, dtype):
    def make(rank):
        base = make_base(family, dtype, experts_implementation=implementation)
        return extended(rank=rank, base=base, shaken=False, **EXCLUSIVE)

    low, whole = make(RANK), make(None)
    assert torch.equal(logits(low), logits(whole))
    assert torch.equal(low(**batch()).logits, whole(**batch()).logits), "with gradients"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low(**batch()).logits, whole(**batch()).logits)


def check_like_whole_experts(family, implementation):
    choices = {"experts_implementation": implementation}
    low = extended(base=make_family(family, **choices))
    whole = with_whole_experts(low, make_family(family, **choices))
    expected = logits(whole)
    assert not torch.equal(expected, logits(extended(base=make_family(family, **choices), shaken=False)))
    bound = rounding(32, 24, 4) * expected.abs().max().item()
    for found in (logits(low), low(**batch()).logits.detach()):
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_computes_what_whole_experts_would(family, implementation):
    check_like_whole_experts(family, implementation)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in SUPPORTED]
)
def test_every_family(name, tmp_path):
    """Every family has weights that take a delta, in the shapes that the names of the factors promise."""
    base = make_family(name)
    layers = dict.fromkeys(list(plan_of(base, "compete"))[-2:], [1, 3])
    model = extended(base=base, plan=layers, rank=3)
    expected = with_whole_experts(model, make_family(name), plan=layers)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)
    for index in layers:
        experts = model.moe_layers[index].experts
        for role, stack in experts._parameters.items():
            if stack is not None and stack.dim() == 3:
                size_in, size_out = stack.shape[1:] if experts.is_transposed else stack.shape[:0:-1]
                new = {key: tensor.shape for key, tensor in model.adapter_tensors().items()}
                assert new[f"layers.{index}.experts.{role}.lora_A"] == (2, 3, size_in)
                assert new[f"layers.{index}.experts.{role}.lora_B"] == (2, size_out, 3)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(MoExtendForCausalLM.from_pretrained(tmp_path, base=make_family(name))), logits(model))


@pytest.mark.parametrize("scope", SCOPES)
def test_every_way_to_choose_them(scope, tmp_path):
    choices, encoder = SCOPES[scope], make_encoder() if scope == "modality" else None
    model, whole = (extended(rank=rank, encoder=encoder, **choices) for rank in (RANK, None))
    if scope == "gate":
        open_gate(model, seed=1)
    whole = with_whole_experts(model, make_base(), encoder=encoder, **choices)
    given = image_inputs() if scope == "modality" else batch()
    torch.testing.assert_close(logits(model, given), logits(whole, given), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base(), encoder=encoder)
    assert torch.equal(logits(again, given), logits(model, given))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(frozen_copy(make_base())))


def test_sums_are_rounded_once(monkeypatch):
    """Whatever kernels make of products in half precision, and of those under autocast."""
    source = torch.full((1, 8, 8), 1.0, dtype=torch.bfloat16)
    lora_A, lora_B = torch.rand(1, 3, 8).bfloat16(), torch.rand(1, 8, 3).bfloat16()
    exact = source.double() + lora_B.double() @ lora_A.double()
    product, seen = torch.baddbmm, []
    monkeypatch.setattr(torch, "baddbmm", lambda *parts: seen.extend(part.dtype for part in parts) or product(*parts))
    found = whole_weights(source, lora_A, lora_B, transposed=False)
    assert seen == [torch.float32] * 3
    assert torch.equal(found, exact.bfloat16()) and found.dtype == torch.bfloat16
    assert torch.equal(whole_weights(source, lora_A, lora_B, transposed=True), exact.mT.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert whole_weights(source, lora_A.float(), lora_B.float(), False).dtype == torch.float32
        torch.testing.assert_close(whole_weights(source.float(), lora_A.float(), lora_B.float(), False), exact.float())


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_gradients_are_those_of_whole_weights_by_the_chain_rule(family):
    plan = {2: [0, 3]}
    low = extended(base=make_family(family), plan=plan, **EXCLUSIVE)
    whole = with_whole_experts(low, make_family(family), plan=plan, **EXCLUSIVE)
    given = batch()
    for model in (low, whole):
        model.set_trainable()
        model(**given, labels=given["input_ids"]).loss.backward()
    found, of_whole = low.adapter_tensors(), whole.adapter_tensors()
    for name, tensor in of_whole.items():
        if name in found:
            assert (tensor.grad is None) == (found[name].grad is None)
            continue
        gradient = tensor.grad.mT if low.moe_layers[2].experts.is_transposed else tensor.grad
        lora_A, lora_B = found[f"{name}.lora_A"], found[f"{name}.lora_B"]
        torch.testing.assert_close(lora_A.grad, lora_B.mT @ gradient, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(lora_B.grad, gradient @ lora_A.mT, rtol=1e-4, atol=1e-6)
    trained = {id(p) for p in low.parameters() if p.grad is not None}
    assert trained == {id(p) for name, p in found.items() if low.learns(name)}


def test_only_factors_are_counted_and_trained_and_nothing_of_the_base_moves():
    model, whole = extended(shaken=False), extended(rank=None)
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    trained = model.set_trainable()
    experts = {name for name in trained if ".experts." in name}
    assert experts and all(name.rpartition(".")[2] in ("lora_A", "lora_B") for name in experts)
    sizes = [sum(p.numel() for n, p in m.adapter_tensors().items() if ".experts." in n) for m in (model, whole)]
    assert sizes == [3 * RANK * (32 + 48 + 24 + 32), 3 * (32 * 48 + 24 * 32)]
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in trained.values())
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for seed in range(2):
        given = batch(seed=seed)
        model.train()(**given, labels=given["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.base.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("moextend" in name for name in moved)
    assert {name.rpartition(".")[2] for name in moved} >= {"lora_A", "lora_B"}


def test_checkpointing_gives_the_same_gradients():
    given, found = batch(), []
    for checkpointing in (False, True):
        model = extended(base=make_base(dtype=torch.bfloat16), **EXCLUSIVE)
        model.set_trainable()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()(**given, labels=given["input_ids"]).loss.backward()
        found.append({name: tensor.grad for name, tensor in model.adapter_tensors().items()})
    assert_equal(*({name: grad for name, grad in one.items() if grad is not None} for one in found))


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": True}
    whole, resumed = (make_trainer(tmp_path, make_model(expert_rank=3, paper=False), **settings) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(tensors(whole.model), tensors(resumed.model))
    other = make_trainer(tmp_path, make_model(expert_rank=2), **settings)
    with pytest.raises(ValueError, match="expert_rank: the adapter's 3, the model's 2"):
        other.train(resume_from_checkpoint=True)


def test_the_summary_names_the_rank(tmp_path, capsys):
    make_trainer(tmp_path, make_model(expert_rank=3), max_steps=1).train()
    assert " MiB (new experts of rank 3); optimiser" in capsys.readouterr().out


def test_a_step_without_new_experts_gives_gradients_of_zero():
    """As whole experts: a process without them would step otherwise than others."""
    model = extended(shaken=False, **SCOPES["gate"])  # its gate is closed
    model.set_trainable()
    given = batch()
    model(**given, labels=given["input_ids"]).loss.backward()
    found = {name: p.grad for name, p in model.adapter_tensors().items() if ".experts." in name}
    assert all(grad is not None and not grad.any() for grad in found.values())


# ---------------------------------------------------------------- what is kept between passes


def kept(model):
    found = [module.merged is not None for module in low_rank_experts(model)]
    assert len(set(found)) == 1
    return found[0]


CHANGES = {
    "an optimiser": lambda model, tensor: tensor.mul_(1.5),
    "load_state_dict": lambda model, tensor: model.load_state_dict(
        {name: value * 1.5 for name, value in model.get_adapter_state_dict().items()}
    ),
    "other memory": lambda model, tensor: setattr(tensor, "data", tensor.data * 1.5),
    "a cast": lambda model, tensor: model.to(torch.bfloat16),
    "the base's cast": lambda model, tensor: model.base.half(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whole_experts_are_kept_for_inference_until_something_changes(change):
    model = extended(**EXCLUSIVE)
    assert not kept(model), "nothing is kept of the checks at attaching"
    expected = logits(model)
    assert kept(model)
    merged = [module.merged[1] for module in low_rank_experts(model)]
    assert torch.equal(logits(model), expected)
    assert all(one is other.merged[1] for one, other in zip(merged, low_rank_experts(model), strict=True))
    with torch.no_grad():
        CHANGES[change](model, model.adapter_tensors()["layers.1.experts.down_proj.lora_B"])
    found = logits(model)
    fresh = copy.deepcopy(model)
    assert not kept(fresh)
    assert torch.equal(found, logits(fresh)) and not torch.equal(found, expected)


def test_what_is_kept_goes_with_training_and_is_nobody_elses():
    model = extended(**EXCLUSIVE)
    expected, names = logits(model), [*model.state_dict()]
    assert kept(model) and not kept(pickle.loads(pickle.dumps(model)))
    assert [*model.state_dict()] == names and not any("merged" in name for name in names)
    model.train()
    assert not kept(model)
    logits(model)
    assert kept(model), "text is sampled in training as well"
    model.eval()(**batch()).logits.sum().backward()
    assert not kept(model), "a pass that trains frees it"
    with torch.inference_mode():
        assert torch.equal(model(**batch()).logits, expected)
    model.require_gradients([])
    embeds = model.get_input_embeddings()(batch()["input_ids"]).requires_grad_()
    model(inputs_embeds=embeds).logits.sum().backward()  # through what was made in inference mode
    assert embeds.grad.any() and kept(model)
    detached = model.detach()
    assert not low_rank_experts(detached)
    assert torch.equal(logits(detached.eval()), logits(frozen_copy(make_base())))


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_an_offloaded_base(place, tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    far = {"model.layers.1": place, "model.layers.2": place}
    near = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.layers.3", "model.norm", "lm_head"], "cpu")
    options = {"device_map": {**near, **far, "model.rotary_emb": "cpu"}, "offload_folder": str(tmp_path / "off")}
    torch.manual_seed(0)
    model = MoExtendForCausalLM.from_base(str(tmp_path / "base"), PLAN, expert_rank=RANK, **COMPETE, **options)
    shake(model).eval()
    torch.manual_seed(0)
    plain = shake(MoExtendForCausalLM.from_base(str(tmp_path / "base"), PLAN, expert_rank=RANK, **COMPETE)).eval()
    expected = logits(plain)
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    assert kept(model)
    assert torch.equal(model(**batch()).logits, expected)
    model.save_pretrained(tmp_path / "adapter")
    loaded = MoExtendForCausalLM.from_pretrained(tmp_path / "adapter", base=str(tmp_path / "base"), **options)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_logits():
    torch._dynamo.reset()
    model = extended(**EXCLUSIVE)
    expected = logits(model)
    torch.testing.assert_close(logits(torch.compile(model, backend="aot_eager")), expected)
    torch._dynamo.reset()


# ---------------------------------------------------------------- several adapters


def test_adapters_of_different_ranks_and_without_one_in_one_model(tmp_path):
    plans = {"a": {1: [0, 3]}, "b": {1: [2], 3: [1]}, "c": {1: [5], 2: [4]}}
    for number, (name, rank) in enumerate({"a": 3, "b": 6, "c": None}.items()):
        shake(extended(rank=rank, plan=plans[name], **EXCLUSIVE), seed=number).save_pretrained(tmp_path / name)
    model = MoExtendForCausalLM.from_pretrained(tmp_path / "a", base=make_base(), adapter_name="a")
    for name in "bc":
        model.load_adapter(tmp_path / name, adapter_name=name)
    alone = {}
    for name in "abc":
        model.set_adapter(name)
        alone[name] = logits(model)
        single = MoExtendForCausalLM.from_pretrained(tmp_path / name, base=make_base())
        assert torch.equal(alone[name], logits(single))
    mixed = logits(model, adapter_names=["a", "b", "c"])
    for row, name in enumerate("abc"):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-5, atol=1e-5)
    model.set_adapter(["a", "b", "c"])
    together = logits(model)
    assert not any(torch.equal(together, one) for one in alone.values())
    held = low_rank_experts(model)
    model.set_adapter("a")
    model.delete_adapter(["b", "c"])
    assert len(low_rank_experts(model)) == 1 < len(held) and torch.equal(logits(model), alone["a"])


def test_on_top_of_another_and_extended_in_place(tmp_path):
    model = extended(plan={1: [0]}, **EXCLUSIVE)
    model.save_pretrained(tmp_path / "low")
    below = logits(model)
    model.add_adapter("top", {1: [3], 2: [2]}, expert_rank=2, **EXCLUSIVE)
    model.extend({3: [1, 4]})
    model.eval()
    names = model.adapter_tensors()
    assert names["layers.3.experts.down_proj.lora_A"].shape == (2, 2, 24)
    assert [model.adapters[name].config.expert_rank for name in ("default", "top")] == [RANK, 2]
    given = batch()
    model.set_trainable()
    model(**given, labels=given["input_ids"]).loss.backward()
    assert all(p.grad is None for p in model.adapter_tensors("default").values())
    assert kept_of(model, "default") and not kept_of(model, "top"), "what is frozen is made once"
    shake(model, seed=3)
    model.save_pretrained(tmp_path / "top")
    loaded = MoExtendForCausalLM.from_pretrained(tmp_path / "low", base=make_base(), adapter_name="law")
    assert torch.equal(logits(loaded), below)
    loaded.load_adapter(tmp_path / "top", adapter_name="top")
    loaded.set_adapter(["law", "top"])
    assert torch.equal(logits(loaded), logits(model))


def kept_of(model, name):
    return all(new.experts.merged is not None for new in model.adapters[name].layers.values())


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_what_is_saved_loads_bit_for_bit_and_is_the_deltas_alone(family, dtype, tmp_path):
    model = extended(family, base=make_base(family, dtype))
    model.set_trainable()
    model.save_pretrained(tmp_path)
    for tensor in model.adapter_tensors().values():
        tensor.data = tensor.data.to(dtype)
    loaded = MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base(family, dtype))
    assert torch.equal(logits(loaded), logits(model))
    stored = load_file(tmp_path / FILE)
    assert stored.keys() == model.adapter_tensors().keys()
    assert sum(tensor.nbytes for tensor in stored.values()) == model.adapter_bytes(dtype)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["expert_rank"] == RANK == read_adapter(tmp_path).config_for_loading().expert_rank
    assert read_adapter(tmp_path).metadata["moextend_format"] == "2", "earlier versions say what they lack"


def test_parameters_have_one_order_however_the_tensors_come(tmp_path):
    """Optimiser states go by it, and what processes exchange."""
    model = extended("gpt_oss")
    model.save_pretrained(tmp_path)
    assert [*read_adapter(tmp_path).tensors] == sorted(model.adapter_tensors())
    loaded = MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base("gpt_oss"))
    (experts, _), (others, _) = low_rank_experts(model), low_rank_experts(loaded)
    assert [name for name, _ in others.named_parameters()] == [name for name, _ in experts.named_parameters()]
    tensors = {name: tensor.detach() for name, tensor in experts.named_parameters()}
    twin = LowRankExperts(dict(reversed(tensors.items())), experts.sources)
    assert [name for name, _ in twin.named_parameters()] == [*tensors]


def test_an_adapter_without_rank_is_written_as_ever(tmp_path):
    extended(rank=None).save_pretrained(tmp_path)
    assert read_adapter(tmp_path).metadata["moextend_format"] == "1"
    assert "expert_rank" not in json.loads((tmp_path / "config.json").read_text())
    assert MoExtendConfig.from_pretrained(tmp_path).expert_rank is None


def test_missing_unexpected_and_misshapen_factors_are_named(tmp_path):
    extended().save_pretrained(tmp_path)

    def damage(tensors):
        prefix = "layers.1.experts."
        tensors[f"{prefix}down_proj"] = tensors.pop(f"{prefix}down_proj.lora_A")
        tensors[f"{prefix}gate_up_proj.lora_B"] = tensors[f"{prefix}gate_up_proj.lora_B"][..., :2].contiguous()

    rewrite(tmp_path, damage)
    with pytest.raises(ValueError) as error:
        MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base())
    assert "missing: layers.1.experts.down_proj.lora_A\n" in str(error.value)
    assert "unexpected: layers.1.experts.down_proj\n" in str(error.value)
    assert "layers.1.experts.gate_up_proj.lora_B is (2, 48, 2), the model needs (2, 48, 4)" in str(error.value)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("rank", [0, -1, True, 2.0, "8", 10**9])
def test_what_is_no_rank_is_refused(rank, tmp_path):
    with pytest.raises(ValueError, match=r"expert_rank=.* must be an integer from 1 to 1000000"):
        MoExtendForCausalLM.from_base(tmp_path, PLAN, expert_rank=rank)  # before a base is looked for
    with pytest.raises(ValueError, match=r"expert_rank=.* must be an integer from 1 to 1000000"):
        MoExtendConfig(expert_rank=rank)


@pytest.mark.parametrize(("family", "sizes"), [("mixtral", "32 x 24"), ("gpt_oss", "24 x 32")])
def test_a_rank_above_the_smaller_side_is_refused(family, sizes):
    base = make_base(family)
    extended(base=base, rank=24, plan={1: [0]}).detach()
    with pytest.raises(ValueError, match=rf"expert_rank=25 is above 24, .*Experts.down_proj \({sizes} an expert\)"):
        extended(base=base, rank=25)
    assert torch.equal(logits(base), logits(make_base(family))), "the base is as it was"
    model = extended(rank=None)
    with pytest.raises(ValueError, match="expert_rank=25 is above 24"):
        model.add_adapter("more", {1: [0]}, expert_rank=25, **COMPETE)
    assert list(model.adapters) == ["default"]


def test_a_full_size_base_is_extended_without_weights():
    """The figures of docs/adapters.md: 16 new experts of Mixtral 8x7B at rank 64."""
    with torch.device("meta"):
        base = MixtralForCausalLM._from_config(MixtralConfig(), dtype=torch.bfloat16)
        model = MoExtendForCausalLM.from_base(base, dict.fromkeys(range(16), [0]), scope="all", expert_rank=64)
    assert model.num_parameters(only_trainable=True) == 16 * 64 * (4096 + 28672 + 14336 + 4096)
    assert round(model.adapter_bytes() / 1e6) == 105


def test_the_papers_experts_are_whole():
    with pytest.raises(ValueError, match="paper=True means new experts that are whole copies, but expert_rank=4"):
        MoExtendForCausalLM.from_base(make_base(), PLAN, paper=True, expert_rank=4)


def test_experts_without_weights_of_three_dimensions_are_refused():
    model = make_base()
    experts = copy.deepcopy(model.model.layers[0].mlp.experts)
    for name in list(experts._parameters):
        experts._parameters[name] = torch.nn.Parameter(torch.zeros(6, 4))
    with pytest.raises(ValueError, match="MixtralExperts has no 3-D weights, so expert_rank has no meaning"):
        expert_shapes(experts, 2, 4)
