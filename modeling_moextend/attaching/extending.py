"""Adding new experts to a model that has an adapter: on top of it (`add_adapter`), or to it (`extend`)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..adapter_file_moextend import check_keywords
from ..base_checks_moextend import base_rule, check_plan
from ..compatibility_moextend import check_new_name, check_together
from ..configuration_moextend import MODALITIES, normalise_plan
from ..deltas_moextend import find_sites, remove_deltas
from ..layers_moextend import remove_experts
from ..tensors_moextend import split_by_part
from ..tools.locations import hub_id
from ..validation_moextend import CHOSEN
from .choices import default_deltas, routing_choices
from .parts import Encoder, identity, load_new_encoders, token_ids
from .selfcheck import self_checked
from .start_values import start_tensors

if TYPE_CHECKING:
    from ..adapters_moextend import Adapter
    from ..modeling_moextend import MoExtendPreTrainedModel

ENTRIES = (  # further ones of the config that a new adapter may have of its own
    "expert_rank",
    *(f"{prefix}{name}" for prefix in MODALITIES.values() for name in CHOSEN),
    "calibration_hidden_size",
    "gate_hidden_size",
    "gate_threshold",
    "deltas",
)


def add_adapter(
    model: MoExtendPreTrainedModel,
    adapter_name: str,
    extended_layers: dict[int, list[int]] | None = None,
    *,
    scope: str | None = None,
    selection: str | None = None,
    calibration: str | None = None,
    encoder: Encoder | list[Encoder] | None = None,
    image_token_id: int | None = None,
    audio_token_id: int | None = None,
    **entries: Any,
) -> None:
    """Adds a new adapter on top of the active ones: continual extension.

    Those that are there are frozen; the new one is active with those that were, and is what trains, and what
    `save_pretrained` saves. Its config's `trained_on` tells on top of which adapters it was made.

    Args:
        adapter_name: a name that no other adapter has.
        extended_layers, scope, selection, calibration, encoder, image_token_id, audio_token_id: as in `from_base`; of
            several active adapters all select alike, `calibration` is "none" for each, and one at most takes images,
            and one audio.
        **entries: more of the config: those of `ENTRIES`.

    Raises:
        ValueError: a name that is taken; a plan that does not fit; choices that can't be active together with those of
            the active adapters. The model is as it was.
    """
    given = (adapter_name, extended_layers, *entries.values())
    if any(type(value).__module__.startswith("peft.") for value in given):
        raise ValueError(
            "add_adapter adds new experts: add_adapter(name, {layer: [source experts]}). A LoRA is added by PEFT's "
            "get_peft_model(model, config), and trained and saved by what takes PEFT models."
        )
    check_keywords("add_adapter", entries, ENTRIES)
    with model.passes.lock:
        check_new_name(adapter_name, model)
        plan, dependencies = normalise_plan(extended_layers), list(model.passes.current.active)
        if not model.passes.selection().enabled:
            raise ValueError("The adapters are off, and a new one goes on top of the active ones: enable_adapters().")
        if not plan and encoder is None:
            raise ValueError("Nothing to add: give extended_layers, like {2: [1]}, or encoder=... for a projector.")
        layers = model.moe_layers
        check_plan(layers, plan)
        encoders = load_new_encoders(encoder, model.base)
        vocab_size = model.get_input_embeddings().weight.shape[0]
        config = model.config_class(
            **identity(model.base, encoders),
            **token_ids(encoders, {"image": image_token_id, "audio": audio_token_id}, vocab_size),
            extended_layers=plan,
            routing_rule=model.config.routing_rule,
            trained_on=describe_adapters(model, dependencies),
            dtype=model.base.dtype,
            **routing_choices(scope, selection, calibration, has_encoder=bool(encoders)),
            **entries,
        )
        check_together({**{name: model.adapters[name].config for name in dependencies}, adapter_name: config}, model)
        if entries.get("deltas") is None:
            config.deltas = default_deltas(config, model.get_decoder())
        rule = base_rule(config, layers)
        try:
            with self_checked(layers, plan, rule, adapter_name):
                model.attach_adapter(adapter_name, config, start_tensors(config, layers, model.base), encoders)
        except BaseException:
            model.remove_adapter(adapter_name)
            raise
        model.adapters[adapter_name].depends_on = set(dependencies)
        model.activate([*dependencies, adapter_name])
        model.require_gradients([adapter_name])


def describe_adapters(model: MoExtendPreTrainedModel, adapter_names: Iterable[str]) -> list[dict[str, str | None]]:
    """The entries of `trained_on` for adapters; where one lies only if that can be a Hub id."""
    sources = {name: model.adapters[name].config.name_or_path for name in adapter_names}
    return [
        {
            "name": name,
            "fingerprint": model.fingerprint_of(name),
            "name_or_path": hub_id(source),
        }
        for name, source in sources.items()
    ]


def extend(model: MoExtendPreTrainedModel, plan: dict[int, list[int]]) -> None:
    """Adds new experts in place, {decoder layer: [source experts]}, and keeps the projector: stage finetune.

    With several adapters, to the one that trains.

    Raises:
        ValueError: a layer that is no MoE layer or has new experts already, a source out of range, an empty plan;
            several adapters of which none is on top; new experts that can't share tokens with active ones.
    """
    with model.passes.lock:
        plan, name = normalise_plan(plan), model.resolve_name()
        adapter, layers = copy.copy(model.adapters[name]), model.moe_layers  # a pass under way keeps the old one
        config = adapter.config
        if not plan:
            raise ValueError("The plan is empty: name layers and source experts, like {2: [1]}.")
        check_plan(layers, plan)
        already_extended = sorted(plan.keys() & config.extended_layers.keys())
        if already_extended:
            raise ValueError(f"Layers {already_extended} have new experts already; a layer is extended once.")
        if (adapter.gate is not None or adapter.deltas) and min(plan) < min(config.extended_layers):
            raise ValueError(
                f"Gate and deltas were made for layer {min(config.extended_layers)} as the lowest, so layer "
                f"{min(plan)} below it can't be added. Name all layers at once, or begin anew with from_base(...)."
            )
        check_no_dependents(model.adapters, name)
        extended = copy.copy(config)
        extended.extended_layers = normalise_plan({**config.extended_layers, **plan})
        rule = base_rule(extended, layers)
        active = {other: model.adapters[other].config for other in model.passes.current.active}
        check_together({**active, name: extended}, model)
        with_gate = adapter.gate is None
        sites = {} if adapter.deltas else find_sites(extended, model.get_decoder())
        tensors = start_tensors(config, layers, model.base, plan, sites, with_gate=with_gate, with_projector=False)
        try:
            with self_checked(layers, plan, rule, name):
                model.attach_layers(name, adapter, plan, sites, split_by_part(tensors, sites))
        except BaseException:
            for layer in plan:
                remove_experts(layers[layer], name)
            if sites:
                remove_deltas(model.get_decoder(), name)
            raise
        config.extended_layers = extended.extended_layers
        model.adapters[name] = adapter
        model.passes.change(adapters={**model.passes.current.adapters, name: adapter})


def check_no_dependents(adapters: Mapping[str, Adapter], name: str) -> None:
    """Refuses to change an adapter that a loaded one, active or not, was trained on top of."""
    dependents = [other for other in adapters if name in adapters[other].depends_on]
    if dependents:
        raise ValueError(
            f"Adapters {dependents} were trained on top of {name!r} as it is, so it can't change below them: "
            f"delete_adapter({dependents}), or load {name!r} in a model of its own."
        )
