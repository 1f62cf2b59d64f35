"""Several adapters on one base: what may be loaded, be active together, share a batch, and stand on what."""

import re

from torch import nn

from .routing_moextend import Rule
from .scope_moextend import BASE, merge_overlapping
from .tensors_moextend import same_fingerprint
from .validation_moextend import short


def check_new_name(name, model):
    if name in list(model.adapters):
        raise ValueError(f"An adapter {name!r} is loaded already: choose another name, or delete_adapter({name!r}).")
    allowed = isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name)
    if not allowed or hasattr(nn.ModuleDict(), name):
        form = "a letter, then letters, digits, _ and -, and no attribute of a PyTorch module"
        raise ValueError(f"{short(name)} can't be the name of an adapter: it has to be {form}.")


def listed_names(given, adapters):
    """The names of `adapters` that a user gave, one or a list, as a list; refuses anything else, and a name twice."""
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{given!r} names no adapters: give a name, or a list of names.")
    if len(set(names)) < len(names):
        raise ValueError(f"{list(names)} names an adapter twice.")
    unknown = sorted(set(names) - set(adapters))
    if unknown:
        raise ValueError(f"Adapters {unknown} are not loaded; this model has {list(adapters)}.")
    return list(names)


def check_together(configs, model):
    """Refuses adapters (name -> config) that have no meaning when they are active together."""
    if len(configs) < 2:
        return
    apart = "Make one of them active at a time, or give them different items of a batch (adapter_names)."
    extending = {name: config for name, config in configs.items() if config.extended_layers}
    calibrated = [name for name, config in extending.items() if config.calibration != "none"]
    if calibrated and len(extending) > 1:
        raise ValueError(
            f"Adapters {calibrated} are calibrated for their own new experts alone, so they can't be active beside "
            f"{[name for name in extending if name not in calibrated] or 'each other'}. {apart}"
        )
    selections = {name: config.selection for name, config in extending.items()}
    if len(set(selections.values())) > 1:
        raise ValueError(f"Adapters active together must select alike, but these do not: {selections}. {apart}")
    check_one_encoder(configs, f"an input goes through one. {apart}")
    rule = Rule(**model.config.routing_rule)
    if len(extending) > 1 and rule.correction and rule.score == "softmax" and rule.corrected == "score":
        raise ValueError(
            f"Adapters {list(extending)} can't be active together on this base ({model.base.config.model_type}): its "
            f"correction bias goes to softmax scores, so one would change the choice of the other. {apart}"
        )


def select_per_item(model, chosen, adapter_names, num_items):
    """The `Selection` that `adapter_names` says, item by item of the batch, in place of `chosen`."""
    if not chosen.enabled:
        raise ValueError("adapter_names was given while the adapters are off: enable_adapters(), or leave it out.")
    if not isinstance(adapter_names, (list, tuple)):
        raise ValueError(
            f"adapter_names={adapter_names!r} must be a list with an entry for each item of the batch: an adapter's "
            f"name, a list of names, or {BASE!r}."
        )
    adapters = chosen.adapters
    per_item = tuple(() if entry == BASE else tuple(sorted(listed_names(entry, adapters))) for entry in adapter_names)
    if num_items is not None and len(per_item) != num_items:
        raise ValueError(f"adapter_names has {len(per_item)} names, but the batch has {num_items} items.")
    groups = merge_overlapping([name for name in names if adapters[name].config.extended_layers] for names in per_item)
    for names in {*per_item}:
        check_complete(adapters, names)
    for group in groups:
        check_together({name: adapters[name].config for name in group}, model)
    names = tuple(sorted({name for names in per_item for name in names}))
    check_one_encoder({name: adapters[name].config for name in names}, "the inputs of a batch go through one of them.")
    return chosen._replace(names=names, groups=groups, per_item=per_item)


def check_one_encoder(configs, reason):
    for modality in {modality for config in configs.values() for modality in config.senses}:
        with_encoder = [name for name, config in configs.items() if modality in config.senses]
        if len(with_encoder) > 1:
            raise ValueError(f"Adapters {with_encoder} have an encoder each, and {reason}")
    ids = [sense.token_id for config in configs.values() for sense in config.senses.values()]
    if len(ids) > len(set(ids)):
        raise ValueError(
            f"Senses of the adapters {list(configs)} share a token id ({ids}), and {reason} Make one of them with "
            "another: from_base(..., audio_token_id=processor.audio_token_id)."
        )


def check_items(selection, input_ids):
    """Refuses placeholders in items of the batch whose adapter has no such sense, and names the first such item."""
    per_item = selection.per_item
    for modality, sensing in selection.sensing.items() if per_item is not None else ():
        has_any = (input_ids == sensing.config.senses[modality].token_id).any(dim=1).tolist()
        for item, found in enumerate(has_any):
            own = per_item[item * len(per_item) // len(has_any)]
            if found and not any(selection.adapters[name] is sensing for name in own):
                names, verb = ", ".join(map(repr, own or [BASE])), "see" if modality == "image" else "hear"
                raise ValueError(
                    f"Item {item} of the batch has {modality} tokens, but its adapter {names} can't {verb}."
                )


def recorded_selection(records, default):
    """The one selection of the adapters whose routing was recorded (layer -> `RoutingRecord`), or else `default`."""
    found = {name: selection for record in records.values() for name, selection in record.selections.items()}
    if len(set(found.values())) > 1:
        raise ValueError(f"The load-balancing loss needs adapters that select alike, but these do not: {found}.")
    return next(iter(found.values()), default)


def dependency_names(config, fingerprints):
    """Names that an adapter with `config` was trained on top of -> what this one is called among the adapters of which
    `fingerprints` (name -> fingerprint) tells; `None`: it is not among them."""

    found = {}
    for name, made in ((entry["name"], entry["fingerprint"]) for entry in config.trained_on):
        same = [one for one, known in fingerprints.items() if known and made and same_fingerprint(known, made)]
        same = same if made else [one for one in fingerprints if one == name]  # made on the meta device
        found[name] = name if name in same else next(iter(same), None)
    return found


def check_dependencies(config, fingerprints, name):
    """Refuses an adapter without those that it was trained on top of, and names them."""
    missing = [below for below, found in dependency_names(config, fingerprints).items() if found is None]
    if missing:
        raise ValueError(
            f"{name} was trained on top of {', '.join(map(repr, missing))}, which this model does not have, as it was "
            "then. Load these first, from the lowest on; check_trained_on=False loads it all the same."
        )


def check_complete(adapters, names, deleting=False):
    """Refuses to use, or to leave where others are deleted, adapters without loaded ones that they were trained on."""
    for name in names:
        missing = sorted(adapters[name].depends_on - {*names})
        if not missing:
            continue
        trained = f"Adapter {name!r} was trained on top of {missing}"
        if deleting:
            raise ValueError(f"{trained}: delete {name!r} first.")
        raise ValueError(
            f"{trained}, and alone it is not what was trained. Use them together: {sorted({*names, *missing})}, in "
            "set_adapter or as one entry of adapter_names; set_adapter(..., check_trained_on=False) uses it alone."
        )
