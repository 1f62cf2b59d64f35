"""`moextend compress`: the nearest adapter of a lower rank, what it says of the loss, and what it refuses."""

import json
import re

import pytest
import torch
from conftest import make_base, shake
from families import known, make_family
from safetensors.torch import load_file, save_file
from test_cli import moextend as moextend
from test_low_rank_moextend import COMPETE, EXCLUSIVE, PLAN, logits

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.adapter_file_moextend import FILE, read_adapter
from modeling_moextend.tools import compression
from modeling_moextend.tools.compression import compress


def save_pair(root, family="mixtral", rank=None, dtype=torch.float32, std=0.05, **choices):
    """Base and adapter in folders of `root`; the model in memory."""
    make_family(family, dtype=dtype).save_pretrained(root / "base")
    torch.manual_seed(0)
    model = MoExtendForCausalLM.from_base(str(root / "base"), PLAN, expert_rank=rank, **(choices or COMPETE))
    shake(model, std=std).eval().save_pretrained(root / "adapter")
    (root / "adapter" / "README.md").write_text("of this adapter")
    return model


def deltas(folder, base):
    """name -> [n, out, in], what an adapter adds to its sources."""
    config = read_adapter(folder).config_for_loading()
    model = MoExtendForCausalLM.from_pretrained(folder, base=base)
    found = {}
    for layer, new in model.adapters["default"].layers.items():
        experts = model.moe_layers[layer].experts
        whole = new.experts.whole(experts) if config.expert_rank else new.experts
        for name, stack in experts._parameters.items():
            if stack is not None and stack.dim() == 3:
                delta = getattr(whole, name).detach() - stack.detach()[config.extended_layers[layer]]
                found[f"layers.{layer}.experts.{name}"] = delta.mT if experts.is_transposed else delta
    model.detach()
    return found


@pytest.mark.parametrize("family", known("mixtral", "gpt_oss", "deepseek_v3", "granitemoe"))
def test_it_is_the_nearest_adapter_of_that_rank_and_says_how_near(family, tmp_path):
    model, base = save_pair(tmp_path, family), make_family(family)
    result = compress(tmp_path / "adapter", tmp_path / "small", 8)
    before, after = deltas(tmp_path / "adapter", base), deltas(tmp_path / "small", base)
    for entry in result["layers"]:
        names = [name for name in before if name.startswith(f"layers.{entry['layer']}.")]
        errors = torch.cat([(before[name] - after[name]).flatten() for name in names])
        whole = torch.cat([before[name].flatten() for name in names])
        assert entry["relative"] == pytest.approx((errors.norm() / whole.norm()).item(), rel=1e-3)
        assert entry["max_abs"] == pytest.approx(errors.abs().max().item(), rel=1e-2)
        cut = sum(torch.linalg.svdvals(before[name])[:, 8:].square().sum() for name in names)
        assert entry["relative"] == pytest.approx((cut.sqrt() / whole.norm()).item(), rel=1e-3), "not the nearest"
    assert [entry["layer"] for entry in result["layers"]] == list(PLAN) and 0.1 < result["layers"][0]["relative"] < 1
    stored = {name: load_file(tmp_path / name / FILE) for name in ("adapter", "small")}
    sizes = [sum(tensor.nbytes for tensor in one.values()) for one in stored.values()]
    assert [result["bytes_before"], result["bytes"]] == sizes and sizes[0] > sizes[1]
    kept = stored["adapter"].keys() & stored["small"].keys()
    assert {name for name in stored["adapter"] if "router" in name or name.endswith("bias")} == kept
    assert all(torch.equal(stored["adapter"][name], stored["small"][name]) for name in kept)
    config, small = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("adapter", "small"))
    assert small.pop("expert_rank") == result["rank"] == 8 and small == config
    assert not (tmp_path / "small" / "README.md").exists(), "its sizes are not those of this adapter"
    again = MoExtendForCausalLM.from_pretrained(tmp_path / "small")
    assert not torch.equal(logits(again), logits(model))


def test_deltas_of_a_low_rank_come_back_whatever_they_are_stored_in(tmp_path):
    """From whole experts in float32; bfloat16 has lost more than such a delta before it is compressed."""
    low = save_pair(tmp_path, rank=3, **EXCLUSIVE)
    torch.manual_seed(0)
    whole = MoExtendForCausalLM.from_base(str(tmp_path / "base"), PLAN, **EXCLUSIVE)
    values = low.get_adapter_state_dict()
    for layer, new in low.adapters["default"].layers.items():
        merged = new.experts.whole(low.moe_layers[layer].experts)
        values |= {f"layers.{layer}.experts.{name}": getattr(merged, name) for name in ("gate_up_proj", "down_proj")}
    whole.load_state_dict({name: values[name] for name in whole.adapter_tensors()})
    errors = {}
    for dtype in ("float32", "bfloat16"):
        whole.save_pretrained(tmp_path / dtype, adapter_dtype=dtype)
        errors[dtype] = compress(tmp_path / dtype, tmp_path / f"small-{dtype}", 3)["layers"][0]["relative"]
        stored = load_file(tmp_path / f"small-{dtype}" / FILE)
        assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{dtype}"}
    assert errors["float32"] < 1e-5 < 1e-3 < errors["bfloat16"]
    again = MoExtendForCausalLM.from_pretrained(tmp_path / "small-float32").eval()
    torch.testing.assert_close(logits(again), logits(low), rtol=1e-4, atol=1e-5)


def test_a_lower_rank_of_one_that_has_a_rank(tmp_path, monkeypatch):
    save_pair(tmp_path, rank=8)
    before = deltas(tmp_path / "adapter", make_base())
    monkeypatch.setattr(compression, "skeleton", None)  # of the base nothing but its fingerprint is needed
    result = compress(tmp_path / "adapter", tmp_path / "small", 2)
    after = deltas(tmp_path / "small", make_base())
    for name, delta in before.items():
        cut = torch.linalg.svdvals(delta)[:, 2:].square().sum().sqrt()
        torch.testing.assert_close((delta - after[name]).norm(), cut, rtol=1e-3, atol=1e-5)
    assert result["bytes"] < result["bytes_before"]
    for rank in (8, 9):
        with pytest.raises(ValueError, match=f"has expert_rank=8 already, and rank={rank} would .* from 1 to 7"):
            compress(tmp_path / "adapter", tmp_path / "other", rank)


def test_an_expert_that_never_learned_loses_nothing(tmp_path):
    save_pair(tmp_path, std=0)
    result = compress(tmp_path / "adapter", tmp_path / "small", 2)
    assert result["layers"] == [{"layer": layer, "relative": 0.0, "max_abs": 0.0} for layer in PLAN]


def test_what_is_refused_leaves_nothing(tmp_path):
    save_pair(tmp_path)
    other = make_base()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    adapter, target = tmp_path / "adapter", tmp_path / "small"
    for rank, reason in {0: "rank=0 must be", True: "rank=True must be", 25: "expert_rank=25 is above 24"}.items():
        with pytest.raises(ValueError, match=reason):
            compress(adapter, target, rank)
    with pytest.raises(ValueError, match="different base than the adapter was made on"):
        compress(adapter, target, 2, base=tmp_path / "other")
    with pytest.raises(FileExistsError):
        compress(adapter, adapter, 2)
    tensors = load_file(adapter / FILE)
    tensors["layers.1.experts.down_proj"][0, 0, 0] = torch.nan
    save_file(
        tensors, adapter / FILE, {k: v for k, v in read_adapter(adapter).metadata.items() if "checksum" not in k}
    )
    with pytest.raises(ValueError, match="can't be compressed: NaN or infinity in layers.1.experts.down_proj"):
        compress(adapter, target, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "other"]


def test_the_command(tmp_path, moextend):
    save_pair(tmp_path)
    code, text = moextend("compress", tmp_path / "adapter", tmp_path / "small", "--rank", 4)
    assert code == 0 and re.search(r"new experts of rank 4, [\d,]+ bytes of tensors, before [\d,]+", text)
    assert all(f" {layer} " in text for layer in PLAN)
    code, found = moextend("compress", tmp_path / "small", tmp_path / "smaller", "--rank", 2, "--json")
    assert code == 0 and found["rank"] == 2 and found["layers"][0]["relative"] > 0
    code, text = moextend("compress", tmp_path / "small", tmp_path / "same", "--rank", 4)
    assert code == 1 and "has expert_rank=4 already" in text
    assert moextend("compress", tmp_path / "adapter", tmp_path / "x", "--rank", "none")[0] == 2
    code, text = moextend("inspect", tmp_path / "small")
    assert code == 0 and "new experts of rank 4: each is its source expert and a low-rank delta" in text
    assert moextend("inspect", tmp_path / "small", "--json")[1]["expert_rank"] == 4
    assert moextend("verify", tmp_path / "small", "--json")[0] == 0
    code, found = moextend("diff", tmp_path / "small", tmp_path / "smaller", "--json")
    assert code == 1 and {"entry": "expert_rank", "values": [4, 2]} in found["config"]
