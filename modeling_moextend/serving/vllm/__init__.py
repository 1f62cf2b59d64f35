"""vLLM plugin: one adapter in the place of a model, or several on one base, each request choosing (docs/serving.md).

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in every process of its own, also where no
adapter is served: nothing of torch or vLLM's engine is imported before an adapter is asked for.
"""

import logging

VERSIONS = ("0.32",)  # minor versions of vLLM whose inside the files here were written for and tested with
PREFIX = "MoExtend"  # before the name of a base's architecture: the same, with adapters
SEEING = "MoExtendSeeing"  # the same, with an adapter that has an encoder
FAMILIES = (  # architectures of bases, by their names in transformers and vLLM
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "GptOssForCausalLM",
    "MixtralForCausalLM",
    "OlmoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
)


def register() -> None:
    """Makes vLLM know adapters' configs, and the extended architectures. vLLM calls it, maybe several times."""
    try:
        from vllm import ModelRegistry
        from vllm.transformers_utils.config import _CONFIG_REGISTRY

        from .config import ServedConfig
    except ImportError as error:  # another version of vLLM, whose users may serve no adapter at all
        logging.getLogger(__name__).warning("This vLLM can't serve MoExtend adapters: %s. %s", error, supported())
        return
    _CONFIG_REGISTRY["moextend"] = ServedConfig
    for name in (prefix + architecture for architecture in FAMILIES for prefix in (PREFIX, SEEING)):
        ModelRegistry.register_model(name, f"{__name__}.model:{name}")


def supported() -> str:
    return f"Supported versions of vLLM: {', '.join(f'{version}.*' for version in VERSIONS)}."


def check_version() -> None:
    """Refuses other versions of vLLM: what the plugin builds on is no stable interface. `ImportError`."""
    from vllm import __version__

    if ".".join(__version__.split(".")[:2]) not in VERSIONS:
        raise ImportError(
            f"MoExtend adapters are not served by vLLM {__version__}. {supported()} Install one of them (pip install "
            '"moextend[vllm]"), or serve a native export (docs/serving.md), which any vLLM takes.'
        )
