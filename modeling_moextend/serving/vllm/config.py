"""What vLLM takes for the config of an adapter: its base's, with a word on the adapter."""

import contextlib
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from ...configuration_moextend import MoExtendConfig
from ...tools.base_weights import location_of_part
from ...tools.inspection import read_headers
from .refusals import check_adapter, check_family
from .supported import PREFIX, SEEING, check_version

SAMPLING = ("eos_token_id", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # what vLLM reads of it


class ServedConfig(PreTrainedConfig):
    """In the place of `MoExtendConfig` where vLLM parses an adapter's config.json."""

    model_type = "moextend"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        """The config of the base, in its own class, as it lies beside the base's weights.

        `moextend_adapter` in it says which adapter this is, and `architectures` names the extended model. What the
        adapter itself says comes from the header of its file, as in transformers.

        Raises:
            ImportError: a vLLM that is not supported.
            OSError, ValueError: no adapter or base there; a damaged file; what can't be served.
        """
        check_version()
        name = kwargs["name_or_path"]
        stored = read_headers(name, {})
        config = stored.config_for_loading()
        check_adapter(config, name)
        path, options = location_of_part("base", None, config, (name, {}))
        base_config = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
        check_family(base_config, name)
        for key, value in generation_values(config, path, options).items():
            setattr(base_config, key, value)
        prefix = PREFIX if config.encoder_config is None else SEEING
        base_config.architectures = [prefix + base_config.architectures[0]]
        base_config.moextend_adapter = {"name_or_path": str(name)}
        if config.encoder_config is not None:
            from .images import refuse_stray_image_tokens  # much of vLLM, which text needs no part of here

            base_config.moextend_adapter["image_token_id"] = config.image_token_id
            refuse_stray_image_tokens()
        return (base_config, {}) if return_unused_kwargs else base_config


def generation_values(config: MoExtendConfig, base: str, options: dict[str, Any]) -> dict[str, Any]:
    """What of the base's generation config, changed by the adapter's, decides where and how vLLM generates: it looks
    for it beside the adapter, finds none, and takes what the model's config says."""
    values = {}
    with contextlib.suppress(OSError):  # the base has none
        values = GenerationConfig.from_pretrained(base, **options).to_diff_dict()
    values |= config.generation_config or {}
    return {name: values[name] for name in SAMPLING if values.get(name) is not None}
