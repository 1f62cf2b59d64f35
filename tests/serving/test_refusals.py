"""What was not measured is refused, by name, before anything is served."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer
from vllm.engine.arg_utils import EngineArgs

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.adapter_file_moextend import FILE
from modeling_moextend.serving.vllm import refusals, supported
from modeling_moextend.serving.vllm.adapters import load_adapters
from modeling_moextend.serving.vllm.refusals import check_adapter, check_engine, check_family
from modeling_moextend.serving.vllm.requests import AdapterManager
from modeling_moextend.serving.vllm.router_check import check_router


def engine_config(model, adapters=(), adapter=None):
    """What `load_adapters` looks at of vLLM's config."""
    own = {"moextend_adapters": [str(one) for one in adapters]} if adapters else {}
    own |= {"moextend_adapter": {"name_or_path": str(adapter)}} if adapter else {}
    model = SimpleNamespace(hf_config=SimpleNamespace(**own), model=str(model), revision=None, dtype=torch.float32)
    return SimpleNamespace(model_config=model, load_config=SimpleNamespace(download_dir=None))


def load(*args, **kwargs):
    return load_adapters(engine_config(*args, **kwargs), torch.device("cpu"))


@pytest.fixture
def copy(workshop, tmp_path):
    """A copy of an adapter's folder, to be damaged."""
    return shutil.copytree(workshop.adapter("gate"), tmp_path / "copy")


def test_another_base_is_refused(workshop, tmp_path):
    other = shutil.copytree(workshop.base(), tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors |= {name: tensor + 0.01 for name, tensor in tensors.items() if ".1." in name}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    folder = workshop.adapter("gate")
    load(workshop.base(), [folder])
    with pytest.raises(ValueError, match="other is a different base than the adapter .* was made on"):
        load(other, [folder])


def test_the_fingerprint_holds_for_a_base_served_in_another_dtype(workshop):
    load(workshop.base(dtype="bfloat16"), [workshop.adapter("gate", dtype="bfloat16")])
    config = engine_config(workshop.base(), [workshop.adapter("gate")])
    config.model_config.dtype = torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it builds a model
    try:
        load_adapters(config, torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)


def test_a_truncated_adapter_is_refused_before_anything_starts(copy):
    data = (copy / FILE).read_bytes()
    (copy / FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged or truncated"):
        EngineArgs(model=str(copy)).create_engine_config()


def test_a_changed_byte_is_refused(copy, workshop):
    data = bytearray((copy / FILE).read_bytes())
    data[-5] ^= 64
    (copy / FILE).write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        load(workshop.base(), [copy])
    with pytest.raises(ValueError, match="checksum"):
        load(copy, adapter=copy)


def test_a_missing_tensor_is_named(copy, workshop):
    with safe_open(copy / FILE, "pt") as file:
        metadata = {key: text for key, text in file.metadata().items() if "checksum" not in key}
    tensors = load_file(copy / FILE)
    del tensors["layers.3.router.weight"], tensors["output.weight"]
    save_file(tensors, copy / FILE, metadata)
    with pytest.raises(ValueError, match=r"missing: layers.3.router.weight\n +missing: output.weight"):
        load(workshop.base(), [copy])


def test_what_is_in_a_config_is_refused_by_name(workshop):
    config = MoExtendForCausalLM.from_pretrained(workshop.adapter("paper")).config
    check_adapter(config, "it")
    config.routing_rule = config.routing_rule | {"softcap": 30.0, "multiplier": 2.0}
    with pytest.raises(ValueError, match="rule has multiplier, softcap"):
        check_adapter(config, "it")
    config.trained_on = [{"name": "below", "fingerprint": None}]
    with pytest.raises(ValueError, match="trained on top of 'below'"):
        check_adapter(config, "it")
    config.extended_layers = {}
    with pytest.raises(ValueError, match="no new experts"):
        check_adapter(config, "it")


def test_an_adapter_that_hears_is_refused_by_name(workshop):
    ears = Path(__file__).parents[2] / "assets" / "tiny-speech"
    with pytest.raises(ValueError, match="encoder of audio, and only images"):
        check_adapter(MoExtendForCausalLM.from_base(workshop.base(), {1: [0]}, encoder=ears).config, "it")


def test_other_families_and_quantised_bases_are_refused_by_name():
    config = AutoConfig.for_model("phimoe")
    config.architectures = ["PhimoeForCausalLM"]
    with pytest.raises(ValueError, match="its base is .*PhimoeForCausalLM.*measured: .*MixtralForCausalLM"):
        check_family(config, "it")
    config.architectures = ["MixtralForCausalLM"]
    check_family(config, "it")
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match="quantised"):
        check_family(config, "it")
    options = {"architectures": ["DeepseekV2ForCausalLM"], "n_group": 4, "topk_group": 2}
    check_family(AutoConfig.for_model("deepseek_v2", topk_method="group_limited_greedy", **options), "it")
    with pytest.raises(ValueError, match="chooses among all experts .* n_group=4 groups"):
        check_family(AutoConfig.for_model("deepseek_v2", topk_method="greedy", **options), "it")


REFUSED = {
    "--tensor-parallel-size: 2": {"tensor_parallel_size": 2},
    "--pipeline-parallel-size: 2": {"pipeline_parallel_size": 2},
    "--data-parallel-size: 2": {"data_parallel_size": 2},
    "--enable-expert-parallel: True": {"enable_expert_parallel": True},
    "--kv-cache-dtype: fp8": {"kv_cache_dtype": "fp8"},
    "--dtype: float16": {"dtype": "float16"},
    "--load-format: dummy": {"load_format": "dummy"},
    "--enable-prompt-embeds: True": {"enable_prompt_embeds": True},
    "--runner: pooling": {"runner": "pooling"},
    "--speculative-config: ngram_gpu": {
        "speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    },
    "--enable-lora beside": {"enable_lora": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_are_refused_by_name(workshop, message):
    given = {"max_model_len": 256, "dtype": "float32", "model": str(workshop.adapter("gate"))}
    config = EngineArgs(**given | REFUSED[message]).create_engine_config()
    with pytest.raises(ValueError, match=message):
        check_engine(config, several=False)


OTHERS = {  # what vLLM itself refuses on a CPU, or asks more for: as if it had been given all the same
    "--enable-eplb: True": ("parallel_config", "enable_eplb", True),
    "--enable-dbo: True": ("parallel_config", "enable_dbo", True),
    "--decode-context-parallel-size: 2": ("parallel_config", "decode_context_parallel_size", 2),
    "--prefill-context-parallel-size: 2": ("parallel_config", "prefill_context_parallel_size", 2),
    "--quantization: fp8": ("model_config", "quantization", "fp8"),
    "--kv-transfer-config: it": (None, "kv_transfer_config", SimpleNamespace(kv_connector="it")),
}


def test_settings_of_other_machines_are_refused_by_name(workshop):
    config = EngineArgs(model=str(workshop.adapter("gate")), max_model_len=256).create_engine_config()
    for message, (part, name, value) in OTHERS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(getattr(config, part) if part else config, name, value)
            with pytest.raises(ValueError, match=message):
                check_engine(config, several=False)
    check_engine(config, several=False)


def test_measured_settings_are_not_refused(workshop):
    config = EngineArgs(model=str(workshop.adapter("gate")), max_model_len=256).create_engine_config()
    check_engine(config, several=False)
    assert config.model_config.architectures == ["MoExtendMixtralForCausalLM"]


def test_other_devices_are_refused_unless_a_user_wants_to_measure(workshop, monkeypatch):
    options = {"model": str(workshop.adapter("gate")), "max_model_len": 256, "dtype": "float32"}
    config = EngineArgs(**options).create_engine_config()
    monkeypatch.setattr(refusals, "current_platform", SimpleNamespace(device_type="cuda"))
    with pytest.raises(ValueError, match=r"this device .*moextend_unmeasured_device.* cuda; measured: cpu"):
        check_engine(config, several=False)
    config.additional_config = {"moextend_unmeasured_device": True}
    with pytest.raises(ValueError, match="--enforce-eager on cuda: False"):
        check_engine(config, several=False)
    config.model_config.enforce_eager = True
    check_engine(config, several=False)


def test_other_versions_of_vllm_are_refused(workshop, monkeypatch):
    monkeypatch.setattr(supported, "VERSIONS", ("0.31",))
    with pytest.raises((ImportError, ValueError), match=r"not served by vLLM 0.32.*0\.31\.\*"):
        EngineArgs(model=str(workshop.adapter("gate"))).create_engine_config()


def test_the_base_generates_as_its_config_and_the_adapters_say(workshop, tmp_path):
    """Where generation ends and how it samples is read beside the base: there is nothing beside the adapter."""
    base = shutil.copytree(workshop.base(), tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 77], "repetition_penalty": 1.25}))
    model = MoExtendForCausalLM.from_base(base, extended_layers={2: [1]}, dtype="float32")
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    config = EngineArgs(model=str(tmp_path / "adapter"), max_model_len=256).create_engine_config().model_config
    found = config.try_get_generation_config()
    assert found["eos_token_id"] == [2, 77] and found["repetition_penalty"] == 1.5
    with pytest.raises(ValueError, match="changes the base's generation config .repetition_penalty."):
        load(base, [tmp_path / "adapter"])


def test_adapters_that_the_server_does_not_know_are_refused():
    manager = object.__new__(AdapterManager)
    manager.numbers, manager.names, manager.places = {}, {}, ["me/law", "me/medicine"]
    manager.add_adapter(SimpleNamespace(lora_path="me/law", lora_name="law", lora_int_id=1))
    with pytest.raises(ValueError, match="me/tax is none of the adapters .*me/law, me/medicine"):
        manager.add_adapter(SimpleNamespace(lora_path="me/tax", lora_name="tax", lora_int_id=2))
    with pytest.raises(ValueError, match="'law' names another adapter already"):
        manager.add_adapter(SimpleNamespace(lora_path="me/medicine", lora_name="law", lora_int_id=3))


def test_a_base_that_vllm_routes_otherwise_is_refused(workshop):
    """vLLM's OLMoE never renormalises, whatever the config says."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    from modeling_moextend.routing_moextend import Rule

    router = CPURouter(top_k=2, global_num_experts=8, renormalize=False)
    extended = SimpleNamespace(hidden_size=16)
    before = torch.get_default_dtype()
    for dtype in (torch.bfloat16, torch.float32):  # what vLLM builds models in
        torch.set_default_dtype(dtype)
        try:
            check_router(1, router, Rule("softmax", renormalise=False), extended)
        finally:
            torch.set_default_dtype(before)
    with pytest.raises(ValueError, match="layer 1 vLLM's router weighs experts otherwise"):
        check_router(1, router, Rule("softmax", renormalise=True), extended)
    with pytest.raises(ValueError, match="chooses experts otherwise"):  # DeepSeek-V3 without topk_method="noaux_tc"
        check_router(1, router, Rule("softmax", renormalise=False, correction="e_score_correction_bias"), extended)
    router.custom_routing_function = lambda hidden_states, gating_output, topk, renormalize: gating_output.topk(
        topk, largest=False
    )
    with pytest.raises(ValueError, match="chooses experts otherwise"):
        check_router(1, router, Rule("softmax", renormalise=False), extended)
