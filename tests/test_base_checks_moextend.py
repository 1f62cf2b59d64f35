"""Layouts of a base: quantised, sharded, kernelised. Each extends as a plain base does, or is refused by its name."""

import copy
import functools
import os
import types
import warnings

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import (
    COMMON,
    FAMILIES,
    batch,
    frozen_copy,
    in_processes,
    leave_group,
    make_base,
    make_encoder,
    shake,
)
from families import NEWEST
from safetensors.torch import load_file, save_file
from test_sft_trainer import make_trainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    GgufConfig,
    Mxfp4Config,
    TorchAoConfig,
)
from transformers.distributed import DistributedConfig
from transformers.integrations import mxfp4
from transformers.integrations.finegrained_fp8 import FP8Experts, replace_with_fp8_linear
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.base_checks_moextend import check_gradients, quantisation_of
from modeling_moextend.tools.hashes import base_tensors_hash, bytes_of

PLAN = {1: [0, 3], 2: [1]}
COMPETE = {"scope": "all", "selection": "compete", "calibration": "none"}
SHARDED = "can't be extended where its tensors are spread over processes"


def extend(base, plan=PLAN, **options):
    return MoExtendForCausalLM.from_base(base, plan, **{**COMPETE, **options})


def logits(model):
    with torch.no_grad():
        return model(**batch()).logits


# ------------------------------------------------------------------ refused from the config, before loading


def config_only(folder, family="mixtral", **quantisation):
    """A checkpoint of nothing but its config: whatever reads weights fails on it."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
    config.architectures = [type(make_base(family)).__name__]
    if quantisation:
        config.quantization_config = quantisation
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("family", "quantisation", "advice"),
    [
        ("gpt_oss", {"quant_method": "mxfp4"}, r"Mxfp4Config\(dequantize=True\)"),
        ("mixtral", {"quant_method": "fp8"}, r"FineGrainedFP8Config\(dequantize=True\)"),
        ("mixtral", {"quant_method": "mxfp8"}, r"FineGrainedFP8Config\(dequantize=True\)"),
        ("mixtral", {"quant_method": "fbgemm_fp8"}, "the checkpoint that it was quantised from"),
        ("mixtral", {"quant_method": "nvfp4"}, "the checkpoint that it was quantised from"),
        ("mixtral", {"quant_method": "awq", "bits": 4}, "the checkpoint that it was quantised from"),
        ("mixtral", {"quant_method": "bitnet"}, "the checkpoint that it was quantised from"),
    ],
)
def test_a_packed_checkpoint_is_refused_before_its_weights_are_read(
    family, quantisation, advice, tmp_path, monkeypatch
):
    method = quantisation["quant_method"]
    # A machine that has what this format needs: on one without, transformers dequantises, or says what is missing.
    monkeypatch.setattr(AUTO_QUANTIZER_MAPPING[method], "validate_environment", lambda self, **kwargs: None)
    path = config_only(tmp_path, family, **quantisation)
    with pytest.raises(ValueError, match=f"quantised with '{method}'.*bitsandbytes or torchao.*{advice}"):
        extend(path)


@pytest.mark.parametrize(
    "options",
    [
        {"tp_plan": "auto"},
        {"tp_size": 2},
        {"device_mesh": "mesh"},
        {"distributed_config": DistributedConfig(tp_size=2, tp_plan="auto")},
        {"distributed_config": DistributedConfig(ep_size=2, tp_size=2)},
        {"distributed_config": {"fsdp_size": 2}},
    ],
)
def test_a_base_to_be_sharded_is_refused_before_anything_is_read(options):
    with pytest.raises(ValueError, match=f"{SHARDED}: {next(iter(options))} was given.*device_map.*FSDP2"):
        extend("nobody/nothing", **options)


def test_a_plain_checkpoint_is_not_quantised_on_the_way_by_asking_to_dequantise_it(tmp_path):
    make_base().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantised with 'fp8'.*Leave out quantization_config, in bfloat16"):
        extend(str(tmp_path), quantization_config=FineGrainedFP8Config(dequantize=True))


def test_the_quantisation_of_a_language_model_inside_another_is_found():
    inner, outer = AutoConfig.for_model("qwen3_moe"), AutoConfig.for_model("qwen3_vl_moe")
    assert quantisation_of(inner) is None and quantisation_of(outer) is None
    outer.text_config.quantization_config = {"quant_method": "fp8"}
    assert quantisation_of(outer) == {"quant_method": "fp8"}


# ------------------------------------------------------------------ refused as loaded models


def fp8_base():
    """Experts and linear layers as a GPU that can FP8 would hold them, weights and scales."""
    base = make_base()
    replace_with_fp8_linear(base, ["lm_head"], FineGrainedFP8Config(weight_block_size=(32, 32)), pre_quantized=True)
    assert isinstance(base.model.layers[1].mlp.experts, FP8Experts)
    return base.to_empty(device="cpu")


def mxfp4_base():
    """gpt-oss as a machine with triton kernels holds it: packed experts, and a block that routes by itself."""
    base = make_base("gpt_oss")
    for layer in base.model.layers:
        experts = mxfp4.Mxfp4GptOssExperts(base.config)
        if hasattr(mxfp4, "Mxfp4GptOssMLP"):
            layer.mlp = mxfp4.Mxfp4GptOssMLP(layer.mlp.router, experts)
        else:  # older versions leave the block, and give it another forward
            layer.mlp.experts, layer.mlp.forward = experts, functools.partial(mxfp4.mlp_forward, layer.mlp)
    return base


def test_fp8_experts_are_refused_by_class_and_dtype():
    base = fp8_base()
    message = r"FP8Experts.gate_up_proj in layer 1 .* quantised \(torch.float8_e4m3fn\).*dequantised"
    with pytest.raises(ValueError, match=message):
        extend(base)


def test_packed_mxfp4_experts_are_refused_by_their_method():
    base = mxfp4_base()
    with pytest.raises(ValueError, match=r"GptOssModel \(gpt_oss\) has experts, but not through .* interface"):
        extend(base)  # put there by hand
    base.is_quantized, base.config.quantization_config = True, Mxfp4Config()  # as transformers leaves it behind
    with pytest.raises(ValueError, match=r"'mxfp4'.*Mxfp4Config\(dequantize=True\)"):
        extend(base)


def test_a_packed_router_is_refused_by_name():
    base = make_base()
    router = base.model.layers[2].mlp.gate
    router.weight = nn.Parameter(router.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"MixtralTopKRouter.weight in layer 2 .*\(torch.int8\)"):
        extend(base)


@pytest.mark.parametrize(
    ("quantisation", "message"),
    [
        (Mxfp4Config(), r"'mxfp4'.*Mxfp4Config\(dequantize=True\)"),
        (FineGrainedFP8Config(), r"'fp8'.*FineGrainedFP8Config\(dequantize=True\)"),
        (GgufConfig(gguf_file="x.gguf"), r"'gguf'.*GgufConfig\(dequantize=True\)"),
    ],
)
def test_a_model_quantised_by_transformers_is_refused_by_its_method(quantisation, message):
    base = make_base()
    base.is_quantized, base.config.quantization_config = True, quantisation  # what its quantisers leave behind
    with pytest.raises(ValueError, match=message):
        extend(base)
    base.is_quantized, base.config.quantization_config = True, BitsAndBytesConfig(load_in_8bit=True)
    extend(base)


def test_an_adapter_refuses_a_packed_base_given_as_a_model(tmp_path):
    extend(make_base()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"FP8Experts.gate_up_proj in layer 1 .*\(torch.float8_e4m3fn\)"):
        MoExtendForCausalLM.from_pretrained(tmp_path, base=fp8_base(), check_base=False)


@pytest.fixture
def mesh():
    """Two processes, of which one is here and the other is made up."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def shard(module, name, mesh):
    tensor = getattr(module, name)
    setattr(module, name, nn.Parameter(distribute_tensor(tensor.data, mesh, [Shard(0)]), tensor.requires_grad))


def test_a_sharded_base_is_refused(mesh):
    base = make_base()
    shard(base.model.layers[3].self_attn.q_proj, "weight", mesh)
    with pytest.raises(ValueError, match=f"{SHARDED}: the base's model.layers.3.self_attn.q_proj.weight is sharded"):
        extend(base)


def test_an_adapter_refuses_a_sharded_base_as_well(mesh, tmp_path):
    extend(make_base()).save_pretrained(tmp_path)
    base = make_base()
    shard(base.model.layers[3].self_attn.q_proj, "weight", mesh)
    with pytest.raises(ValueError, match=f"{SHARDED}: the base's model.layers.3.self_attn.q_proj.weight is sharded"):
        MoExtendForCausalLM.from_pretrained(tmp_path, base=base)


def test_a_base_whose_experts_are_spread_over_processes_is_refused():
    base = make_base()
    base.model.layers[0].mlp.experts._is_expert_parallel = True  # as expert parallel plans of transformers leave it
    with pytest.raises(ValueError, match=rf"{SHARDED}: the base's experts .* \(expert parallel\)"):
        extend(base)


def test_a_model_sharded_after_it_was_extended_takes_no_more_experts(mesh):
    model = extend(make_base(), {1: [0]})
    shard(model.base.model.layers[2].mlp.experts, "down_proj", mesh)
    with pytest.raises(ValueError, match=f"{SHARDED}: down_proj of layer 2 is sharded"):
        model.extend({2: [0]})


# ------------------------------------------------------------------ packed on disk, dequantised on loading


def fp8_blocks(tensor):
    """Values and inverse scale [1, 1] of one block that holds the whole matrix."""
    scale = tensor.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    return (tensor / scale).to(torch.float8_e4m3fn), scale.reshape(1, 1)


def fp8_checkpoint(folder):
    make_base("qwen3_moe").save_pretrained(folder)
    tensors, packed = load_file(folder / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            packed[name], packed[f"{name}_scale_inv"] = fp8_blocks(tensor)
        else:
            packed[name] = tensor
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config.save_pretrained(folder)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    return packed[name].float() * packed[f"{name}_scale_inv"]


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def mxfp4_checkpoint(folder):
    config = AutoConfig.for_model("gpt_oss", **{**COMMON, **FAMILIES["gpt_oss"], "intermediate_size": 64})
    torch.manual_seed(0)
    config.dtype = torch.float32 if NEWEST else torch.bfloat16  # to which older versions dequantise
    AutoModelForCausalLM.from_config(config, dtype=config.dtype).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, width, height = tensors.pop(name).shape  # the family's experts are transposed
        tensors[f"{name}_blocks"] = torch.randint(256, (experts, height, width // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full((experts, height, width // 32), 124, dtype=torch.uint8)  # 2 ** -3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(folder)
    blocks = tensors["model.layers.1.mlp.experts.down_proj_blocks"][3].flatten(1).long()  # [H, I / 2]
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(1)
    return (FP4[codes & 7] * (1 - 2 * (codes >> 3)) / 8).T


CHECKPOINTS = {
    "fp8": (fp8_checkpoint, FineGrainedFP8Config(dequantize=True)),
    "mxfp4": (mxfp4_checkpoint, Mxfp4Config(dequantize=True)),
}


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "by transformers"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_dequantised_checkpoint_extends(kind, asked, tmp_path):
    """Asked for in the call, as a machine with a GPU needs, or done by transformers where there is none."""
    make, quantisation = CHECKPOINTS[kind]
    (tmp_path / "base").mkdir()
    expert = make(tmp_path / "base")
    options = {"quantization_config": copy.deepcopy(quantisation)} if asked else {}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **copy.deepcopy(options))
    expected = logits(frozen_copy(base))
    model = extend(str(tmp_path / "base"), **copy.deepcopy(options))
    copied = model.adapter_tensors()["layers.1.experts.down_proj"][1]
    torch.testing.assert_close(copied, expert.to(model.base.dtype).float(), rtol=1e-2 if kind == "fp8" else 0, atol=0)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    on = logits(shake(model))
    assert not torch.equal(on, expected)
    model.save_pretrained(tmp_path / "adapter", adapter_dtype="float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", **copy.deepcopy(options))
    assert torch.equal(logits(loaded), on)


# ------------------------------------------------------------------ hub kernels and other patches


def kernel(self, hidden_states):
    return torch.zeros_like(hidden_states), None


def kernelise(module, forward=kernel):
    """What `kernels.kernelize` does: binds another class's forward, or by way of fallback the module's own."""
    module.forward = types.MethodType(forward, module)


REPLACED = r"In layer 1, kernel lies before {}.forward.*new experts would take no part.*KernelConfig"


@pytest.mark.parametrize("part", ["block", "router", "experts"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_a_kernelised_base_is_refused(part, offloaded):
    base = make_base("gpt_oss")
    block = base.model.layers[1].mlp
    module = block if part == "block" else getattr(block, part)
    kernelise(module)
    if offloaded:
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    with pytest.raises(ValueError, match=REPLACED.format(type(module).__name__)):
        extend(base, {1: [0]})
    assert type(block.router).__name__ == "GptOssTopKRouter" and not hasattr(block.router, "moextend")


@pytest.mark.parametrize("part", ["block", "router", "experts"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_kernel_that_comes_after_the_adapter_is_refused_in_the_next_pass(part, copied):
    model = extend(make_base("gpt_oss"), {1: [0]})
    logits(model)
    if copied:
        model = copy.deepcopy(model)
    block = model.base.model.layers[1].mlp
    module = block if part == "block" else getattr(block, part)
    kernelise(module, lambda self, *args: kernel(*args))
    with pytest.raises(ValueError, match="In layer 1, .*<lambda> lies before"):
        logits(model)
    with pytest.raises(ValueError, match="In layer 1, .*<lambda> lies before"), torch.no_grad():
        model.model(**batch())  # the body, as trainers call it


def test_a_partial_function_in_place_of_a_block_is_refused():
    base = make_base("gpt_oss")
    block = base.model.layers[1].mlp
    block.forward = functools.partial(kernel, block)
    with pytest.raises(ValueError, match="In layer 1, partial lies before GptOssMLP.forward"):
        extend(base)


def test_a_kernel_in_a_layer_added_later_is_refused():
    model = extend(make_base("gpt_oss"), {1: [0]})
    kernelise(model.base.model.layers[2].mlp)
    logits_before = logits(extend(make_base("gpt_oss"), {1: [0]}))
    assert not torch.equal(logits(model), logits_before)  # layer 2 has no new experts: the base's own business
    with pytest.raises(ValueError, match="In layer 2, kernel lies before GptOssMLP.forward"):
        model.extend({2: [0]})
    model.extend({3: [0]})
    kernelise(model.base.model.layers[3].mlp)
    with pytest.raises(ValueError, match="In layer 3, kernel lies before GptOssMLP.forward"):
        logits(model)


def test_a_kernel_in_a_layer_of_a_second_adapter_is_refused(tmp_path):
    extend(make_base("gpt_oss"), {2: [0]}).save_pretrained(tmp_path)
    model = extend(make_base("gpt_oss"), {1: [0]})
    model.load_adapter(tmp_path, adapter_name="law")
    logits(model)
    block = model.base.model.layers[2].mlp
    kernelise(block)
    with pytest.raises(ValueError, match="In layer 2, kernel lies before GptOssMLP.forward"):
        logits(model)
    model.delete_adapter("law")
    logits(model)  # layer 2 is the base's own again
    with pytest.raises(ValueError, match="In layer 2, kernel lies before GptOssMLP.forward"):
        model.load_adapter(tmp_path, adapter_name="law")


def test_a_switched_off_adapter_leaves_kernels_to_the_base():
    model = extend(make_base("gpt_oss"), {1: [0]})
    kernelise(model.base.model.layers[1].mlp)
    base = frozen_copy(make_base("gpt_oss"))
    kernelise(base.model.layers[1].mlp)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


def test_kernels_that_fall_back_to_the_blocks_own_forward_change_nothing():
    base = make_base("gpt_oss")
    for layer in base.model.layers:
        kernelise(layer.mlp, type(layer.mlp).forward)
        kernelise(layer.input_layernorm, type(layer.input_layernorm).forward)
    model, plain = shake(extend(base)), shake(extend(make_base("gpt_oss")))
    assert torch.equal(logits(model), logits(plain))


def test_kernels_of_norms_are_the_bases_own():
    def doubled(self, hidden_states):
        return 2 * type(self).forward(self, hidden_states)

    plain = [frozen_copy(make_base("gpt_oss")), extend(make_base("gpt_oss"))]
    before = [logits(model) for model in plain]
    for model in plain:
        for layer in model.get_decoder().layers:
            kernelise(layer.input_layernorm, doubled)
    base, model = plain
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert not torch.equal(logits(base), before[0]) and not torch.equal(logits(model), before[1])


def test_a_router_bound_to_its_base_class_before_the_adapter_is_refused():
    """Kernels bind a module's own forward where they have none: the swapped class would never be asked."""
    base = make_base("qwen3_moe")
    router = base.model.layers[1].mlp.gate
    kernelise(router, type(router).forward)
    with pytest.raises(ValueError, match=r"In layer 1, Qwen3MoeTopKRouter.forward lies before Qwen3MoeTopKRouter"):
        extend(base)


# ------------------------------------------------------------------ gradients through quantised layers


class Packing(nn.Linear):
    """Stands for bitsandbytes' 4-bit layer on a CPU that packs it at the first inference."""

    support_avx512bf16_for_cpu = True


def test_training_is_refused_where_a_quantised_layer_hands_on_no_gradient(tmp_path):
    base = make_base()
    attention = base.model.layers[3].self_attn
    attention.o_proj.__class__ = Packing
    base.is_quantized, base.config.quantization_config = True, BitsAndBytesConfig(load_in_4bit=True)
    model = extend(base)
    message = r"layers.3.self_attn.o_proj of the quantised base \(Packing, Parameter\) hands on no gradient"
    with pytest.raises(ValueError, match=message + r".*load_in_8bit=True.*Int8WeightOnlyConfig"):
        make_trainer(tmp_path, model)
    with pytest.raises(ValueError, match=message):
        model(**batch())
    with pytest.raises(ValueError, match=message):
        model.model(**batch())
    assert torch.equal(logits(model), logits(extend(make_base())))  # without gradients it answers
    with model.disable_adapter():
        assert torch.equal(model(**batch()).logits, logits(frozen_copy(make_base())))


def test_a_projector_is_not_trained_through_such_a_layer_either():
    base = make_base()
    base.model.layers[0].self_attn.o_proj.__class__ = Packing
    base.is_quantized, base.config.quantization_config = True, BitsAndBytesConfig(load_in_4bit=True)
    model = MoExtendForCausalLM.from_base(base, {}, encoder=make_encoder())
    with pytest.raises(ValueError, match="layers.0.self_attn.o_proj of the quantised base"):
        model(**batch())


def test_an_unquantised_base_is_asked_nothing():
    base = make_base()
    base.model.layers[3].self_attn.o_proj.__class__ = Packing
    check_gradients(extend(base))


# ------------------------------------------------------------------ bitsandbytes and torchao, for real


def linear_base(family, folder):
    """Wide enough for bitsandbytes' blocks of 64 values."""
    width = {"hidden_size": 128, "head_dim": 32} if family == "qwen3_moe" else {"hidden_size": 128}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **width}))
    with torch.no_grad():
        for name, tensor in base.named_parameters():
            if name.endswith(".gate.weight") or "experts" in name:
                tensor.normal_(std=0.2)
    base.save_pretrained(folder)
    return str(folder)


def quantisation(kind):
    if kind == "bitsandbytes 8-bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind == "bitsandbytes 4-bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    return TorchAoConfig({"torchao": Int8WeightOnlyConfig, "dynamic": Int8DynamicActivationInt8WeightConfig}[kind]())


def whole(linear):
    """The weight [O, I] of a quantised linear layer, in float32."""
    if type(linear).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(linear.weight, linear.weight.quant_state).float()
    if type(linear).__name__ == "Linear8bitLt":
        return linear.weight.data.float() * linear.state.SCB.unsqueeze(-1) / 127  # moved there by its first pass
    return linear.weight.dequantize().float()


def dequantised(base, path):
    """The unquantised base with the quantised base's weights: plain torch from here on."""
    plain = AutoModelForCausalLM.from_pretrained(path)
    for name, linear in base.named_modules():
        if isinstance(linear, nn.Linear) and type(linear.weight) is not nn.Parameter:
            plain.get_submodule(name).weight.data = whole(linear)
    return plain


def base_bytes(base):
    return {name: bytes_of(p) for name, p in base.named_parameters() if "moextend" not in name.split(".")}


def check_backward(base):
    """The gradient at the input of every quantised layer is the one at its output times its weight."""
    quantised = [one for one in base.modules() if isinstance(one, nn.Linear) and type(one.weight) is not nn.Parameter]
    assert len(quantised) == 16  # attention's, in four layers
    for linear in quantised:
        rows = torch.randn(5, linear.in_features, requires_grad=True)
        output = linear(rows)
        after = torch.randn(output.shape)
        output.backward(after)
        torch.testing.assert_close(rows.grad, after @ whole(linear), rtol=1e-4, atol=1e-5)


def unpacked(base):
    """Linear4bit as on a GPU, or a CPU without AVX512-BF16: never packed for inference."""
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base


def load(path, kind):
    return unpacked(AutoModelForCausalLM.from_pretrained(path, quantization_config=quantisation(kind)))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["bitsandbytes 8-bit", "bitsandbytes 4-bit", "torchao"])
def test_a_base_with_quantised_linear_layers(kind, family, tmp_path):
    path = linear_base(family, tmp_path / "base")
    base = load(path, kind)
    assert type(base.model.layers[1].self_attn.q_proj.weight) is not nn.Parameter
    assert type(base.model.layers[1].mlp.experts.down_proj) is nn.Parameter
    expected, frozen = logits(base), base_bytes(base)
    model = extend(load(path, kind))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(path, kind).requires_grad_(False)))

    shake(model).set_trainable()
    inputs = {**batch(), "labels": batch()["input_ids"]}
    model(**inputs).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient and all("moextend" in name for name in with_gradient)
    check_backward(base)
    if kind != "bitsandbytes 8-bit":  # it rounds activations as well, and a rounding turns the choice of some tokens
        twin = shake(extend(dequantised(base, path)))
        twin.set_trainable()
        twin(**inputs).loss.backward()
        for name, tensor in twin.adapter_tensors().items():
            torch.testing.assert_close(model.adapter_tensors()[name].grad, tensor.grad, rtol=1e-3, atol=1e-6)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.step()
    assert base_bytes(model.base) == frozen
    model.save_pretrained(tmp_path / "adapter", adapter_dtype="float32")
    on = logits(model)
    loaded = MoExtendForCausalLM.from_pretrained(tmp_path / "adapter", base=load(path, kind))
    assert torch.equal(logits(loaded), on) and not torch.equal(on, expected)
    assert torch.equal(logits(model.detach()), expected)


@pytest.mark.slow
def test_an_adapter_is_loaded_onto_a_quantised_base_by_its_options(tmp_path):
    path = linear_base("mixtral", tmp_path / "base")
    options = {"quantization_config": quantisation("bitsandbytes 8-bit")}
    model = shake(extend(path, **options))
    model.save_pretrained(tmp_path / "adapter", adapter_dtype="float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", **options)
    assert type(loaded.base.model.layers[0].self_attn.q_proj).__name__ == "Linear8bitLt"
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bitsandbytes 8-bit", "torchao"])
def test_the_trainer_verifies_a_quantised_base(kind, tmp_path):
    model = extend(load(linear_base("mixtral", tmp_path / "base"), kind))
    before = {name: tensor.detach().clone() for name, tensor in model.adapter_tensors().items()}
    trainer = make_trainer(tmp_path / "run", model, verify_base=True)  # hashes every base tensor before and after
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.adapter_tensors().items())
    hashes = base_tensors_hash(model)
    weight = model.base.model.layers[0].self_attn.q_proj.weight
    (weight.qdata if kind == "torchao" else weight.data)[0, 0] += 1
    changed = {name for name, found in base_tensors_hash(model).items() if found != hashes[name]}
    assert changed == {"base.model.layers.0.self_attn.q_proj.weight"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bitsandbytes 4-bit", "dynamic"])
def test_training_is_refused_where_the_packages_have_no_backward(kind, tmp_path):
    path = linear_base("mixtral", tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantisation(kind))
    if kind == "bitsandbytes 4-bit":  # also on a CPU that could not pack
        for module in base.modules():
            if type(module).__name__ == "Linear4bit":
                module.support_avx512bf16_for_cpu = True
    model = extend(base)
    with pytest.raises(ValueError, match="q_proj of the quantised base.*hands on no gradient"):
        make_trainer(tmp_path / "run", model)


@pytest.mark.slow
def test_experts_quantised_by_torchao_are_refused(tmp_path):
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

    path = linear_base("mixtral", tmp_path / "base")
    config = FqnToConfig({r"re:.*\.experts\.down_proj": Int8WeightOnlyConfig()})
    with pytest.raises(ValueError, match=r"MixtralExperts.down_proj in layer 1 .* quantised \(Int8Tensor"):
        extend(path, quantization_config=TorchAoConfig(config))


# ------------------------------------------------------------------ two processes

PARALLEL = {
    "tensor parallel": {"tp_plan": "auto"},
    "expert parallel": {"tp_size": 2, "ep_size": 2},
    "enable_expert_parallel": {"tp_size": 2, "tp_plan": "auto", "enable_expert_parallel": True},
    "FSDP": {"fsdp_size": 2},
}


def work(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    found, expected = {}, logits(make_base())
    for name, settings in PARALLEL.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            distributed = DistributedConfig(**settings)
        base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", distributed_config=distributed)
        answer = logits(base)
        answer = answer.full_tensor() if hasattr(answer, "full_tensor") else answer
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)  # transformers did shard it, and rightly
        with pytest.raises(ValueError, match=SHARDED) as error:
            extend(base)
        found[name] = str(error.value)
    torch.save(found, f"{folder}/{rank}.pt")
    leave_group()


@pytest.mark.slow
def test_a_base_sharded_over_two_processes_is_refused_by_name(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    in_processes(work, tmp_path)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == PARALLEL.keys()
        assert "sharded over processes (tp_plan or FSDP)" in found["tensor parallel"]
        assert "(expert parallel)" in found["expert parallel"]
        assert "(expert parallel)" in found["enable_expert_parallel"]
        assert "sharded over processes (tp_plan or FSDP)" in found["FSDP"]


def test_a_projector_trains_behind_a_base_whose_experts_somebody_else_has_wrapped():
    peft = pytest.importorskip("peft")
    model = MoExtendForCausalLM.from_base(make_base(), encoder=make_encoder(), image_token_id=95)
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    peft.inject_adapter_in_model(config, model.base)
    assert model(**batch()).logits.isfinite().all()
