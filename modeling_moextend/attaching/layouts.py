"""Refusing a base by its config alone, before gigabytes are read: see base_checks_moextend.py and docs/layouts.md."""

import copy
import inspect
import os
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, get_hf_quantizer

from ..base_checks_moextend import check_method, quantisation_of, sharded_message
from ..loading_moextend import HUB_KWARGS, check_no_adapter

CONFIG_KWARGS = (*HUB_KWARGS, "trust_remote_code", "code_revision")
DISTRIBUTED = ("distributed_config", "tp_plan", "tp_size", "device_mesh")


def check_request(name_or_path: str | os.PathLike, options: dict[str, Any]) -> None:
    """Refuses, from its config alone, a base whose layout can't be extended: before gigabytes are read.

    Args:
        name_or_path, options: what the base's `from_pretrained` will be given.

    Raises:
        ValueError: sharded over processes, or quantised in a way that reaches the experts.
    """
    distributed = [name for name in DISTRIBUTED if options.get(name) is not None]
    if distributed:
        raise ValueError(sharded_message(f"{', '.join(distributed)} was given"))
    check_no_adapter(name_or_path, options)
    if options.get("gguf_file") is None:  # of a GGUF file only the loaded model tells whether it is still packed
        quantiser = planned_quantiser(name_or_path, options)
        dequantises = quantiser is not None and getattr(quantiser.quantization_config, "dequantize", False)
        if quantiser is not None and not (quantiser.pre_quantized and dequantises):
            check_quantisation(quantiser.quantization_config)


def check_quantisation(quantisation: Any) -> None:
    """Refuses, with what to do instead, every quantisation (config of transformers') but those that were tried."""
    method = str(getattr(quantisation.quant_method, "value", quantisation.quant_method))
    own = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    advice = "Load the checkpoint that it was quantised from, "
    if own is not None and "dequantize" in inspect.signature(own).parameters:
        advice = f"Load it with quantization_config={own.__name__}(dequantize=True), "
    if getattr(quantisation, "dequantize", False):  # the checkpoint is not quantised, and would be now
        advice = "Leave out quantization_config, "
    check_method(quantisation, advice)


def check_quantised(base: PreTrainedModel) -> None:
    """Refuses a loaded base that is quantised in a way that reaches the experts."""
    if getattr(base, "is_quantized", False):
        check_quantisation(quantisation_of(base.config))


def planned_quantiser(name_or_path: str | os.PathLike, options: dict[str, Any]) -> HfQuantizer | None:
    """The `HfQuantizer` that transformers will load this base with, or `None`.

    transformers decides by the machine: without a GPU it dequantises MXFP4 and FP8 checkpoints of its own accord.
    """
    config = options.get("config")
    if not isinstance(config, PretrainedConfig):
        hub_kwargs = {name: options[name] for name in CONFIG_KWARGS if options.get(name) is not None}
        try:
            config = AutoConfig.from_pretrained(name_or_path, **{"trust_remote_code": False, **hub_kwargs})
        except OSError as error:
            raise OSError(f"The base {str(name_or_path)!r} can't be loaded. ({error})") from error
    config, requested = copy.deepcopy(config), copy.deepcopy(options.get("quantization_config"))
    if requested is None and quantisation_of(config) is None:
        return None
    return get_hf_quantizer(config, requested, options.get("device_map"), None, {})[0]
