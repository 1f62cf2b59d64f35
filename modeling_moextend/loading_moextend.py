"""Loading base and encoder from their own checkpoints, or taking those that are given, and saying which they are."""

import contextlib
import copy
from pathlib import Path

from huggingface_hub import ResolvedRevision
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import resolve_revision
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from .adapter_file_moextend import check_keywords, check_source
from .base_checks_moextend import check_fingerprint, check_loaded, check_plan
from .configuration_moextend import MODALITIES, check_choices
from .families_moextend import check_routers, find_moe_layers
from .layers_moextend import detach, input_device
from .routing_moextend import Rule
from .senses_moextend import encoder_of, is_multimodal, load_encoder, load_whole, modality_at, modality_of
from .tensors_moextend import fingerprint, same_fingerprint

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
SHARED_HUB_KWARGS = ("cache_dir", "local_files_only", "token")
ENCODER_KWARGS = ("dtype", "torch_dtype", "use_safetensors", *SHARED_HUB_KWARGS)


def load_parts(stored, base, encoder, auto_class, check_base, options, location=None):
    """Base and encoders of an adapter with config `stored`, which takes theirs, each loaded unless given as a model,
    and checked. `options`: for the base; `location`: (folder or Hub id, keywords for the Hub) of the adapter."""
    encoders = load_encoders_of(stored, encoder, location, options)
    if not isinstance(base, PreTrainedModel):
        auto_class = auto_class_for(stored.text_config, auto_class)
        base = load_stored("base", base, stored, load_base, location, auto_class=auto_class, **options)
    else:  # what else would be for its from_pretrained
        check_keywords("from_pretrained with a loaded base", options, (*ENCODER_KWARGS, "trust_remote_code"))
    check_loaded(base)
    fit_to_base(stored, base, find_moe_layers(base.get_decoder()), check_base)
    return base, fit_encoders(stored, encoders, base, check_base)


def fit_to_base(stored, base, layers, check_base, advice=None):
    """Takes an adapter's config to a loaded base with MoE `layers`; refuses another one than its own."""
    stored.set_text_config(base.config)
    if check_base and stored.base_fingerprint:
        check_fingerprint("base", stored.base_fingerprint, fingerprint(base.get_decoder()), advice)
    check_plan(layers, stored.extended_layers)
    if not check_base:
        try:
            check_routers(layers, stored.extended_layers, Rule(**(stored.routing_rule or {})))
        except (ValueError, TypeError):  # another rule, or none recorded: the base's own is to be found
            stored.routing_rule = None


def by_modality(given, senses, **hub):
    """`given`, an encoder (a model, or where it lies) or a list of them, by modality; refuses one that none of
    `senses` takes. Where there is one of each, they belong together."""
    given = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    if given and not senses:
        raise ValueError("The adapter has no encoder, so it can't see or hear: leave out encoder=...")
    if len(given) == len(senses) == 1:
        return dict(zip(senses, given, strict=True))
    found = {}
    for one in given:
        modality = modality_of(type(encoder_of(one))) if isinstance(one, PreTrainedModel) else modality_at(one, **hub)
        if modality in found or modality not in senses:
            name = type(one).__name__ if isinstance(one, PreTrainedModel) else str(one)[:200]
            reason = "which an earlier one takes" if modality in found else f"and the adapter {', '.join(senses)}"
            raise ValueError(f"encoder={name!r} takes {modality}, {reason}: give one for each.")
        found[modality] = one
    return found


def load_encoders_of(stored, given, location, options, adapters=()):
    """Modality -> encoder of an adapter with config `stored`: as `given`, or of `adapters`, or loaded."""
    options = {key: options[key] for key in ENCODER_KWARGS if key in options}
    hub, found = {key: options[key] for key in SHARED_HUB_KWARGS if key in options}, {}
    requested = by_modality(given, list(stored.senses), **hub)
    for modality, sense in stored.senses.items():
        found[modality] = requested.get(modality)
        if isinstance(found[modality], PreTrainedModel):
            continue
        for adapter in adapters if found[modality] is None and sense.encoder_fingerprint else ():
            known = adapter.config.senses[modality].encoder_fingerprint if modality in adapter.encoders else None
            if known and same_fingerprint(known, sense.encoder_fingerprint):
                found[modality] = adapter.encoders[modality]
        if not isinstance(found[modality], PreTrainedModel):
            role = f"{MODALITIES[modality]}encoder"
            found[modality] = load_stored(role, found[modality], stored, load_encoder, location, **options)
    return found


def fit_encoders(stored, encoders, base, check_base):
    """`encoders` (by modality) beside the base, whose configs become part of `stored`; refuses others than its own."""
    found = {}
    for modality, given in encoders.items():
        prefix, sense = MODALITIES[modality], stored.senses[modality]
        encoder = encoder_of(given).to(input_device(base))
        if modality_of(type(encoder)) != modality:
            raise ValueError(f"The adapter's {modality}s need another encoder than a {encoder.config.model_type}.")
        setattr(stored, f"{prefix}encoder_config", copy.deepcopy(encoder.config))
        check_choices(stored)  # a hidden state that this encoder has
        if sense.token_id is None:
            raise ValueError(f"{modality}_token_id=None must be an integer: the adapter has an encoder.")
        if check_base and sense.encoder_fingerprint:
            check_fingerprint("encoder", sense.encoder_fingerprint, fingerprint(encoder))
        found[modality] = encoder
    return found


def load_stored(role, given, config, loader, location=None, **kwargs):
    """Base or encoder, from where the call or else the adapter's config says."""
    path, inside = location_of(role, given, config, location)
    try:
        check_source(f"The adapter's {role}", path)
        return loader(path, **kwargs, **inside)
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"The adapter's {role} {str(path)!r} can't be loaded: pass {role.removeprefix('audio_')}=<folder or Hub "
            "id> if it is elsewhere, or use_safetensors=False if it has only pickled weights and you trust them. "
            f"({error})"
        ) from error


def location_of(role, given, config, location=None):
    """Where the "base", "encoder" or "audio_encoder" of an adapter lies, (folder or Hub id, keywords for the Hub): as
    `given`, or in its own folder or repository at `location`, or where its `config` says."""
    keyword = role.removeprefix("audio_")
    if given is not None:
        return given, {}
    subfolder, revision = getattr(config, f"{role}_subfolder"), config.base_model_revision if role == "base" else None
    name = getattr(config, f"{role}_model_name_or_path" if role == "base" else f"{role}_name_or_path")
    if subfolder is None or location is None:
        if name is None:
            raise ValueError(f"The adapter does not say where its {role} lies: pass {keyword}=<folder or Hub id>.")
        return name, {"revision": revision} if revision else {}
    name_or_path, hub_kwargs = location
    path, folder = "/".join(filter(None, (hub_kwargs.get("subfolder"), subfolder))), Path(name_or_path)
    if not folder.is_dir():
        return name_or_path, {"subfolder": path, "revision": hub_kwargs.get("revision")}
    if not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder / path} is a link that leads out of {folder}. Nothing was loaded.")
    return str(folder / path), {}


def check_folder(folder, config):
    """Refuses to write over the config.json of a base or encoder."""
    encoders = [("encoder", sense.encoder_name_or_path) for sense in config.senses.values()]
    for role, path in (("base", config.base_model_name_or_path), *encoders):
        if path is not None and Path(path).is_dir() and folder.resolve() == Path(path).resolve():
            raise ValueError(f"{folder} is the folder of the adapter's {role}: save the adapter elsewhere.")
    if config.base_subfolder and (folder / config.base_subfolder).is_dir():
        raise ValueError(f"{folder} is a standalone checkpoint with a base of its own: save the adapter elsewhere.")


def load_base(name_or_path, auto_class, **kwargs):
    """A base from its checkpoint; its config remembers the commit, `_commit_hash`, as transformers does no longer."""
    kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))  # of `None` transformers asks at a prompt
    check_no_adapter(name_or_path, kwargs)
    shared = {key: kwargs[key] for key in SHARED_HUB_KWARGS if key in kwargs}
    kwargs["revision"] = resolve_revision(name_or_path, kwargs.pop("revision", None), **shared)
    try:
        base = load_whole("base", auto_class, name_or_path, **kwargs)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        if auto_class is AutoModelForCausalLM:  # a language model inside a multimodal one
            return load_base(name_or_path, AutoModelForImageTextToText, **kwargs)
        raise ValueError(f"base={name_or_path!r} is no causal LM: transformers has no causal head for it.") from error
    if isinstance(kwargs["revision"], ResolvedRevision):
        base.config._commit_hash = kwargs["revision"].resolved
    return base


def check_no_adapter(name_or_path, options):
    """Refuses an adapter in the place of a base, before it is loaded: its own base might be itself, without end."""
    hub = {name: options[name] for name in HUB_KWARGS if options.get(name) is not None}
    try:
        values, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub)
        model_type = values.get("model_type") or find_adapter_config_file(name_or_path, **hub)
    except (OSError, ValueError):  # for whoever loads the base to say
        return
    except Exception as error:  # it holds something else than a mapping
        raise ValueError(f"base={str(name_or_path)!r} has a config.json that can't be read: {error!r}.") from error
    if model_type == "moextend":
        raise ValueError(f"base={str(name_or_path)!r} is extended already: it is an adapter. Pass base=<its base>.")
    if str(model_type).endswith(ADAPTER_CONFIG_NAME):
        name = str(name_or_path)
        raise ValueError(f"base={name!r} is a PEFT adapter and no model: merge it into its own (merge_and_unload()).")


def auto_class_for(config, auto_class):
    """The auto class of a base with a causal head: multimodal ones have one of their own."""
    return AutoModelForImageTextToText if auto_class is AutoModelForCausalLM and is_multimodal(config) else auto_class


@contextlib.contextmanager
def undone_on_error(base, encoders):
    """Leaves base and encoders as the caller gave them where the block, which attaches an adapter, fails."""
    modules = [module for model in (base, *encoders.values()) for module in model.modules()]
    trained = [p for module in modules for p in module.parameters(recurse=False) if p.requires_grad]
    modes = [module.training for module in modules]
    try:
        yield
    except BaseException:
        detach(base.get_decoder())
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        raise
