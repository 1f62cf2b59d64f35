"""Which versions of vLLM and which bases are supported, and what their models are called with adapters."""

VERSIONS = ("0.32",)  # minor versions of vLLM whose inside the files here were written for and tested with
PREFIX = "MoExtend"  # before the name of a base's architecture: the same, with adapters
SEEING = "MoExtendSeeing"  # the same, with an adapter that has an encoder
FAMILIES = (  # architectures of bases, by their names in transformers and vLLM
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "GptOssForCausalLM",
    "GraniteMoeForCausalLM",
    "MixtralForCausalLM",
    "OlmoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
)


def supported_versions() -> str:
    return f"Supported versions of vLLM: {', '.join(f'{version}.*' for version in VERSIONS)}."


def check_version() -> None:
    """Refuses other versions of vLLM: what the plugin builds on is no stable interface. `ImportError`."""
    from vllm import __version__

    if ".".join(__version__.split(".")[:2]) not in VERSIONS:
        raise ImportError(
            f"MoExtend adapters are not served by vLLM {__version__}. {supported_versions()} Install one of them "
            '(pip install "moextend[vllm]"), or serve a native export (docs/serving.md), which any vLLM takes.'
        )
