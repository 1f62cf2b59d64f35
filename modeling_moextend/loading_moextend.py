"""Loading base and encoder from their own checkpoints, or taking those that are given, and saying which they are."""

import contextlib
import copy
from pathlib import Path

from huggingface_hub import ResolvedRevision
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import resolve_revision
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from .adapter_file_moextend import check_given, check_keywords
from .base_checks_moextend import check_fingerprint, check_loaded, check_not_distributed, check_plan, forget_other_rule
from .configuration_moextend import check_routing_choices
from .families_moextend import find_moe_layers
from .layers_moextend import detach, input_device
from .tensors_moextend import fingerprint, same_fingerprint
from .vision_moextend import load_encoder, vision_tower

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
SHARED_HUB_KWARGS = ("cache_dir", "local_files_only", "token")
ENCODER_KWARGS = ("dtype", "torch_dtype", "use_safetensors", *SHARED_HUB_KWARGS)


def load_parts(stored, base, encoder, auto_class, check_base, options, location=None):
    """Base and encoder of an adapter with the config `stored`, each loaded unless given as a model, and checked
    against it; their configs become part of it. The other arguments are those of `from_pretrained`, what the base is
    loaded with, and (folder or Hub id, keywords for the Hub) of the adapter: see `within`."""
    if has_encoder(stored, encoder) and not isinstance(encoder, PreTrainedModel):
        chosen = {key: options[key] for key in ENCODER_KWARGS if key in options}
        encoder = load_stored("encoder", encoder, stored, load_encoder, location, **chosen)
    if not isinstance(base, PreTrainedModel):
        auto_class = auto_class_for(stored.text_config, auto_class)
        base = load_stored("base", base, stored, load_base, location, auto_class=auto_class, **options)
    else:  # what else would be for its from_pretrained
        check_keywords("from_pretrained with a loaded base", options, (*ENCODER_KWARGS, "trust_remote_code"))
    check_loaded(base)
    stored.set_text_config(base.config)
    if encoder is not None:
        encoder = vision_tower(encoder).to(input_device(base))
        stored.encoder_config = copy.deepcopy(encoder.config)
        check_routing_choices(stored)  # a hidden state that this encoder has
        if stored.image_token_id is None:
            raise ValueError("image_token_id=None must be an integer: the adapter has an encoder.")
    for role, module in (("base", base.get_decoder()), ("encoder", encoder)):
        recorded = getattr(stored, f"{role}_fingerprint")
        if module is not None and check_base and recorded:
            check_fingerprint(role, recorded, fingerprint(module))
    layers = find_moe_layers(base.get_decoder())
    check_plan(layers, stored.extended_layers)
    if not check_base:
        forget_other_rule(stored, layers)
    return base, encoder


def load_stored_encoder(model, stored, encoder, check_base, location):
    """The encoder of a stored adapter that is loaded beside others; one of theirs, where it is the same."""
    if not has_encoder(stored, encoder):
        return None
    for adapter in model.adapters.values() if encoder is None and stored.encoder_fingerprint else ():
        known = adapter.config.encoder_fingerprint
        if adapter.encoder is not None and known and same_fingerprint(known, stored.encoder_fingerprint):
            return adapter.encoder
    if not isinstance(encoder, PreTrainedModel):
        options = {key: location[1][key] for key in SHARED_HUB_KWARGS if key in location[1]}
        encoder = load_stored("encoder", encoder, stored, load_encoder, location, dtype=model.base.dtype, **options)
    encoder = vision_tower(encoder).to(input_device(model.base))
    if check_base and stored.encoder_fingerprint:
        check_fingerprint("encoder", stored.encoder_fingerprint, fingerprint(encoder))
    return encoder


def has_encoder(stored, given):
    """Whether an adapter with config `stored` has an encoder; refuses one that is `given` to an adapter without."""
    if given is not None and stored.encoder_config is None:
        raise ValueError("The adapter has no encoder, so it can't see: leave out encoder=...")
    return stored.encoder_config is not None


def load_stored(role, given, config, loader, location=None, **kwargs):
    """Base or encoder, from where the call or else the adapter's config says; see `location_of`."""
    path, inside = location_of(role, given, config, location)
    check_given(f"The adapter's {role}", path)
    if Path(path).exists() and not Path(path).is_dir():  # transformers would read any file as a config
        raise ValueError(f"The adapter's {role} {str(path)!r} is a file: pass {role}=<folder or Hub id>.")
    try:
        return loader(path, **kwargs, **inside)
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"The adapter's {role} {str(path)!r} can't be loaded: pass {role}=<folder or Hub id> if it lies "
            "elsewhere, or use_safetensors=False if it has only pickled weights and you trust them. "
            f"({error})"
        ) from error


def location_of(role, given, config, location=None):
    """Where the "base" or "encoder" of an adapter with `config` lies: (folder or Hub id, keywords for the Hub).

    `given`: what the user says, which wins; `location`: the same of the adapter, if parts of it may lie there.
    """
    if given is not None:
        return given, {}
    subfolder = getattr(config, f"{role}_subfolder")
    if subfolder is not None and location is not None:
        return within(*location, subfolder)
    name, revision = config.encoder_name_or_path, None
    if role == "base":
        name, revision = config.base_model_name_or_path, config.base_model_revision
    if name is None:
        raise ValueError(f"The adapter does not say where its {role} lies: pass {role}=<folder or Hub id>.")
    return name, {"revision": revision} if revision else {}


def within(name_or_path, hub_kwargs, subfolder):
    """Where a subfolder of an adapter's own folder or repository lies: (folder or Hub id, keywords for the Hub)."""
    path = "/".join(filter(None, (hub_kwargs.get("subfolder"), subfolder)))
    folder = Path(name_or_path)
    if not folder.is_dir():
        return name_or_path, {"subfolder": path, "revision": hub_kwargs.get("revision")}
    if not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder / path} is a link that leads out of {folder}. Nothing was loaded.")
    return str(folder / path), {}


def check_folder(folder, config):
    """Refuses to write over the config.json of a base or encoder."""
    for role in ("base_model", "encoder"):
        path = getattr(config, f"{role}_name_or_path")
        if path is not None and Path(path).is_dir() and folder.resolve() == Path(path).resolve():
            role = role.removesuffix("_model")
            raise ValueError(f"{folder} is the folder of the adapter's {role}: save the adapter elsewhere.")
    if config.base_subfolder and (folder / config.base_subfolder).is_dir():
        raise ValueError(f"{folder} is a standalone checkpoint with a base of its own: save the adapter elsewhere.")


def load_base(name_or_path, auto_class, **kwargs):
    """A base from its checkpoint; from safetensors only, unless `use_safetensors=False` allows pickled weights. Its
    config remembers the commit (`_commit_hash`, which transformers itself sets no longer)."""
    kwargs["use_safetensors"] = kwargs.get("use_safetensors", True) or None  # False would refuse safetensors
    kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))  # of `None` transformers asks at a prompt
    check_not_distributed(kwargs)
    check_no_adapter(name_or_path, kwargs)
    shared = {key: kwargs[key] for key in SHARED_HUB_KWARGS if key in kwargs}
    kwargs["revision"] = resolve_revision(name_or_path, kwargs.pop("revision", None), **shared)
    try:
        base, loading = auto_class.from_pretrained(name_or_path, **{**kwargs, "output_loading_info": True})
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            if auto_class is AutoModelForCausalLM:  # a language model inside a multimodal one
                return load_base(name_or_path, AutoModelForImageTextToText, **kwargs)
            raise ValueError(
                f"base={name_or_path!r} is no causal LM: transformers has no causal head for it."
            ) from error
        raise
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would go on with random values in their place
        raise ValueError(f"base={name_or_path!r} is incomplete or no causal LM: it lacks {', '.join(missing[:8])}.")
    if isinstance(kwargs["revision"], ResolvedRevision):
        base.config._commit_hash = kwargs["revision"].resolved
    return base


def check_no_adapter(name_or_path, options):
    """Refuses an adapter in the place of a base, before it is loaded: its own base might be itself, without end."""
    names = (*SHARED_HUB_KWARGS, "revision", "subfolder")
    hub = {name: options[name] for name in names if options.get(name) is not None}
    try:
        values, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub)
        model_type = values.get("model_type") or find_adapter_config_file(name_or_path, **hub)
    except (OSError, ValueError):  # for whoever loads the base to say
        return
    except Exception as error:  # it holds something else than a mapping
        raise ValueError(f"base={str(name_or_path)!r} has a config.json that can't be read: {error!r}.") from error
    if model_type == "moextend":
        raise ValueError(f"base={str(name_or_path)!r} is extended already: it is an adapter. Pass base=<its base>.")
    if model_type and model_type.endswith(ADAPTER_CONFIG_NAME):
        raise ValueError(
            f"base={str(name_or_path)!r} is a PEFT adapter and no model: pass the model that it was trained on, with "
            "it merged (merge_and_unload()) or without."
        )


def is_multimodal(config):
    """Whether a base of this config has a language model inside a model that sees."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class_for(config, auto_class):
    """The auto class of a base with a causal head: multimodal ones have one of their own."""
    own = auto_class is AutoModelForCausalLM and is_multimodal(config)
    return AutoModelForImageTextToText if own else auto_class


@contextlib.contextmanager
def undone_on_error(base, encoder):
    """Leaves base and encoder as the caller gave them where the block, which attaches an adapter, fails."""
    modules = [module for model in (base, encoder) if model is not None for module in model.modules()]
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
