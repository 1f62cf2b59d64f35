"""What users of PEFT and transformers type: it works with the meaning that it has there, or says why not."""

import inspect
import json

import pytest
import torch
from conftest import PAPER, batch, make_base, make_encoder, shake
from peft import LoraConfig, get_peft_model
from test_sft_trainer import make_tokenizer, text_data
from transformers import TrainingArguments
from transformers.integrations.peft import PeftAdapterMixin

from modeling_moextend import MoExtendForCausalLM, MoExtendModel, MoExtendSFTTrainer
from modeling_moextend.tools.verification import verify_adapter

PLAN = {1: [0, 3], 2: [1]}
MUST = r"must be a folder or a Hub id \(a base or encoder also a loaded model.*merge_and_unload\(\) returns\), not "
NO_PLACE = "is no folder here, and no Hub id like owner/name"
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture
def model():
    return shake(MoExtendForCausalLM.from_base(make_base(), PLAN, **PAPER))


@pytest.fixture
def folder(model, tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    model.config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def lora(**options):
    return LoraConfig(r=2, **options)


def test_no_method_of_transformers_peft_mixin_is_inherited():
    """Each has its meaning here, or is refused by name: what is inherited speaks of PEFT's own adapters."""
    names = {name for name, value in vars(PeftAdapterMixin).items() if inspect.isfunction(value) and name[0] != "_"}
    assert {"load_adapter", "add_adapter", "enable_peft_hotswap", "get_adapter_state_dict"} <= names
    for kind in (MoExtendForCausalLM, MoExtendModel):
        inherited = {name for name in names if getattr(kind, name) is getattr(PeftAdapterMixin, name)}
        assert not inherited


def test_the_state_of_an_adapter_and_which_is_active(model, folder):
    state = model.get_adapter_state_dict()
    assert state.keys() == model.adapter_tensors().keys() and model.active_adapter == "default"
    assert all(
        not tensor.requires_grad and torch.equal(tensor, model.adapter_tensors()[k]) for k, tensor in state.items()
    )
    model.load_adapter(folder, adapter_name="other")
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.get_adapter_state_dict("other").items())
    model.set_adapter("other")
    assert model.active_adapter == "other"
    model.disable_adapters()
    assert model.active_adapter == []
    with pytest.raises(ValueError, match="'third'"):
        model.get_adapter_state_dict("third")
    with pytest.raises(ValueError, match=r"enable_peft_hotswap is for LoRA: load_adapter.*set_adapter\(name\)"):
        model.enable_peft_hotswap(target_rank=8)


def test_after_the_active_adapter_is_deleted_the_next_is_set(model, folder):
    model.load_adapter(folder, adapter_name="second")
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="No active adapter was left, so 'second' is set"):
        model.delete_adapter("default")
    assert model.active_adapters() == ["second"]
    assert {name for name, tensor in model.named_parameters() if tensor.requires_grad} >= {
        name for name, _ in model.named_parameters() if ".second.experts" in name
    }


@pytest.mark.parametrize(
    "words, unknown",
    [
        ({"is_trainble": True, "nonsense": 3}, "is_trainble, nonsense"),
        ({"hotswap": True}, "hotswap"),
        ({"peft_config": {}, "adapter_state_dict": {}}, "adapter_state_dict, peft_config"),
    ],
)
def test_unknown_words_of_load_adapter_are_refused(model, folder, words, unknown):
    with pytest.raises(
        TypeError, match=f"unexpected keyword arguments: {unknown}. Allowed here: cache_dir, .*is_trainable"
    ):
        model.load_adapter(folder, "other", **words)
    assert list(model.adapters) == ["default"]


def test_a_lora_is_not_added_by_add_adapter(model):
    config = lora(target_modules=["q_proj"])
    for args, words in (((config,), {}), (("x", config), {}), ((), {"adapter_config": config, "adapter_name": "x"})):
        with pytest.raises(ValueError, match=r"add_adapter adds new experts: .*get_peft_model\(model, config\)"):
            model.add_adapter(*args, **words)
    with pytest.raises(ValueError, match="add_adapter adds new experts"):
        model.add_adapter(adapter_config=config)
    with pytest.raises(
        TypeError, match="unexpected keyword arguments: nonsense. Allowed here: expert_rank, encoder_select"
    ):
        model.add_adapter("x", {0: [1]}, nonsense=3)
    with pytest.raises(ValueError, match=r"\{1: \[0\]\} can't be the name of an adapter"):
        model.add_adapter({1: [0]})
    assert list(model.adapters) == ["default"]


def test_a_peft_model_is_no_base(folder, tmp_path):
    wrapped = get_peft_model(make_base(), lora(target_modules=["q_proj"]))
    for given in (wrapped, torch.compile(make_base()), None, 3):
        with pytest.raises(ValueError, match=f"The base {MUST}{type(given).__name__}"):
            MoExtendForCausalLM.from_base(given, PLAN)
    with pytest.raises(ValueError, match=f"The adapter's base {MUST}PeftModel"):
        MoExtendForCausalLM.from_pretrained(folder, base=wrapped)
    with pytest.raises(ValueError, match=f"The encoder {MUST}int"):
        MoExtendForCausalLM.from_base(make_base(), PLAN, encoder=3)
    assert MoExtendForCausalLM.from_base(wrapped.merge_and_unload(), PLAN).adapters


@pytest.mark.parametrize("tensors", [EXPERTS, EXPERTS[1:], ["gate.weight"]], ids=str)
def test_a_lora_on_experts_or_routers_is_named_as_the_reason(folder, tensors):
    config = lora(target_modules=[], target_parameters=tensors)
    message = rf"{tensors[0].split('.')[0]} is wrapped by PEFT \(LoRA with target_parameters\).*merge_and_unload"
    wrapped = get_peft_model(make_base(), config)
    with pytest.raises(ValueError, match=message):
        MoExtendForCausalLM.from_base(wrapped.get_base_model(), PLAN)
    with pytest.raises(ValueError, match=message):
        MoExtendForCausalLM.from_pretrained(folder, base=wrapped.get_base_model())
    base = make_base()
    base.add_adapter(config)
    with pytest.raises(ValueError, match=message):
        MoExtendForCausalLM.from_base(base, PLAN)
    for plain in (wrapped.unload(), get_peft_model(make_base(), config).merge_and_unload()):
        MoExtendForCausalLM.from_base(plain, PLAN)


def test_such_a_lora_on_an_extended_model_takes_part_and_trains(model):
    with torch.no_grad():
        expected = model(**batch()).logits
    wrapped = get_peft_model(model, lora(target_modules=[], target_parameters=EXPERTS))
    with torch.no_grad():
        torch.testing.assert_close(wrapped(**batch()).logits, expected)
    wrapped(**batch(), labels=batch()["input_ids"]).loss.backward()
    added = {name: tensor for name, tensor in wrapped.named_parameters() if "lora_" in name}
    assert added and all(tensor.grad is not None for tensor in added.values())


def test_places_that_are_none_say_so(model, folder, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    for action, what in (
        (lambda place: MoExtendForCausalLM.from_base(place, PLAN), "The base"),
        (lambda place: MoExtendForCausalLM.from_base(make_base(), PLAN, encoder=place), "The encoder"),
    ):
        for place in (nowhere, "./no/such", "a/b/c", ""):
            with pytest.raises(OSError, match=f"{what} '{place}' {NO_PLACE}"):
                action(place)
    for load in (MoExtendForCausalLM.from_pretrained, lambda place: model.load_adapter(place, "x")):
        for place in (nowhere, "./no/such", "a/b/c", ""):
            with pytest.raises(OSError, match=f"{place} holds no MoExtend adapter: neither"):
                load(place)


def test_a_hub_that_cannot_be_reached_is_no_missing_adapter(model, folder, tmp_path):
    for options in ({}, {"local_files_only": True}):
        for action in (MoExtendForCausalLM.from_pretrained, lambda name, **o: model.load_adapter(name, "x", **o)):
            with pytest.raises(OSError, match="me/adapter is no folder here, and the Hub can't be reached"):
                action("me/adapter", **options)
    with pytest.raises(OSError, match="The base 'me/base' can't be loaded.*couldn't connect"):
        MoExtendForCausalLM.from_base("me/base", PLAN)
    with pytest.raises(OSError, match="The encoder 'me/clip' can't be loaded.*couldn't connect"):
        MoExtendForCausalLM.from_base(make_base(), PLAN, encoder="me/clip")
    with pytest.raises(OSError, match="base holds no MoExtend adapter"):
        MoExtendForCausalLM.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize("recorded", ["somebody/base", None])
def test_a_folder_with_only_a_lora_is_no_base(folder, tmp_path, recorded):
    get_peft_model(make_base(), lora(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": recorded}))
    for action in (
        lambda place: MoExtendForCausalLM.from_base(place, PLAN),
        lambda place: MoExtendForCausalLM.from_pretrained(folder, base=place),
    ):
        with pytest.raises(ValueError, match=r"lora' is a PEFT adapter and no model: .*merge_and_unload\(\)"):
            action(str(tmp_path / "lora"))


def test_a_model_of_config_and_state_dict(model, folder):
    config, state = model.config, model.state_dict()
    with pytest.raises(ValueError, match=f"The adapter {MUST}NoneType"):
        MoExtendForCausalLM.from_pretrained(None, config=config, state_dict=state)
    with pytest.raises(ValueError, match="The adapter's base .* can't be loaded.*`state_dict` cannot be passed"):
        MoExtendForCausalLM.from_pretrained(folder, state_dict=state)
    with pytest.raises(TypeError, match="loaded base.* got unexpected keyword arguments: nonsense, state_dict"):
        MoExtendForCausalLM.from_pretrained(folder, base=make_base(), state_dict=state, nonsense=3)
    with pytest.raises(TypeError, match="takes 2 positional arguments"):
        MoExtendForCausalLM.from_pretrained(folder, "further")
    drawn = MoExtendForCausalLM(config)
    drawn.load_state_dict(state)
    assert torch.equal(drawn.eval()(**batch()).logits, model.eval()(**batch()).logits)


def test_options_of_a_base_that_is_loaded_are_refused():
    with pytest.raises(TypeError, match=r"from_base\(\) got unexpected keyword arguments: device_map, nonsense"):
        MoExtendForCausalLM.from_base(make_base(), PLAN, device_map="auto", nonsense=3)


def test_an_encoder_for_an_adapter_without_one_is_refused(model, folder, tmp_path):
    make_encoder().save_pretrained(tmp_path / "encoder")
    for action in (
        lambda given: MoExtendForCausalLM.from_pretrained(folder, encoder=given),
        lambda given: model.load_adapter(folder, "x", encoder=given),
        lambda given: verify_adapter(folder, base=str(tmp_path / "base"), encoder=given),
    ):
        with pytest.raises(
            ValueError, match="The adapter has no encoder, so it can't see or hear: leave out encoder="
        ):
            action(str(tmp_path / "encoder"))
    with pytest.raises(ValueError, match="encoder' can't be loaded.*is no causal LM"):
        verify_adapter(folder, base=str(tmp_path / "encoder"))


def test_arguments_of_another_trainer_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="args must be a MoExtendSFTConfig, not TrainingArguments"):
        MoExtendSFTTrainer(
            model,
            TrainingArguments(str(tmp_path), use_cpu=True),
            train_dataset=text_data(),
            processing_class=make_tokenizer(),
        )


def test_a_file_in_the_place_of_a_base_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="The base .*config.json' is a file: give the folder"):
        MoExtendForCausalLM.from_base(tmp_path / "config.json", {1: [0]})
