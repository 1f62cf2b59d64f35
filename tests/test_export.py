"""Export: standalone and native checkpoints, what they need of memory, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import COMMON, FAMILIES, batch, make_base, make_encoder, rounding, shake
from families import known
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_push_to_hub import BASE
from test_push_to_hub import hub as hub
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_moextend import MoExtendConfig, MoExtendForCausalLM
from modeling_moextend.adapter_file_moextend import FILE, read_adapter, shipped_code, write_folder
from modeling_moextend.tensors_moextend import decode_fingerprint, fingerprint
from modeling_moextend.tools import merge as export
from modeling_moextend.tools import native as native_module
from modeling_moextend.tools.base_weights import Checkpoint, Unusable, checkpoint_fingerprint, skeleton
from modeling_moextend.tools.inspection import inspect_adapter
from modeling_moextend.tools.merge import merge
from modeling_moextend.tools.native import NUMBER

NATIVE = {"scope": "all", "selection": "compete", "calibration": "none"}
EVERY_LAYER = {layer: [1, 4] for layer in range(4)}
AS_NATIVE = {  # settings without which a family has no native form
    "olmoe": {"norm_topk_prob": True},
    "qwen2_moe": {"norm_topk_prob": True},
    "deepseek_v3": {"n_group": 1, "topk_group": 1},
}


def save_pair(
    root, family="mixtral", plan=EVERY_LAYER, dtype=torch.float32, encoder=None, config=(), save=(), **choices
):
    """Base and adapter in folders of `root`; returns the model in memory."""
    make_base(family, dtype=dtype, **dict(config)).save_pretrained(root / "base", max_shard_size="30KB", **dict(save))
    model = MoExtendForCausalLM.from_base(str(root / "base"), plan, encoder=encoder, **(choices or NATIVE))
    shake(model).eval().save_pretrained(root / "adapter")
    return MoExtendForCausalLM.from_pretrained(root / "adapter", encoder=encoder)


@torch.no_grad()
def logits(model, **inputs):
    return model(**{**batch(), **inputs}).logits


def assert_same_but_for_rounding(found, model):
    """The logits of `found`, a model of the base's own kind, are those of `model`.

    Both sum the same terms in products of another shape: E + N rows of a router at once, or E and then N. A router's
    logit is a sum of H terms; what rounding adds to it is the relative change of its score (softmax or sigmoid), so of
    what an expert gives. Each layer adds its own. All in all less than 1e-4, and new experts change logits by 0.1.
    """
    with model.record_routing() as records:
        expected = logits(model)
    largest = max(record.logits.abs().max().item() for record in records.values())
    config = model.base.config
    bound = config.num_hidden_layers * rounding(config.hidden_size) * largest * expected.abs().max().item()
    assert bound < 1e-4
    torch.testing.assert_close(logits(found), expected, rtol=0, atol=bound)


# ---------------------------------------------------------------- reading a checkpoint


def read_all(checkpoint, model, name, shape):
    return checkpoint.values(model, name, shape, torch.arange(shape.numel())).view(shape)


@pytest.mark.slow
def test_parameters_and_fingerprint_from_disk_are_those_of_the_loaded_base(base, tmp_path):
    base.save_pretrained(tmp_path, max_shard_size="30KB")
    checkpoint = Checkpoint(tmp_path)
    lazy = skeleton(checkpoint.config())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert checkpoint_fingerprint(checkpoint, lazy) == fingerprint(loaded.get_decoder())
    assert all(parameter.is_meta for parameter in lazy.parameters()), "nothing stays in memory"
    for name, parameter in base.named_parameters():
        assert torch.equal(read_all(checkpoint, lazy, name, parameter.shape), parameter)


@pytest.mark.parametrize("family", known("inkling2", "kimi_linear", "minimax_m3_vl"))
def test_parameters_of_checkpoints_that_interleave_or_split(family, tmp_path):
    """Experts with gate and up interleaved; a convolution in three parts; dense layers of two projections."""
    base = make_base(family)
    base.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    model = skeleton(checkpoint.config())
    decoder = dict.fromkeys(base.get_decoder().parameters())
    for name, parameter in base.named_parameters():
        if parameter in decoder:
            assert torch.equal(read_all(checkpoint, model, name, parameter.shape), parameter), name


def test_single_values_have_the_dtype_of_the_file(tmp_path):
    """A fingerprint leaves out what is no ordinary floating-point number."""
    make_base(dtype=torch.bfloat16).save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    model = skeleton(checkpoint.config())
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.experts.gate_up_proj"):
        values = checkpoint.values(model, name, model.get_parameter(name).shape, torch.tensor([0, 5]))
        assert values.dtype == torch.bfloat16
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    decoder = model.get_decoder()
    names = sorted(name for name, parameter in decoder.named_parameters() if parameter.dim() > 1)
    left_out = decode_fingerprint(checkpoint_fingerprint(checkpoint, model)).isnan().nonzero()[:, 0]
    assert len(left_out) and set((left_out % len(names)).tolist()) == {names.index(key.removeprefix("model."))}


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "model.layers.1.block_sparse_moe.experts.3.w2.weight"])
def test_a_base_that_lacks_a_tensor_or_has_another_is_refused(key, native, tmp_path):
    save_pair(tmp_path)
    shard = Checkpoint(tmp_path / "base").paths[key]
    tensors = load_file(shard)
    for tensor, problem in ((tensors.pop(key)[:-1], "as .*, the model needs"), (None, f"has no tensor {key}")):
        save_file(tensors if tensor is None else {**tensors, key: tensor.clone()}, shard, {"format": "pt"})
        with pytest.raises(Unusable, match=problem):
            merge(tmp_path / "adapter", tmp_path / "merged", native=native)
    assert not (tmp_path / "merged").exists()


def test_an_index_that_leads_elsewhere_is_refused(tmp_path):
    make_base().save_pretrained(tmp_path, max_shard_size="30KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside the checkpoint's folder: ../elsewhere"):
        Checkpoint(tmp_path)


# ---------------------------------------------------------------- standalone


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.slow
def test_a_standalone_checkpoint_needs_nothing_else(family, tmp_path):
    expected = logits(save_pair(tmp_path, family, {1: [0], 3: [2, 5]}, scope="all"))
    done = merge(tmp_path / "adapter", tmp_path / "merged")
    for name in ("base", "adapter"):
        shutil.rmtree(tmp_path / name)
    model = MoExtendForCausalLM.from_pretrained((tmp_path / "merged").rename(tmp_path / "moved"))
    assert torch.equal(logits(model), expected)
    files = [path for path in (tmp_path / "moved").rglob("*") if path.is_file()]
    assert done["kind"] == "standalone" and done["files"] == len(files)
    assert done["bytes"] == sum(path.stat().st_size for path in files)


def test_a_multimodal_base(tmp_path):
    model = save_pair(tmp_path, "qwen3_vl_moe", {1: [0]}, scope="all")
    expected = logits(model)
    merge(tmp_path / "adapter", tmp_path / "merged")
    shutil.rmtree(tmp_path / "base")
    assert torch.equal(logits(MoExtendForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_the_target_may_lie_in_a_folder_that_is_not_there_yet(tmp_path):
    save_pair(tmp_path)
    merge(tmp_path / "adapter", tmp_path / "some" / "where" / "merged")
    assert [path.name for path in (tmp_path / "some" / "where").iterdir()] == ["merged"]


def test_the_bases_files_are_copied_as_they_are(tmp_path):
    save_pair(tmp_path)
    (tmp_path / "base" / "LICENSE").write_text("of the base")
    (tmp_path / "base" / "tokenizer.json").write_text("base's")
    (tmp_path / "base" / "pytorch_model.bin").write_text("pickled")
    (tmp_path / "adapter" / "README.md").write_text("card")
    merge(tmp_path / "adapter", tmp_path / "merged")
    ours, theirs = tmp_path / "merged" / "base", tmp_path / "base"
    names = {path.name for path in theirs.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in ours.iterdir()} == names and len(names) > 10
    assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)
    assert (tmp_path / "merged" / "README.md").read_text() == "card"
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "base's", "the adapter had none"
    (tmp_path / "adapter" / "tokenizer.json").write_text("adapter's")
    merge(tmp_path / "adapter", tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "adapter's"
    assert (tmp_path / "again" / "base" / "tokenizer.json").read_text() == "base's"


def test_only_the_subfolder_is_new_in_the_config(tmp_path):
    save_pair(tmp_path)
    merge(tmp_path / "adapter", tmp_path / "merged")
    before, after = (read_adapter(tmp_path / name).values for name in ("adapter", "merged"))
    assert after == before | {"base_subfolder": "base"}
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == after
    assert load_file(tmp_path / "merged" / FILE).keys() == load_file(tmp_path / "adapter" / FILE).keys()


@pytest.fixture
def seeing(tmp_path):
    """A merged folder with an encoder; base, adapter and encoder are gone. (inputs with images, their logits)"""
    make_encoder().save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder" / "preprocessor_config.json").write_text("{}")
    model = save_pair(tmp_path, plan={1: [0]}, encoder=str(tmp_path / "encoder"), scope="modality")
    ids = batch()["input_ids"]
    ids[:, -6:-2] = model.config.image_token_id
    images = {"input_ids": ids, "pixel_values": torch.randn(3, 3, 16, 16)}
    expected = logits(model, **images)
    merge(tmp_path / "adapter", tmp_path / "merged")
    for name in ("base", "adapter", "encoder"):
        shutil.rmtree(tmp_path / name)
    return images, expected


def test_with_its_encoder(seeing, tmp_path):
    images, expected = seeing
    model = MoExtendForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(model, **images), expected)
    assert (logits(model, **{**images, "pixel_values": -images["pixel_values"]}) - expected).abs().max() > 1e-3
    assert (tmp_path / "merged" / "encoder" / "preprocessor_config.json").exists()
    config = read_adapter(tmp_path / "merged").values
    assert (config["base_subfolder"], config["encoder_subfolder"]) == ("base", "encoder")
    (tmp_path / "merged" / "encoder").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="encoder"):
        MoExtendForCausalLM.from_pretrained(tmp_path / "merged")
    model = MoExtendForCausalLM.from_pretrained(tmp_path / "merged", encoder=str(tmp_path / "elsewhere"))
    assert torch.equal(logits(model, **images), expected)


@pytest.mark.slow
def test_with_its_encoder_without_the_package(seeing, tmp_path):
    images, expected = seeing
    torch.save({**batch(), **images}, tmp_path / "images.pt")
    environment = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    found = run(SEE, str(tmp_path / "merged"), str(tmp_path / "images.pt"), environment=environment)
    assert torch.equal(torch.tensor(json.loads(found)), expected)


def test_a_merged_folder_as_a_further_adapter(seeing, tmp_path):
    """A standalone checkpoint is an adapter's folder as well; a native one is none."""
    images, expected = seeing
    model = MoExtendForCausalLM.from_base(str(tmp_path / "merged" / "base"), EVERY_LAYER, **NATIVE)
    model.save_pretrained(tmp_path / "text")
    model.load_adapter(tmp_path / "merged", adapter_name="sees")
    model.set_adapter("sees")
    assert torch.equal(logits(model.eval(), **images), expected)
    merge(tmp_path / "text", tmp_path / "native", native=True)
    with pytest.raises(OSError, match="native holds no MoExtend adapter"):
        model.load_adapter(tmp_path / "native", adapter_name="none")
    assert sorted(model.adapters) == ["default", "sees"]


def test_merging_a_merged_folder_again(tmp_path):
    expected = logits(save_pair(tmp_path))
    merge(tmp_path / "adapter", tmp_path / "merged")
    for name in ("base", "adapter"):
        shutil.rmtree(tmp_path / name)
    merge(tmp_path / "merged", tmp_path / "again")
    assert torch.equal(logits(MoExtendForCausalLM.from_pretrained(tmp_path / "again")), expected)


def test_base_given_by_the_user_wins(tmp_path):
    expected = logits(save_pair(tmp_path))
    merge(tmp_path / "adapter", tmp_path / "merged")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="base"):
        merge(tmp_path / "adapter", tmp_path / "again")
    merge(tmp_path / "adapter", tmp_path / "again", base=tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "merged" / "base")
    for name, options in (("again", {}), ("merged", {"base": str(tmp_path / "elsewhere")})):
        assert torch.equal(logits(MoExtendForCausalLM.from_pretrained(tmp_path / name, **options)), expected)


def test_what_is_saved_from_a_standalone_checkpoint_is_an_adapter(tmp_path):
    expected = logits(save_pair(tmp_path))
    merge(tmp_path / "adapter", tmp_path / "merged")
    model = MoExtendForCausalLM.from_pretrained(tmp_path / "merged")
    with pytest.raises(ValueError, match="standalone checkpoint with a base of its own: save the adapter elsewhere"):
        model.save_pretrained(tmp_path / "merged")
    model.save_pretrained(tmp_path / "saved")
    assert MoExtendConfig.from_pretrained(tmp_path / "saved").base_subfolder is None
    assert torch.equal(logits(MoExtendForCausalLM.from_pretrained(tmp_path / "saved")), expected)


# ---------------------------------------------------------------- where a base may lie


@pytest.mark.parametrize(
    "place", ["../base", "/etc", "base/../..", "base/", "", ".", "..", ".git", "a\\b", "a//b", 3, ["a"]]
)
def test_places_outside_the_folder_are_refused(place, tmp_path):
    for name in ("base_subfolder", "encoder_subfolder"):
        with pytest.raises(ValueError, match=f"{name}=.* must be a folder inside the adapter's own"):
            MoExtendConfig(**{name: place})


def test_a_file_that_leads_out_of_its_folder_is_refused(tmp_path):
    save_pair(tmp_path)
    tensors = read_adapter(tmp_path / "adapter").tensors
    config = MoExtendConfig.from_pretrained(tmp_path / "adapter")
    config.base_subfolder = "../base"  # past the check of the constructor, as an attacker would write it
    write_folder(tmp_path / "adapter", tensors, config)
    with pytest.raises(ValueError, match="base_subfolder='../base' must be a folder inside"):
        MoExtendForCausalLM.from_pretrained(tmp_path / "adapter")
    config.base_subfolder = "base"
    write_folder(tmp_path / "adapter", tensors, config)
    (tmp_path / "adapter" / "base").symlink_to(tmp_path / "base")
    with pytest.raises(ValueError, match="is a link that leads out of"):
        MoExtendForCausalLM.from_pretrained(tmp_path / "adapter")


def test_places_inside_the_folder_are_taken():
    for place in ("base", "parts/base-1.0", "base_2"):
        assert MoExtendConfig(base_subfolder=place).base_subfolder == place


# ---------------------------------------------------------------- whole or not at all


def test_something_at_the_target_is_left_alone(tmp_path):
    save_pair(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "file", "link", "base", "adapter"):
        with pytest.raises(FileExistsError, match=f"{name} exists already"):
            merge(tmp_path / "adapter", tmp_path / name)
    assert not list((tmp_path / "there").iterdir()) and (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("fails", ["write_folder", "copy_file"])
def test_a_merge_that_fails_leaves_nothing(fails, native, tmp_path, monkeypatch):
    save_pair(tmp_path)

    def fail(*args):
        raise OSError("No space left on device")

    if native and fails == "write_folder":
        monkeypatch.setattr(native_module, "write_text", fail)
    else:
        monkeypatch.setattr(export, fails, fail)
    with pytest.raises(OSError, match="No space left"):
        merge(tmp_path / "adapter", tmp_path / "merged", native=native)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_target_appears_last(tmp_path, monkeypatch):
    save_pair(tmp_path)
    rename, seen = os.rename, []

    def watch(source, target):
        seen.append({str(path.relative_to(source)) for path in Path(source).rglob("*")})
        assert not Path(target).exists() and Path(source).parent == Path(target).parent
        rename(source, target)

    monkeypatch.setattr(export.os, "rename", watch)
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert seen == [{str(path.relative_to(tmp_path / "merged")) for path in (tmp_path / "merged").rglob("*")}]


@pytest.mark.parametrize("native", [False, True])
def test_every_file_is_on_the_disk_before_the_target_appears(native, tmp_path, monkeypatch):
    """And anybody may read it who may read other files: safetensors alone would write for its user only."""
    save_pair(tmp_path)
    synced, fsync, rename, late = set(), os.fsync, os.rename, []

    def watch(source, target):
        late.extend(path for path in Path(source).rglob("*") if path.is_file() and path.stat().st_ino not in synced)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda number: (synced.add(os.fstat(number).st_ino), fsync(number)))
    monkeypatch.setattr(export.os, "rename", watch)
    merge(tmp_path / "adapter", tmp_path / "merged", native=native, max_shard_size="30KB")
    assert not late
    (tmp_path / "other").touch()
    files = [path for path in (tmp_path / "merged").rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {(tmp_path / "other").stat().st_mode}


def test_damaged_adapters_and_other_bases_are_refused(tmp_path):
    save_pair(tmp_path)
    other = make_base()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="different base than the adapter was made on"):
        merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "other")
    tensors = load_file(tmp_path / "adapter" / FILE)
    metadata = read_adapter(tmp_path / "adapter").metadata
    save_file({**tensors, "layers.0.router.weight": torch.zeros(2, 32)}, tmp_path / "adapter" / FILE, metadata)
    with pytest.raises(ValueError, match="damaged"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "other"]


def test_another_base_on_demand(tmp_path):
    save_pair(tmp_path)
    other = make_base()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    expected = logits(
        MoExtendForCausalLM.from_pretrained(tmp_path / "adapter", base=str(tmp_path / "other"), check_base=False)
    )
    merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "other", check_base=False)
    merged = MoExtendForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), expected)
    stored = read_adapter(tmp_path / "merged").values
    assert stored["base_model_name_or_path"] == str(tmp_path / "other"), "what is saved from it names this one"
    merge(tmp_path / "adapter", tmp_path / "native", base=tmp_path / "other", check_base=False, native=True)
    assert_same_but_for_rounding(AutoModelForCausalLM.from_pretrained(tmp_path / "native"), merged)


def test_another_base_with_another_rule_on_demand(tmp_path):
    save_pair(tmp_path, "olmoe")
    make_base("olmoe", norm_topk_prob=True).save_pretrained(tmp_path / "other")
    options = {"base": str(tmp_path / "other"), "check_base": False}
    expected = logits(MoExtendForCausalLM.from_pretrained(tmp_path / "adapter", **options))
    merge(tmp_path / "adapter", tmp_path / "merged", **options)
    assert torch.equal(logits(MoExtendForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_another_encoder_on_demand(tmp_path):
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path / "encoder")
    save_pair(tmp_path, plan={1: [0]}, encoder=str(tmp_path / "encoder"), scope="modality")
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.5)
    encoder.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="different encoder than the adapter was made on"):
        merge(tmp_path / "adapter", tmp_path / "merged", encoder=tmp_path / "other")
    merge(tmp_path / "adapter", tmp_path / "merged", encoder=tmp_path / "other", check_base=False)
    loaded = MoExtendForCausalLM.from_pretrained(tmp_path / "merged").encoder
    assert all(map(torch.equal, loaded.state_dict().values(), encoder.state_dict().values()))


def test_code_and_auto_classes_are_those_of_this_version(tmp_path):
    save_pair(tmp_path)
    stored = read_adapter(tmp_path / "adapter")
    config = MoExtendConfig.from_dict({**stored.values, "auto_map": {}, "architectures": None})
    write_folder(tmp_path / "adapter", stored.tensors, config)
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert {key: merged[key] for key in ("auto_map", "architectures")} == {
        "auto_map": stored.values["auto_map"],
        "architectures": ["MoExtendForCausalLM"],
    }
    assert len(shipped_code()) > 15
    for source in shipped_code():
        assert (tmp_path / "merged" / source.name).read_bytes() == source.read_bytes()


def test_tensors_that_do_not_fit_are_named(tmp_path):
    save_pair(tmp_path)
    stored = read_adapter(tmp_path / "adapter")
    stored.tensors["layers.0.router.weight"] = torch.zeros(3, 32)
    write_folder(tmp_path / "adapter", stored.tensors, MoExtendConfig.from_dict(stored.values))
    with pytest.raises(
        ValueError, match=r"wrong shape: layers.0.router.weight is \(3, 32\), the model needs \(2, 32\)"
    ):
        merge(tmp_path / "adapter", tmp_path / "merged")


# ---------------------------------------------------------------- native


def native(root, **options):
    merge(root / "adapter", root / "native", native=True, max_shard_size="30KB", **options)
    return AutoModelForCausalLM.from_pretrained(root / "native", output_loading_info=True)


@pytest.mark.parametrize("family", known(*sorted(NUMBER)))
def test_native_logits(family, tmp_path):
    model = save_pair(tmp_path, family, config=AS_NATIVE.get(family, {}))
    found, loading = native(tmp_path)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert type(found) is type(base) and getattr(found.config, NUMBER[family]) == 6 + 2
    assert (logits(base) - logits(model)).abs().max() > 0.1, "new experts change the answers"
    assert_same_but_for_rounding(found, model)
    prompt = {"input_ids": torch.arange(3, 11)[None], "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(found.generate(**prompt), model.generate(**prompt))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_of_a_low_rank_are_merged_whole(family, tmp_path):
    save_pair(tmp_path, family, expert_rank=3, **NATIVE)
    model = MoExtendForCausalLM.from_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "standalone")
    stored = read_adapter(tmp_path / "standalone")
    assert "expert_rank" not in stored.values and stored.metadata["moextend_format"] == "1"
    assert not [name for name in stored.tensors if "lora" in name]
    assert torch.equal(logits(MoExtendForCausalLM.from_pretrained(tmp_path / "standalone")), logits(model))
    merge(tmp_path / "adapter", tmp_path / "native", native=True)
    assert_same_but_for_rounding(AutoModelForCausalLM.from_pretrained(tmp_path / "native"), model)


def test_native_needs_no_code_of_ours(tmp_path):
    save_pair(tmp_path)
    native(tmp_path)
    assert not list((tmp_path / "native").glob("*.py"))
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    before = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config == before | {"num_local_experts": 8}


def test_native_keeps_every_base_tensor(tmp_path):
    save_pair(tmp_path)
    native(tmp_path)
    before, after = Checkpoint(tmp_path / "base"), Checkpoint(tmp_path / "native")
    for key in before.paths:
        old, new = before.tensor(key), after.tensor(key)
        assert torch.equal(new[: len(old)], old)
        assert len(new) == (8 if key.endswith("gate.weight") else len(old))
    added = sorted(after.paths.keys() - before.paths.keys())
    assert len(added) == 4 * 2 * 3 and all(".experts.6." in key or ".experts.7." in key for key in added)
    tensors = load_file(tmp_path / "adapter" / FILE)
    prefix = "model.layers.2.block_sparse_moe"
    assert torch.equal(after.tensor(f"{prefix}.gate.weight")[6:], tensors["layers.2.router.weight"])
    assert torch.equal(after.tensor(f"{prefix}.experts.7.w2.weight"), tensors["layers.2.experts.down_proj"][1])
    assert torch.equal(after.tensor(f"{prefix}.experts.6.w3.weight"), tensors["layers.2.experts.gate_up_proj"][0, 24:])


def test_native_of_a_base_saved_in_the_models_own_names(tmp_path):
    model = save_pair(tmp_path, save={"save_original_format": False})
    assert "model.layers.0.mlp.experts.gate_up_proj" in Checkpoint(tmp_path / "base").paths
    found, loading = native(tmp_path)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert_same_but_for_rounding(found, model)


def test_files_of_a_native_checkpoint(tmp_path):
    """Those of a checkpoint of the base's kind; the card tells of an adapter, so it stays behind."""
    save_pair(tmp_path)
    for name in ("README.md", "tokenizer.json", "processor_config.json"):
        (tmp_path / "adapter" / name).write_text("{}")
    (tmp_path / "base" / "merges.txt").write_text("base's")
    merge(tmp_path / "adapter", tmp_path / "merged", native=True)
    names = {"config.json", "generation_config.json", "model.safetensors", "merges.txt", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_native_of_an_adapter_in_less_precision(tmp_path):
    model = save_pair(tmp_path)
    model.save_pretrained(tmp_path / "adapter", adapter_dtype="bfloat16")
    found, _ = native(tmp_path)
    assert_same_but_for_rounding(found, MoExtendForCausalLM.from_pretrained(tmp_path / "adapter"))
    checkpoint = Checkpoint(tmp_path / "native")
    tensors = [checkpoint.tensor(key) for key in checkpoint.paths]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}, "the base's"
    index = json.loads((tmp_path / "native" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)


def test_native_in_bfloat16(tmp_path):
    model = save_pair(tmp_path, dtype=torch.bfloat16)
    found, _ = native(tmp_path)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    assert_same_but_for_rounding(found.float(), model.float())


def test_native_files_are_as_small_as_asked(tmp_path):
    save_pair(tmp_path)
    native(tmp_path)
    sizes = [path.stat().st_size for path in (tmp_path / "native").glob("*.safetensors")]
    assert len(sizes) > 10 and max(sizes) < 30_000 + 5_000, "headers come on top"


def quantised(root):
    path = root / "base" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(config))


OBSTACLES = {  # condition -> options of save_pair under which it, and only it, fails
    "groups": {"family": "deepseek_v3"},
    "weights": {"family": "olmoe"},
    "layers": {"plan": {0: [1], 2: [0]}},
    "number": {"plan": {0: [1], 1: [0], 2: [0, 1], 3: [4]}},
    "scope": {**NATIVE, "scope": "gate", "deltas": ()},
    "deltas": {**NATIVE, "deltas": ["output"]},
    "selection": {**NATIVE, "selection": "exclusive"},
    "calibration": {**NATIVE, "calibration": "routed"},
    "encoder": {**NATIVE, "encoder": True},
    "quantisation": {},
    "dtype": {"dtype": torch.bfloat16},
    "family": {},
}


@pytest.mark.parametrize("condition", sorted(OBSTACLES))
def test_conditions_of_a_native_form(condition, tmp_path, monkeypatch):
    options = dict(OBSTACLES[condition])
    if options.get("encoder"):
        make_encoder().save_pretrained(tmp_path / "encoder")
        options["encoder"] = str(tmp_path / "encoder")
    model = save_pair(tmp_path, **options)
    if condition == "dtype":
        model.save_pretrained(tmp_path / "adapter", adapter_dtype="float32")
    if condition == "quantisation":
        quantised(tmp_path)
    if condition == "family":
        monkeypatch.delitem(NUMBER, "mixtral")
    with pytest.raises(ValueError, match="no native form; nothing was written") as error:
        merge(tmp_path / "adapter", tmp_path / "native", native=True)
    lines = str(error.value).splitlines()[1:-1]
    assert [line.split(":")[0].strip() for line in lines] == [condition]
    assert not (tmp_path / "native").exists()


def test_all_failing_conditions_are_named(tmp_path):
    save_pair(tmp_path, plan={1: [0], 2: [0, 1]}, scope="gate", selection="exclusive")
    with pytest.raises(ValueError, match="no native form") as error:
        merge(tmp_path / "adapter", tmp_path / "native", native=True)
    lines = str(error.value).splitlines()[1:-1]
    assert [line.split(":")[0].strip() for line in lines] == ["layers", "number", "scope", "selection", "deltas"]


# ---------------------------------------------------------------- from the Hub


@pytest.mark.parametrize("native", [False, True])
def test_merging_what_lies_on_the_hub(native, hub, tmp_path):
    """The adapter at its revision in its subfolder, the base at the commit it was made on, all by one cache."""
    made_on = hub.repos[BASE].refs["main"]
    model = shake(MoExtendForCausalLM.from_base(BASE, EVERY_LAYER, **NATIVE)).eval()
    model.save_pretrained(tmp_path / "parts" / "one")
    (tmp_path / "parts" / "one" / "tokenizer.json").write_text("{}")
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.add("me/adapters", tmp_path / "base")
    hub.add("me/adapters", tmp_path / "parts", revision="v1")
    other = make_base()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    hub.add(BASE, tmp_path / "other")
    assert hub.repos[BASE].refs["main"] != made_on
    where = {"revision": "v1", "subfolder": "one", "cache_dir": str(tmp_path / "downloads")}
    merge("me/adapters", tmp_path / "merged", native=native, **where)
    assert not Path(constants.HF_HUB_CACHE).exists(), "everything is in the cache that was named"
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    if native:
        assert_same_but_for_rounding(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), model)
    else:
        assert torch.equal(logits(MoExtendForCausalLM.from_pretrained(tmp_path / "merged")), logits(model))


# ---------------------------------------------------------------- memory

MEASURE = """
import sys
from pathlib import Path
from modeling_moextend.tools.merge import merge
from transformers import AutoModelForCausalLM, GraniteMoeForCausalLM, MixtralForCausalLM
def memory(name):  # MiB; not resource.getrusage, whose peak a new process inherits from the one that started it
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) / 1024
root, loads = Path(sys.argv[1]), sys.argv[2] == "loads"
for native in (False, True):  # imports, memory pools
    merge(root / "small" / "adapter", root / "small" / f"merged-{native}-{loads}", native=native)
for native in (False, True):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    now = memory("VmRSS")
    if loads:
        base = AutoModelForCausalLM.from_pretrained(root / "base")
    merge(root / "adapter", root / f"merged-{native}-{loads}", native=native, max_shard_size="24MB")
    print(memory("VmHWM") - now)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("family", known("mixtral", "granitemoe"))
def test_memory_is_that_of_a_shard_not_of_the_base(family, tmp_path):
    """The peak of a process that merges, above what it held before: the adapter and a file of the base; with --native
    the file that is written as well. Files that are mapped count as soon as they are read.

    mixtral's experts lie in a file's tensors one by one, those of granitemoe in one tensor a layer.
    """
    (tmp_path / "small").mkdir()
    save_pair(tmp_path / "small", family)
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12}
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **wide})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base", max_shard_size="24MB")
    plan = {layer: [0] for layer in range(12)}
    MoExtendForCausalLM.from_base(str(tmp_path / "base"), plan, **NATIVE).save_pretrained(tmp_path / "adapter")
    base = file_sizes(tmp_path / "base")
    (adapter,) = file_sizes(tmp_path / "adapter")
    assert len(base) > 20 and sum(base) > 400 and 70 < adapter < 75
    # glibc keeps freed blocks of less than 32 MB for later, as those of this test are and those of real models not
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "MALLOC_MMAP_THRESHOLD_": "65536"}
    measure = partial(run, MEASURE, str(tmp_path), environment=environment)
    standalone, native = [float(line) for line in measure("").split()]
    written = max(file_sizes(tmp_path / "merged-True-False"))
    print(f"{family}: MiB more at the peak: {standalone:.1f} standalone, {native:.1f} native", end="; ")
    print(f"base {sum(base):.1f}, adapter {adapter:.1f}, largest file {max(base):.1f}, written {written:.1f}")
    room = 8  # for names and plans, whatever the sizes
    assert standalone < adapter + max(base) + room
    assert native < adapter + max(base) + written + room
    if family == "mixtral":  # the measure sees a base that is loaded
        assert float(measure("loads").split()[0]) > sum(base)


def file_sizes(folder):
    """MiB of each file with weights."""
    return [path.stat().st_size / 2**20 for path in folder.glob("*.safetensors")]


def run(code, *arguments, environment):
    """Output of a new Python process."""
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---------------------------------------------------------------- from a folder and from the Hub, without the package

LOAD = """
import json, sys, torch
if sys.argv[3] == "package":
    from modeling_moextend import MoExtendForCausalLM as Model
    options = {}
else:
    from transformers import AutoModelForCausalLM as Model
    options = {"trust_remote_code": True}
model = Model.from_pretrained(sys.argv[1], **options, **json.loads(sys.argv[2]))
print(json.dumps(model(input_ids=torch.arange(3, 13)[None]).logits.tolist()))
assert ("modeling_moextend" in sys.modules) == (sys.argv[3] == "package")
"""
SEE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    images = torch.load(sys.argv[2], weights_only=True)
    print(json.dumps(model(**images).logits.tolist()))
assert "modeling_moextend" not in sys.modules
"""
INSPECT = """
import sys
import moextend_cli as cli
sys.exit(cli.main(["inspect", sys.argv[1], "--revision", "v1", "--json"]))
"""


class Repository(BaseHTTPRequestHandler):
    """A Hub with one repository, read-only: the files of `folder` under `prefix`."""

    protocol_version = "HTTP/1.1"
    folder, prefix, sha, asked, ranges = None, "", "a" * 40, None, None

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = self.path.split("?")[0]
        self.asked.append(path)
        if "range" in self.headers:
            self.ranges.append((path.split("/")[-1], self.headers["range"]))
        kind, _, place = path.partition("me/merged/")
        if kind == "/api/models/":
            return self.describe(tree=place.startswith("tree/"))
        revision, _, name = place.removeprefix("resolve/").partition("/")
        file = self.folder / name.removeprefix(self.prefix)
        if revision not in ("v1", self.sha) or not name.startswith(self.prefix) or not file.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        self.answer(200, file.read_bytes(), {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": self.sha})

    def describe(self, tree):
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        names = {f"{self.prefix}{path.relative_to(self.folder)}": path.stat().st_size for path in files}
        found = [{"type": "file", "path": name, "oid": "0" * 40, "size": size} for name, size in names.items()]
        if not tree:
            siblings = [{"rfilename": name} for name in names]
            found = {"_id": "0", "id": "me/merged", "modelId": "me/merged", "sha": self.sha, "siblings": siblings}
        self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_GET

    def answer(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def merged_hub(tmp_path):
    """A merged folder on a Hub (base and adapter are gone), what it answers, and the environment to ask it from."""
    expected = save_pair(tmp_path, plan={1: [0]}, scope="all")(input_ids=torch.arange(3, 13)[None]).logits
    merge(tmp_path / "adapter", tmp_path / "merged")
    for name in ("base", "adapter"):
        shutil.rmtree(tmp_path / name)
    handler = type("Here", (Repository,), {"folder": tmp_path / "merged", "asked": [], "ranges": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "PYTHONPATH": ""}
    yield handler, expected, environment
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_standalone_without_the_package(merged_hub, tmp_path):
    handler, expected, environment = merged_hub
    found = run(LOAD, "me/merged", '{"revision": "v1"}', "", environment=environment)
    assert torch.equal(torch.tensor(json.loads(found)), expected)
    assert any("/v1/base/model-00001" in path or f"{handler.sha}/base/model-00001" in path for path in handler.asked)
    assert run(LOAD, str(tmp_path / "merged"), "{}", "", environment=environment) == found


@pytest.mark.slow
def test_standalone_in_a_subfolder_of_a_repository(merged_hub):
    """With the package: transformers looks for remote code only at the top of a repository."""
    handler, expected, environment = merged_hub
    handler.prefix = "parts/one/"
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    options = '{"revision": "v1", "subfolder": "parts/one"}'
    found = run(LOAD, "me/merged", options, "package", environment=environment)
    assert torch.equal(torch.tensor(json.loads(found)), expected)


@pytest.mark.slow
def test_inspecting_a_repository_fetches_headers_only(merged_hub, tmp_path):
    handler, _, environment = merged_hub
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    found = json.loads(run(INSPECT, "me/merged", environment=environment))
    here = inspect_adapter(tmp_path / "merged")
    assert found == here | {"adapter": "me/merged", "not_finite": None} and here["not_finite"] == []
    resolved = [path.split("/")[-1] for path in handler.asked if "/resolve/" in path]
    assert set(resolved) == {FILE, FILE + ".index.json"}
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "nothing but a header was fetched"
    assert (FILE, "bytes=0-100000") in handler.ranges
