"""The plan of a run, held against passes that ran: parameters exactly, operations and kept bytes within a tenth."""

import copy

import pytest
import torch
from conftest import make_base
from families import make_family
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.training import planning
from modeling_moextend.training.planning import plan_training, sizes_of

LENGTH, ROWS = 96, 2
SHAPES = {
    "mixtral": MixtralConfig(
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=96,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        vocab_size=96,
    ),
}
SETTINGS = {
    "upper": {"new_experts": 4},
    "few": {"new_experts": 1, "layers": [1, 3]},
    "low rank": {"new_experts": 4, "expert_rank": 4},
    "deltas": {"new_experts": 4, "scope": "gate"},
}


def base_of(shape, implementation="eager"):
    torch.manual_seed(0)
    config = copy.deepcopy(SHAPES[shape])
    model = (MixtralForCausalLM if shape == "mixtral" else Qwen3MoeForCausalLM)._from_config(
        config, attn_implementation="eager" if implementation == "eager" else "sdpa"
    )
    model.set_experts_implementation(implementation)
    return model


def plan_of(shape, **settings):
    settings = {"scope": "all", "deltas": None, **settings}
    if settings["scope"] == "all":
        settings["deltas"] = ()
    return plan_training(base_of(shape), dtype="float32", sequence=LENGTH, batch=ROWS, checkpointing=False, **settings)


def extended(shape, implementation="eager", new_experts=4, layers=(3, 4, 5), **settings):
    base = base_of(shape, implementation)
    plan = {layer: list(range(new_experts)) for layer in layers}
    options = {"scope": "all", **settings}
    if options["scope"] == "gate":
        options["gate_threshold"] = -1e9
    model = MoExtendForCausalLM.from_base(base, plan, **options)
    model.set_trainable()
    return model


def operations_of_a_step(model):
    """Of products of matrices; attention by two products forward and four back, and its plan counts five."""
    ids = torch.randint(0, 96, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


def attention_back(shape, layers):
    """What the plan counts of attention's backward pass beyond two and two products, which eager attention does."""
    sizes = sizes_of(base_of(shape))
    return 0.5 * sum(4 * LENGTH * sizes.layers[layer].heads for layer in layers) * LENGTH * ROWS


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_operations_of_a_step(shape, setting):
    settings = SETTINGS[setting]
    planned = plan_of(shape, **settings)["methods"]["MoExtend"]["flops"]
    above = range(min(settings.get("layers", (3,))) + 1, 6)
    counted = operations_of_a_step(extended(shape, **settings))
    assert planned - attention_back(shape, above) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_operations_of_the_others(shape):
    methods = plan_of(shape)["methods"]
    full = operations_of_a_step(base_of(shape))
    assert methods["full fine-tuning"]["flops"] - attention_back(shape, range(6)) == pytest.approx(full, rel=0.1)
    modules, stacks = ["q_proj", "k_proj", "v_proj", "o_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = get_peft_model(base_of(shape), LoraConfig(r=16, target_modules=modules, target_parameters=stacks))
    assert sum(p.numel() for p in lora.parameters() if p.requires_grad) == methods["LoRA"]["parameters"]
    counted = operations_of_a_step(lora)
    assert methods["LoRA"]["flops"] - attention_back(shape, range(6)) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_checkpointing_takes_a_forward_pass_more_and_keeps_little(shape):
    settings = {"sequence": LENGTH, "batch": ROWS, "scope": "all", "layers": [2, 3, 4, 5]}
    planned = plan_training(base_of(shape), **settings, checkpointing=True)["methods"]["MoExtend"]
    model = extended(shape, layers=(2, 3, 4, 5)).train()
    model.gradient_checkpointing_enable()
    counted = operations_of_a_step(model)
    assert planned["flops"] - attention_back(shape, range(3, 6)) == pytest.approx(counted, rel=0.1)
    without = plan_of(shape, layers=[2, 3, 4, 5])["methods"]["MoExtend"]
    assert planned["memory"]["activations"] < 0.5 * without["memory"]["activations"]


def kept_bytes(model, inside):
    """Bytes that a forward pass of the decoder keeps for its backward pass, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no other gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        inside(torch.randint(0, 96, (ROWS, LENGTH)))
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("setting", ["upper", "few", "low rank"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_step_keeps(shape, setting):
    methods = plan_of(shape, **SETTINGS[setting])["methods"]
    model = extended(shape, "grouped_mm", **SETTINGS[setting]).train()
    found = kept_bytes(model, lambda ids: model.model(ids, use_cache=False).last_hidden_state)
    assert methods["MoExtend"]["memory"]["activations"] == pytest.approx(found, rel=0.1)
    base = base_of(shape, "grouped_mm").train()
    found = kept_bytes(base, lambda ids: base.model(ids, use_cache=False).last_hidden_state)
    assert methods["full fine-tuning"]["memory"]["activations"] == pytest.approx(found, rel=0.1)


def test_mixtral_with_an_expert_in_half_of_its_layers():
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(MixtralConfig(), dtype=torch.bfloat16)
    plan = plan_training(base, new_experts=1, scope="all", gpus=8, tokens=1e9)
    assert plan["layers"] == list(range(16, 32))
    assert plan["base"]["parameters"] == 46_702_792_704
    rows = 16 * 4096  # of a single new expert with exclusive selection, the router's row is stored and not trained
    assert plan["adapter"] == {"parameters": 2_818_572_288 + rows, "bytes": 2 * (2_818_572_288 + rows)}
    ours, full = plan["methods"]["MoExtend"], plan["methods"]["full fine-tuning"]
    assert ours["parameters"] == 2_818_572_288 and ours["memory"]["trained"] == 16 * 2_818_572_288
    assert ours["hours"] < full["hours"] and ours["per_gpu"]["fsdp2"]["fits"] and not full["per_gpu"]["ddp"]["fits"]


def test_a_model_that_was_given_stays_as_it_was():
    base = make_base()
    before = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    plan_training(base, layers=[1], scope="all")
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == before
    assert not any("moextend" in module._modules for module in base.modules())


def test_a_multimodal_base_is_planned_from_its_config(tmp_path):
    make_family("qwen3_vl_moe").config.save_pretrained(tmp_path)
    assert plan_training(tmp_path, layers=[1], scope="all")["layers"] == [1]


@pytest.mark.parametrize("name", ["dbrx", "diffusion_gemma", "openai_privacy_filter", "zaya"])
def test_bases_that_can_not_be_extended_are_refused(name):
    with pytest.raises(ValueError, match="can't be extended|no causal LM"):
        plan_training(make_family(name))


def test_wrong_numbers_and_bases_are_refused(tmp_path):
    for settings in ({"new_experts": 0}, {"new_experts": 10**8}, {"gpus": -1}, {"fraction": 1.5}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            plan_training(make_base(), **settings)
    with pytest.raises(ValueError, match="7"):
        plan_training(make_base(), layers=[7])
    with pytest.raises((OSError, ValueError), match="no/such|nowhere"):
        plan_training(tmp_path / "nowhere")
    assert planning.FREE < 1
