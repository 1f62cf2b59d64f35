"""What each entry of a config may be, whoever wrote it: one table, and one error that names all that is wrong.

Adapters are shared, so a config may be damaged, or made to do harm: to run code, read a file, or fill the memory.
"""

import base64
import os
import re
import reprlib

import torch
from transformers import GenerationConfig
from transformers.activations import ACT2FN

from .routing_moextend import SCORES, Rule

FINGERPRINT_SIZE = 1024
NESTED_COUNT = 10**6  # no base has more layers, heads, experts or labels; some configs make a list that long
PLAIN_NAME = re.compile(r"\w[\w.-]*")  # of a folder: no dot in front, so neither hidden nor "..", and no separator
SHORT = reprlib.Repr()  # for messages: what was given may be huge
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 200
SHORT.maxlist = SHORT.maxtuple = SHORT.maxdict = 16
short = SHORT.repr


def is_name(value):
    return isinstance(value, str) and 0 < len(value) <= 4096 and value.isprintable()


def is_whole(low, high):
    """A test for integers from `low` to `high`; `True` and `False` are none."""
    return lambda value: type(value) is int and low <= value <= high


def one_of(*allowed):
    return lambda value: value in allowed, f"one of {', '.join(map(repr, allowed))}"


def is_fingerprint(value):
    try:
        return isinstance(value, str) and len(base64.b64decode(value, validate=True)) == 4 * FINGERPRINT_SIZE
    except ValueError:
        return False


def is_rule(value):
    fields, small = set(Rule._fields), is_whole(-(2**53), 2**53)
    if not isinstance(value, dict) or not fields - set(Rule._field_defaults) <= set(value) <= fields:
        return False
    for name, field in value.items():
        forms = (field, float(field)) if small(field) else (field,)  # JSON may write 1.0 or 1
        if not any(isinstance(form, Rule.__annotations__[name]) for form in forms):
            return False
    return value["score"] in SCORES


def is_trained_on(value):
    texts = {"name": str, "fingerprint": str | None, "name_or_path": str | None}
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and {"name", "fingerprint"} <= set(entry) <= set(texts)
        and all(isinstance(text, texts[key]) for key, text in entry.items())
        for entry in value
    )


def is_generation(value):
    """Whether these are entries for a `GenerationConfig`: what of them has a meaning, transformers knows."""
    kinds = str | int | float | list | None
    return isinstance(value, dict) and not any(
        hides(name, GenerationConfig) or name.startswith("_") or not isinstance(entry, kinds)
        for name, entry in value.items()
    )


NAME = (is_name, "a text of 1 to 4096 printable characters")
PLACE = (lambda value: value == "" or is_name(os.fspath(value) if isinstance(value, os.PathLike) else value), NAME[1])
FLAG = (lambda value: isinstance(value, bool), "true or false")
MAPPING = (lambda value: isinstance(value, dict), "a mapping")
FINGERPRINT = (is_fingerprint, f"{FINGERPRINT_SIZE} float32 values in base64")
SUBFOLDER = (
    lambda value: isinstance(value, str) and all(PLAIN_NAME.fullmatch(part) for part in value.split("/")),
    "a folder inside the adapter's own, like 'base': no '..', no absolute path, no backslash",
)
SIZE = (is_whole(1, 4096), "an integer from 1 to 4096")
COUNT = (is_whole(0, NESTED_COUNT), f"an integer from 0 to {NESTED_COUNT}")
DTYPE = (
    lambda value: isinstance(getattr(torch, value, None) if isinstance(value, str) else value, torch.dtype),
    "the name of a torch dtype",
)
LABELS = (
    lambda value: isinstance(value, dict) and all(str(key).isdecimal() and len(str(key)) < 10 for key in value),
    "a mapping of integers",
)
TOKEN_ID = (is_whole(-(2**31), 2**31 - 1), "an integer of 32 bits")
IMPLEMENTATION = (lambda value: isinstance(value, dict) or is_name(value), "a name, or a mapping to names")
GENERATION = (is_generation, "a mapping of a GenerationConfig's entries to texts, numbers, true, false, or lists")

FORMED = (lambda value: True, "what a function of configuration_moextend.py makes of it")

OWN = {  # entry -> default (what a config without it means), test, what passes it, in words
    "base_model_name_or_path": (None, *NAME),  # Hub id or folder of the base
    "base_model_revision": (None, *NAME),  # commit the adapter was made on
    "base_fingerprint": (None, *FINGERPRINT),  # 1,024 base values at fixed indices, float32, base64
    "text_config": (None, *FORMED),  # the base's whole config, unchanged
    # Of a sense, here that of images; other senses have the same entries with their modality in front: see `Sense`.
    "encoder_name_or_path": (None, *NAME),  # its encoder's checkpoint; `None` for text only
    "encoder_config": (None, *FORMED),  # the encoder's own (of a whole CLIP model, its vision config)
    "encoder_fingerprint": (None, *FINGERPRINT),  # like `base_fingerprint`
    "encoder_subfolder": (None, *SUBFOLDER),  # where it lies in the adapter's own folder, if it came along
    "encoder_select_layer": (-2, is_whole(-1000, 1000), "an integer"),  # its hidden state (LLaVA-1.5: -2)
    "encoder_select_feature": ("patch", *one_of("patch", "full")),  # "patch" drops class tokens
    "projector_hidden_act": ("gelu", *one_of(*sorted(ACT2FN))),  # between the projector's two linear layers
    "projector_type": ("mlp", *one_of("mlp", "linear")),  # two linear layers, or one
    "projector_downsample": (1, *SIZE),  # so many features, side by side, make one
    "image_token_id": (None, *TOKEN_ID),  # may lie past the embedding
    "audio_token_id": (None, *TOKEN_ID),
    "extended_layers": (None, *FORMED),  # {decoder layer index: [source expert of each new expert]}
    "expert_rank": (None, is_whole(1, NESTED_COUNT), f"an integer from 1 to {NESTED_COUNT}"),  # `None`: whole experts
    "scope": ("all", *one_of("all", "modality", "gate")),  # who may use new experts: see scope_moextend.py
    "selection": ("compete", *one_of("compete", "exclusive")),  # one top-k over old and new rows (the paper), or not
    "calibration": ("all", *one_of("all", "routed", "none")),  # "all": the paper's
    "calibration_hidden_size": (16, *SIZE),  # inner width of the calibration
    "gate_hidden_size": (64, *SIZE),  # width D of the gate
    "gate_threshold": (0.0, *FORMED),  # the gate lets a token through when its routing margin is above this
    "deltas": (None, *FORMED),  # {"embedding", "attention" or "output": rank of its deltas, 0: whole matrices}
    "routing_rule": (None, is_rule, f"a mapping with fields of a routing rule ({', '.join(Rule._fields)})"),
    "trained_on": (None, is_trained_on, 'a list of {"name": ..., "fingerprint": ...}, one for each adapter below'),
    "base_subfolder": (None, *SUBFOLDER),  # where it lies in the adapter's own folder, if it came along
    "generation_config": (None, *GENERATION),  # what of the model's `GenerationConfig` is not the base's
}
SENSE = tuple(name for name in OWN if name.startswith(("encoder_", "projector_")))  # entries that every sense has
CHOSEN = tuple(name for name in SENSE if name.startswith(("encoder_select", "projector_")))  # of these, the user's own
AUDIO = {
    "encoder_select_layer": -1,
    "projector_downsample": 4,
}  # defaults of its own: Whisper gives 50 features a second
OWN |= {f"audio_{name}": (AUDIO.get(name, OWN[name][0]), *OWN[name][1:]) for name in SENSE}
DEFAULTS = {name: default for name, (default, *_) in OWN.items()}
INHERITED = {  # what a config of transformers has beside its own; the two implementations only where a call gives them
    **dict.fromkeys(("_name_or_path", "name_or_path"), PLACE),
    **dict.fromkeys(("attn_implementation", "experts_implementation"), IMPLEMENTATION),
    **dict.fromkeys(("auto_map", "label2id"), MAPPING),
    **dict.fromkeys(("chunk_size_feed_forward", "num_labels"), COUNT),
    **dict.fromkeys(("dtype", "torch_dtype"), DTYPE),
    **dict.fromkeys(("is_encoder_decoder", "output_attentions", "output_hidden_states", "return_dict"), FLAG),
    "architectures": (lambda value: isinstance(value, (list, tuple)) and all(map(is_name, value)), "a list of names"),
    "id2label": LABELS,
    "model_type": one_of("moextend"),
    "problem_type": one_of("regression", "single_label_classification", "multi_label_classification"),
    "quantization_config": (lambda value: isinstance(value, dict) or hasattr(value, "to_dict"), "a mapping"),
    "tie_word_embeddings": FLAG,
    "transformers_version": NAME,
}
ENTRIES = {name: (test, words) for name, (_, test, words) in OWN.items()} | INHERITED
REQUIRED = {"model_type", "num_labels", *(name for name, default in DEFAULTS.items() if default is not None)}


def problems_of(entries, config_class):
    """What is wrong with entries of a config, a line each: values outside `ENTRIES`, names that would hide methods."""
    problems = []
    for name, value in entries.items():
        if name in ENTRIES:
            test, words = ENTRIES[name]
            if not test(value) and (value is not None or name in REQUIRED):
                problems.append(f"{name}={short(value)} must be {words}.")
        elif hides(name, config_class):
            problems.append(f"{short(name)} can't be an entry: a config has an attribute of that name.")
    return problems


def nested_problems(entries, config_class):
    """The same for the config of a base or encoder, whose entries are transformers' own to know."""
    problems = [
        f"{name}={short(value)} is no number that a model could have."
        for name, value in entries.items()
        if name.startswith(("num_", "n_")) and type(value) is int and abs(value) > NESTED_COUNT
    ]
    methods = [name for name in entries if name.startswith("__") or callable(getattr(config_class, name, None))]
    return problems + [f"{short(name)} can't be an entry: a config has a method of that name." for name in methods]


def hides(name, config_class):
    return not name.isidentifier() or name == "self" or name.startswith("__") or hasattr(config_class, name)
