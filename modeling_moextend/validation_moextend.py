"""What each entry of a config may be, whoever wrote it: one table, and one error that names all that is wrong.

Adapters are shared, so a config may be damaged, or made to do harm: to run code, read a file, or fill the memory.
"""

import base64
import binascii
import os
import re
import reprlib

import torch
from transformers import GenerationConfig

from .routing_moextend import SCORES, Rule

FINGERPRINT_SIZE = 1024
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
NESTED_COUNT = 10**6  # no base has more layers, heads, experts or labels; some configs make a list that long

PLAIN_NAME = re.compile(r"\w[\w.-]*")  # of a folder: no dot in front, so neither hidden nor "..", and no separator

SHORT = reprlib.Repr()  # for messages: what was given may be huge
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 200
SHORT.maxlist = SHORT.maxtuple = SHORT.maxdict = 16
short = SHORT.repr


def is_name(value):
    return isinstance(value, str) and 0 < len(value) <= 4096 and value.isprintable()


def is_flag(value):
    return isinstance(value, bool)


def is_mapping(value):
    return isinstance(value, dict)


def is_whole(low, high):
    """A test for integers from `low` to `high`; `True` and `False` are none."""
    return lambda value: isinstance(value, int) and not is_flag(value) and low <= value <= high


def is_fingerprint(value):
    try:
        return isinstance(value, str) and len(base64.b64decode(value, validate=True)) == 4 * FINGERPRINT_SIZE
    except (binascii.Error, ValueError):
        return False


def is_rule(value):
    """Whether `Rule(**value)` is a rule whose fields have their types."""
    if not is_mapping(value) or not set(Rule._fields) - set(Rule._field_defaults) <= set(value) <= set(Rule._fields):
        return False
    small = is_whole(-(2**53), 2**53)
    for name, field in value.items():
        forms = (field, float(field)) if small(field) else (field,)  # JSON may write 1.0 or 1
        if not any(isinstance(form, Rule.__annotations__[name]) for form in forms):
            return False
    return value["score"] in SCORES


def is_trained_on(value):
    texts = {"name": str, "fingerprint": str | None, "name_or_path": str | None}
    return isinstance(value, list) and all(
        is_mapping(entry)
        and {"name", "fingerprint"} <= set(entry) <= set(texts)
        and all(isinstance(text, texts[key]) for key, text in entry.items())
        for entry in value
    )


def is_generation(value):
    """Whether these are entries for a `GenerationConfig`: what of them has a meaning, transformers knows."""
    kinds = str | int | float | list | None
    return is_mapping(value) and not any(
        hides(name, GenerationConfig) or name.startswith("_") or not isinstance(entry, kinds)
        for name, entry in value.items()
    )


NAME = (is_name, "a text of 1 to 4096 printable characters")
PLACE = (lambda value: value == "" or is_name(os.fspath(value) if isinstance(value, os.PathLike) else value), NAME[1])
FLAG = (is_flag, "true or false")
MAPPING = (is_mapping, "a mapping")
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
    lambda value: is_mapping(value) and all(str(key).isdecimal() and len(str(key)) < 10 for key in value),
    "a mapping of integers",
)
IMPLEMENTATION = (lambda value: is_mapping(value) or is_name(value), "a name, or a mapping to names")

GENERATION = (is_generation, "a mapping of a GenerationConfig's entries to texts, numbers, true, false, or lists")

OWN = {  # entry -> (test, what passes it, in words); the others have a function in configuration_moextend.py
    "base_model_name_or_path": NAME,
    "base_model_revision": NAME,
    "base_fingerprint": FINGERPRINT,
    "encoder_name_or_path": NAME,
    "encoder_fingerprint": FINGERPRINT,
    "encoder_select_layer": (is_whole(-1000, 1000), "an integer"),
    "image_token_id": (is_whole(-(2**31), 2**31 - 1), "an integer of 32 bits"),
    "calibration_hidden_size": SIZE,
    "gate_hidden_size": SIZE,
    "base_subfolder": SUBFOLDER,
    "encoder_subfolder": SUBFOLDER,
    "generation_config": GENERATION,
    "trained_on": (is_trained_on, 'a list of {"name": ..., "fingerprint": ...}, one for each adapter that was below'),
    "routing_rule": (is_rule, f"a mapping with fields of a routing rule ({', '.join(Rule._fields)})"),
}
INHERITED = {  # what a config of transformers has beside its own; the two implementations only where a call gives them
    **dict.fromkeys(("_name_or_path", "name_or_path"), PLACE),
    **dict.fromkeys(("attn_implementation", "experts_implementation"), IMPLEMENTATION),
    **dict.fromkeys(("auto_map", "label2id"), MAPPING),
    **dict.fromkeys(("chunk_size_feed_forward", "num_labels"), COUNT),
    **dict.fromkeys(("dtype", "torch_dtype"), DTYPE),
    **dict.fromkeys(("is_encoder_decoder", "output_attentions", "output_hidden_states", "return_dict"), FLAG),
    "architectures": (lambda value: isinstance(value, (list, tuple)) and all(map(is_name, value)), "a list of names"),
    "id2label": LABELS,
    "model_type": (lambda value: value == "moextend", "'moextend'"),
    "problem_type": (lambda value: value in PROBLEM_TYPES, f"one of {PROBLEM_TYPES}"),
    "quantization_config": (lambda value: is_mapping(value) or hasattr(value, "to_dict"), "a mapping"),
    "tie_word_embeddings": FLAG,
    "transformers_version": NAME,
}
ENTRIES = OWN | INHERITED
REQUIRED = ("encoder_select_layer", "calibration_hidden_size", "gate_hidden_size", "model_type", "num_labels")


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
    count = is_whole(-NESTED_COUNT, NESTED_COUNT)
    problems = [
        f"{name}={short(value)} is no number that a model could have."
        for name, value in entries.items()
        if name.startswith(("num_", "n_")) and isinstance(value, int) and not is_flag(value) and not count(value)
    ]
    methods = [name for name in entries if name.startswith("__") or callable(getattr(config_class, name, None))]
    return problems + [f"{short(name)} can't be an entry: a config has a method of that name." for name in methods]


def hides(name, config_class):
    return not name.isidentifier() or name == "self" or name.startswith("__") or hasattr(config_class, name)
