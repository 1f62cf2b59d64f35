"""`MoExtendConfig` survives JSON and copies, keeps the base's config as it was, and refuses what has no meaning."""

import base64
import copy
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import PAPER, batch, frozen_copy, make_base, make_encoder
from hostile import NAMES
from hostile import VALUES as ANYTHING
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, CLIPVisionConfig, MixtralConfig, PreTrainedConfig, SiglipVisionConfig

from modeling_moextend import MoExtendConfig, MoExtendForCausalLM
from modeling_moextend.attaching.choices import routing_choices
from modeling_moextend.validation_moextend import ENTRIES, FORMED, OWN

ENCODER = {
    "model_type": "clip_vision_model",
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_attention_heads": 2,
}
VALUES = {
    "base_model_name_or_path": "someone/base",
    "base_model_revision": "0123456789abcdef",
    "base_fingerprint": base64.b64encode(bytes(4096)).decode(),
    "text_config": {"model_type": "mixtral", "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 96},
    "encoder_name_or_path": "someone/encoder",
    "encoder_config": ENCODER,
    "encoder_fingerprint": base64.b64encode(b"MoEx" * 1024).decode(),
    "encoder_select_layer": -1,
    "encoder_select_feature": "full",
    "projector_hidden_act": "relu",
    "image_token_id": 96,
    "extended_layers": {"5": [3, 0], "2": [1]},
    "scope": "modality",
    "selection": "exclusive",
    "calibration": "none",
    "calibration_hidden_size": 8,
    "routing_rule": {"score": "softmax", "renormalise": True, "scale": 1.0},
}


def test_every_value_survives_a_json_round_trip():
    config = MoExtendConfig(**VALUES)
    again = MoExtendConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
    assert MoExtendConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    for name, value in VALUES.items():
        if name not in ("text_config", "encoder_config", "extended_layers"):
            assert getattr(again, name) == value, name
    assert isinstance(again.text_config, MixtralConfig) and again.text_config.vocab_size == 96
    assert isinstance(again.encoder_config, CLIPVisionConfig) and again.encoder_config.hidden_size == 16


def test_layer_indices_are_sorted_integers_in_python_and_strings_in_json():
    config = MoExtendConfig(extended_layers={"10": (1,), 2: [0, 3]})
    assert config.extended_layers == {2: [0, 3], 10: [1]}
    assert list(config.extended_layers) == [2, 10]
    assert config.to_dict()["extended_layers"] == {"2": [0, 3], "10": [1]}
    assert MoExtendConfig.from_dict(config.to_dict()).extended_layers == {2: [0, 3], 10: [1]}


def test_the_saved_config_depends_on_no_default():
    saved = json.loads(MoExtendConfig().to_json_string())
    assert {"scope", "selection", "calibration", "calibration_hidden_size", "encoder_select_layer"} <= saved.keys()


def test_deepcopy_is_equal_and_apart():
    config = MoExtendConfig(**VALUES)
    config.get_text_config().num_experts = 9
    twin = copy.deepcopy(config)
    assert twin.to_dict() == config.to_dict()
    twin.extended_layers[7] = [0]
    twin.text_config.hidden_size = 8
    assert 7 not in config.extended_layers and config.text_config.hidden_size == 32


def test_what_a_trainer_writes_stays_in_its_view():
    base = make_base()
    before = base.config.to_dict()
    model = MoExtendForCausalLM.from_base(base, {1: [0]})
    view = model.config.get_text_config()
    view.num_experts, view.router_aux_loss_coef, view.use_cache, view.output_router_logits = 99, 0.5, False, True
    assert model.config.get_text_config() is view, "what was written must be found again"
    assert model.config.text_config.to_dict() == before
    assert model.base.config.to_dict() == before
    saved = model.config.to_dict()
    assert saved["text_config"] == {k: v for k, v in before.items() if k != "transformers_version"}
    assert not any("view" in name for name in saved)
    assert model.config.get_text_config() is view, "saving must not lose the view"


@pytest.mark.parametrize("model_type", ["dict", "config"])
def test_text_config_is_taken_as_dict_or_config(model_type):
    text = MixtralConfig(hidden_size=32, num_attention_heads=4)
    config = MoExtendConfig(text_config=text.to_dict() if model_type == "dict" else text)
    assert isinstance(config.text_config, MixtralConfig) and config.get_text_config().hidden_size == 32


def test_auto_config_round_trip(tmp_path):
    config = MoExtendConfig(**VALUES)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is MoExtendConfig and again.model_type == "moextend"
    ours, theirs = config.to_dict(), again.to_dict()
    for values in (ours, theirs):
        values.pop("_name_or_path", None)
    assert theirs == ours


@pytest.mark.parametrize(
    ("encoder", "feature", "expected"),
    [
        (None, "patch", 0),
        (CLIPVisionConfig(image_size=336, patch_size=14), "patch", 576),
        (CLIPVisionConfig(image_size=336, patch_size=14), "full", 577),
        (SiglipVisionConfig(image_size=224, patch_size=16), "patch", 196),
        (SiglipVisionConfig(image_size=224, patch_size=16), "full", 196),  # has no class token
    ],
)
def test_number_of_image_tokens(encoder, feature, expected):
    assert MoExtendConfig(encoder_config=encoder, encoder_select_feature=feature).num_image_tokens == expected


def test_a_config_without_the_three_choices_is_an_old_one():
    """What was written before they had entries routes as the paper does, whatever new adapters start with."""
    config = MoExtendConfig()
    assert {name: getattr(config, name) for name in PAPER} == PAPER


# Given, and what comes of it. By hand: every combination of given and left out, and of the values that have a meaning.
LEFT_OUT = {  # (has_encoder, selection, calibration) -> what is filled in with no scope given
    (False, None, None): ("gate", "exclusive", "none"),
    (False, None, "none"): ("gate", "exclusive", "none"),
    (False, "exclusive", None): ("gate", "exclusive", "none"),
    (False, "exclusive", "none"): ("gate", "exclusive", "none"),
    (False, "compete", None): ("gate", "compete", "routed"),
    (False, "compete", "all"): ("gate", "compete", "all"),
    (False, "compete", "routed"): ("gate", "compete", "routed"),
    (False, "compete", "none"): ("gate", "compete", "none"),
    (True, None, None): ("modality", "exclusive", "none"),
    (True, None, "none"): ("modality", "exclusive", "none"),
    (True, "exclusive", None): ("modality", "exclusive", "none"),
    (True, "exclusive", "none"): ("modality", "exclusive", "none"),
    (True, "compete", None): ("modality", "compete", "routed"),
    (True, "compete", "all"): ("modality", "compete", "all"),
    (True, "compete", "routed"): ("modality", "compete", "routed"),
    (True, "compete", "none"): ("modality", "compete", "none"),
}


@pytest.mark.parametrize("scope", [None, "all", "modality", "gate"])
@pytest.mark.parametrize(("given", "expected"), LEFT_OUT.items(), ids=str)
def test_choices_left_out_are_filled_in_and_those_given_are_kept(given, expected, scope):
    has_encoder, selection, calibration = given
    found = routing_choices(scope, selection, calibration, has_encoder=has_encoder)
    assert list(found) == ["scope", "selection", "calibration"]
    assert tuple(found.values()) == (scope or expected[0], *expected[1:])
    if scope == "modality" and not has_encoder:
        with pytest.raises(ValueError, match="scope='modality' needs an encoder"):
            MoExtendForCausalLM.from_base(make_base(), {1: [0]}, scope=scope, selection=selection)
        return
    encoder = make_encoder() if has_encoder else None
    choices = {"scope": scope, "selection": selection, "calibration": calibration}
    config = MoExtendForCausalLM.from_base(make_base(), {1: [0]}, encoder=encoder, **choices).config
    assert {name: getattr(config, name) for name in found} == found


@pytest.mark.parametrize("has_encoder", [False, True])
@pytest.mark.parametrize("given", [{}, *({name: value} for name, value in PAPER.items()), PAPER], ids=str)
def test_paper_is_the_papers_three_choices_with_an_encoder_or_without(given, has_encoder):
    assert routing_choices(**given, paper=True, has_encoder=has_encoder) == PAPER
    encoder = make_encoder() if has_encoder else None
    config = MoExtendForCausalLM.from_base(make_base(), {1: [0]}, encoder=encoder, paper=True, **given).config
    assert {name: getattr(config, name) for name in PAPER} == PAPER


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"scope": "modality"}, "{'scope': 'modality'}"),
        ({"scope": "gate"}, "{'scope': 'gate'}"),
        ({"selection": "exclusive"}, "{'selection': 'exclusive'}"),
        ({"calibration": "none"}, "{'calibration': 'none'}"),
        ({"calibration": "routed"}, "{'calibration': 'routed'}"),
        (
            {"scope": "gate", "selection": "compete", "calibration": "none"},
            "{'scope': 'gate', 'calibration': 'none'}",
        ),
    ],
    ids=str,
)
def test_paper_refuses_other_choices_by_name(given, named):
    message = re.escape(f"paper=True means {PAPER}, but {named} was given: leave out one or the other.")
    with pytest.raises(ValueError, match=message):
        routing_choices(**given, paper=True)
    with pytest.raises(ValueError, match=message):
        MoExtendForCausalLM.from_base(make_base(), {1: [0]}, paper=True, **given)


@pytest.mark.parametrize("with_encoder", [False, True])
def test_with_all_choices_left_out_text_is_bit_equal_to_the_base(family, with_encoder):
    base = make_base(family)
    expected = frozen_copy(base)(**batch()).logits
    encoder = make_encoder() if with_encoder else None
    model = MoExtendForCausalLM.from_base(base, {1: [0], 3: [2, 5]}, encoder=encoder)
    assert torch.equal(model(**batch()).logits, expected)
    assert any(name.startswith("gate.") for name in model.adapter_tensors()) != with_encoder


@pytest.mark.parametrize("plan", [{1: [0.7]}, {1: [True]}, {0.5: [1]}])
def test_a_plan_of_other_numbers_than_integers_is_refused(plan):
    with pytest.raises(ValueError, match="must map a layer index to a list of source experts"):
        MoExtendConfig(extended_layers=plan)


@pytest.mark.parametrize("layer", [4, -5])
def test_an_encoder_layer_out_of_range_is_refused(layer):
    encoder = make_encoder().config
    with pytest.raises(ValueError, match=r"encoder_select_layer=.* has hidden states -4 to 3"):
        MoExtendConfig(encoder_config=encoder, encoder_select_layer=layer)
    MoExtendConfig(encoder_config=encoder, encoder_select_layer=3)
    MoExtendConfig(encoder_config=encoder, encoder_select_layer=-4)


def test_an_unknown_projector_activation_is_refused():
    with pytest.raises(ValueError, match="projector_hidden_act='nope' must be one of .*gelu"):
        MoExtendConfig(projector_hidden_act="nope")


REFUSED = [
    ({"scope": "some"}, "scope='some' must be one of 'all', 'modality', 'gate'"),
    ({"selection": "both"}, "selection='both' must be one of 'compete', 'exclusive'"),
    ({"calibration": None}, "calibration=None must be one of 'all', 'routed', 'none'"),
    ({"encoder_select_feature": "cls"}, "encoder_select_feature='cls' must be one of 'patch', 'full'"),
    ({"selection": "exclusive"}, "selection='exclusive' with calibration='all' has no meaning.*calibration='none'"),
    (
        {"selection": "exclusive", "calibration": "routed"},
        "selection='exclusive' with calibration='routed' has no meaning.*calibration='none'",
    ),
    ({"scope": "modality"}, "scope='modality' needs an encoder"),
    ({"extended_layers": [1, 2]}, r"must map a layer index to a list of source experts.*got \[1, 2\]"),
    ({"extended_layers": {"first": [1]}}, r"must map a layer index to a list of source experts.*got \{'first'"),
    ({"extended_layers": {1: 2}}, r"must map a layer index to a list of source experts.*got \{1: 2\}"),
    ({"extended_layers": {1: ["a"]}}, "must map a layer index to a list of source experts"),
    ({"extended_layers": {1: [0], 3: []}}, r"no source expert for layers \[3\]: leave these layers out"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_refused_values(values, message):
    with pytest.raises(ValueError, match=message):
        MoExtendConfig(**values)


FILLED_IN = ({"calibration": None}, {"selection": "exclusive"})  # refused in a config, not in from_base
REFUSED_CHOICES = [(values, message) for values, message in REFUSED[:7] if values not in FILLED_IN] + [
    ({"calibration": "all"}, "selection='exclusive' with calibration='all' has no meaning.*or selection='compete'"),
    ({"calibration": "routed"}, "selection='exclusive' with calibration='routed' has no meaning"),
    ({"selection": "exclusive", "calibration": "all"}, "selection='exclusive' with calibration='all' has no meaning"),
    ({"calibration": "maybe"}, "calibration='maybe' must be one of 'all', 'routed', 'none'"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED_CHOICES, ids=str)
def test_refused_choices_name_the_way_out_in_from_base(values, message):
    with pytest.raises(ValueError, match=message):
        MoExtendForCausalLM.from_base(make_base(), {1: [0]}, **values)


def test_every_entry_has_its_rule():
    """A new entry of the config without one would be taken as it comes from whoever wrote the file."""
    formed = {name for name, (_, *rule) in OWN.items() if rule == [*FORMED]}
    assert formed == {
        *("text_config", "encoder_config", "audio_encoder_config", "extended_layers", "gate_threshold", "deltas")
    }
    assert MoExtendConfig(**VALUES).to_dict().keys() <= ENTRIES.keys()
    fields = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"tie_last_hidden_states"}
    assert fields <= ENTRIES.keys(), "transformers has new ones"


def test_one_error_names_every_wrong_entry():
    wrong = {
        "base_model_name_or_path": "a\0b",
        "base_model_revision": 3,
        "base_fingerprint": "AAAA",
        "text_config": [],
        "encoder_name_or_path": "",
        "encoder_config": {"model_type": "clip_vision_model", "hidden_size": "wide"},
        "encoder_fingerprint": base64.b64encode(bytes(4095)).decode(),
        "encoder_select_layer": True,
        "encoder_select_feature": "cls",
        "projector_hidden_act": ["gelu"],
        "image_token_id": 10**30,
        "extended_layers": {"1": [0], "01": [1]},
        "scope": float("nan"),
        "selection": {},
        "calibration": 0,
        "calibration_hidden_size": 0,
        "gate_hidden_size": 10**9,
        "gate_threshold": 10**400,
        "routing_rule": {"score": "softmax", "renormalise": 1, "scale": 1.0},
        "dtype": "load",
        "num_labels": 10**9,
        "id2label": {"one": "a"},
        "to_dict": 1,
    }
    with pytest.raises(ValueError, match=f"The config has {len(wrong)} wrong entries") as raised:
        MoExtendConfig(**wrong)
    lines = str(raised.value).split("\n  ")[1:]
    assert len(lines) == len(wrong) and all(any(name in line for line in lines) for name in wrong)
    assert all(len(line) < 1000 for line in lines)


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        ({"score": "softmax", "renormalise": True}, True),
        ({"score": "sigmoid", "renormalise": False, "scale": 2}, True),
        ({"score": "sigmoid", "renormalise": False, "scale": 2.5}, True),
        ({"score": "softmax"}, False),
        ({"score": "tanh", "renormalise": True}, False),
        ({"score": ["softmax"], "renormalise": True}, False),
        ({"score": "softmax", "renormalise": True, "scale": 10**400}, False),
        ({"score": "softmax", "renormalise": True, "scale": "2"}, False),
        ({"score": "softmax", "renormalise": True, "power": 2.0}, False),
        (["softmax", True], False),
    ],
    ids=str,
)
def test_a_routing_rule_has_the_fields_of_one(rule, fits):
    if fits:
        assert MoExtendConfig(routing_rule=rule).routing_rule == rule
        return
    with pytest.raises(ValueError, match="routing_rule=.* must be a mapping with fields of a routing rule"):
        MoExtendConfig(routing_rule=rule)


@pytest.mark.parametrize("entries", [{"num_hidden_layers": 10**9}, {"n_layers": -(10**9)}, {"num_labels": 2**31}])
def test_a_nested_config_of_impossible_size_is_refused_before_it_is_made(entries):
    for model_type in ("mixtral", "no_such_type"):
        with pytest.raises(ValueError, match=f"text_config: {next(iter(entries))}=.* is no number that a model could"):
            MoExtendConfig(text_config={"model_type": model_type, **entries})


@pytest.mark.parametrize("name", ["to_dict", "__class__", "update"])
def test_a_nested_config_keeps_its_methods(name):
    with pytest.raises(ValueError, match=f"text_config: '{name}' can't be an entry"):
        MoExtendConfig(text_config={"model_type": "mixtral", name: 1})


@given(st.dictionaries(st.sampled_from([*VALUES, *ENTRIES]) | NAMES, ANYTHING, max_size=4), st.booleans())
@settings(max_examples=300, derandomize=True, deadline=None, database=None)
def test_any_entries_make_a_config_that_can_be_saved_or_one_error_of_ours(entries, over_good_ones):
    values = copy.deepcopy({**VALUES, **entries} if over_good_ones else entries)
    try:
        config = MoExtendConfig.from_dict(values)
    except ValueError as error:
        assert type(error) is ValueError
        assert innermost(error).parent.name == "modeling_moextend"
        return
    again = MoExtendConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_json_string() == config.to_json_string()


def innermost(error):
    """The file with the line that raised `error`."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return Path(trace.tb_frame.f_code.co_filename)


def test_text_config_of_an_attached_model_is_the_bases_own():
    base = make_base("qwen3_moe")
    before = base.config.to_dict()
    model = MoExtendForCausalLM.from_base(base, {0: [1], 3: [2, 2]}, encoder=make_encoder())
    assert model.config.text_config.to_dict() == before
    assert model.config.encoder_config.to_dict() == model.encoder.config.to_dict()
    assert model.config.image_token_id == 96, "the first id past the embedding"
    assert model.config.num_image_tokens == 4
