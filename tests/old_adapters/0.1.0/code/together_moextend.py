"""Several adapters on one base: what may be loaded, be active together, share a batch, and stand on what."""

import re

from .adapter_moextend import same_fingerprint
from .families_moextend import find_moe_layers
from .layers_moextend import RouterExtension
from .loading_moextend import agreed_rule, check_fingerprint, check_plan, check_rule
from .routing_moextend import Rule
from .state_moextend import BASE, meeting


def check_new_name(name, model):
    """Refuses a name that another adapter has, or that no module can have.

    Raises:
        ValueError: says which names are taken.
    """
    if name in model.adapters:
        raise ValueError(
            f"An adapter {name!r} is loaded already; this model has {list(model.adapters)}. Choose another name, or "
            f"delete_adapter({name!r}) first."
        )
    allowed = isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name)
    if not allowed or hasattr(RouterExtension(0, 0, None, None), name):
        raise ValueError(
            f"{name!r} can't be the name of an adapter: it has to begin with a letter, hold only letters, digits, _ "
            "and -, and be no attribute of a PyTorch module."
        )


def check_belongs(model, stored, name, check_base):
    """Refuses an adapter, with config `stored`, that was not made for the base of `model`.

    Raises:
        ValueError: another base, another routing rule, a plan that does not fit.
    """
    if check_base:
        check_fingerprint("base", stored.base_fingerprint, model.get_decoder(), advice=f"Load {name} on its own base")
    stored.set_text_config(model.base.config)
    if not check_base:
        stored.routing_rule = None
    layers, rule = find_moe_layers(model.get_decoder()), Rule(**model.config.routing_rule)
    stored.routing_rule = agreed_rule(stored, rule)._asdict()
    check_plan(layers, stored.extended_layers)
    check_rule(layers, stored.extended_layers, rule)


def check_together(configs, model):
    """Refuses adapters (name -> config) that have no meaning when they are active together.

    Raises:
        ValueError: names them and says what would do.
    """
    if len(configs) < 2:
        return
    apart = "Make one of them active at a time, or give them different rows of a batch (adapter_names)."
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
    seeing = [name for name, config in configs.items() if config.encoder_config is not None]
    if len(seeing) > 1:
        raise ValueError(f"Adapters {seeing} have an encoder each, and an image goes through one. {apart}")
    rule = Rule(**model.config.routing_rule)
    if len(extending) > 1 and rule.correction and rule.score == "softmax" and rule.corrected == "score":
        raise ValueError(
            f"Adapters {list(extending)} can't be active together on this base ({model.base.config.model_type}): it "
            "adds a correction bias to softmax scores, so each adapter's rows would change which of the other's are "
            f"selected. {apart}"
        )


def names_in(given):
    """The adapter names that a user gave, one or a list of them, as a list.

    Raises:
        ValueError: neither; a name twice.
    """
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{given!r} names no adapters: give a name, or a list of names.")
    if len(set(names)) < len(names):
        raise ValueError(f"{list(names)} names an adapter twice.")
    return list(names)


def checked_rows(model, adapter_names, num_rows):
    """What `adapter_names` says: for each row of the batch the names of its adapters, and which of these share tokens
    (`meeting`).

    Raises:
        ValueError: no list; unknown names; another number of rows; adapters off; adapters that can't share a token or
            a batch, or without those that they were trained on top of.
    """
    if not model.routing.enabled:
        raise ValueError("adapter_names was given while the adapters are off: enable_adapters(), or leave it out.")
    if not isinstance(adapter_names, (list, tuple)):
        raise ValueError(
            f"adapter_names={adapter_names!r} must be a list with an entry for each row of the batch: an adapter's "
            f"name, a list of names, or {BASE!r}."
        )
    rows = tuple(() if entry == BASE else tuple(sorted(names_in(entry))) for entry in adapter_names)
    model.check_known({name for row in rows for name in row})
    if num_rows is not None and len(rows) != num_rows:
        raise ValueError(f"adapter_names has {len(rows)} names, but the batch has {num_rows} rows.")
    for row in {*rows}:
        check_complete(model, row)
    groups = meeting([name for name in row if model.adapters[name].config.extended_layers] for row in rows)
    for group in groups:
        check_together({name: model.adapters[name].config for name in group}, model)
    seeing = sorted({name for row in rows for name in row if model.adapters[name].encoder is not None})
    if len(seeing) > 1:
        raise ValueError(f"Adapters {seeing} have an encoder each; the images of one batch go through one of them.")
    return rows, groups


def check_image_rows(model, input_ids):
    """Refuses image tokens in rows of the batch whose adapter can't see.

    Raises:
        ValueError: names the first such row.
    """
    rows = model.routing.now.rows
    if rows is None:
        return
    repeats = len(input_ids) // len(rows)
    has_image = (input_ids == model.eyes.config.image_token_id).any(dim=1).tolist()
    for place, image in enumerate(has_image):
        row = rows[place // repeats]
        if image and not any(model.adapters[name] is model.eyes for name in row):
            names = ", ".join(map(repr, row or [BASE]))
            raise ValueError(f"Row {place} of the batch has image tokens, but its adapter {names} can't see.")


def check_one_selection(model):
    """The one selection of the adapters of this pass, or else of the model's own.

    Raises:
        ValueError: there are two.
    """
    names = [name for name in model.routing.wanted if model.adapters[name].config.extended_layers]
    selections = {model.adapters[name].config.selection for name in names} or {model.config.selection}
    if len(selections) > 1:
        raise ValueError(
            f"The load-balancing loss needs adapters that select alike, but {names} do not: {sorted(selections)}."
        )
    return selections.pop()


def found_below(config, fingerprints):
    """Names that an adapter with `config` was trained on top of -> what this one is called among the adapters of which
    `fingerprints` (name -> fingerprint) tells; `None`: it is not among them."""

    def found(entry):
        wanted = entry["fingerprint"]
        if wanted is None:  # made on the meta device
            return entry["name"] if entry["name"] in fingerprints else None
        same = [name for name, known in fingerprints.items() if known and same_fingerprint(known, wanted)]
        return entry["name"] if entry["name"] in same else next(iter(same), None)

    return {entry["name"]: found(entry) for entry in config.trained_on}


def check_below(config, fingerprints, name):
    """Refuses an adapter without those that it was trained on top of.

    Raises:
        ValueError: names them.
    """
    missing = [below for below, found in found_below(config, fingerprints).items() if found is None]
    if missing:
        raise ValueError(
            f"{name} was trained on top of {', '.join(map(repr, missing))}, which this model does not have (or not as "
            "it was then). Load these first, the lowest with from_pretrained and the others with load_adapter; "
            "check_trained_on=False loads it all the same."
        )


def left_out(model, names):
    """Those of the adapters `names` that were trained on top of loaded ones beside `names` -> the names of these."""
    missing = {name: sorted(model.adapters[name].below - {*names}) for name in names}
    return {name: below for name, below in missing.items() if below}


def check_complete(model, names):
    """Refuses to use the adapters `names` without loaded ones that one of them was trained on top of.

    Raises:
        ValueError: names them.
    """
    for name, missing in left_out(model, names).items():
        raise ValueError(
            f"Adapter {name!r} was trained on top of {missing}, and alone it is not what was trained. Use them "
            f"together: {sorted({*names, *missing})}, in set_adapter or as one row of adapter_names; "
            "set_adapter(..., check_trained_on=False) uses it all the same."
        )


def check_may_train(model, name):
    """Refuses to train an adapter that is not active, or that another was trained on top of.

    Raises:
        ValueError: says which.
    """
    if name not in model.routing.active:
        raise ValueError(f"Adapter {name!r} is not active, so it can't train: set_adapter first.")
    check_nothing_above(model, name)


def check_nothing_above(model, name):
    """Refuses to change an adapter that a loaded one, active or not, was trained on top of.

    Raises:
        ValueError: says which.
    """
    above = [other for other in model.adapters if name in model.adapters[other].below]
    if above:
        raise ValueError(
            f"Adapters {above} were trained on top of {name!r} as it is, so it can't change below them: "
            f"delete_adapter({above}), or load {name!r} in a model of its own."
        )


def check_still_below(model, staying):
    """Refuses to delete adapters that one of those `staying` was trained on top of.

    Raises:
        ValueError: names them.
    """
    for name, lost in left_out(model, staying).items():
        raise ValueError(f"Adapter {name!r} was trained on top of {lost}: delete {name!r} first.")
