"""Attaching the first adapter to a base that was never extended."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ..adapter_file_moextend import check_keywords
from ..base_checks_moextend import base_rule, check_loaded, check_plan
from ..configuration_moextend import normalise_deltas, normalise_plan
from ..families_moextend import find_moe_layers
from ..loading_moextend import ENCODER_KWARGS, SHARED_HUB_KWARGS, load_base, undone_on_error
from ..tools.locations import check_folder_or_id, check_location
from ..validation_moextend import CHOSEN, is_generation
from .choices import check_rank, default_deltas, routing_choices
from .layouts import check_quantised, check_request
from .parts import Encoder, identity, listed, load_new_encoders, token_ids
from .rules import check_family
from .selfcheck import self_checked

if TYPE_CHECKING:
    from ..modeling_moextend import MoExtendPreTrainedModel


def from_base(
    cls: type[MoExtendPreTrainedModel],
    base: str | os.PathLike | PreTrainedModel,
    extended_layers: dict[int, list[int]] | None = None,
    *,
    scope: str | None = None,
    selection: str | None = None,
    calibration: str | None = None,
    paper: bool = False,
    encoder: Encoder | list[Encoder] | None = None,
    image_token_id: int | None = None,
    audio_token_id: int | None = None,
    expert_rank: int | None = None,
    calibration_hidden_size: int = 16,
    gate_hidden_size: int = 64,
    gate_threshold: float = 0.0,
    deltas: Iterable[str] | Mapping[str, int] | None = None,
    adapter_name: str = "default",
    **kwargs: Any,
) -> MoExtendPreTrainedModel:
    """Attaches new experts, and an encoder, to a pretrained MoE causal LM.

    Args:
        base: Hub id, folder, or a loaded model (which is extended in place; its own tensors never change).
        extended_layers: decoder layer index -> source experts; one new expert for each.
        scope: which tokens may use new experts: `"all"`, `"modality"` (default with an encoder) or `"gate"`
            (default without one; the gate lets no token through until it is trained).
        selection: `"compete"` (base experts and new ones share one top-k) or `"exclusive"` (default).
        calibration: whose weights are calibrated: `"all"`, `"routed"` (default with `"compete"`) or `"none"`
            (default with `"exclusive"`, which takes no other).
        expert_rank: r makes a new expert its source expert plus a trained delta of rank r, which is all that the
            adapter holds of it; `None`: a whole copy.
        paper: sets the paper's three (`"all"`, `"compete"`, `"all"`) and refuses others, and `expert_rank`.
        encoder: checkpoint or model that takes images alone (CLIP, SigLIP, SigLIP 2, DINOv2, ...) or audio alone
            (Whisper, Wav2Vec2, HuBERT, WavLM, AST, ...), or a list of one for each; `None` for text only.
        image_token_id, audio_token_id: stand for features in `input_ids`; default: the first ids past the embedding.
            With a processor: `processor.image_token_id`, `processor.audio_token_id`.
        deltas: shared layers that move too, for tokens in scope alone: any of `"embedding"`, `"attention"` (its
            projections) and `"output"` (the last hidden state); or a mapping from these to ranks (0: whole matrices),
            as in `DELTAS`. In decoder layers above the lowest extended one. Default: with scope `"gate"` all three,
            as far as the base can have them; else none, as `()`.
        adapter_name: what the adapter is called in this model, where more are to come.
        **kwargs: what a sense is: `encoder_select_layer`, `encoder_select_feature`, `projector_type`,
            `projector_hidden_act`, `projector_downsample`, of audio with `audio_` in front (docs/senses.md); others to
            the base's `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, ...).

    Raises:
        ValueError: no MoE layers; a family without the interface; a layer that is no MoE layer; a source out of
            range; nothing to add; no causal LM; choices without meaning; a rank above a weight's smaller side. A base
            given as a model stays as it was.
        ImportError: only the code of an adapter is there, and not the package, which finds a base's routing rule.
    """
    loaded, encoder = isinstance(base, PreTrainedModel), listed(encoder) or None
    senses = {name: kwargs.pop(name) for name in list(kwargs) if name.removeprefix("audio_") in CHOSEN}
    if not loaded:
        check_folder_or_id("The base", base)
    elif not any(isinstance(one, str | os.PathLike) for one in listed(encoder)):
        check_keywords("from_base", kwargs, ())
    else:
        check_keywords("from_base", kwargs, ENCODER_KWARGS)
    plan = normalise_plan(extended_layers)
    choices = routing_choices(scope, selection, calibration, paper, encoder is not None, normalise_deltas(deltas))
    check_rank(expert_rank, paper)
    if not plan and encoder is None:
        raise ValueError(
            "Nothing to add: extended_layers is empty and there is no encoder. Name layers and source experts, "
            "like extended_layers={2: [1]}, or pass encoder=... to begin with a projector."
        )
    if not loaded:
        check_request(base, kwargs)
        for one in listed(encoder):
            if not isinstance(one, PreTrainedModel):  # before a base that takes minutes
                check_location("encoder", one, **{key: kwargs[key] for key in SHARED_HUB_KWARGS if key in kwargs})
        base = load_base(base, cls.auto_base_class, **kwargs)
    check_quantised(base)
    check_loaded(base)
    check_causal_lm(base, cls.auto_base_class)
    check_family(base.get_decoder())
    layers = find_moe_layers(base.get_decoder())
    check_plan(layers, plan)
    encoders = load_new_encoders(encoder, base, kwargs)
    given = {"image": image_token_id, "audio": audio_token_id}
    config = cls.config_class(
        **identity(base, encoders),
        **token_ids(encoders, given, base.get_input_embeddings().weight.shape[0]),
        **senses,
        extended_layers=plan,
        expert_rank=expert_rank,
        calibration_hidden_size=calibration_hidden_size,
        gate_hidden_size=gate_hidden_size,
        gate_threshold=gate_threshold,
        deltas=deltas,
        dtype=base.dtype,
        **choices,
    )
    if deltas is None:
        config.deltas = default_deltas(config, base.get_decoder())
    rule = base_rule(config, layers)
    with undone_on_error(base, encoders), self_checked(layers, plan, rule, adapter_name):
        model = cls(config, base, encoders, adapter_name=adapter_name)
    if loaded and hasattr(model, "initial_generation"):
        model.initial_generation |= stored_generation(base)
    return model


def stored_generation(base: PreTrainedModel) -> dict[str, Any]:
    """What the checkpoint of a loaded base says of generating, where it is not what the base does by now: an adapter
    is loaded onto the checkpoint."""
    config, now = base.config, base.generation_config.to_dict()
    try:
        options = {"revision": getattr(config, "_commit_hash", None), "local_files_only": True}
        stored = GenerationConfig.from_pretrained(config.name_or_path, **options).to_dict()
    except (OSError, ValueError):  # not there: the base had made its own of its config
        stored = GenerationConfig.from_model_config(config).to_dict()
    changed = {name for name in now if name[0] != "_" and now[name] != stored.get(name)}
    return {name: stored.get(name) for name in changed} if is_generation({name: now[name] for name in changed}) else {}


def check_causal_lm(base: PreTrainedModel, auto_class: type) -> None:
    """Refuses what is no causal LM."""
    if auto_class is AutoModelForCausalLM and (
        base.config.is_encoder_decoder or base.get_output_embeddings() is None or not base.can_generate()
    ):
        raise ValueError(
            f"{type(base).__name__} is no causal LM (it has no language-model head of its own): pass the "
            "...ForCausalLM."
        )
