"""vLLM plugin: one adapter in the place of a model, or several on one base, each request choosing (docs/serving.md).

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in every process of its own, also where no
adapter is served: vLLM's models are not imported before an adapter is asked for.
"""

import logging

from .supported import FAMILIES, PREFIX, SEEING, supported_versions


def register() -> None:
    """Makes vLLM know adapters' configs, and the extended architectures. vLLM calls it, maybe several times."""
    try:
        from vllm import ModelRegistry
        from vllm.transformers_utils.config import _CONFIG_REGISTRY

        from .config import ServedConfig
    except ImportError as error:  # another version of vLLM, whose users may serve no adapter at all
        logging.getLogger(__name__).warning(
            "This vLLM can't serve MoExtend adapters: %s. %s", error, supported_versions()
        )
        return
    _CONFIG_REGISTRY["moextend"] = ServedConfig
    for name in (prefix + architecture for architecture in FAMILIES for prefix in (PREFIX, SEEING)):
        ModelRegistry.register_model(name, f"{__name__}.model:{name}")
