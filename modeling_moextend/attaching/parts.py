"""Base and encoder of a new adapter."""

import copy
import os
from typing import Any

from transformers import PreTrainedModel

from ..layers_moextend import input_device
from ..loading_moextend import ENCODER_KWARGS, is_multimodal
from ..tensors_moextend import fingerprint
from ..tools.locations import check_folder_or_id
from ..vision_moextend import load_encoder, vision_tower


def load_new_encoder(
    encoder: str | os.PathLike | PreTrainedModel | None, base: PreTrainedModel, options: dict[str, Any] | None = None
) -> PreTrainedModel | None:
    """The vision tower of `encoder`, a model or where it lies, beside `base`; `None` for `None`."""
    if encoder is None:
        return None
    if is_multimodal(base.config):
        raise ValueError(
            f"{type(base).__name__} has an image encoder of its own: leave out encoder=..., and give images as the "
            "base takes them."
        )
    if not isinstance(encoder, PreTrainedModel):
        check_folder_or_id("The encoder", encoder)
        options = {"dtype": base.dtype} if options is None else options
        try:
            encoder = load_encoder(encoder, **{key: options[key] for key in ENCODER_KWARGS if key in options})
        except OSError as error:
            raise OSError(f"The encoder {str(encoder)!r} can't be loaded. ({error})") from error
    return vision_tower(encoder).to(input_device(base))


def identity(base: PreTrainedModel, encoder: PreTrainedModel | None) -> dict[str, Any]:
    """The entries of a config that say which base and encoder these are."""
    entries = {
        "base_model_name_or_path": base.config._name_or_path or None,
        "base_model_revision": getattr(base.config, "_commit_hash", None),
        "base_fingerprint": fingerprint(base.get_decoder()),
        "text_config": copy.deepcopy(base.config),
    }
    if encoder is not None:
        entries["encoder_name_or_path"] = encoder.config._name_or_path or None
        entries["encoder_config"] = copy.deepcopy(encoder.config)
        entries["encoder_fingerprint"] = fingerprint(encoder)
    return entries
