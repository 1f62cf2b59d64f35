"""Several adapters on one base: what may be loaded, be active together, share a batch, and stand on what."""

import re

from .adapter_moextend import same_fingerprint
from .families_moextend import find_moe_layers
from .layers_moextend import RouterExtension
from .loading_moextend import agreed_rule, check_fingerprint, check_plan, check_rule
from .routing_moextend import Rule


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


def check_rows(model, names, num_rows):
    """Refuses an adapter a row (`adapter_names`) that can't be followed.

    Raises:
        ValueError: adapters off, another number of names, two adapters with encoders.
    """
    if not model.routing.enabled:
        raise ValueError("adapter_names was given while the adapters are off: enable_adapters(), or leave it out.")
    if num_rows is not None and len(names) != num_rows:
        raise ValueError(f"adapter_names has {len(names)} names, but the batch has {num_rows} rows.")
    seeing = [name for name in sorted({*names} & {*model.adapters}) if model.adapters[name].encoder is not None]
    if len(seeing) > 1:
        raise ValueError(f"Adapters {seeing} have an encoder each; the images of one batch go through one of them.")


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
        name = rows[place // repeats]
        if image and (name not in model.adapters or model.adapters[name] is not model.eyes):
            raise ValueError(f"Row {place} of the batch has image tokens, but its adapter {name!r} can't see.")


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


def missing_below(config, fingerprints):
    """Names of the adapters that one with `config` was trained on top of, and that are not among those of which
    `fingerprints` (name -> fingerprint) tells, whatever they are called."""

    def is_there(entry):
        if entry["fingerprint"] is None:  # made on the meta device
            return entry["name"] in fingerprints
        return any(known and same_fingerprint(known, entry["fingerprint"]) for known in fingerprints.values())

    return [entry["name"] for entry in config.trained_on if not is_there(entry)]


def check_below(config, fingerprints, name):
    """Refuses an adapter without those that it was trained on top of.

    Raises:
        ValueError: names them.
    """
    missing = missing_below(config, fingerprints)
    if missing:
        raise ValueError(
            f"{name} was trained on top of {', '.join(map(repr, missing))}, which this model does not have (or not as "
            "it was then). Load these first, the lowest with from_pretrained and the others with load_adapter; "
            "check_trained_on=False loads it all the same."
        )


def check_still_below(model, staying):
    """Refuses to delete adapters that one of those `staying` was trained on top of.

    Raises:
        ValueError: names them.
    """
    above = {name: model.adapters[name].config for name in staying if model.adapters[name].config.trained_on}
    fingerprints = model.fingerprints() if above else {}
    for name, config in above.items():
        kept = {other: fingerprints[other] for other in staying if other != name}
        lost = [one for one in missing_below(config, kept) if one not in missing_below(config, fingerprints)]
        if lost:
            raise ValueError(f"Adapter {name!r} was trained on top of {lost}: delete {name!r} first.")
