"""A base or encoder that changes in memory, and a model inside another: refused before training and when saved."""

import copy
import os

import pytest
import torch
from conftest import batch, make_base, shake
from peft import LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from test_push_to_hub import REPO
from test_push_to_hub import hub as hub
from test_sft_trainer import make_model, make_trainer, tensors
from torch import nn

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.tensors_moextend import bits_of, changed_tensors, snapshot

LORA = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
QUERY = "model.layers.0.self_attn.q_proj"


def lora(model):
    return get_peft_model(model, LORA)


def scaled(path):
    def change(model):
        with torch.no_grad():
            model.base.get_parameter(path).mul_(1.01)

    return change


def zeroed(path, *where):
    return lambda model: model.base.get_parameter(path).data[where].zero_()


def swapped(path, one, other):
    def change(model):
        weight = model.base.get_parameter(path).data
        weight[[one, other]] = weight[[other, one]]

    return change


def with_more_tokens(model):
    model.base.resize_token_embeddings(len(model.base.get_input_embeddings().weight) + 1, mean_resizing=False)


def with_another_head(model):
    model.base.lm_head = nn.Linear(model.base.config.hidden_size, model.base.config.vocab_size, bias=False)


def with_another_encoder(model):
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.01)


CHANGES = {  # what somebody does to a base -> what the refusal names first
    "a LoRA merged": (lambda model: lora(model).merge_and_unload(), f"{QUERY}.weight"),
    "a LoRA merged where it is": (lambda model: lora(model).merge_adapter(), f"{QUERY}.base_layer.weight"),
    "a LoRA": (lora, f"{QUERY}.base_layer.weight"),
    "a norm": (scaled("model.norm.weight"), "model.norm.weight (1 tensors"),
    "a head": (scaled("lm_head.weight"), "lm_head.weight (1 tensors"),
    "experts": (scaled("model.layers.1.mlp.experts.down_proj"), "model.layers.1.mlp.experts.down_proj (1"),
    "one token": (zeroed("model.embed_tokens.weight", 7), "model.embed_tokens.weight (1 tensors"),
    "a neuron": (zeroed("model.layers.1.mlp.experts.down_proj", 3, 11), "experts.down_proj (1 tensors"),
    "a column": (zeroed("lm_head.weight", slice(None), 5), "lm_head.weight (1 tensors"),
    "another head": (with_another_head, "lm_head.weight (1 tensors"),
    "more tokens": (with_more_tokens, "lm_head.weight, model.embed_tokens.weight (2 tensors"),
    "NaN": (lambda model: model.base.lm_head.weight.data.fill_(torch.nan), "lm_head.weight (1 tensors"),
    "a value": (zeroed("model.embed_tokens.weight", 7, 3), "model.embed_tokens.weight (1 tensors"),
    "two tokens": (swapped("model.embed_tokens.weight", 7, 9), "model.embed_tokens.weight (1 tensors"),
    "rounded": (lambda model: model.bfloat16().float(), "lm_head.weight, model.embed_tokens.weight, "),
    "the encoder": (with_another_encoder, "The encoder in memory is no longer the one that was loaded: "),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_made_on_a_changed_base_is_not_saved(tmp_path, name, hub):
    change, named = CHANGES[name]
    model = shake(make_model(encoder=name == "the encoder"))
    model.save_pretrained(tmp_path / "before")
    change(model)
    model.config.base_model_name_or_path = "me/base"
    model.config.encoder_name_or_path = "me/encoder"
    for refused in (
        lambda: model.save_pretrained(tmp_path / "after"),
        lambda: model.model.save_pretrained(tmp_path / "after"),
        lambda: model.push_to_hub(REPO),
    ):
        with pytest.raises(ValueError, match="no longer the one that was loaded.*not saved.*anew") as error:
            refused()
        assert named in str(error.value)
    assert sorted(set(os.listdir(tmp_path)) - {"base"}) == ["before"]  # the Hub's, of the fixture
    with pytest.raises(ValueError, match="no longer the one that was loaded|ask for gradients"):
        make_trainer(tmp_path, model)


@pytest.mark.parametrize("dtypes", [("bfloat16",), ("float16", "bfloat16"), ("float64",)])
def test_a_cast_is_no_change(tmp_path, dtypes, family):
    base = make_base(family)
    before = snapshot(base)
    assert before.keys() >= {name for name, parameter in base.named_parameters()}
    for dtype in dtypes:
        base.to(getattr(torch, dtype))
    assert changed_tensors(before, snapshot(base)) == []


def test_what_is_loaded_merged_is_no_change(tmp_path):
    """What counts is what the base was when the adapter was put on it."""
    base = make_base()
    model = MoExtendForCausalLM.from_base(get_peft_model(base, LORA).merge_and_unload(), {1: [0]})
    model.save_pretrained(tmp_path)
    copy.deepcopy(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a different base than the adapter was made on"):
        MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base())


@pytest.mark.parametrize("shape", [(), (1,), (3,), (8,), (2, 3), (4, 8), (2, 3, 5), (2, 4, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_value_of_a_tensor_shows_in_its_bits(shape, dtype):
    tensor = torch.randn(shape, dtype=dtype)
    elsewhere = torch.cat([tensor.view(-1)[:1], tensor.view(-1)])[1:].view(shape)
    assert bits_of(elsewhere) == bits_of(tensor)
    assert bits_of(torch.stack([tensor, tensor], -1)[..., 0]) == bits_of(tensor)
    for index in range(tensor.numel()):
        other = tensor.clone()
        other.view(-1)[index].neg_()
        assert bits_of(other) != bits_of(tensor)


def test_quantised_and_empty_weights_count_as_unchanged():
    whole, packed = nn.Linear(3, 2), nn.Linear(3, 2)
    packed.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.uint8), requires_grad=False)
    assert changed_tensors(snapshot(whole), snapshot(nn.Linear(3, 2, device="meta"))) == []
    assert changed_tensors(snapshot(packed) | {"bias": snapshot(whole)["bias"]}, snapshot(whole)) == []
    assert changed_tensors(snapshot(whole), snapshot(nn.Linear(3, 4))) == ["bias", "weight"]


WRAPPED = {
    "PeftModelForCausalLM": lora,
    "PeftModel": lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])),
    "PeftModelForCausalLM, prompt": lambda model: get_peft_model(
        model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    ),
    "OptimizedModule": torch.compile,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_model_inside_another_is_not_trained(tmp_path, name):
    with pytest.raises(ValueError, match=f"is inside a {name.split(',')[0]}: .*Pass the MoExtend model itself"):
        make_trainer(tmp_path, WRAPPED[name](make_model()))


def test_a_body_is_not_trained(tmp_path):
    with pytest.raises(ValueError, match="MoExtendModel has no head.*MoExtendForCausalLM"):
        make_trainer(tmp_path, make_model().model)


def test_a_base_that_asks_for_gradients_is_not_trained(tmp_path):
    model = make_model(encoder=True)
    model.base.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"^base.lm_head.weight \(1 tensors\) ask for gradients.*Freeze them"):
        make_trainer(tmp_path, model)
    model.base.requires_grad_(False)
    model.encoder.requires_grad_(True)
    with pytest.raises(ValueError, match="^adapters.default.encoder.*ask for gradients"):
        make_trainer(tmp_path, model)
    model.encoder.requires_grad_(False)
    trainer = make_trainer(tmp_path, model, True)
    model.base.model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"^base.model.norm.weight \(1 tensors\) ask"):
        trainer.train()
    injected = make_model()
    inject_adapter_in_model(LORA, injected)
    with pytest.raises(ValueError, match="lora_A.default.weight.*PEFT's unload"):
        make_trainer(tmp_path, injected)


def test_what_a_lora_was_taken_off_trains_and_is_saved(tmp_path):
    model = shake(make_model())
    with torch.no_grad():
        before = model(**batch()).logits
    lora(model).unload()
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, before)
    trainer = make_trainer(tmp_path, model, max_steps=1)
    trainer.train()
    trainer.save_model()
    loaded = MoExtendForCausalLM.from_pretrained(tmp_path, base=make_base())
    for name, tensor in tensors(model).items():
        assert torch.equal(tensor, tensors(loaded)[name])


def test_an_encoder_that_two_adapters_share(tmp_path):
    model = make_model(encoder=True)
    model.save_pretrained(tmp_path / "first")
    model.load_adapter(tmp_path / "first", "second")
    assert model.adapters["second"].encoder is model.encoder
    model.save_pretrained(tmp_path / "second", adapter_name="second")
    with_another_encoder(model)
    for name in ("default", "second"):
        with pytest.raises(ValueError, match="The encoder in memory is no longer the one"):
            model.save_pretrained(tmp_path / "third", adapter_name=name)
