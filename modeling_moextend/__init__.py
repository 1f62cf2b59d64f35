"""MoExtend: give a pretrained Mixture-of-Experts model a new skill or a new sense by adding experts to it."""

import importlib
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from .configuration_moextend import MoExtendConfig
from .data.processors import load_processor
from .modeling_moextend import MoExtendForCausalLM, MoExtendModel
from .processing_moextend import MoExtendProcessor

if TYPE_CHECKING:  # what `LAZY` names, for editors and type checkers
    from .data.llava import load_llava
    from .evaluation.compare import base_retention, compare_with_base, threshold_curve
    from .evaluation.report import ReportCallback, evaluate_adapter, write_report
    from .extender.router_probe import measure_router_shift
    from .extender.router_shift import RouterShift
    from .publishing.card import create_card
    from .training.config import MoExtendSFTConfig
    from .training.reference import use_reference
    from .training.trainer import MoExtendSFTTrainer

__version__ = "0.2.0"

LAZY = {  # these import trl, datasets or matplotlib, which the model itself does not need
    "MoExtendSFTConfig": "training.config",
    "MoExtendSFTTrainer": "training.trainer",
    "use_reference": "training.reference",
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

__all__ = [
    "MoExtendConfig",
    "MoExtendForCausalLM",
    "MoExtendModel",
    "MoExtendProcessor",
    "MoExtendSFTConfig",
    "MoExtendSFTTrainer",
    "ReportCallback",
    "RouterShift",
    "base_retention",
    "compare_with_base",
    "create_card",
    "evaluate_adapter",
    "load_llava",
    "load_processor",
    "measure_router_shift",
    "threshold_curve",
    "use_reference",
    "write_report",
]

AutoConfig.register("moextend", MoExtendConfig)
AutoModel.register(MoExtendConfig, MoExtendModel)
AutoModelForCausalLM.register(MoExtendConfig, MoExtendForCausalLM)
AutoModelForImageTextToText.register(MoExtendConfig, MoExtendForCausalLM)
# Not under MoExtendConfig: a saved processor names its class, and an adapter without one has its tokenizer.
AutoProcessor.register(MoExtendProcessor, MoExtendProcessor)


def __getattr__(name):
    if name in LAZY:
        return getattr(importlib.import_module(f".{LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *LAZY])
