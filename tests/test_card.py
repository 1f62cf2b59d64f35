"""The model card names what the config and the caller give, leaves out the rest, and shows no local path."""

import ast
import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import PAPER
from hub_server import card_problems
from huggingface_hub import ModelCard

from modeling_moextend.publishing import card as card_module
from modeling_moextend.publishing.card import create_card, read_template

VISION = {
    "base_model_name_or_path": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "base_model_revision": "41bd4c9e7e4fb318ca40e721131d4933966c2cc1",
    "encoder_name_or_path": "openai/clip-vit-large-patch14-336",
    "encoder_config": {"model_type": "clip_vision_model"},
    "extended_layers": {5: [3, 0], 2: [1]},
    "expert_rank": None,
    "scope": "modality",
    "selection": "exclusive",
    "calibration": "none",
    "deltas": {},
    "trained_on": [],
}
TEXT = VISION | {"encoder_name_or_path": None, "encoder_config": None}


def make_config(values=VISION, **changes):
    entries = {"senses": {}} | values | changes
    if entries["encoder_config"] or entries["encoder_name_or_path"]:
        sense = SimpleNamespace(encoder_name_or_path=entries["encoder_name_or_path"])
        entries["senses"] = {"image": sense} | entries["senses"]
    return SimpleNamespace(**entries)


def metadata(card):
    return yaml.safe_load(str(card).split("---\n")[1])


def table(card, heading):
    """Cells of the first Markdown table after `heading`, header first."""
    lines = str(card).split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[:1] + rows[2:]]


def test_metadata_of_a_vision_adapter():
    card = create_card(make_config(), license="mit", language="en", datasets=["liuhaotian/LLaVA-Instruct-150K"])
    assert metadata(card) == {
        "base_model": "mistralai/Mixtral-8x7B-Instruct-v0.1",
        "base_model_relation": "adapter",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["moextend", "moe", "mixture-of-experts", "adapter", "multimodal", "vision-language"],
        "license": "mit",
        "language": "en",
        "datasets": ["liuhaotian/LLaVA-Instruct-150K"],
    }


def test_metadata_of_a_text_adapter_holds_only_what_is_known():
    found = metadata(create_card(make_config(TEXT, base_model_name_or_path=None)))
    assert found == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moextend", "moe", "mixture-of-experts", "adapter"],
    }


def test_body_names_base_revision_encoder_and_sizes():
    text = str(create_card(make_config(), adapter_bytes=5_912_000, num_parameters=1_475_584))
    assert VISION["base_model_revision"] in text
    assert "https://huggingface.co/openai/clip-vit-large-patch14-336" in text
    assert "| new experts | 3 |" in text
    assert "1,475,584" in text
    assert "5.9 MB (5,912,000 bytes)" in text and "rank of" not in text
    assert "| rank of a new expert's difference to its source | 8 |" in str(create_card(make_config(expert_rank=8)))


def test_layers_are_sorted_by_number():
    card = create_card(make_config(extended_layers={"10": [0], "2": [1, 7]}))  # JSON makes the keys strings
    assert table(card, "Extended layers")[1:] == [["2", "2", "1, 7"], ["10", "1", "0"]]


@pytest.mark.parametrize("scope", ["all", "modality", "gate"])
@pytest.mark.parametrize("selection, calibration", [("compete", "all"), ("compete", "routed"), ("exclusive", "none")])
def test_every_routing_choice_is_explained(scope, selection, calibration):
    card = create_card(make_config(scope=scope, selection=selection, calibration=calibration))
    rows = table(card, "Routing")[1:]
    assert [row[1] for row in rows] == [f"`{scope}`", f"`{selection}`", f"`{calibration}`"]
    assert all(row[2] for row in rows)


def test_paper_choices_are_called_so():
    assert "the paper's own choices" in str(create_card(make_config(**PAPER)))
    assert "the paper's own choices" not in str(create_card(make_config()))


def test_bit_equality_is_promised_only_where_it_holds():
    promise = "Batches without images give logits bit-equal"
    assert promise in str(create_card(make_config()))
    assert promise in str(create_card(make_config(extended_layers={}, **PAPER)))
    assert promise not in str(create_card(make_config(**PAPER)))
    assert "text without images may differ" in str(create_card(make_config(**PAPER)))


def test_projector_only_has_no_expert_sections():
    text = str(create_card(make_config(extended_layers={})))
    assert "## Extended layers" not in text
    assert "## Routing" not in text
    assert "| new experts |" not in text
    assert "a projector that brings images in for" in text


@pytest.mark.parametrize("values, extra", [(VISION, "AutoProcessor"), (TEXT, "AutoTokenizer")])
def test_code_to_load_it_parses_and_names_the_repository(values, extra):
    blocks = re.findall(r"```python\n(.*?)```", str(create_card(make_config(values), repo_id="me/eyes")), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        ast.parse(block)
    assert 'AutoModelForCausalLM.from_pretrained("me/eyes", trust_remote_code=True)' in blocks[0]
    assert f'{extra}.from_pretrained("me/eyes", trust_remote_code=True)' in blocks[0]
    assert ("encoder=" in blocks[1]) == (values is VISION)


def test_text_adapter_does_not_speak_of_images():
    body = str(create_card(make_config(TEXT, **PAPER), repo_id="me/law")).split("---\n")[2]
    for word in ("encoder", "projector", "images", "Images"):
        assert word not in body


def test_results_table_joins_columns_in_order_of_appearance():
    results = [{"benchmark": "a|b", "accuracy": 0.91234567}, {"benchmark": "text", "perplexity": 45.0, "n": 1710}]
    card = create_card(make_config(), results=results)
    assert table(card, "Results") == [
        ["benchmark", "accuracy", "perplexity", "n"],
        ["a\\|b", "0.912346", "", ""],
        ["text", "", "45", "1710"],
    ]


def test_training_settings_without_a_value_are_left_out():
    card = create_card(
        make_config(), training={"stage": "finetune", "learning_rate": 1.5e-3, "seed": 0, "notes": None}
    )
    assert table(card, "Training")[1:] == [["stage", "finetune"], ["learning_rate", "0.0015"], ["seed", "0"]]


def test_sections_without_data_are_left_out():
    text = str(create_card(make_config(TEXT, base_model_name_or_path=None, base_model_revision=None)))
    for absent in (
        "## Training",
        "## Results",
        "## Forgetting",
        "## Tensors",
        "| base |",
        "revision `",
        "![",
        "None",
        "Undefined",
        "\n\n\n",
        "{{",
        "{%",
    ):
        assert absent not in text
    for present in ("## Use", "## What is guaranteed", "disable_adapter()", "2024.acl-srw.8"):
        assert present in text


def test_local_paths_are_shown_by_name_only(tmp_path):
    base = tmp_path / "secret" / "tiny-moe"
    base.mkdir(parents=True)
    config = make_config(base_model_name_or_path=str(base), encoder_name_or_path=str(tmp_path / "gone" / "tiny-clip"))
    card = create_card(config, datasets=str(tmp_path / "questions.json"))
    assert {"base_model", "base_model_relation", "datasets"}.isdisjoint(metadata(card))
    assert str(tmp_path) not in str(card)
    for name in ("`tiny-moe` (local)", "`tiny-clip` (local)", "`questions.json` (local)"):
        assert name in str(card)


def test_figures_lie_in_the_repository():
    assert "![router shift](plots/shift.png)" in str(
        create_card(make_config(), figures={"router shift": "plots/shift.png"})
    )
    for outside in ("/tmp/shift.png", "../shift.png"):
        with pytest.raises(ValueError, match="relative to the repository"):
            create_card(make_config(), figures={"router shift": outside})


def test_missing_jinja_names_the_extra(monkeypatch):
    monkeypatch.setattr(card_module, "is_jinja_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'moextend\[train\]'"):
        create_card(make_config())


def test_measured_values_become_a_model_index():
    metrics = [
        {
            "type": "exact_match",
            "name": "exact match",
            "value": 0.45,
            "dataset": "letters",
            "dataset_type": "me/letters",
        },
        {"type": "perplexity", "value": 40.5, "dataset": "held out"},
        {"type": "exact_match", "value": 0.5, "dataset": "digits"},
    ]
    card = create_card(make_config(), repo_id="me/eyes", metrics=metrics)
    found = metadata(card)
    task = {"type": "image-text-to-text"}
    assert found["metrics"] == ["exact_match", "perplexity"]
    assert found["model-index"] == [
        {
            "name": "eyes",
            "results": [
                {
                    "task": task,
                    "dataset": {"name": "letters", "type": "me/letters"},
                    "metrics": [{"type": "exact_match", "value": 0.45, "name": "exact match"}],
                },
                {
                    "task": task,
                    "dataset": {"name": "held out", "type": "held out"},
                    "metrics": [{"type": "perplexity", "value": 40.5}],
                },
                {
                    "task": task,
                    "dataset": {"name": "digits", "type": "digits"},
                    "metrics": [{"type": "exact_match", "value": 0.5}],
                },
            ],
        }
    ]
    again = ModelCard(str(card)).data
    assert [(one.dataset_name, one.metric_value) for one in again.eval_results] == [
        ("letters", 0.45),
        ("held out", 40.5),
        ("digits", 0.5),
    ]
    assert card_problems(str(card)) == []
    assert "metrics" not in metadata(create_card(make_config()))


def test_tokens_that_used_new_experts_are_marked():
    text = str(create_card(make_config(), token_lines=["a [b\nc]\n\n# d", "e"]))
    assert "(in brackets):\n\n    a [b c] # d\n    e\n" in text, "code of one line each, whatever a text holds"
    assert "in brackets" not in str(create_card(make_config()))


def test_licences_that_need_a_name_are_linked():
    license = {"license": "other", "license_name": "base-2.0", "license_link": "https://example.org/base"}
    card = create_card(make_config(), **license)
    assert license.items() <= metadata(card).items()
    assert "This adapter's licence: [base-2.0](https://example.org/base)." in str(card)
    assert "No licence is named for the adapter itself." in str(create_card(make_config()))


def test_further_tags_come_behind_and_once():
    assert metadata(create_card(make_config(TEXT), tags=["law", "moe"]))["tags"] == [
        "moextend",
        "moe",
        "mixture-of-experts",
        "adapter",
        "law",
    ]


TENSORS = {  # of layers 2 and 5, one of them of 2 x 3 values
    "layers.2.router.weight": torch.empty(2, 3, dtype=torch.bfloat16, device="meta"),
    "layers.2.experts.down_proj": torch.empty(10, device="meta"),
    "layers.5.router.weight": torch.empty(1000, 4, dtype=torch.bfloat16, device="meta"),
    "gate.mean": torch.empty(7, device="meta"),
    "projector.linear_1.bias": torch.empty(5, dtype=torch.float16, device="meta"),
}


def test_tensors_are_counted_by_part_and_listed():
    card = create_card(make_config(), tensors=TENSORS)
    assert table(card, "Extended layers") == [
        ["decoder layer", "new experts", "copied at the start from base expert", "tensors", "parameters", "bytes"],
        ["2", "1", "1", "2", "16", "52"],
        ["5", "2", "3, 0", "1", "4,000", "8,000"],
        ["gate", "", "", "1", "7", "28"],
        ["projector", "", "", "1", "5", "10"],
    ]
    assert table(card, "Tensors")[1] == ["`layers.2.router.weight`", "[2, 3]", "bfloat16", "12"]
    assert len(table(card, "Tensors")) == 1 + len(TENSORS)
    for row in ("| tensors in the adapter | 5 |", "| parameters in the adapter | 4,028 |", "8.1 kB (8,090 bytes)"):
        assert row in str(card)


def test_forgetting_and_router_shift_are_shown():
    rows = [{"domain": "law", "ratio": "1.0000"}, {"domain": "code", "ratio": "1.2500"}]
    card = create_card(make_config(), forgetting=rows, router_shift="shift.png")
    assert table(card, "Forgetting") == [["domain", "ratio"], ["law", "1.0000"], ["code", "1.2500"]]
    assert "![router shift](shift.png)" in str(card).split("## Extended layers")[1].split("\n## ")[0]
    with pytest.raises(ValueError, match="relative to the repository"):
        create_card(make_config(), router_shift="../shift.png")


def limits(card):
    return str(card).split("## Limits\n")[1].split("\n## ")[0]


def test_limits_say_what_is_not_known_and_what_the_scope_lets_through():
    bare = limits(create_card(make_config(TEXT, **PAPER)))
    assert "Nothing was measured" in bare and "was not measured for this card" in bare and "Any token may use" in bare
    full = limits(create_card(make_config(), results=[{"n": 1}], forgetting=[{"n": 1}]))
    assert "measured" not in full and "after the first image" in full and "and the encoder's" in full
    assert "begins like the new task" in limits(create_card(make_config(TEXT, scope="gate")))
    aligned = limits(create_card(make_config(extended_layers={})))
    assert "new experts" not in aligned and "What the base lost" not in aligned


def test_an_adapter_on_top_of_others_names_them():
    below = [{"name": "law", "fingerprint": "0"}, {"name": "code", "fingerprint": "1"}]
    card = create_card(make_config(trained_on=below))
    assert "| on top of the adapters | `law`, `code` |" in str(card)
    assert "trained on top of the adapters law, code and is refused without them" in limits(card)
    below[0]["name_or_path"] = "me/law"
    use = str(create_card(make_config(trained_on=below), repo_id="me/med"))
    assert 'from_pretrained("me/law", trust_remote_code=True, adapter_name="law")' in use
    assert 'model.load_adapter("path/to/code", adapter_name="code")' in use
    assert 'model.load_adapter("me/med", adapter_name="top")' in use
    assert 'model.set_adapter(["law", "code", "top"], inference_mode=True)' in use
    assert 'MoExtendForCausalLM.from_pretrained("me/law", base="path/to/base"' in use
    assert "on top of" not in str(create_card(make_config()))


def test_the_tokenizer_may_lie_elsewhere():
    text = str(create_card(make_config(TEXT), repo_id="me/law", tokenizer="org/base"))
    assert 'AutoTokenizer.from_pretrained("org/base")' in text


def test_card_survives_saving(tmp_path):
    card = create_card(make_config(), repo_id="me/eyes")
    card.save(tmp_path / "README.md")
    loaded = card_module.ModelCard.load(tmp_path / "README.md")
    assert loaded.data.to_dict() == card.data.to_dict()
    assert loaded.text == card.text


def test_template_is_the_one_at_the_root(pytestconfig):
    assert read_template() == (pytestconfig.rootpath / "model_card_template.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("image", "task"), [(None, "audio-text-to-text"), ("openai/clip", "any-to-any")])
def test_an_adapter_that_hears_says_so(image, task):
    ears = {"audio": SimpleNamespace(encoder_name_or_path="openai/whisper-large-v3")}
    eyes = {"encoder_name_or_path": image, "encoder_config": {"model_type": "clip"} if image else None}
    card = create_card(make_config(TEXT, senses=ears, **eyes))
    assert metadata(card)["pipeline_tag"] == task and "audio" in metadata(card)["tags"]
    assert ("vision-language" in metadata(card)["tags"]) == bool(image) and "openai/whisper-large-v3" in str(card)
    text = str(create_card(make_config(TEXT, senses=ears, **eyes, scope="modality")))
    both = "images or " if image else ""
    assert f"Batches without {both}audio give logits" in text and f"prompts of text, not of {both}audio." in text
    assert f"from the first {both.replace('images', 'image')}audio token of their" in text
    assert image or "image" not in text
