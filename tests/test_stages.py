"""The recipes, and the stages in a row on tiny models."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_base, make_encoder
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl import TrlParser

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.sft_config import MoExtendSFTConfig
from modeling_moextend.sft_trainer import MoExtendSFTTrainer
from modeling_moextend.stages import StagesConfig, load_data, read_plan, run_stages

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("configuration/recipes/*.yaml"))
PAPER = ROOT / "configuration/recipes/mixtral_8x7b_clip_l.yaml"
WORDS = "what is in the image ? a red blue circle square USER: ASSISTANT: <image>".split()


def parse(*arguments):
    return TrlParser((StagesConfig, MoExtendSFTConfig)).parse_args_and_config(list(arguments))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_is_flat(recipe):
    values = yaml.safe_load(recipe.read_text())
    assert len(values) < 30
    assert not any(isinstance(value, dict) for value in values.values())
    config, args = parse("--config", str(recipe), "--use_cpu", "true", "--bf16", "false")
    assert config.base == values["base"] and args.learning_rate == values["learning_rate"]


def test_an_unknown_key_in_a_recipe_fails(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPES[0].read_text() + "\nnew_expert: 2\n")
    with pytest.raises(ValueError, match="new_expert"):
        parse("--config", str(recipe))


def test_the_command_line_wins_over_the_recipe():
    config, args = parse("--config", str(RECIPES[0]), "--scope", "all", "--learning_rate", "0.5")
    assert config.scope == "all" and args.learning_rate == 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stages": ["extend", "align"]}, "in this order"),
        ({"stages": ["align"]}, "needs --encoder and --align_data"),
        ({"stages": ["finetune"]}, "needs --plan"),
        ({"stages": ["extend"], "plan": "{}"}, "takes the place of stage extend"),
        ({"stages": ["extend"], "encoder": "clip"}, "the projector is random"),
    ],
)
def test_stages_that_cannot_run_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        StagesConfig(base="base", data="data.json", **values)


def test_the_papers_recipe_has_the_papers_settings():
    config, args = parse("--config", str(PAPER), "--use_cpu", "true", "--bf16", "false")
    devices = 8 * args.per_device_train_batch_size
    assert devices * config.align_gradient_accumulation_steps == 256
    assert devices * args.gradient_accumulation_steps == 128
    assert (config.align_learning_rate, config.probe_learning_rate, args.learning_rate) == (1e-3, 1e-3, 2e-5)
    assert (config.align_max_length, args.max_length) == (1024, 2048)
    assert (config.probe_max_steps, config.probe_samples, config.fraction, config.new_experts) == (
        1000,
        10_000,
        0.5,
        1,
    )
    assert (args.lr_scheduler_type, args.warmup_steps, args.weight_decay) == ("cosine", 0.03, 0.0)
    assert args.router_aux_loss_coef == 0.001
    assert (config.scope, config.selection, config.calibration) == ("all", "compete", "all")


def test_the_papers_recipe_builds_mixtral_on_the_meta_device():
    recipe = {"fraction": 0.5, **yaml.safe_load(PAPER.read_text())}
    text_config = AutoConfig.for_model("mixtral")  # its defaults are Mixtral-8x7B's
    eyes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(text_config, dtype=torch.bfloat16)
        encoder = CLIPVisionModel(CLIPVisionConfig(image_size=336, patch_size=14, **eyes))  # CLIP ViT-L/14-336
        plan = {
            j: [0] * recipe["new_experts"] for j in range(round(recipe["fraction"] * text_config.num_hidden_layers))
        }
        routing = {name: recipe[name] for name in ("scope", "selection", "calibration")}
        model = MoExtendForCausalLM.from_base(base, plan, encoder=encoder, **routing)
    sizes = {name: tensor.numel() for name, tensor in model.adapter_tensors().items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert experts == 16 * 3 * 4096 * 14336  # 2.82B, the paper's trained LLM parameters
    assert sum(size for name, size in sizes.items() if ".router." in name) == 16 * 4096
    assert sum(size for name, size in sizes.items() if ".calibration." in name) == 16 * 2 * 16 * 9
    assert sum(size for name, size in sizes.items() if "projector" in name) == 1025 * 4096 + 4097 * 4096
    assert model.config.num_image_tokens == 576


@pytest.fixture
def folders(tmp_path):
    """A tiny base with tokenizer, an encoder with image processor, captions and questions, all on disk."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS[:-1]])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "base")
    make_base().save_pretrained(tmp_path / "base")
    make_encoder().save_pretrained(tmp_path / "encoder")
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False).save_pretrained(tmp_path / "encoder")
    entries = []
    for number in range(24):
        colour = ("red", "blue")[number % 2]
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image> what is in the image ?"},
            {"from": "gpt", "value": f"a {colour} square"},
        ]
        entries.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path


def options(folders, **values):
    """Arguments of a few-step run."""
    defaults = {
        "base": folders / "base",
        "data": folders / "data.json",
        "output_dir": folders / "out",
        "max_steps": 3,
        "align_max_steps": 2,
        "probe_max_steps": 2,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 4,
        "assistant_only_loss": "true",
        "max_length": 64,
        "use_cpu": "true",
        "bf16": "false",
        "save_strategy": "no",
        "report_to": "none",
        "verify_base": "true",
    }
    return [part for name, value in (defaults | values).items() for part in (f"--{name}", str(value))]


def test_three_stages_in_a_row_give_an_adapter_that_loads(folders):
    encoder = {"encoder": folders / "encoder", "align_data": folders / "data.json"}
    routing = {"scope": "modality", "selection": "exclusive", "calibration": "none", "new_experts": 2}
    model = run_stages(*parse(*options(folders, **encoder, **routing)))
    plan = json.loads((folders / "out/extend/plan.json").read_text())
    assert len(plan) == 2 and all(len(sources) == 2 for sources in plan.values())  # half of 4 layers, 2 experts each
    assert (folders / "out/extend/shift.png").stat().st_size > 1000
    loaded = MoExtendForCausalLM.from_pretrained(folders / "out")
    for name, tensor in loaded.adapter_tensors().items():
        assert torch.equal(tensor, model.adapter_tensors()[name].to(tensor.dtype)), name
    aligned = MoExtendForCausalLM.from_pretrained(folders / "out/align")
    assert not aligned.config.extended_layers and aligned.projector is not None


def test_a_later_stage_goes_on_from_an_earlier_one(folders):
    encoder = {"encoder": folders / "encoder", "align_data": folders / "data.json"}
    arguments = options(folders, **encoder, output_dir=folders / "one")
    run_stages(*parse(*arguments, "--stages", "align", "extend"))
    arguments = options(folders, **encoder, adapter=folders / "one", output_dir=folders / "two")
    model = run_stages(*parse(*arguments, "--stages", "finetune"))
    plan = {int(k): v for k, v in json.loads((folders / "one/extend/plan.json").read_text()).items()}
    assert model.config.extended_layers == plan


def test_two_runs_with_one_seed_are_equal(folders):
    encoder = {"encoder": folders / "encoder", "align_data": folders / "data.json"}
    models = [run_stages(*parse(*options(folders, **encoder, output_dir=folders / name))) for name in ("one", "two")]
    one, two = (model.adapter_tensors() for model in models)
    assert models[0].config.extended_layers == models[1].config.extended_layers
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_a_resumed_run_ends_as_one_that_ran_through_and_repeats_no_stage(folders, stage, capsys):
    encoder = {"encoder": folders / "encoder", "align_data": folders / "data.json"}
    steps = {"max_steps": 4, "align_max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    arguments = options(folders, **encoder, **steps)
    through = run_stages(*parse(*arguments)).adapter_tensors()
    through = {name: tensor.detach().clone() for name, tensor in through.items()}
    capsys.readouterr()
    checkpoint = folders / "out" / ("align/checkpoint-2" if stage == "align" else "checkpoint-2")
    resumed = run_stages(*parse(*arguments, "--resume_from_checkpoint", str(checkpoint))).adapter_tensors()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in through.items())
    printed = capsys.readouterr().out
    assert ("stage align" in printed) == ("Stage extend" in printed) == (stage == "align")


def test_other_routing_may_follow_an_alignment_but_not_new_experts(folders):
    encoder = {"encoder": folders / "encoder", "align_data": folders / "data.json"}
    run_stages(*parse(*options(folders, **encoder, output_dir=folders / "one"), "--stages", "align"))
    routing = {"scope": "modality", "selection": "exclusive", "calibration": "none"}
    later = options(folders, **encoder, **routing, adapter=folders / "one", output_dir=folders / "two")
    model = run_stages(*parse(*later, "--stages", "finetune", "--plan", '{"1": [0, 2]}'))
    assert (model.config.scope, model.config.selection) == ("modality", "exclusive")
    assert not any("calibration" in name for name in model.adapter_tensors())
    again = options(folders, **encoder, scope="all", adapter=folders / "two", output_dir=folders / "three")
    with pytest.raises(ValueError, match="were made for {'scope': 'modality'}"):
        run_stages(*parse(*again, "--stages", "finetune"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": "0,9"}, r"\[9\] are not MoE layers"),
        ({"layers": "some"}, "must be one of all, first-half"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "needs --eval_data"),
        ({"stage": "align"}, "use --stages align"),
        ({"probe_samples": 0}, "held-out samples"),
        ({"data": "nowhere.json"}, "nowhere.json"),
        ({"resume_from_checkpoint": "nowhere"}, "no checkpoint there"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first_step(folders, values, message, capsys):
    encoder = {"encoder": folders / "encoder", "align_data": folders / "data.json"}
    with pytest.raises((ValueError, OSError), match=message):
        run_stages(*parse(*options(folders, **encoder, **values)))
    assert "stage align" not in capsys.readouterr().out


def test_a_text_only_extension_needs_no_encoder(folders):
    entries = json.loads((folders / "data.json").read_text())
    for entry in entries:
        del entry["image"]
        entry["conversations"][0]["value"] = "what is in the image ?"
    (folders / "text.json").write_text(json.dumps(entries))
    arguments = options(folders, data=folders / "text.json", layers="all", assistant_only_loss="false")
    (folders / "base/chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    model = run_stages(*parse(*arguments, "--stages", "extend", "finetune"))
    assert sorted(model.config.extended_layers) == [0, 1, 2, 3] and model.encoder is None


def test_a_plan_is_read_from_a_file_or_from_the_command_line(tmp_path):
    (tmp_path / "plan.json").write_text('{"3": [1], "0": [2, 2]}')
    given = [
        StagesConfig(base="b", data="d", plan=plan, stages=["finetune"])
        for plan in (str(tmp_path / "plan.json"), '{"1": [0]}')
    ]
    assert [read_plan(config) for config in given] == [{0: [2, 2], 3: [1]}, {1: [0]}]


def test_the_trainer_finds_tokenizer_and_image_processor_itself(folders):
    config, args = parse(*options(folders, max_steps=1, encoder=folders / "encoder", align_data=folders / "data.json"))
    model = MoExtendForCausalLM.from_base(folders / "base", {1: [0]}, encoder=folders / "encoder")
    data = load_data(config.data, config)
    trainer = MoExtendSFTTrainer(model=model, args=args, train_dataset=data)
    assert trainer.processing_class.image_token_id == model.config.image_token_id
    trainer.train()
