"""MoExtend: give a pretrained Mixture-of-Experts model a new skill or a new sense by adding experts to it."""

import importlib

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from .configuration_moextend import MoExtendConfig
from .modeling_moextend import MoExtendForCausalLM, MoExtendModel
from .processing_moextend import MoExtendProcessor, load_processor

__version__ = "0.1.0"

LAZY = {  # these import trl, datasets or matplotlib, which the model itself does not need
    "MoExtendSFTConfig": "sft_config",
    "MoExtendSFTTrainer": "sft_trainer",
    "RouterShift": "extender",
    "measure_router_shift": "extender",
    "load_llava": "llava",
    "create_card": "card",
    "compare_with_base": "evaluation",
    "base_retention": "evaluation",
    "threshold_curve": "evaluation",
    "evaluate_adapter": "report",
    "write_report": "report",
    "ReportCallback": "report",
}

__all__ = ["MoExtendConfig", "MoExtendForCausalLM", "MoExtendModel", "MoExtendProcessor", "load_processor", *LAZY]

AutoConfig.register("moextend", MoExtendConfig)
AutoModel.register(MoExtendConfig, MoExtendModel)
AutoModelForCausalLM.register(MoExtendConfig, MoExtendForCausalLM)
AutoModelForImageTextToText.register(MoExtendConfig, MoExtendForCausalLM)
AutoProcessor.register(MoExtendConfig, MoExtendProcessor)


def __getattr__(name):
    if name in LAZY:
        return getattr(importlib.import_module(f".{LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *LAZY])
