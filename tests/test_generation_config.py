"""How a model generates is saved with its adapter: the end token that it was trained to write, for one."""

import copy
import json

import numpy
import pytest
import torch
from conftest import batch, make_base, shake
from safetensors import safe_open
from test_sft_trainer import WORDS, make_trainer
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.adapter_file_moextend import FILE
from modeling_moextend.tools.merge import merge

NATIVE = {"scope": "all", "selection": "compete", "calibration": "none"}


def values(model):
    return {name: value for name, value in model.generation_config.to_dict().items() if not name.startswith("_")}


@pytest.fixture
def base(tmp_path):
    base = make_base()
    base.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, max_new_tokens=7)
    base.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_the_end_token_of_training_is_that_of_the_reloaded_model(base, tmp_path):
    model = MoExtendForCausalLM.from_base(base, {1: [0]}, **NATIVE)
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path / "run", model, eos_token="ASSISTANT:", **options)
    trainer.train()
    trainer.save_model()
    assert model.generation_config.eos_token_id == [WORDS.index("ASSISTANT:"), 2]
    for folder in ("run", "run/checkpoint-1"):
        loaded = MoExtendForCausalLM.from_pretrained(tmp_path / folder)
        assert values(loaded) == values(model)
        assert loaded.base.generation_config.eos_token_id == 2, "the base's own stays as it is"
    inputs = batch()
    answers = [one.eval().generate(**inputs, do_sample=False) for one in (model, loaded)]
    assert torch.equal(*answers) and answers[0].shape[1] <= 17


def test_only_what_is_not_the_bases_is_saved_and_it_stays(base, tmp_path):
    model = shake(MoExtendForCausalLM.from_base(base, {1: [0]}, **NATIVE))
    model.save_pretrained(tmp_path / "first")
    with safe_open(tmp_path / "first" / FILE, framework="pt") as file:
        assert json.loads(file.metadata()["config"])["generation_config"] is None
    model.generation_config.update(eos_token_id=[5, 6], max_new_tokens=None, top_p=0.5, stop_strings=["."])
    model.generation_config.of_mine = 3
    model.save_pretrained(tmp_path / "second")
    changed = {"eos_token_id": [5, 6], "max_new_tokens": None, "top_p": 0.5, "stop_strings": ["."], "of_mine": 3}
    loaded = MoExtendForCausalLM.from_pretrained(tmp_path / "second")
    assert loaded.config.generation_config == changed and values(loaded) == values(model)
    loaded.generation_config.top_p = None
    loaded.save_pretrained(tmp_path / "third")
    again = MoExtendForCausalLM.from_pretrained(tmp_path / "third")
    assert again.config.generation_config == changed | {"top_p": None} and values(again) == values(loaded)
    first = MoExtendForCausalLM.from_pretrained(tmp_path / "first")
    first.load_adapter(tmp_path / "second", "second")
    assert values(first)["eos_token_id"] == 2, "a model generates as the adapter it was loaded with"
    first.save_pretrained(tmp_path / "copy", adapter_name="second")
    assert values(MoExtendForCausalLM.from_pretrained(tmp_path / "copy")) == values(model)
    first.model.save_pretrained(tmp_path / "body", adapter_name="second")
    assert values(MoExtendForCausalLM.from_pretrained(tmp_path / "body")) == values(model)


def test_what_a_loaded_base_was_told_before_is_saved(base, tmp_path):
    for folder in (base, None):  # None: it has no checkpoint
        loaded = make_base() if folder is None else AutoModelForCausalLM.from_pretrained(folder)
        before = copy.deepcopy(loaded)
        loaded.generation_config.update(eos_token_id=[5, 6], max_new_tokens=None)
        model = shake(MoExtendForCausalLM.from_base(loaded, {1: [0]}, **NATIVE))
        model.save_pretrained(tmp_path / "adapter")
        again = MoExtendForCausalLM.from_pretrained(tmp_path / "adapter", base=before)
        assert values(again) == values(model) and again.generation_config.eos_token_id == [5, 6]
    unchanged = MoExtendForCausalLM.from_base(AutoModelForCausalLM.from_pretrained(base), {1: [0]}, **NATIVE)
    unchanged.save_pretrained(tmp_path / "unchanged")
    assert MoExtendForCausalLM.from_pretrained(tmp_path / "unchanged").config.generation_config is None


@pytest.mark.parametrize("given", [(3, 5), {3, 5}, torch.tensor([3, 5]), numpy.array([3, 5])])
def test_what_json_has_by_another_name_is_saved(base, tmp_path, given):
    model = MoExtendForCausalLM.from_base(base, {1: [0]}, **NATIVE)
    model.generation_config.eos_token_id = given
    model.save_pretrained(tmp_path / "adapter")
    assert MoExtendForCausalLM.from_pretrained(tmp_path / "adapter").generation_config.eos_token_id == [3, 5]


def test_a_call_says_how_to_generate(base, tmp_path):
    model = MoExtendForCausalLM.from_base(base, {1: [0]}, **NATIVE)
    model.generation_config.eos_token_id = 5
    model.save_pretrained(tmp_path / "adapter")
    for auto in (AutoModelForCausalLM, MoExtendForCausalLM):
        own = GenerationConfig(eos_token_id=6)
        loaded = auto.from_pretrained(tmp_path / "adapter", trust_remote_code=True, generation_config=own)
        assert loaded.generation_config.eos_token_id == 6
    config = model.config_class.from_pretrained(tmp_path / "adapter", generation_config={"eos_token_id": 7})
    assert config.generation_config == {"eos_token_id": 7}, "a config's own entry, as every other"


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_a_merged_checkpoint_generates_alike(base, tmp_path, native, known):
    if not known:
        (tmp_path / "base" / "generation_config.json").unlink()
    model = MoExtendForCausalLM.from_base(base, dict.fromkeys(range(4), [0]), **NATIVE)
    model.generation_config.eos_token_id = [9, 2]
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", native=native)
    auto = AutoModelForCausalLM if native else MoExtendForCausalLM
    merged = values(auto.from_pretrained(tmp_path / "merged"))
    assert merged["eos_token_id"] == [9, 2] and merged["max_new_tokens"] == (7 if known else None)


def test_what_a_config_can_not_hold_is_refused(base, tmp_path):
    model = MoExtendForCausalLM.from_base(base, {1: [0]}, **NATIVE)
    model.generation_config.compile_config = CompileConfig()
    with pytest.raises(ValueError, match="generation_config has changed in .*compile_config.*give them to generate"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    for wrong in ([1], {"validate": 1}, {"_x": 1}, {"a b": 1}, {"eos_token_id": {"a": 1}}):
        with pytest.raises(ValueError, match="generation_config=.* must be a mapping of a GenerationConfig's entries"):
            model.config_class(generation_config=wrong)
