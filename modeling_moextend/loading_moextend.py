"""Loading: base and encoder from their own checkpoints, and every check before anything is attached."""

import copy
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from .adapter_moextend import fingerprint, same_fingerprint
from .configuration_moextend import UnknownConfig
from .layers_moextend import find_moe_layers
from .vision_moextend import load_encoder, vision_tower

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
SHARED_HUB_KWARGS = ("cache_dir", "local_files_only", "token")
ENCODER_KWARGS = ("dtype", "use_safetensors", *SHARED_HUB_KWARGS)


def load_parts(stored, base, encoder, auto_class, check_base, options):
    """Base and encoder of a stored adapter, each loaded unless given as a model, and checked against it.

    Args:
        stored: the adapter's `MoExtendConfig`; gets the base's config where its own could not be read.
        base, encoder: model, or where it lies; `None`: where `stored` says.
        auto_class: `AutoModelForCausalLM` or `AutoModel`.
        check_base: whether fingerprints must agree.
        options: to the base's `from_pretrained`.

    Raises:
        OSError, ValueError: not found; incomplete; of another kind; not the ones the adapter was made on.
    """
    if stored.encoder_config is not None and not isinstance(encoder, PreTrainedModel):
        chosen = {key: options[key] for key in ENCODER_KWARGS if key in options}
        encoder = load_stored("encoder", encoder, stored, load_encoder, **chosen)
    if not isinstance(base, PreTrainedModel):
        revision = {"revision": stored.base_model_revision} if base is None and stored.base_model_revision else {}
        base = load_stored("base", base, stored, load_base, auto_class=auto_class, **revision, **options)
    check_not_extended(base)
    if isinstance(stored.text_config, UnknownConfig):
        stored.text_config = copy.deepcopy(base.config)
    if encoder is not None:
        encoder = vision_tower(encoder).to(base.get_input_embeddings().weight.device)
    for role, module in (("base", base.get_decoder()), ("encoder", encoder)):
        if module is not None and check_base:
            check_fingerprint(role, getattr(stored, f"{role}_fingerprint"), module)
    check_plan(find_moe_layers(base.get_decoder()), stored.extended_layers)
    return base, encoder


def load_base(name_or_path, auto_class, **kwargs):
    """A base from its checkpoint; from safetensors only, unless `use_safetensors=False` allows pickled weights."""
    kwargs["use_safetensors"] = kwargs.get("use_safetensors", True) or None  # False would refuse safetensors
    try:
        base, loading = auto_class.from_pretrained(name_or_path, **{**kwargs, "output_loading_info": True})
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise ValueError(
                f"base={name_or_path!r} is no causal LM: transformers has no causal head for it."
            ) from error
        raise
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would go on with random values in their place
        raise ValueError(f"base={name_or_path!r} is incomplete or no causal LM: it lacks {', '.join(missing[:8])}.")
    return base


def load_stored(role, given, config, loader, **kwargs):
    """Base or encoder, from where the call or else the adapter's config says."""
    path = given or getattr(config, "base_model_name_or_path" if role == "base" else "encoder_name_or_path")
    if path is None:
        raise ValueError(f"The adapter does not say where its {role} lies: pass {role}=<folder or Hub id>.")
    try:
        return loader(path, **kwargs)
    except OSError as error:
        raise OSError(
            f"The adapter's {role} {path!r} can't be loaded: pass {role}=<folder or Hub id> if it lies elsewhere, or "
            f"use_safetensors=False if it has only pickled weights and you trust them. ({error})"
        ) from error


def check_causal_lm(base, auto_class):
    """Refuses what is no causal LM, or extended already."""
    name = type(base).__name__
    check_not_extended(base)
    if auto_class is AutoModelForCausalLM and (
        base.config.is_encoder_decoder or base.get_output_embeddings() is None or not base.can_generate()
    ):
        raise ValueError(
            f"{name} is no causal LM (it has no language-model head of its own): pass the ...ForCausalLM."
        )


def check_not_extended(base):
    """Refuses a base that carries an adapter: one attached twice would answer for both."""
    if base.config.model_type == "moextend" or any(hasattr(module, "moextend") for module in base.modules()):
        raise ValueError(
            f"{type(base).__name__} is extended already: use model.extend(plan), or pass what model.detach() returns."
        )


def check_plan(layers, plan):
    """Refuses layers that are no MoE layers and source experts out of range.

    Raises:
        ValueError: says which layers and experts there are.
    """
    wrong = sorted(plan.keys() - layers.keys())
    if wrong:
        raise ValueError(f"Layers {wrong} are not MoE layers of this base; its MoE layers are {sorted(layers)}.")
    for layer, sources in plan.items():
        bad = [source for source in sources if not 0 <= source < layers[layer].num_experts]
        if bad:
            raise ValueError(
                f"Source experts {bad} of layer {layer} are out of range: "
                f"it has experts 0 to {layers[layer].num_experts - 1}."
            )


def check_folder(folder, config):
    """Refuses to write over the config.json of a base or encoder."""
    for role in ("base_model", "encoder"):
        place = getattr(config, f"{role}_name_or_path")
        if place is not None and Path(place).is_dir() and folder.resolve() == Path(place).resolve():
            raise ValueError(
                f"{folder} is the folder of the adapter's {role.split('_')[0]}: save the adapter elsewhere."
            )


def check_fingerprint(role, stored, module):
    """Refuses a base or encoder that is not the one the adapter was made on."""
    found = fingerprint(module) if stored else None
    if found is not None and not same_fingerprint(stored, found):
        raise ValueError(
            f"This is a different {role} than the adapter was made on: its weights do not match the adapter's "
            f"{role} fingerprint. Pass {role}=<the right one>; check_base=False loads it all the same."
        )
