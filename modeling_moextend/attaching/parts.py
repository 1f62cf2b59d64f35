"""Base and encoder of a new adapter."""

import copy
import os
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration_moextend import MODALITIES, MoExtendConfig
from ..layers_moextend import input_device
from ..loading_moextend import ENCODER_KWARGS, by_modality
from ..senses_moextend import encoder_of, is_multimodal, load_encoder
from ..tensors_moextend import fingerprint
from ..tools.locations import check_folder_or_id
from ..tools.modes import evaluation_mode


def listed(given: Any) -> list[Any]:
    """One, a list of them or `None`, as a list."""
    return [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]


Encoder = str | os.PathLike | PreTrainedModel  # where it lies, or the model


def load_new_encoders(
    given: Encoder | list[Encoder] | None, base: PreTrainedModel, options: dict[str, Any] | None = None
) -> dict[str, PreTrainedModel]:
    """The encoders of a new adapter beside `base`, by what they take; `options`: keywords of the base's loading."""
    if given is None:
        return {}
    if is_multimodal(base.config):
        raise ValueError(
            f"{type(base).__name__} has an image encoder of its own: leave out encoder=..., and give images as the "
            "base takes them."
        )
    options = {"dtype": base.dtype} if options is None else options
    options = {key: options[key] for key in ENCODER_KWARGS if key in options}
    loaded = []
    for one in listed(given):
        if not isinstance(one, PreTrainedModel):
            check_folder_or_id("The encoder", one)
            try:
                one = load_encoder(one, **options)
            except OSError as error:
                raise OSError(f"The encoder {str(one)!r} can't be loaded. ({error})") from error
        loaded.append(encoder_of(one).to(input_device(base)))
    encoders = by_modality(loaded, list(MODALITIES))
    for modality, encoder in encoders.items():
        check_features(modality, encoder)
    return encoders


def identity(base: PreTrainedModel, encoders: dict[str, PreTrainedModel]) -> dict[str, Any]:
    """The entries of a config that say which base and encoders (by modality) these are."""
    entries = {
        "base_model_name_or_path": base.config._name_or_path or None,
        "base_model_revision": getattr(base.config, "_commit_hash", None),
        "base_fingerprint": fingerprint(base.get_decoder()),
        "text_config": copy.deepcopy(base.config),
    }
    for modality, encoder in encoders.items():
        prefix = MODALITIES[modality]
        entries[f"{prefix}encoder_name_or_path"] = encoder.config._name_or_path or None
        entries[f"{prefix}encoder_config"] = copy.deepcopy(encoder.config)
        entries[f"{prefix}encoder_fingerprint"] = fingerprint(encoder)
    return entries


def token_ids(encoders: dict[str, PreTrainedModel], given: dict[str, Any], vocab_size: int) -> dict[str, int]:
    """The entries for the placeholders of these modalities: as `given`, or the first ids past the embedding."""
    taken = {one for one in given.values() if one is not None}
    free = (one for one in range(vocab_size, vocab_size + 2 * len(MODALITIES)) if one not in taken)
    chosen = {m: one for m, one in given.items() if one is not None} | {"image": given.get("image")}
    if chosen["image"] is None:
        chosen["image"] = next(free)
    for modality in encoders:
        if chosen.get(modality) is None:
            chosen[modality] = next(free)
    return {f"{modality}_token_id": one for modality, one in chosen.items()}


@torch.no_grad()
def check_features(modality: str, encoder: PreTrainedModel) -> None:
    """Refuses an encoder that gives other features than its config tells of, by a try of it on zeros.

    Raises:
        ValueError: says what was expected and what came.
    """
    config, prefix, more = encoder.config, MODALITIES[modality], {}
    whole = {"encoder_config": copy.deepcopy(config), "encoder_select_feature": "full", "projector_downsample": 1}
    sense = MoExtendConfig(**{f"{prefix}{name}": value for name, value in whole.items()}).senses[modality]
    try:
        if hasattr(config, "conv_kernel"):
            size = shape = (16000,)
        elif hasattr(config, "max_source_positions"):
            size, shape = (2 * config.max_source_positions,), sense.input_shape
        elif sense.convolutions is not None:
            side = int(config.num_patches**0.5)
            size, shape = (side**2,), (side**2, config.num_channels * config.patch_size**2)
            more = {"pixel_attention_mask": torch.ones(1, side**2, device=encoder.device, dtype=torch.long)}
            more["spatial_shapes"] = torch.tensor([[side, side]])
        else:
            shape = sense.input_shape
            size = shape[-2:]
        expected = [1, sense.num_placeholders(size if len(size) > 1 else size[0]), config.hidden_size]
        if encoder.device.type == "meta":
            return
        values = torch.zeros(1, *shape, device=encoder.device, dtype=encoder.dtype)
        with evaluation_mode(encoder):
            output = encoder(**{encoder.main_input_name: values}, **more, output_hidden_states=True)
        given = list(output.hidden_states[-1].shape)
        problem = (
            f"it gives features of shape {given}, and its config tells of {expected}" if given != expected else None
        )
    except AttributeError as error:
        problem = (
            f"its config does not tell how many features it makes ({error}): it needs image_size and patch_size, "
            "conv_kernel and conv_stride, or num_mel_bins and max_source_positions or max_length"
        )
    except Exception as error:  # whatever a model of another kind makes of it
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        raise ValueError(f"A {config.model_type!r} model can't be an encoder of {modality}, for {problem}.")
