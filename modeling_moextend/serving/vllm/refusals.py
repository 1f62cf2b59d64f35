"""What is refused, by name: whatever was not measured to give the tokens that `generate` gives."""

from typing import Any

import torch
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from ...configuration_moextend import MoExtendConfig
from ...routing_moextend import Rule
from .supported import FAMILIES

UNMEASURED = "--additional-config '{\"moextend_unmeasured_device\": true}'"
DTYPES = (torch.float32, torch.bfloat16)
LOAD_FORMATS = ("auto", "hf", "safetensors")
# Entries of a routing rule that may be anything; of the others only the default was measured.
FREE = ("score", "renormalise", "scale", "epsilon", "floor", "correction", "rows")


def refuse(what: str, problems: list[str]) -> None:
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"{what} can't be served by vLLM:\n  {lines}\nSee docs/serving.md for other ways.")


def check_family(base_config: PreTrainedConfig, name: str) -> None:
    """Refuses bases of which no adapter was measured in vLLM."""
    architectures = list(base_config.architectures or ())
    problems = []
    if architectures[:1] == [] or architectures[0] not in FAMILIES:
        problems.append(f"its base is {architectures or base_config.model_type}; measured: {', '.join(FAMILIES)}.")
    if getattr(base_config, "quantization_config", None):
        problems.append("its base is quantised: give the checkpoint that it was quantised from.")
    if getattr(base_config, "topk_method", None) == "greedy" and (base_config.n_group or 1) > 1:
        problems.append(
            f'its base chooses among all experts (topk_method="greedy"), and vLLM among those of the best of its '
            f"n_group={base_config.n_group} groups."
        )
    refuse(f"The adapter {name}", problems)


def check_adapter(config: MoExtendConfig, name: str, among_others: bool = False) -> None:
    """Refuses adapters that were not measured in vLLM, by what their config says."""
    problems = []
    if config.encoder_config is not None and among_others:
        problems.append("it has an encoder, and adapters that see are served alone: vllm serve ADAPTER.")
    if "audio" in config.senses:
        problems.append("it has an encoder of audio, and only images are served.")
    if "image" in config.senses and config.senses["image"].convolutions is not None:
        problems.append("its encoder takes images of any size, and only those of one size are served.")
    if not config.extended_layers:
        problems.append("it has no new experts.")
    if config.trained_on:
        below = ", ".join(repr(entry["name"]) for entry in config.trained_on)
        problems.append(f"it was trained on top of {below}, and a request is served by one adapter.")
    rule = Rule(**(config.routing_rule or {"score": "", "renormalise": False}))
    other = [entry for entry, value in Rule._field_defaults.items() if getattr(rule, entry) != value]
    other = [entry for entry in other if entry not in FREE]
    if not config.routing_rule or other:
        problems.append(f"its base's routing rule has {', '.join(other) or 'no record'} (docs/families.md).")
    refuse(f"The adapter {name}", problems)


def check_engine(config: VllmConfig, several: bool) -> None:
    """Refuses settings of the engine that were not measured."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    device, unmeasured = current_platform.device_type, config.additional_config.get("moextend_unmeasured_device")
    found = {
        f"this device ({UNMEASURED} serves there all the same, on your own account)": (
            device,
            ["cpu", *([device] if unmeasured else [])],
        ),
        f"--enforce-eager on {device}": (device == "cpu" or model.enforce_eager, [True]),
        "--dtype": (model.dtype, list(DTYPES)),
        "--runner": (model.runner_type, ["generate"]),
        "--tensor-parallel-size": (parallel.tensor_parallel_size, [1]),
        "--pipeline-parallel-size": (parallel.pipeline_parallel_size, [1]),
        "--data-parallel-size": (parallel.data_parallel_size, [1]),
        "--decode-context-parallel-size": (parallel.decode_context_parallel_size, [1]),
        "--prefill-context-parallel-size": (parallel.prefill_context_parallel_size, [1]),
        "--enable-expert-parallel": (parallel.enable_expert_parallel, [False]),
        "--enable-eplb": (parallel.enable_eplb, [False]),
        "--enable-dbo": (parallel.enable_dbo, [False]),
        "--kv-cache-dtype": (cache.cache_dtype, ["auto"]),
        "--load-format": (config.load_config.load_format, list(LOAD_FORMATS)),
        "--enable-prompt-embeds": (model.enable_prompt_embeds, [False]),
        "--quantization": (model.quantization, [None]),
        "--speculative-config": (getattr(config.speculative_config, "method", None), [None, "ngram"]),
        "--kv-transfer-config": (getattr(config.kv_transfer_config, "kv_connector", None), [None]),
        "VLLM_USE_V2_MODEL_RUNNER": (config.use_v2_model_runner, [False]),
    }
    problems = [
        f"{name}: {shown(value)}; measured: {', '.join(map(shown, allowed))}."
        for name, (value, allowed) in found.items()
        if value not in allowed
    ]
    if config.lora_config is not None and not several:
        problems.append(
            "--enable-lora beside an adapter in the model's place: serve the base, and name the adapter (and others) "
            "in moextend_adapters."
        )
    refuse("With these settings of the engine, MoExtend adapters", problems)


def shown(value: Any) -> str:
    return str(value).removeprefix("torch.")
