"""MoExtend: give a pretrained Mixture-of-Experts model a new skill or a new sense by adding experts to it."""

import importlib

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from .configuration_moextend import MoExtendConfig
from .data.processors import load_processor
from .modeling_moextend import MoExtendForCausalLM, MoExtendModel
from .processing_moextend import MoExtendProcessor

__version__ = "0.1.0"

LAZY = {  # these import trl, datasets or matplotlib, which the model itself does not need
    "MoExtendSFTConfig": "training.config",
    "MoExtendSFTTrainer": "training.trainer",
    "RouterShift": "extender.router_shift",
    "measure_router_shift": "extender.router_probe",
    "load_llava": "data.llava",
    "create_card": "publishing.card",
    "compare_with_base": "evaluation.compare",
    "base_retention": "evaluation.compare",
    "threshold_curve": "evaluation.compare",
    "evaluate_adapter": "evaluation.report",
    "write_report": "evaluation.report",
    "ReportCallback": "evaluation.report",
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
