"""The adapter's file: what it holds, what is refused before anything is touched, what a killed save leaves behind."""

import base64
import contextlib
import copy
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, PAPER, batch, make_base, make_encoder, shake
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modeling_moextend import MoExtendForCausalLM, adapter_file_moextend, tensor_files_moextend
from modeling_moextend.adapter_file_moextend import FILE, INDEX, read_adapter, write_folder
from modeling_moextend.tensor_files_moextend import as_bytes, read_header, read_tensor
from modeling_moextend.tensors_moextend import fingerprint, same_fingerprint
from modeling_moextend.tools.base_weights import BASE_DTYPES, Checkpoint, Unusable
from modeling_moextend.tools.hashes import base_tensors_hash
from modeling_moextend.tools.inspection import read_headers
from modeling_moextend.training.resuming import load_adapter_tensors

PLAN = {1: [0], 3: [2, 5]}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PIXELS = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def extended(family="mixtral", plan=PLAN, encoder=None, dtype=torch.float32, seed=0, base=None, **choices):
    torch.manual_seed(seed)
    base = make_base(family, dtype) if base is None else base
    choices = {**PAPER, **choices}
    return shake(MoExtendForCausalLM.from_base(base, plan, encoder=encoder, **choices), seed=seed).eval()


def image_batch():
    inputs = batch()
    inputs["input_ids"][0, 2:6] = 96
    return inputs | {"pixel_values": PIXELS}


def logits(model, images=False):
    with torch.no_grad():
        return model(**(image_batch() if images else batch())).logits


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.adapter_tensors().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    different = [
        name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])
    ]
    assert not different


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(folder, change, **metadata):
    """Saves the folder's tensors again after `change(tensors)`, the rest of the header as it was."""
    path = Path(folder) / FILE
    tensors, old = load_file(path), metadata_of(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, path, old | metadata)


@pytest.fixture
def saved(tmp_path):
    model = extended()
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


# ---------------------------------------------------------------- guarantee 4: what is saved is what is loaded


@pytest.mark.parametrize("with_encoder", [False, True])
def test_save_and_load_give_bit_equal_logits(family, with_encoder, tmp_path):
    model = extended(family, encoder=make_encoder() if with_encoder else None)
    model.save_pretrained(tmp_path)
    again = MoExtendForCausalLM.from_pretrained(
        tmp_path, base=make_base(family), encoder=make_encoder() if with_encoder else None
    )
    assert_equal(state(again), state(model))
    assert not torch.equal(logits(model), make_base(family)(**batch()).logits)
    assert torch.equal(logits(again, with_encoder), logits(model, with_encoder))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("with_encoder", [False, True])
def test_over_a_bf16_base_logits_are_bit_equal_after_the_cast(family, with_encoder, tmp_path):
    encoder = make_encoder().bfloat16() if with_encoder else None
    model = extended(family, encoder=encoder, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in state(model).values()} == {torch.float32}, "new tensors train in float32"
    model.save_pretrained(tmp_path)
    for tensor in model.adapter_tensors().values():
        tensor.data = tensor.data.bfloat16()
    again = MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base(family, torch.bfloat16), encoder=encoder)
    assert_equal(state(again), state(model))
    assert torch.equal(logits(again, with_encoder), logits(model, with_encoder))


@pytest.mark.parametrize("adapter_dtype", ["float32", torch.float16])
def test_adapter_dtype_is_the_files_dtype(adapter_dtype, tmp_path):
    model = extended(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, adapter_dtype=adapter_dtype)
    dtype = torch.float32 if adapter_dtype == "float32" else adapter_dtype
    assert {tensor.dtype for tensor in load_file(tmp_path / FILE).values()} == {dtype}
    again = MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base(dtype=torch.bfloat16))
    wide = torch.promote_types(dtype, torch.bfloat16)  # no narrower than the file, no narrower than the base
    assert_equal(state(again), {name: tensor.to(dtype).to(wide) for name, tensor in state(model).items()})


def expected_names(family, with_encoder, calibration):
    """Name -> shape of the contract; E = 6, H = 32, I = 24, D = 16."""
    shapes = {}
    for layer, n in ((1, 1), (3, 2)):
        gate_up, down = ([n, 48, 32], [n, 32, 24]) if family != "gpt_oss" else ([n, 32, 48], [n, 24, 32])
        shapes |= {f"layers.{layer}.experts.gate_up_proj": gate_up, f"layers.{layer}.experts.down_proj": down}
        shapes[f"layers.{layer}.router.weight"] = [n, 32]
        if family == "gpt_oss":
            shapes[f"layers.{layer}.experts.gate_up_proj_bias"] = [n, 48]
            shapes[f"layers.{layer}.experts.down_proj_bias"] = [n, 32]
            shapes[f"layers.{layer}.router.bias"] = [n]
        if family == "deepseek_v3":
            shapes[f"layers.{layer}.router.correction_bias"] = [n]
        if calibration != "none":
            shapes[f"layers.{layer}.calibration.fc1.weight"] = [16, 6 + n]
            shapes[f"layers.{layer}.calibration.fc2.weight"] = [6 + n, 16]
    if with_encoder:
        shapes |= {"projector.linear_1.weight": [32, 16], "projector.linear_1.bias": [32]}
        shapes |= {"projector.linear_2.weight": [32, 32], "projector.linear_2.bias": [32]}
    return shapes


@pytest.mark.parametrize(("with_encoder", "calibration"), [(False, "all"), (True, "none")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_holds_exactly_the_new_tensors(family, with_encoder, calibration, dtype, tmp_path):
    model = extended(
        family, encoder=make_encoder().to(dtype) if with_encoder else None, dtype=dtype, calibration=calibration
    )
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    assert {name: list(t.shape) for name, t in tensors.items()} == expected_names(family, with_encoder, calibration)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    raw = (tmp_path / FILE).read_bytes()
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert len(raw) == header + numbers * dtype.itemsize
    assert model.adapter_bytes() == numbers * dtype.itemsize
    code = {path.name for path in Path(adapter_file_moextend.__file__).parent.glob("*_moextend.py")}
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", FILE} | code


def test_an_ungated_familys_experts_are_named_up_proj(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "nemotron_h",
        vocab_size=96,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layers_block_type=["moe", "attention"],
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
        intermediate_size=24,
    )
    base = AutoModelForCausalLM.from_config(config).eval()
    model = extended(plan={0: [1, 2]}, base=copy.deepcopy(base), calibration="none")
    model.save_pretrained(tmp_path)
    shapes = {name: list(tensor.shape) for name, tensor in load_file(tmp_path / FILE).items()}
    assert shapes["layers.0.experts.up_proj"] == [2, 24, 32] and shapes["layers.0.experts.down_proj"] == [2, 32, 24]
    assert shapes.keys() == {f"layers.0.{n}" for n in ("experts.up_proj", "experts.down_proj")} | {
        f"layers.0.router.{n}" for n in ("weight", "correction_bias")
    }
    again = MoExtendForCausalLM.from_pretrained(tmp_path, base=base)
    assert torch.equal(logits(again), logits(model))


def test_the_header_says_what_the_contract_says(saved):
    model, folder = saved
    metadata = metadata_of(folder / FILE)
    assert metadata["format"] == "pt" and metadata["moextend_format"] == "1"
    assert json.loads(metadata["config"]) == json.loads((folder / "config.json").read_text())
    assert metadata["base_fingerprint"] == model.config.base_fingerprint
    assert len(base64.b64decode(metadata["base_fingerprint"])) == 4 * 1024
    assert all(isinstance(value, str) for value in metadata.values())


def test_after_loading_only_the_adapters_tensors_are_trainable(saved):
    _, folder = saved
    model = MoExtendForCausalLM.from_pretrained(folder, base=make_base("mixtral"))
    numbers = sum(tensor.numel() for tensor in load_file(folder / FILE).values())
    assert model.num_parameters(only_trainable=True) == numbers
    assert not model.training


def test_a_file_is_read_the_same_whatever_the_default_device_is(saved, tmp_path):
    """On another one than the CPU it was called damaged; to load a model there is transformers' affair."""
    folder = saved[1]
    make_base().save_pretrained(tmp_path / "base")
    expected = read_adapter(folder).tensors
    with torch.device("meta"):
        found = read_adapter(folder).tensors
        with pytest.raises(RuntimeError, match="meta device context manager"):
            MoExtendForCausalLM.from_pretrained(folder, base=tmp_path / "base")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_loaded_tensors_do_not_hang_on_the_file(saved):
    model, folder = saved
    again = MoExtendForCausalLM.from_pretrained(folder, base=make_base())
    before = state(again)
    with open(folder / FILE, "r+b") as file:  # the same file, overwritten in place
        size = len(file.read())
        file.seek(0)
        file.write(b"\0" * size)
    assert_equal(state(again), before)


def read_while_it_is_written(read, path, seconds=1.5):
    """Exit code of a process that calls `read()` time and again while another writes the file at `path` anew, in place
    as `cp` does; and what it was refused with."""
    raw, (texts, writer) = path.read_bytes(), os.pipe()
    reader, end = os.fork(), time.time() + seconds
    if not reader:
        code, refused = 1, set()
        with contextlib.suppress(BaseException):
            while time.time() < end:
                try:
                    read()
                except ValueError as error:
                    refused.add(str(error))
            os.write(writer, "\n".join(refused)[:50_000].encode())
            code = 0
        os._exit(code)
    os.close(writer)
    while time.time() < end:
        path.write_bytes(raw)
    code = os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1])
    with open(texts, encoding="utf-8", errors="replace") as file:
        return code, file.read().splitlines()


def test_a_file_that_is_overwritten_while_it_is_read_is_an_error_and_no_signal(saved, tmp_path):
    _, folder = saved
    code, refused = read_while_it_is_written(lambda: read_adapter(folder), folder / FILE)
    assert code == 0 and refused and all(f"{FILE} is damaged or truncated" in text for text in refused), refused
    make_base().save_pretrained(tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"

    def read_base():
        checkpoint = Checkpoint(tmp_path / "base")
        [checkpoint.tensor(key) for key in checkpoint.paths]

    code, refused = read_while_it_is_written(read_base, weights)
    assert code == 0 and refused and all(f"{weights} is damaged or truncated" in text for text in refused), refused


@pytest.mark.parametrize("change", ["cut", "longer", "same size", "replaced"])
def test_tensors_of_two_states_of_a_file_are_never_mixed(change, saved):
    _, folder = saved
    path, raw = folder / FILE, (folder / FILE).read_bytes()
    with open(path, "rb") as file:
        header = read_header(file)
        assert read_tensor(file, header, "layers.1.router.weight").shape == (1, 32)
        time.sleep(0.01)  # some file systems count in hundredths of a second
        if change == "replaced":  # by rename, as we save: what is open is whole
            (folder / "other").write_bytes(bytes(len(raw)))
            os.replace(folder / "other", path)
            assert read_tensor(file, header, "layers.3.router.weight").shape == (2, 32)
            return
        path.write_bytes({"cut": raw[:-1], "longer": raw + b"\0", "same size": bytes(len(raw))}[change])
        with pytest.raises(ValueError, match="it was overwritten while it was read"):
            read_tensor(file, header, "layers.3.router.weight")


def test_an_adapter_of_two_states_of_its_file_is_refused(saved, monkeypatch):
    size = (saved[1] / FILE).stat().st_size
    states = itertools.chain([(1, size, 0)] * 3, itertools.repeat((2, size, 0)))  # written to after the second tensor
    monkeypatch.setattr(tensor_files_moextend, "state_of", lambda file: next(states))
    with pytest.raises(ValueError, match=f"{FILE} is damaged or truncated: 'it was overwritten while it was read'"):
        read_adapter(saved[1])


def test_a_checkpoint_that_is_overwritten_after_it_was_opened_is_refused(tmp_path):
    make_base().save_pretrained(tmp_path)
    checkpoint, weights = Checkpoint(tmp_path), tmp_path / "model.safetensors"
    key = next(iter(checkpoint.paths))
    indices, values = torch.tensor([7, 0, 3]), load_file(weights)[key]
    assert torch.equal(checkpoint.values_of(key, values.shape, indices), values.reshape(-1)[indices])
    time.sleep(0.01)
    weights.write_bytes(weights.read_bytes())
    for read in (checkpoint.tensor, lambda key: checkpoint.values_of(key, values.shape, indices)):
        with pytest.raises(Unusable, match=r"model.safetensors is damaged or truncated \(it was overwritten"):
            read(key)


def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path):
    tensors = {"F32": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    for name, dtype in BASE_DTYPES.items():
        values = torch.arange(48, dtype=torch.uint8)
        tensors[f"{name}.x"] = (values % 2 == 0 if dtype == torch.bool else values.view(dtype)).reshape(2, -1)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert list(checkpoint.paths) == sorted(tensors)
    for key, tensor in tensors.items():
        for found in (checkpoint.tensor(key), checkpoint.empty(key)):
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert as_bytes(checkpoint.tensor(key)).tobytes() == as_bytes(tensor).tobytes()


HEADERS = {  # what safetensors itself refuses, and a little more
    "gap": ({"a": ["F32", [1], [0, 4]], "b": ["F32", [1], [8, 12]]}, 12, "a tensor begins at byte 8, not at 4"),
    "overlap": ({"a": ["F32", [1], [0, 4]], "b": ["F32", [1], [0, 4]]}, 4, "a tensor begins at byte 0, not at 4"),
    "backwards": ({"a": ["F32", [1], [0, -4]]}, 0, "a tensor begins at byte 0"),
    "too few bytes": ({"a": ["F32", [2], [0, 8]]}, 4, "bytes are needed, and it has"),
    "too many bytes": ({"a": ["F32", [2], [0, 8]]}, 12, "bytes are needed, and it has"),
    "shape": ({"a": ["F32", [3], [0, 8]]}, 8, r"a has 8 bytes, which are not \[3\] of torch.float32"),
    "negative": ({"a": ["F32", [-1, -2], [0, 8]]}, 8, r"a has the shape \[-1, -2\]"),
    "fractions": ({"a": ["F32", [2.0], [0, 8]]}, 8, r"a has the shape \[2.0\]"),
    "text": ({"a": ["F32", ["x" * 9, 10**9], [0, 8]]}, 8, "a has the shape"),
    "huge": ({"a": ["F32", [0, 2**63], [0, 0]]}, 0, "a has the shape"),
    "many": ({"a": ["F32", [10**18] * 5000, [0, 0]]}, 0, "a has the shape"),
    "three offsets": ({"a": ["F32", [1], [0, 4, 4]]}, 4, "damaged or truncated"),
    "offsets of text": ({"a": ["F32", [1], ["0", "4"]]}, 4, "damaged or truncated"),
    "dtype": ({"a": ["F6_E3M2", [4], [0, 3]]}, 3, "wrong dtype: a is 'F6_E3M2'; allowed: F64, F32"),
    "dtype of a list": ({"a": [["F32"], [1], [0, 4]]}, 4, "damaged or truncated"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_does_not_fit_its_file_is_refused(name, tmp_path):
    entries, size, message = HEADERS[name]
    entries = {
        key: dict(zip(("dtype", "shape", "data_offsets"), entry, strict=True)) for key, entry in entries.items()
    }
    text = json.dumps({"__metadata__": {"moextend_format": "1"}, **entries}).encode()
    (tmp_path / FILE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(ValueError, match=f"{FILE} is damaged or truncated.*Nothing was loaded"):
        read_adapter(tmp_path)
    with pytest.raises(ValueError, match=f"{FILE} is damaged or truncated.*Nothing was loaded") as error:
        read_headers(tmp_path, {})
    assert re.search(message, str(error.value)), error.value


def test_aligned_only_adapters_hold_the_projector_and_extend_later(tmp_path):
    torch.manual_seed(0)
    aligned = MoExtendForCausalLM.from_base(make_base(), {}, encoder=make_encoder())
    aligned.save_pretrained(tmp_path)
    assert all(name.startswith("projector.") for name in load_file(tmp_path / FILE))
    again = MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base(), encoder=make_encoder())
    assert_equal(state(again), state(aligned))
    again.extend(PLAN)
    again.save_pretrained(tmp_path)
    third = MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base(), encoder=make_encoder())
    assert torch.equal(logits(third, images=True), logits(again.eval(), images=True))


# ---------------------------------------------------------------- shards


def test_sharded_adapters_are_bit_equal(tmp_path):
    model = extended(encoder=make_encoder())
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    shards = {path.name for path in tmp_path.glob("moextend_adapter-*.safetensors")}
    index = json.loads((tmp_path / INDEX).read_text())
    assert len(shards) > 2 and set(index["weight_map"].values()) == shards
    assert set(index["weight_map"]) == set(state(model)) and not (tmp_path / FILE).exists()
    again = MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base(), encoder=make_encoder())
    assert_equal(state(again), state(model))
    assert torch.equal(logits(again, images=True), logits(model, images=True))


def test_a_missing_shard_is_named(tmp_path):
    extended().save_pretrained(tmp_path, max_shard_size="5KB")
    gone = sorted(tmp_path.glob("moextend_adapter-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of [0-9]+ adapter files: {gone.name}"):
        MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base())


def test_shards_of_two_adapters_are_never_mixed(tmp_path):
    for seed in (0, 1):
        extended(seed=seed).save_pretrained(tmp_path / str(seed), max_shard_size="5KB")
    ours, theirs = (sorted((tmp_path / str(seed)).glob("moextend_adapter-*")) for seed in (0, 1))
    shutil.copyfile(theirs[0], ours[0])
    with pytest.raises(
        ValueError, match=f"The adapter is damaged or truncated: .* is of another save than .*{ours[0].name}"
    ):
        MoExtendForCausalLM.from_pretrained(tmp_path / "0", base=make_base())


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../outside.safetensors"}}',
        '{"weight_map": {"a": "moextend_adapter/../../outside.safetensors"}}',
        '{"weight_map": {"a": "model.safetensors"}}',
    ],
)
def test_a_damaged_index_is_refused(saved, text):
    _, folder = saved
    shutil.copyfile(folder / FILE, folder.parent / "outside.safetensors")
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"{INDEX} is damaged.*Nothing was loaded"):
        MoExtendForCausalLM.from_pretrained(folder, base=make_base())


# ---------------------------------------------------------------- guarantee 5: refused before anything is touched


def assert_untouched(folder, message, error=ValueError):
    """Loading fails with `message`; neither the base it was given nor a live model is touched."""
    base = make_base()
    classes = [type(module) for module in base.modules()]
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    trained = [parameter.requires_grad for parameter in base.parameters()]
    with pytest.raises(error, match=message):
        MoExtendForCausalLM.from_pretrained(folder, base=base)
    assert [type(module) for module in base.modules()] == classes
    assert [parameter.requires_grad for parameter in base.parameters()] == trained
    assert_equal(dict(base.state_dict()), before)
    live = extended(seed=7)
    own, pointers = state(live), {name: tensor.data_ptr() for name, tensor in live.adapter_tensors().items()}
    with pytest.raises(error, match=message):
        load_adapter_tensors(live, folder)
    assert_equal(state(live), own)
    assert {name: tensor.data_ptr() for name, tensor in live.adapter_tensors().items()} == pointers


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.3, 0.6, 0.999, -1])
def test_truncated_files_are_refused(saved, keep):
    _, folder = saved
    raw = (folder / FILE).read_bytes()
    keep = int(keep * len(raw)) if isinstance(keep, float) else keep
    (folder / FILE).write_bytes(raw[:keep])
    assert_untouched(folder, f"{FILE} is damaged or truncated.*Nothing was loaded")


def test_a_longer_file_is_refused(saved):
    _, folder = saved
    with open(folder / FILE, "ab") as file:
        file.write(b"\0")
    assert_untouched(folder, "is damaged or truncated")


def test_no_flipped_byte_of_the_header_gets_through(saved):
    model, folder = saved
    raw = bytearray((folder / FILE).read_bytes())
    size = struct.unpack("<Q", raw[:8])[0]
    key = bytes(raw).index(b'"header_checksum"')  # with another key the check is gone, and nothing else is
    generator = torch.Generator().manual_seed(0)
    places = [*range(8), *torch.randint(8, 8 + size, (250,), generator=generator).tolist()]
    places += list(range(bytes(raw).index(b'"layers.1'), bytes(raw).index(b'"layers.1') + 120))
    expected, live = state(model), model.adapter_tensors()
    passed = []
    for place in places:
        if key <= place < key + 17:
            continue
        damaged = bytearray(raw)
        damaged[place] ^= 0x01 if damaged[place] != 0x20 else 0x08
        (folder / FILE).write_bytes(damaged)
        try:
            adapter_file_moextend.check_tensors(live, read_adapter(folder))
            passed.append(place)
        except ValueError:
            pass
    assert not passed, [bytes(raw[place - 20 : place + 5]) for place in passed[:3]]
    (folder / FILE).write_bytes(raw)
    assert_equal(read_adapter(folder).tensors, expected)


def test_no_flipped_byte_of_the_data_gets_through(saved):
    _, folder = saved
    raw = (folder / FILE).read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    for place in (start, (start + len(raw)) // 2, len(raw) - 1):
        damaged = bytearray(raw)
        damaged[place] ^= 0x10
        (folder / FILE).write_bytes(damaged)
        assert_untouched(folder, "The adapter is damaged or truncated: its tensors do not match the checksum")


def test_a_missing_tensor_is_named(saved):
    _, folder = saved
    rewrite(folder, lambda tensors: tensors.pop("layers.3.router.weight"))
    assert_untouched(folder, r"does not fit the model; nothing was loaded.\n  missing: layers.3.router.weight$")


def test_an_unexpected_tensor_is_named(saved):
    _, folder = saved
    rewrite(folder, lambda tensors: tensors.update({"layers.2.router.weight": torch.zeros(1)}))
    assert_untouched(folder, r"nothing was loaded.\n  unexpected: layers.2.router.weight$")


def test_a_wrong_shape_is_named_with_both_shapes(saved):
    _, folder = saved
    rewrite(folder, lambda tensors: tensors.update({"layers.1.router.weight": torch.zeros(32, 1)}))
    message = r"wrong shape: layers.1.router.weight is \(32, 1\), the model needs \(1, 32\)$"
    assert_untouched(folder, message)


def test_all_problems_are_named_in_one_error(saved):
    _, folder = saved

    def change(tensors):
        del tensors["layers.1.router.weight"], tensors["layers.3.experts.down_proj"]
        tensors["surprise"] = torch.zeros(2)
        tensors["layers.3.router.weight"] = torch.zeros(3, 32)

    rewrite(folder, change)
    names = "missing: layers.1.router.weight\n  missing: layers.3.experts.down_proj\n  unexpected: surprise\n"
    names += r"  wrong shape: layers.3.router.weight is \(3, 32\), the model needs \(2, 32\)$"
    assert_untouched(folder, names)


def test_a_newer_format_is_refused_by_name(saved):
    _, folder = saved
    rewrite(folder, lambda tensors: None, moextend_format="3")
    assert_untouched(folder, "has moextend_format 3; this version reads up to 2. Update moextend")


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"moextend_format": "1"}, {"moextend_format": "one"}])
def test_other_safetensors_files_are_refused(saved, metadata):
    _, folder = saved
    save_file({"a": torch.zeros(1)}, folder / FILE, metadata)
    assert_untouched(folder, "is damaged or truncated: its header lacks .*no MoExtend adapter")


def test_a_header_without_checksums_is_read(saved):
    model, folder = saved
    tensors, metadata = load_file(folder / FILE), metadata_of(folder / FILE)
    del metadata["checksum"], metadata["header_checksum"]
    save_file(tensors, folder / FILE, metadata)
    again = MoExtendForCausalLM.from_pretrained(folder, base=make_base())
    assert torch.equal(logits(again), logits(model))


def test_a_folder_without_an_adapter_says_so(tmp_path):
    assert_untouched(tmp_path, f"holds no MoExtend adapter: neither {FILE} nor {INDEX} is there", OSError)
    make_base().save_pretrained(tmp_path)
    assert_untouched(tmp_path, "holds no MoExtend adapter", OSError)


def test_the_headers_config_wins_over_a_stale_one(saved):
    model, folder = saved
    stale = json.loads((folder / "config.json").read_text())
    stale |= {"extended_layers": {"0": [4]}, "calibration": "none", "base_model_name_or_path": "/gone"}
    (folder / "config.json").write_text(json.dumps(stale))
    again = MoExtendForCausalLM.from_pretrained(folder, base=make_base())
    assert again.config.extended_layers == PLAN and again.config.calibration == "all"
    assert torch.equal(logits(again), logits(model))
    (folder / "config.json").unlink()
    assert torch.equal(logits(MoExtendForCausalLM.from_pretrained(folder, base=make_base())), logits(model))


def test_a_base_that_is_gone_or_unknown_asks_for_base(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    make_encoder().save_pretrained(tmp_path / "encoder")
    model = MoExtendForCausalLM.from_base(str(tmp_path / "base"), PLAN, encoder=str(tmp_path / "encoder"))
    model.save_pretrained(tmp_path / "adapter")
    assert MoExtendForCausalLM.from_pretrained(tmp_path / "adapter").config.extended_layers == PLAN
    (tmp_path / "encoder").rename(tmp_path / "eyes")
    with pytest.raises(OSError, match=r"The adapter's encoder '.*encoder' can't be loaded: pass encoder=<folder or"):
        MoExtendForCausalLM.from_pretrained(tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(OSError, match=r"The adapter's base '.*base' can't be loaded: pass base=<folder or Hub id>"):
        MoExtendForCausalLM.from_pretrained(tmp_path / "adapter", encoder=str(tmp_path / "eyes"))
    again = MoExtendForCausalLM.from_pretrained(
        tmp_path / "adapter", base=str(tmp_path / "moved"), encoder=str(tmp_path / "eyes")
    )
    assert torch.equal(logits(again), logits(model.eval()))
    extended().save_pretrained(tmp_path / "nameless")  # attached to a base without a place
    with pytest.raises(ValueError, match="does not say where its base lies: pass base="):
        MoExtendForCausalLM.from_pretrained(tmp_path / "nameless")


def test_a_different_base_is_refused_unless_asked_for(saved):
    _, folder = saved
    torch.manual_seed(11)
    other = type(make_base())(make_base().config).eval()
    with pytest.raises(ValueError, match="This is a different base than .*Pass base=.*check_base=False loads it"):
        MoExtendForCausalLM.from_pretrained(folder, base=other)
    with pytest.raises(ValueError, match="This is a different base"):
        MoExtendForCausalLM.from_pretrained(folder, base=make_base("gpt_oss"))
    model = MoExtendForCausalLM.from_pretrained(folder, base=other, check_base=False)
    assert logits(model).isfinite().all()


def test_a_different_encoder_is_refused_unless_asked_for(tmp_path):
    extended(encoder=make_encoder()).save_pretrained(tmp_path)
    other = make_encoder()
    torch.manual_seed(12)
    other = type(other)(other.config)
    with pytest.raises(ValueError, match="This is a different encoder than .*Pass encoder=.*check_base=False"):
        MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base(), encoder=other)
    MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base(), encoder=other, check_base=False)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"plan": {2: [1]}}, r"extended_layers: the adapter's \{.*the model's \{2: \[1\]\}"),
        ({"calibration": "routed"}, "calibration: the adapter's '.*', the model's 'routed'"),
    ],
)
def test_live_tensors_are_replaced_only_by_those_of_the_same_kind(saved, choices, message):
    _, folder = saved
    live = extended(**choices)
    own = state(live)
    with pytest.raises(ValueError, match=f"(?s)does not belong to this model; nothing was loaded.*{message}"):
        load_adapter_tensors(live, folder)
    assert_equal(state(live), own)


def test_live_tensors_of_another_base_are_replaced_only_if_asked_for(saved):
    model, folder = saved
    torch.manual_seed(11)
    live = extended(base=type(make_base())(make_base().config).eval())
    with pytest.raises(ValueError, match="(?s)does not belong.*base_fingerprint: .*check_base=False"):
        load_adapter_tensors(live, folder)
    load_adapter_tensors(live, folder, check_base=False)
    assert_equal(state(live), state(model))


def test_loading_info_is_given_where_asked_for(saved):
    model, folder = saved
    again, info = MoExtendForCausalLM.from_pretrained(folder, base=make_base(), output_loading_info=True)
    assert torch.equal(logits(again), logits(model))
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_base_that_is_an_adapters_folder_is_refused(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    MoExtendForCausalLM.from_base(str(tmp_path / "base"), PLAN).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is extended already"):
        MoExtendForCausalLM.from_base(str(tmp_path / "adapter"), PLAN)


def test_unknown_arguments_of_save_pretrained_are_refused_by_name(tmp_path):
    model = extended()
    with pytest.raises(TypeError, match="unexpected keyword arguments: adapter_dtyp, bogus"):
        model.save_pretrained(tmp_path, bogus=1, adapter_dtyp="float32")
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, state_dict={}, safe_serialization=True, is_main_process=True, token=None)


def test_a_base_of_another_family_brings_its_own_config_and_rule(tmp_path):
    extended(family="qwen3_moe", calibration="none").save_pretrained(tmp_path)
    base = make_base("olmoe")
    with pytest.raises(ValueError, match="This is a different base"):
        MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base("olmoe"))
    model = MoExtendForCausalLM.from_pretrained(tmp_path, base=base, check_base=False)
    assert model.config.text_config.model_type == "olmoe" and not model.config.routing_rule["renormalise"]


def test_the_stored_rule_is_compared_with_the_routers_own(tmp_path):
    extended(family="qwen3_moe").save_pretrained(tmp_path)
    base = make_base("qwen3_moe")
    for layer in base.model.layers:
        layer.mlp.gate.norm_topk_prob = False
    with pytest.raises(
        ValueError,
        match="Layer 1 of qwen3_moe .*renormalise=True.*weights are made otherwise.*base that the adapter was made on",
    ):
        MoExtendForCausalLM.from_pretrained(tmp_path, base=base)
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_adapters_that_store_three_entries_of_the_rule_are_read_for_ever(family, tmp_path):
    """As version 0.1.0 wrote them."""
    model = shake(extended(family=family, calibration="none"))
    whole = dict(model.config.routing_rule)
    model.config.routing_rule = {name: whole[name] for name in ("score", "renormalise", "scale")}
    model.save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "config.json").read_text())["routing_rule"]) == 3
    loaded = MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base(family))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.routing_rule == whole
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["routing_rule"] == whole


def test_a_base_with_fewer_layers_is_refused_by_name(saved):
    _, folder = saved
    config = copy.deepcopy(make_base().config)
    config.num_hidden_layers = 2
    with pytest.raises(ValueError, match=r"Layers \[3\] are not MoE layers of this base; its MoE layers are \[0, 1\]"):
        MoExtendForCausalLM.from_pretrained(folder, base=type(make_base())(config), check_base=False)


def test_a_base_that_is_extended_already_is_refused(saved):
    model, folder = saved
    for given in (model, model.base):
        with pytest.raises(ValueError, match=r"is extended already: .*model.detach\(\) returns"):
            MoExtendForCausalLM.from_pretrained(folder, base=given, check_base=False)
        with pytest.raises(ValueError, match="is extended already"):
            MoExtendForCausalLM.from_base(given, PLAN)
    MoExtendForCausalLM.from_pretrained(folder, base=model.detach())


def test_saving_into_the_bases_or_encoders_folder_is_refused(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    make_encoder().save_pretrained(tmp_path / "encoder")
    model = MoExtendForCausalLM.from_base(str(tmp_path / "base"), PLAN, encoder=str(tmp_path / "encoder"))
    for role in ("base", "encoder"):
        before = (tmp_path / role / "config.json").read_text()
        with pytest.raises(ValueError, match=f"is the folder of the adapter's {role}: save the adapter elsewhere"):
            model.save_pretrained(tmp_path / "base" / ".." / role)
        assert (tmp_path / role / "config.json").read_text() == before


# ---------------------------------------------------------------- fingerprints


@pytest.mark.parametrize("checkpoint", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_every_pair_of_dtypes_of_one_checkpoint_matches(checkpoint, scale, family):
    base = make_base(family)
    with torch.no_grad():
        for tensor in base.parameters():
            tensor.mul_(scale)  # 1e-4: below what fp16 holds exactly
    base.to(checkpoint)
    prints = [fingerprint(copy.deepcopy(base).to(dtype)) for dtype in DTYPES]
    assert all(same_fingerprint(one, other) for one in prints for other in prints)


@pytest.mark.parametrize("attached", DTYPES, ids=str)
@pytest.mark.parametrize("loaded", DTYPES, ids=str)
def test_one_checkpoint_loads_in_every_pair_of_dtypes(attached, loaded, tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    model = MoExtendForCausalLM.from_base(str(tmp_path / "base"), PLAN, dtype=attached)
    model.save_pretrained(tmp_path / "adapter")
    again = MoExtendForCausalLM.from_pretrained(tmp_path / "adapter", dtype=loaded)
    assert again.base.dtype == loaded
    dtypes = {name: tensor.dtype for name, tensor in again.adapter_tensors().items()}
    assert {dtypes.pop(name) for name in list(dtypes) if name.startswith("gate.")} == {torch.float32}
    assert set(dtypes.values()) == {torch.promote_types(attached, loaded)}
    assert logits(again).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slightly_different_checkpoint_does_not_match(dtype, family):
    """Loaded in one dtype, a change of one rounding step in some of the weights is found."""
    base, other = make_base(family, dtype), make_base(family, dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in other.parameters():
            change = 1 + 0.6 * torch.finfo(dtype).eps * (torch.rand(tensor.shape, generator=generator) < 0.1)
            tensor.copy_((tensor.double() * change.double()).to(dtype))
    assert not same_fingerprint(fingerprint(base), fingerprint(other))


def test_across_dtypes_a_change_of_two_rounding_steps_is_found(family):
    base, other = make_base(family), make_base(family)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.mul_(1 + 2 * torch.finfo(torch.bfloat16).eps)
    assert not same_fingerprint(fingerprint(base), fingerprint(other.bfloat16()))
    assert same_fingerprint(fingerprint(base), fingerprint(make_base(family, torch.bfloat16)))


def test_router_embedding_attention_and_experts_are_all_in_the_fingerprint(family):
    base = make_base(family).get_decoder()
    expected = fingerprint(base)
    touched = {}
    with torch.no_grad():
        for name, tensor in base.named_parameters():
            if tensor.dim() > 1:
                old = tensor.clone()
                tensor.add_(0.5)
                touched[name] = not same_fingerprint(expected, fingerprint(base))
                tensor.copy_(old)
    assert all(touched.values()), [name for name in touched if not touched[name]]
    kinds = ("embed_tokens", "attn", "experts")
    assert all(any(kind in name for name in touched) for kind in kinds)
    assert any(name.endswith((".gate.weight", ".router.weight")) or "router" in name for name in touched)


def test_attaching_does_not_change_the_fingerprint(family):
    model = extended(family)
    assert fingerprint(model.get_decoder()) == model.config.base_fingerprint == fingerprint(make_base(family).model)


# ---------------------------------------------------------------- guarantee 6: nothing unpickled, nothing else opened


def test_loading_unpickles_nothing(saved, monkeypatch, tmp_path):
    model, folder = saved
    make_base().save_pretrained(tmp_path / "base")

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    again = MoExtendForCausalLM.from_pretrained(folder, base=str(tmp_path / "base"))
    load_adapter_tensors(model, folder)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("allowed", [False, True])
def test_a_base_of_pickled_weights_is_refused_unless_asked_for(saved, allowed, tmp_path):
    model, folder = saved
    base = make_base()
    base.config.save_pretrained(tmp_path / "base")
    torch.save(base.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    if allowed:
        again = MoExtendForCausalLM.from_pretrained(folder, base=str(tmp_path / "base"), use_safetensors=False)
        assert torch.equal(logits(again), logits(model))
        return
    with pytest.raises(OSError, match="can't be loaded: pass base=.*or use_safetensors=False.*model.safetensors"):
        MoExtendForCausalLM.from_pretrained(folder, base=str(tmp_path / "base"))
    with pytest.raises(OSError, match="model.safetensors"):
        MoExtendForCausalLM.from_base(str(tmp_path / "base"), PLAN)


OPENED = """
import os, sys
import transformers.modeling_utils
from modeling_moextend import MoExtendForCausalLM, adapter_file_moextend, tensor_files_moextend
root, opened = sys.argv[1], []


def recording(safe_open):  # it opens files without telling Python
    return lambda path, *args, **kwargs: opened.append(str(path)) or safe_open(path, *args, **kwargs)


transformers.modeling_utils.safe_open = recording(transformers.modeling_utils.safe_open)
MoExtendForCausalLM.from_pretrained(root + "/adapter")  # the first time also imports
opened.clear()
sys.addaudithook(lambda event, args: event == "open" and isinstance(args[0], (str, bytes)) and opened.append(args[0]))
MoExtendForCausalLM.from_pretrained(root + "/adapter")
ignored = (*{os.path.realpath(path) for path in (sys.prefix, sys.base_prefix)}, os.getcwd(), "/proc", "/dev", "/sys")
for path in sorted({os.path.realpath(os.fsdecode(path)) for path in opened}):
    if not path.startswith(ignored):
        print(os.path.relpath(path, root))
"""


def check_opened(root):
    """Loading root/adapter opens weights there, in root/base and root/encoder, and nothing pickled, no code."""
    for stray in ("training_args.bin", "optimizer.pt", "pytorch_model.bin"):
        (root / "adapter" / stray).write_bytes(b"no weights")
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}:{here}", "HF_HOME": str(root / "home")}
    command = [sys.executable, "-c", OPENED, str(root)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=here)
    assert run.returncode == 0, run.stderr[-2000:]
    opened = run.stdout.split()
    assert {path.split("/")[0] for path in opened} == {"adapter", "base", "encoder"}
    weights = {"base/model.safetensors", "encoder/model.safetensors", f"adapter/{FILE}"}
    assert weights <= set(opened)
    assert not any(path.endswith((".bin", ".pt", ".py")) for path in opened), opened


@pytest.mark.slow
def test_only_adapter_base_and_encoder_are_opened(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    make_encoder().save_pretrained(tmp_path / "encoder")
    model = MoExtendForCausalLM.from_base(str(tmp_path / "base"), PLAN, encoder=str(tmp_path / "encoder"))
    model.save_pretrained(tmp_path / "adapter")
    check_opened(tmp_path)


# ---------------------------------------------------------------- guarantee 7: killed in mid-save


def killed_save(save, step, count_code):
    """Runs `save()` in a forked process that is killed at its `step`-th step: before a call that changes the folder,
    or with half of a file written. Returns False where the save ended before that step.

    `count_code=False` counts no steps of the shipped code's files.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the save failed by itself"
        return os.WIFSIGNALED(status)
    try:
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        left = iter(range(step, -1, -1))

        def tick():
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def watched(call, file=None):
            def run(*args, **kwargs):
                if not count_code and any("_moextend.py" in str(argument) for argument in args):
                    return call(*args, **kwargs)
                tick()
                result = call(*args, **kwargs)
                if file is not None:
                    path, size = args[file], os.path.getsize(args[file])
                    content = Path(path).read_bytes()
                    os.truncate(path, size // 2)
                    tick()
                    Path(path).open("wb").write(content)
                return result

            return run

        adapter_file_moextend.save_file = watched(adapter_file_moextend.save_file, file=1)
        shutil.copyfile = watched(shutil.copyfile, file=1)
        Path.write_text = watched(Path.write_text, file=0)
        os.replace = watched(os.replace)
        Path.unlink = watched(Path.unlink)
        save()
        os._exit(0)
    except BaseException:
        os._exit(1)


def which(folder, old, new):
    """ "old" or "new": the adapter that the folder loads as; anything else fails."""
    stored = read_adapter(folder)
    for name, model in (("old", old), ("new", new)):
        if stored.values["extended_layers"] == model.config.to_dict()["extended_layers"]:
            shapes = {key: tensor.shape for key, tensor in model.adapter_tensors().items()}
            adapter_file_moextend.check_tensors(shapes, stored)
            assert_equal(stored.tensors, {key: tensor.detach() for key, tensor in model.adapter_tensors().items()})
            return name
    raise AssertionError("neither the old adapter nor the new one")


KILLED = [("50GB", "20KB", False), ("20KB", "50GB", False)]
KILLED += [pytest.param(size, size, False, marks=pytest.mark.slow) for size in ("50GB", "20KB")]
KILLED.append(pytest.param("50GB", "50GB", True, marks=pytest.mark.slow))  # at each of the shipped files as well


def make_parts():
    return {"base": make_base()}


def kill_at_every_step(old, new, tmp_path, before="50GB", after="50GB", count_code=False, parts=make_parts):
    """Saves `new` over `old`, killed at each step: the folder loads as one of the two, and takes the next save."""
    old.save_pretrained(tmp_path / "start", max_shard_size=before)
    code = sum(1 for _ in (tmp_path / "start").glob("*_moextend.py")) if count_code else 0
    found, step, clean = [], 0, None
    while True:
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "start", folder)
        if not killed_save(lambda folder=folder: new.save_pretrained(folder, max_shard_size=after), step, count_code):
            break
        found.append(which(folder, old, new))
        again = MoExtendForCausalLM.from_pretrained(folder, **parts())  # whatever config.json says
        assert again.config.extended_layers == (old if found[-1] == "old" else new).config.extended_layers
        new.save_pretrained(folder, max_shard_size=after)
        assert which(folder, old, new) == "new"
        names = {path.name.split("-")[0] for path in folder.iterdir()}
        clean = clean or names
        assert names == clean and not list(folder.glob("*.tmp")), "something was left behind"
        assert len(list(folder.glob("moextend_adapter*"))) == (1 if after == "50GB" else len(shards_of(folder)) + 1)
        shutil.rmtree(folder)
        step += 1
    assert found == sorted(found, reverse=True) and set(found) == {"old", "new"}, "the change is one moment"
    assert step >= 4 * code + 8, "every copy, write, rename and removal was a step"


@pytest.mark.parametrize(("before", "after", "count_code"), KILLED)
def test_a_killed_save_leaves_the_old_adapter_or_the_new_one(before, after, count_code, tmp_path):
    old, new = extended(seed=1), extended(plan={0: [1], 3: [2, 5]}, seed=2)  # as many shards, and as large
    kill_at_every_step(old, new, tmp_path, before, after, count_code)


def shards_of(folder):
    return set(json.loads((folder / INDEX).read_text())["weight_map"].values())


def test_a_failing_save_leaves_the_old_adapter(saved, monkeypatch):
    model, folder = saved
    names = {path.name for path in folder.iterdir()}

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(adapter_file_moextend, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        extended(seed=4).save_pretrained(folder)
    assert which(folder, model, model) == "old"
    assert {path.name for path in folder.iterdir()} == names


def test_a_second_save_replaces_the_first_whole(tmp_path):
    one, two = extended(seed=1), extended(plan={2: [1]}, seed=2)
    config = two.config.published()
    for size in ("20KB", "50GB", "20KB", "20KB"):
        write_folder(tmp_path, state(one), one.config.published(), max_shard_size=size)
        write_folder(tmp_path, state(two), config, max_shard_size=size)
        assert which(tmp_path, one, two) == "new"


def test_base_and_encoder_are_bit_equal_after_saving_and_loading(tmp_path):
    base, encoder = make_base(), make_encoder()
    model = extended(base=base, encoder=encoder)
    before = base_tensors_hash(model)
    model.save_pretrained(tmp_path)
    load_adapter_tensors(model, tmp_path)
    assert base_tensors_hash(model) == before
    detached = model.detach()
    assert_equal(dict(detached.state_dict()), dict(make_base().state_dict()))
    assert len(FAMILIES) == 7


def test_what_is_read_from_a_file_is_what_the_model_holds(saved, monkeypatch):
    """No tensor of an adapter is in memory twice."""
    places, read = [], tensor_files_moextend.read_tensor

    def watched(*args):
        tensor = read(*args)
        places.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(adapter_file_moextend, "read_tensor", watched)
    model = MoExtendForCausalLM.from_pretrained(saved[1], base=make_base())
    assert places and sorted(places) == sorted(tensor.data_ptr() for tensor in model.adapter_tensors().values())
