"""Adapter folders, damaged by chance or on purpose: strategies of hypothesis that change files held in memory.

A folder is a `dict`: name -> bytes, or a `Special` (a link, a pipe, a directory). `changed_folders` draws a change of
one of two kinds. "Bytes": files are damaged as a disk or a transfer would, checksums as they were. "Entries": somebody
writes what he likes, and makes the header's own checksum right again or leaves the checksums out.
"""

import copy
import hashlib
import json
import os
import random
import struct
from typing import NamedTuple

from hypothesis import strategies as st

FILE = "moextend_adapter.safetensors"
INDEX = FILE + ".index.json"
SIZE = struct.Struct("<Q")


class Special(NamedTuple):
    kind: str  # "link", "pipe" or "directory"
    target: str = ""


class Folder(dict):
    """Files in memory; printed short, for hypothesis prints what it draws from."""

    def __repr__(self):
        return f"Folder({', '.join(sorted(self))})"


def deep(levels, opening="[", closing="]"):
    return opening * levels + closing * levels


HUGE = [2**31, 2**63, 2**64, 10**9, 10**12, 10**30, 10**400, -1, -(2**63), -(10**400)]
NUMBERS = [0, 1, 2, 3, 4, 7, 16, 96, 4096, 4097, 0.5, -0.0, 1e308, float("nan"), float("inf"), *HUGE]
WORDS = ["all", "none", "gate", "modality", "exclusive", "compete", "routed", "full", "patch", "relu", "mixtral"]
WORDS += ["float32", "load", "clip_vision_model", "softmax", "eager", "kernels-community/flash-attn", "moextend"]
PATHS = ["../../x", "../x", "/etc", "/etc/passwd", "/dev/zero", "/proc/self/mem", "~", ".", "..", "", "someone/base"]
PATHS += ["https://localhost/x", "file:///etc/passwd", "C:\\x", "a/b/c/d", "-", "None", "../secret", "coded"]
TEXTS = ["\0", "a\0b", "\ud800", "\n", "\x1b[31m", "x" * 5000, "A" * 5464, "é", "1", "0", "AAAA", "{}", "%s%n"]
PLANS = [
    {},
    {"1": []},
    {"1": [0]},
    {"1": [0], "3": [2, 4]},
    {"1": [0], "01": [0], "3": [2, 5]},
    {"1": [0] * 20000, "3": [2, 5]},
    {"1": [0], "3": [2, 10**30]},
    {"-1": [0]},
    {"1_0": [0]},
    {"9" * 30: [0]},
    {"9" * 5000: [0]},
    {str(layer): [0] for layer in range(5000)},
    {"1": {"0": 0}},
    {"1": "02"},
]
RULES = [{"score": "softmax"}, {"score": [], "renormalise": 1, "scale": {}}, {"score": "softmax", "scale": 2.0}]
RULES += [{"score": "sigmoid", "renormalise": True, "scale": 1}, {"self": 1}, {"_asdict": 1}]
NESTED = [[], {}, [1], [[]], [None] * 9, {"a": 1}, {"": ""}, {"model_type": "mixtral"}, {"model_type": []}]
NESTED += [{"model_type": "mixtral", "num_hidden_layers": 10**9}, {"model_type": "x", "to_dict": 1}, *PLANS, *RULES]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
VALUES = st.sampled_from([None, True, False, *NUMBERS, *WORDS, *PATHS, *TEXTS, *NESTED]) | JSON

STRANGE_NAMES = ["to_dict", "__class__", "__dict__", "__init__", "get_text_config", "_text_view", "per_layer_config"]
STRANGE_NAMES += ["attn_implementation", "experts_implementation", "_attn_implementation_internal", "rope_scaling"]
STRANGE_NAMES += ["quantization_config", "name_or_path", "torch_dtype", "num_labels", "attribute_map", "sub_configs"]
STRANGE_NAMES += ["self", "cls", "kwargs", "config_dict", "", "a b", "use_cache", "vocab_size", "num_image_tokens"]
STRANGE_NAMES += ["published", "validate", "save_pretrained", "trust_remote_code", "model_type", "tie_word_embeddings"]
NAMES = st.sampled_from(STRANGE_NAMES) | st.text(max_size=12)

RAW_JSON = [  # texts in the place of a JSON file
    b"",
    b"{",
    b"[]",
    b"{}",
    b"null",
    b"NaN",
    b'{"weight_map": {}}',
    b'{"weight_map": []}',
    b'{"weight_map": {"a": 3}}',
    b'{"weight_map": {"a": null}}',
    b'{"weight_map": {"a": "model.safetensors"}}',
    b'{"weight_map": {"a": "/etc/passwd"}}',
    b'{"weight_map": {"a": "../elsewhere/moextend_adapter.safetensors"}}',
    b'{"weight_map": {"a": "moextend_adapter/../../elsewhere/moextend_adapter.safetensors"}}',
    b'{"weight_map": {"a": "moextend_adapter\\u0000.safetensors"}}',
    b'{"weight_map": {"a": "moextend_adapter\\ud800.safetensors"}}',
    b'{"weight_map": {"a": "moextend_adapter%s.safetensors"}}' % (b"x" * 5000),
    b'{"weight_map": {"a": "moextend_adapter.safetensors.index.json"}}',
    b'{"weight_map": {"a": "moextend_adapter.safetensors", "a": "moextend_adapter-2.safetensors"}}',
    b'{"weight_map": {"a": "moextend_adapter.safetensors"}, "weight_map": {}}',
    b'{"weight_map": ' + b'{"a":' * 100000,
    deep(100000).encode(),
    deep(400).encode(),
    b"\xff\xfe\x00",
    b"\x80",
    "{}".encode("utf-16"),
    "{}".encode("utf-8-sig"),
    b" " * 10_000_000 + b"{}",
    b'{"weight_map": {"a": ' + b"9" * 5000 + b"}}",
    json.dumps({"weight_map": {str(n): f"moextend_adapter-{n}.safetensors" for n in range(20000)}}).encode(),
]


def unpacked(raw):
    """(header as `dict`, data) of a safetensors file."""
    size = SIZE.unpack(raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def packed(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return SIZE.pack(len(text)) + text + data


def adapter_files(folder):
    return sorted(name for name in folder if name.endswith(".safetensors") and isinstance(folder[name], bytes))


# ---------------------------------------------------------------- bytes: damage that nobody meant


def flip_bytes(draw, folder):
    """Bits flipped in the header or the data of one file."""
    name = draw(st.sampled_from(adapter_files(folder)))
    raw = bytearray(folder[name])
    header = 8 + SIZE.unpack(raw[:8])[0]
    first, last = draw(st.sampled_from([(0, 7), (8, header - 1), (header, len(raw) - 1)]))
    for place in draw(st.lists(st.integers(first, last), min_size=1, max_size=4, unique=True)):
        raw[place] ^= draw(st.integers(1, 255))
    folder[name] = bytes(raw)


def cut(draw, folder):
    """A file cut short, or made longer."""
    name = draw(st.sampled_from(sorted(name for name in folder if name.startswith("moextend_adapter"))))
    raw = folder[name]
    if draw(st.booleans()):
        folder[name] = raw[: draw(st.integers(0, len(raw) - 1))]
    else:
        folder[name] = raw + draw(st.sampled_from([b"\0", b"}", raw, bytes(2**20)]) | st.binary(min_size=1))


def write_length(draw, folder):
    """Another length of the header than it has."""
    name = draw(st.sampled_from(adapter_files(folder)))
    size = SIZE.unpack(folder[name][:8])[0]
    other = draw(st.sampled_from([0, 1, 2, size - 1, size + 1, 10**8, 2**31, 2**63, 2**64 - 1]))
    folder[name] = SIZE.pack(other) + folder[name][8:]


def write_header(draw, folder):
    """A header that is no JSON of safetensors, or not only."""
    name = draw(st.sampled_from(adapter_files(folder)))
    header, data = unpacked(folder[name])
    text = json.dumps(header)
    twice = '{"__metadata__": {"moextend_format": "1", "config": "{}"}, ' + text[1:]
    texts = [b"", b"{}", b"[]", b"null", b'{"__metadata__": {}}', text.encode("utf-16"), text.encode("utf-8-sig")]
    texts += [text.replace("layers", "\xff").encode("latin-1"), twice.encode(), deep(100000).encode(), b"\0" * 50]
    texts += [deep(500, '{"a":', "}").encode(), (text[:-1] + ', "layers.1.router.weight": 3}').encode()]
    texts += [text.encode() + b" " * 7, text.encode() + b"\0", text.replace(": 0", ": NaN").encode()]
    folder[name] = packed(draw(st.sampled_from(texts)), data)


def write_index(draw, folder):
    """Another index, or one where there was none."""
    folder[INDEX] = draw(st.sampled_from(RAW_JSON) | JSON.map(lambda value: json.dumps(value).encode()))


def name_shards(draw, folder):
    """An index with other names in it, or an adapter file under another name."""
    names = ["../x", "/etc/passwd", "moextend_adapter", "moextend_adapter-1.safetensors", "moextend_adapter.bin", "."]
    names += ["model.safetensors", FILE, "moextend_adapter/x.safetensors", "moextend_adapter-\0.safetensors", ""]
    if INDEX in folder:
        index = json.loads(folder[INDEX])
        key = draw(st.sampled_from(sorted(index["weight_map"])))
        index["weight_map"][key] = draw(st.sampled_from([*names, *adapter_files(folder)]) | JSON)
        folder[INDEX] = json.dumps(index).encode()
    else:
        index = {"weight_map": {"a": draw(st.sampled_from([*names, FILE]))}}
        folder[INDEX] = json.dumps(index).encode()


def add_files(draw, folder):
    """Files that are not the adapter's: shards of another save, stray weights, configs, what a killed save leaves."""
    stray = ["config.json", "adapter_config.json", "model.safetensors", "adapter_model.safetensors", "README.md"]
    stray += ["moextend_adapter-1.safetensors", "moextend_adapter.safetensors.0123.tmp", "training_args.bin"]
    stray += ["model.safetensors.index.json", "generation_config.json", "pytorch_model.bin", "config.json.ab.tmp"]
    pickled = b"cos\nsystem\n(S'exit 1'\ntR."
    for name in draw(st.lists(st.sampled_from(stray), min_size=1, max_size=4, unique=True)):
        folder[name] = draw(st.sampled_from([*RAW_JSON[:8], pickled, folder[adapter_files(folder)[0]]]))


def replace_code(draw, folder):
    """Code of the folder's own, in every place where something might run it."""
    code = b"import pathlib, os\npathlib.Path(os.environ['CANARY']).touch()\n"
    names = sorted(name for name in folder if name.endswith("_moextend.py"))
    names += ["__init__.py", "torch.py", "sitecustomize.py", "conftest.py", "custom.py", "moextend_adapter.py"]
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=9, unique=True)):
        folder[name] = code
    config = {"model_type": "moextend", "architectures": ["Custom"], "base_model_name_or_path": "../secret"}
    config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "custom.Custom")
    folder["config.json"] = json.dumps(config).encode()


def replace_by_special(draw, folder):
    """A link, a pipe or a directory in the place of a file."""
    name = draw(st.sampled_from([*adapter_files(folder), INDEX, FILE, "config.json"]))
    targets = ["../elsewhere/" + FILE, "/etc/passwd", "/dev/zero", "/dev/null", name, "nowhere", ".", "/proc/self/mem"]
    inside = {} if name not in folder else {"copy-" + name: folder[name]}
    specials = [Special("pipe"), Special("directory"), *(Special("link", target) for target in targets)]
    chosen = draw(st.sampled_from([*specials, *(Special("link", copy) for copy in inside)]))
    if chosen.target in inside:
        folder.update(inside)
    folder[name] = chosen


def remove(draw, folder):
    """A file that is gone."""
    name = draw(st.sampled_from(sorted(folder)))
    if len(adapter_files(folder)) > 1 or name not in adapter_files(folder):
        del folder[name]


# ---------------------------------------------------------------- entries: what somebody wrote on purpose


def edit_headers(folder, edit):
    """`edit(header)` on every adapter file: each has the whole metadata."""
    for name in adapter_files(folder):
        header, data = unpacked(folder[name])
        edit(header)
        folder[name] = packed(header, data)


def seal(draw, folder):
    """Makes the header's own checksum right again, or leaves both out, as files without them are read too."""
    without = draw(st.booleans())

    def edit(header):
        metadata = header["__metadata__"]
        if not isinstance(metadata, dict):
            return
        metadata.pop("header_checksum", None)
        if without:
            metadata.pop("checksum", None)
        elif all(isinstance(value, str) for value in metadata.values()):
            text = json.dumps(sorted(metadata.items()))
            metadata["header_checksum"] = hashlib.sha256(text.encode()).hexdigest()

    edit_headers(folder, edit)


def change_metadata(draw, folder):
    """Other entries of the header, the config's text included."""
    keys = ["moextend_format", "config", "checksum", "header_checksum", "format", "base_fingerprint", "other"]
    key = draw(st.sampled_from(keys))
    numbers = ["0", "1", "2", "-1", "01", "1.0", " 1", "\u0661", "\u00b2", "9" * 5000, ""]
    texts = [text.decode("latin-1") for text in RAW_JSON if len(text) < 10**6]
    change = draw(st.sampled_from([*numbers, *texts, *TEXTS]) | st.none() | VALUES)

    def edit(header):
        if change is None:
            header["__metadata__"].pop(key, None)
        else:
            header["__metadata__"][key] = change

    edit_headers(folder, edit)


def change_config(draw, folder):
    """Entries of the header's config: set, added, removed, or in a nested mapping."""
    header, _ = unpacked(folder[adapter_files(folder)[0]])
    values = json.loads(header["__metadata__"]["config"])
    for _ in range(draw(st.integers(1, 3))):
        at = values
        while True:
            name = draw(st.sampled_from(sorted(at)) if at and draw(st.integers(0, 3)) else NAMES)
            if not isinstance(at.get(name), dict) or draw(st.booleans()):
                break
            at = at[name]
        if name in at and draw(st.integers(0, 5)) == 0:
            del at[name]
        else:
            at[name] = copy.deepcopy(draw(VALUES))  # the next round may change what is in it
    write_config(folder, json.dumps(values))


def name_base(draw, folder):
    """A base or an encoder that lies elsewhere, is something else, or has code of its own."""
    header, _ = unpacked(folder[adapter_files(folder)[0]])
    values = json.loads(header["__metadata__"]["config"])
    entry = draw(st.sampled_from(["base_model_name_or_path", "base_model_revision", "encoder_name_or_path"]))
    values[entry] = draw(st.sampled_from([*PATHS, *TEXTS]))
    write_config(folder, json.dumps(values))


def change_config_text(draw, folder):
    """The config as another text: keys twice, deep nesting, huge numbers."""
    header, _ = unpacked(folder[adapter_files(folder)[0]])
    text = header["__metadata__"]["config"]
    entry = draw(st.sampled_from(["scope", "extended_layers", "text_config", "unknown", "base_fingerprint"]))
    values = ["3", "null", '"all"', "9" * 5000, "1e999", "-Infinity", deep(40), deep(900), deep(5000), deep(100000)]
    written = [f'{{"{entry}": {value}, {text[1:]}' for value in values]
    written += [f'{text[:-1]}, "{entry}": {value}}}' for value in values]
    written += [text[:-1], text + "}", "\ufeff" + text, "[" + text + "]", json.dumps(text), "//\n" + text, text * 2]
    written += [text + " " * 9_000_000, '{"a":' + "[" * 4_000_000]
    write_config(folder, draw(st.sampled_from(written)))


def write_config(folder, text):
    edit_headers(folder, lambda header: header["__metadata__"].update(config=text))


def change_tensors(draw, folder):
    """Entries of tensors in one header: moved, renamed, of another dtype or shape, twice, in no file."""
    name = draw(st.sampled_from(adapter_files(folder)))
    header, data = unpacked(folder[name])
    key = draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    entry = header[key]
    what = draw(st.sampled_from(["dtype", "shape", "data_offsets", "remove", "rename", "twice", "value"]))
    if what == "dtype":
        kinds = ["I32", "U32", "F64", "BF16", "I64", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "C64", "X", 3]
        entry["dtype"] = draw(st.sampled_from(kinds))
    elif what == "shape":
        shapes = [[], [0], [-1], [2**63], [2**32, 2**32], [0, 2**62], entry["shape"][::-1], [1, *entry["shape"]], "x"]
        entry["shape"] = draw(st.sampled_from(shapes))
    elif what == "data_offsets":
        begin, end = entry["data_offsets"]
        spans = [[begin, begin], [end, begin], [begin + 4, end + 4], [0, len(data)], [0, 2**63], [-4, end], [0]]
        entry["data_offsets"] = draw(st.sampled_from(spans))
    elif what == "rename":
        names = ["", "a", "\0", "layers.1", "layers.99.router.weight", "base.lm_head.weight", "x" * 5000, "layers.x.y"]
        header[draw(st.sampled_from(names))] = header.pop(key)
    elif what == "twice":
        header[key + "2"] = dict(entry)
    elif what == "value":
        header[key] = draw(VALUES)
    else:
        del header[key]
    folder[name] = packed(header, data)


def change_values(draw, folder):
    """Other numbers in a tensor, NaN and infinity among them; every checksum is right again."""
    name = draw(st.sampled_from(adapter_files(folder)))
    header, data = unpacked(folder[name])
    first, last = header[draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))]["data_offsets"]
    number = struct.pack("<f", draw(st.sampled_from([0.0, -1.0, 1e-40, 1e30, *map(float, ("nan", "inf", "-inf"))])))
    for place in draw(st.lists(st.integers(first // 4, last // 4 - 1), min_size=1, max_size=4)):
        data = data[: 4 * place] + number + data[4 * place + 4 :]
    folder[name] = packed(header, data)
    tensors, digest = {}, hashlib.sha256()
    for name in adapter_files(folder):
        header, data = unpacked(folder[name])
        tensors |= {key: (entry, data) for key, entry in header.items() if key != "__metadata__"}
    for key, (entry, data) in sorted(tensors.items()):
        digest.update(f"{key} torch.float32 {tuple(entry['shape'])}".encode() + data[slice(*entry["data_offsets"])])

    def edit(header):
        metadata = header["__metadata__"]
        del metadata["header_checksum"]
        metadata["checksum"] = digest.hexdigest()
        text = json.dumps(sorted(metadata.items()))
        metadata["header_checksum"] = hashlib.sha256(text.encode()).hexdigest()

    edit_headers(folder, edit)


def change_reader(draw, folder):
    """A file of the processor or the tokenizer, or the card: damaged, replaced by another, or gone."""
    name = draw(st.sampled_from([name for name in READER if name in folder]))
    raw, how = bytearray(folder[name]), draw(st.sampled_from(["flip", "cut", "other", "entry", "gone", "link"]))
    if how == "flip":
        for place in draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4, unique=True)):
            raw[place] ^= draw(st.integers(1, 255))
        folder[name] = bytes(raw)
    elif how == "cut":
        folder[name] = bytes(raw[: draw(st.integers(0, len(raw) - 1))])
    elif how == "entry" and name.endswith(".json"):
        values = json.loads(raw)
        values[draw(st.sampled_from([*values, "auto_map", "extra"]))] = draw(VALUES)
        folder[name] = json.dumps(values).encode()
    elif how == "gone":
        del folder[name]
    elif how == "link":
        folder[name] = Special("link", draw(st.sampled_from(["nowhere", "."])))
    else:
        folder[name] = draw(st.sampled_from(RAW_JSON))


DAMAGE = (flip_bytes, cut, write_length, write_header, write_index, name_shards)
WRITING = (change_metadata, change_config, change_config, change_config, change_config_text, name_base)
AROUND = (add_files, replace_code, replace_by_special, remove)
READER = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja", "README.md")
CHANGES = {change.__name__: change for change in (*DAMAGE, *WRITING, *AROUND, change_tensors)}


def any_of(draw, choices):
    """One of them, each as likely: hypothesis draws some far more often than others."""
    return random.Random(draw(st.integers(0, 2**32 - 1))).choice(choices)


@st.composite
def changed_folders(draw, folder):
    """(names of the changes made, changed folder) of a folder in memory."""
    folder, done = Folder(folder), []

    def make(*changes):
        change = any_of(draw, changes)
        done.append(change.__name__)
        change(draw, folder)

    if draw(st.booleans()):
        make(*WRITING)
        if draw(st.integers(0, 7)):
            seal(draw, folder)
        if draw(st.integers(0, 3)) == 0:
            make(*AROUND)
    elif draw(st.integers(0, 3)) == 0:
        make(change_tensors)
    else:
        make(*DAMAGE, *AROUND)
        if draw(st.integers(0, 3)) == 0 and adapter_files(folder):
            make(*AROUND)
    return done, folder


@st.composite
def changed_by(draw, change, folder):
    """The same by one `change`, of those that no checksum tells of."""
    folder = Folder(folder)
    change(draw, folder)
    return [change.__name__], folder


def write_out(folder, place):
    """Puts a folder of memory on the disk at `place`, a `Path`."""
    place.mkdir()
    for name, content in folder.items():
        path = place / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content.kind == "link":
            path.symlink_to(content.target)
        elif content.kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
