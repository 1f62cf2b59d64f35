"""Several adapters on one base: what may be loaded, be active together, share a batch, and stand on what."""

import re

from torch import nn

from .base_checks_moextend import base_rule, check_fingerprint, check_plan, forget_other_rule
from .routing_moextend import Rule
from .scope_moextend import BASE, merge_overlapping
from .tensors_moextend import fingerprint, same_fingerprint
from .validation_moextend import short


def check_new_name(name, model):
    """Refuses a name that another adapter has, or that no module can have."""
    if isinstance(name, str) and name in model.adapters:
        raise ValueError(
            f"An adapter {name!r} is loaded already; this model has {list(model.adapters)}. Choose another name, or "
            f"delete_adapter({name!r}) first."
        )
    allowed = isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name)
    if not allowed or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"{short(name)} can't be the name of an adapter: it has to begin with a letter, hold only letters, "
            "digits, _ and -, and be no attribute of a PyTorch module."
        )


def listed_names(given):
    """The adapter names that a user gave, one or a list, as a list; refuses anything else, and a name twice."""
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{given!r} names no adapters: give a name, or a list of names.")
    if len(set(names)) < len(names):
        raise ValueError(f"{list(names)} names an adapter twice.")
    return list(names)


def check_belongs(model, stored, name, check_base):
    """Refuses an adapter, with config `stored`, that was not made for the base of `model`."""
    if check_base and stored.base_fingerprint:
        found = fingerprint(model.get_decoder())
        check_fingerprint("base", stored.base_fingerprint, found, advice=f"Load {name} on its own base")
    stored.set_text_config(model.base.config)
    check_plan(model.moe_layers, stored.extended_layers)
    if not check_base:
        forget_other_rule(stored, model.moe_layers)
    base_rule(stored, model.moe_layers)


def check_together(configs, model):
    """Refuses adapters (name -> config) that have no meaning when they are active together."""
    if len(configs) < 2:
        return
    apart = "Make one of them active at a time, or give them different items of a batch (adapter_names)."
    extending = {name: config for name, config in configs.items() if config.extended_layers}
    calibrated = [name for name, config in extending.items() if config.calibration != "none"]
    if calibrated and len(extending) > 1:
        raise ValueError(
            f"Adapters {calibrated} are calibrated for their own new experts, so they can't be active beside "
            f"{[name for name in extending if name not in calibrated] or 'each other'}: only adapters with "
            f"calibration='none' can. {apart}"
        )
    selections = {name: config.selection for name, config in extending.items()}
    if len(set(selections.values())) > 1:
        raise ValueError(
            f"Adapters that are active together must select alike, but these do not: {selections}. {apart}"
        )
    with_encoder = [name for name, config in configs.items() if config.encoder_config is not None]
    if len(with_encoder) > 1:
        raise ValueError(f"Adapters {with_encoder} have an encoder each, and an image goes through one. {apart}")
    rule = Rule(**model.config.routing_rule)
    if len(extending) > 1 and rule.correction and rule.score == "softmax" and rule.corrected == "score":
        raise ValueError(
            f"Adapters {list(extending)} can't be active together on this base ({model.base.config.model_type}): it "
            "adds a correction bias to softmax scores, so each adapter's rows would change which of the other's are "
            f"selected. {apart}"
        )


def select_per_item(model, chosen, adapter_names, num_items):
    """The `Selection` that `adapter_names` says: for each item of the batch the names of its adapters.

    `chosen`: what would serve the pass without it.
    """
    if not chosen.enabled:
        raise ValueError("adapter_names was given while the adapters are off: enable_adapters(), or leave it out.")
    if not isinstance(adapter_names, (list, tuple)):
        raise ValueError(
            f"adapter_names={adapter_names!r} must be a list with an entry for each item of the batch: an adapter's "
            f"name, a list of names, or {BASE!r}."
        )
    adapters = chosen.adapters
    per_item = tuple(() if entry == BASE else tuple(sorted(listed_names(entry))) for entry in adapter_names)
    check_known({name for names in per_item for name in names}, adapters)
    if num_items is not None and len(per_item) != num_items:
        raise ValueError(f"adapter_names has {len(per_item)} names, but the batch has {num_items} items.")
    for names in {*per_item}:
        check_complete(adapters, names)
    groups = merge_overlapping([name for name in names if adapters[name].config.extended_layers] for names in per_item)
    for group in groups:
        check_together({name: adapters[name].config for name in group}, model)
    names = tuple(sorted({name for names in per_item for name in names}))
    with_encoder = [name for name in names if adapters[name].encoder is not None]
    if len(with_encoder) > 1:
        raise ValueError(
            f"Adapters {with_encoder} have an encoder each; the images of one batch go through one of them."
        )
    return chosen._replace(names=names, groups=groups, per_item=per_item)


def check_known(names, adapters):
    """Refuses names of adapters that are not loaded."""
    unknown = sorted(set(names) - set(adapters))
    if unknown:
        raise ValueError(f"Adapters {unknown} are not loaded; this model has {list(adapters)}.")


def check_image_items(selection, input_ids):
    """Refuses image tokens in items of the batch whose adapter can't see, and names the first such item."""
    if selection.per_item is None:
        return
    vision = selection.vision_adapter
    repeats = len(input_ids) // len(selection.per_item)
    has_image = (input_ids == vision.config.image_token_id).any(dim=1).tolist()
    for item, image in enumerate(has_image):
        own = selection.per_item[item // repeats]
        if image and not any(selection.adapters[name] is vision for name in own):
            names = ", ".join(map(repr, own or [BASE]))
            raise ValueError(f"Item {item} of the batch has image tokens, but its adapter {names} can't see.")


def recorded_selection(records, default):
    """The one selection of the adapters whose routing was recorded (layer -> `RoutingRecord`), or else `default`."""
    found = {name: selection for record in records.values() for name, selection in record.selections.items()}
    if len(set(found.values())) > 1:
        raise ValueError(
            f"The load-balancing loss needs adapters that select alike, but {sorted(found)} do not: "
            f"{sorted(set(found.values()))}."
        )
    return next(iter(found.values()), default)


def dependency_names(config, fingerprints):
    """Names that an adapter with `config` was trained on top of -> what this one is called among the adapters of which
    `fingerprints` (name -> fingerprint) tells; `None`: it is not among them."""

    def find(entry):
        fingerprint = entry["fingerprint"]
        if fingerprint is None:  # made on the meta device
            return entry["name"] if entry["name"] in fingerprints else None
        same = [name for name, known in fingerprints.items() if known and same_fingerprint(known, fingerprint)]
        return entry["name"] if entry["name"] in same else next(iter(same), None)

    return {entry["name"]: find(entry) for entry in config.trained_on}


def check_dependencies(config, fingerprints, name):
    """Refuses an adapter without those that it was trained on top of, and names them."""
    missing = [below for below, found in dependency_names(config, fingerprints).items() if found is None]
    if missing:
        raise ValueError(
            f"{name} was trained on top of {', '.join(map(repr, missing))}, which this model does not have (or not as "
            "it was then). Load these first, the lowest with from_pretrained and the others with load_adapter; "
            "check_trained_on=False loads it all the same."
        )


def missing_dependencies(adapters, names):
    """Those of `names` that were trained on top of loaded `adapters` beside `names` -> the names of these."""
    missing = {name: sorted(adapters[name].depends_on - {*names}) for name in names}
    return {name: below for name, below in missing.items() if below}


def check_complete(adapters, names):
    """Refuses to use the adapters `names` without loaded ones that one of them was trained on top of."""
    for name, missing in missing_dependencies(adapters, names).items():
        raise ValueError(
            f"Adapter {name!r} was trained on top of {missing}, and alone it is not what was trained. Use them "
            f"together: {sorted({*names, *missing})}, in set_adapter or as one entry of adapter_names; "
            "set_adapter(..., check_trained_on=False) uses it all the same."
        )


def check_not_needed(adapters, staying):
    """Refuses to delete adapters that one of those `staying` was trained on top of."""
    for name, lost in missing_dependencies(adapters, staying).items():
        raise ValueError(f"Adapter {name!r} was trained on top of {lost}: delete {name!r} first.")
