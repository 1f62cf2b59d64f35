"""The recipes, and the stages in a row on tiny models."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import PAPER, make_base, make_encoder
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    WhisperConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from trl import TrlParser

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.tools.interrupts import run_script
from modeling_moextend.tools.locations import check_location
from modeling_moextend.training.config import MoExtendSFTConfig
from modeling_moextend.training.stages import StagesConfig, build_model, load_any, load_data, read_plan, run_stages
from modeling_moextend.training.trainer import MoExtendSFTTrainer

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("configuration/recipes/*.yaml"))
PAPERS_RECIPE = ROOT / "configuration/recipes/mixtral_8x7b_clip_l.yaml"
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


@pytest.mark.parametrize(
    ("values", "routing", "new_experts"),
    [
        ({}, {}, 4),
        ({"new_experts": 2}, {}, 2),
        ({"scope": "all", "selection": "compete"}, {"scope": "all", "selection": "compete"}, 4),
        ({"paper": True}, PAPER, 1),
        ({"paper": True, "new_experts": 3}, PAPER, 3),
        ({"paper": True, "calibration": "all"}, PAPER, 1),
    ],
    ids=str,
)
def test_paper_chooses_its_routing_and_one_new_expert_a_layer(values, routing, new_experts):
    config = StagesConfig(base="base", data="data.json", stages=["extend"], **values)
    assert config.chosen_routing() == routing and config.new_experts == new_experts
    arguments = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    arguments += ["--output_dir", "out", "--use_cpu", "true", "--bf16", "false", "--stages", "extend"]
    parsed, _ = parse("--base", "base", "--data", "data.json", *arguments)
    assert parsed.chosen_routing() == routing and parsed.new_experts == new_experts


def test_paper_beside_another_routing_is_refused_by_name():
    with pytest.raises(ValueError, match="paper=True means .*, but {'selection': 'exclusive'} was given"):
        StagesConfig(base="base", data="data.json", stages=["extend"], paper=True, selection="exclusive")
    with pytest.raises(ValueError, match="paper=True means new experts that are whole copies, but expert_rank=4"):
        StagesConfig(base="base", data="data.json", stages=["extend"], paper=True, expert_rank=4)


def test_the_small_recipe_leaves_the_choices_to_the_defaults_or_to_paper():
    recipe = str(ROOT / "configuration/recipes/easy_vqa.yaml")
    config, _ = parse("--config", recipe)
    assert (config.chosen_routing(), config.new_experts) == ({}, 4) and config.encoder is not None
    config, _ = parse("--config", recipe, "--paper", "true")
    assert (config.chosen_routing(), config.new_experts) == (PAPER, 1)


def test_the_papers_recipe_has_the_papers_settings():
    config, args = parse("--config", str(PAPERS_RECIPE), "--use_cpu", "true", "--bf16", "false")
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
    recipe = {"fraction": 0.5, **yaml.safe_load(PAPERS_RECIPE.read_text())}
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


WHISPER_LARGE_V3 = {  # its config.json, as far as shapes go
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
    "vocab_size": 51866,
}
SIGLIP2_SO400M = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
QWEN3_30B_A3B = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "vocab_size": 151936,
}


@pytest.mark.parametrize("name", ["mixtral_8x7b_whisper_large", "qwen3_30b_a3b_siglip2"])
def test_recipes_of_other_senses_parse_and_build_on_the_meta_device(name):
    config, _ = parse(
        "--config", str(ROOT / f"configuration/recipes/{name}.yaml"), "--use_cpu", "true", "--bf16", "false"
    )
    with torch.device("meta"):
        if "whisper" in name:
            base = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral"), dtype=torch.bfloat16)
            encoder, size, downsample = WhisperEncoder(WhisperConfig(**WHISPER_LARGE_V3)), 3000, config.downsample
        else:
            text_config = AutoConfig.for_model("qwen3_moe", **QWEN3_30B_A3B)
            base = AutoModelForCausalLM.from_config(text_config, dtype=torch.bfloat16)
            encoder, size, downsample = Siglip2VisionModel(Siglip2VisionConfig(**SIGLIP2_SO400M)), 256, 1
        depth = base.config.num_hidden_layers
        plan = {j: [0] * config.new_experts for j in range(round(config.fraction * depth))}
        model = MoExtendForCausalLM.from_base(base, plan, encoder=encoder, **config.chosen_routing())
    (sense,) = model.senses.values()
    assert sense.num_placeholders(size) == {3000: 375, 256: 256}[size]
    width, hidden = encoder.config.hidden_size * downsample, base.config.hidden_size
    sizes = {name: tensor.numel() for name, tensor in model.adapter_tensors().items()}
    assert sum(n for name, n in sizes.items() if "projector" in name) == (width + 1) * hidden + (hidden + 1) * hidden


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


def write_text_data(folders):
    """The questions without their images."""
    entries = json.loads((folders / "data.json").read_text())
    for entry in entries:
        del entry["image"]
        entry["conversations"][0]["value"] = "what is in the image ?"
    (folders / "text.json").write_text(json.dumps(entries))


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_later_stage_goes_on_from_an_earlier_one(folders):
    encoder = {"encoder": folders / "encoder", "align_data": folders / "data.json"}
    arguments = options(folders, **encoder, output_dir=folders / "one")
    run_stages(*parse(*arguments, "--stages", "align", "extend"))
    arguments = options(folders, **encoder, adapter=folders / "one", output_dir=folders / "two")
    model = run_stages(*parse(*arguments, "--stages", "finetune"))
    plan = {int(k): v for k, v in json.loads((folders / "one/extend/plan.json").read_text()).items()}
    assert model.config.extended_layers == plan


@pytest.mark.slow
def test_two_runs_with_one_seed_are_equal(folders):
    encoder = {"encoder": folders / "encoder", "align_data": folders / "data.json"}
    models = [run_stages(*parse(*options(folders, **encoder, output_dir=folders / name))) for name in ("one", "two")]
    one, two = (model.adapter_tensors() for model in models)
    assert models[0].config.extended_layers == models[1].config.extended_layers
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("stage", [pytest.param("align", marks=pytest.mark.slow), "finetune"])
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
    assert (": align" in printed) == (": extend" in printed) == (stage == "align")


def test_a_resumed_stage_has_the_last_whole_checkpoint_and_its_plan(folders, capsys):
    write_text_data(folders)
    (folders / "base/chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    values = {"data": folders / "text.json", "assistant_only_loss": "false", "dtype": "bfloat16", "scope": "all"}
    values |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "plan": '{"1": [0]}'}  # its row is frozen
    arguments = [*options(folders, **values), "--stages", "finetune"]
    through = run_stages(*parse(*arguments)).adapter_tensors()
    through = {name: tensor.detach().clone() for name, tensor in through.items()}
    (folders / "out/checkpoint-4/optimizer.pt").unlink()
    (folders / "out/checkpoint-3/trainer_state.json").write_text("{")
    arguments += ["--resume_from_checkpoint", "true"]
    capsys.readouterr()
    resumed = run_stages(*parse(*arguments)).adapter_tensors()
    said = capsys.readouterr().out
    assert "checkpoint-4 is not a complete" in said and "checkpoint-3 is not" in said
    assert f"goes on in stage finetune from {folders / 'out/checkpoint-2'}; what came before is not run" in said
    assert {n: t.dtype for n, t in through.items()} == {n: t.dtype for n, t in resumed.items()}
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in through.items())
    with pytest.raises(ValueError, match=r"--plan says {2: \[0\]}, but .* has {1: \[0\]}: leave out --plan"):
        run_stages(*parse(*arguments, "--plan", '{"2": [0]}'))
    with pytest.raises(ValueError, match="learning_rate: it was 0.01, now 0.5"):
        run_stages(*parse(*arguments, "--learning_rate", "0.5"))


def test_other_routing_may_follow_an_alignment_but_not_new_experts(folders):
    encoder = {"encoder": folders / "encoder", "align_data": folders / "data.json"}
    aligned = run_stages(
        *parse(*options(folders, **encoder, paper="true", output_dir=folders / "one"), "--stages", "align")
    )
    assert (aligned.config.scope, aligned.config.selection) == ("all", "compete")
    routing = {"scope": "modality", "selection": "exclusive", "calibration": "none"}
    later = options(folders, **encoder, **routing, expert_rank=2, adapter=folders / "one", output_dir=folders / "two")
    model = run_stages(*parse(*later, "--stages", "finetune", "--plan", '{"1": [0, 2]}'))
    assert (model.config.scope, model.config.selection, model.config.expert_rank) == ("modality", "exclusive", 2)
    assert model.adapter_tensors()["layers.1.experts.down_proj.lora_A"].shape[:2] == (2, 2)
    assert not any("calibration" in name for name in model.adapter_tensors())
    for other, made in (({"scope": "all"}, "'scope': 'modality'"), ({"expert_rank": 3}, "'expert_rank': 2")):
        again = options(folders, **encoder, **other, adapter=folders / "two", output_dir=folders / "three")
        with pytest.raises(ValueError, match=f"were made for {{{made}}}"):
            run_stages(*parse(*again, "--stages", "finetune"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": "0,9"}, r"\[9\] are not MoE layers"),
        ({"layers": "some"}, "must be one of all, first-half"),
        ({"expert_rank": 1000}, "expert_rank=1000 is above"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "needs --eval_data"),
        ({"stage": "align"}, "use --stages align"),
        ({"probe_samples": 0}, "held-out samples"),
        ({"data": "nowhere.json"}, "nowhere.json"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere is not a complete checkpoint: there is no such folder"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first_step(folders, values, message, capsys):
    encoder = {"encoder": folders / "encoder", "align_data": folders / "data.json"}
    with pytest.raises((ValueError, OSError), match=message):
        run_stages(*parse(*options(folders, **encoder, **values)))
    assert "stage align" not in capsys.readouterr().out


WRONG = {
    "base": "no/such/base",
    "encoder": "~/no-encoder",
    "adapter": "./none",
    "data": "nowhere.json",
    "align_data": "nowhere.jsonl",
    "eval_data": "/no/folder",
    "retention_data": "nothing.jsonl",
    "image_folder": "no-images",
    "plan": "plan.json",
}


@pytest.mark.parametrize("name", [*WRONG, "all of them"])
def test_wrong_paths_are_found_before_anything_is_loaded(folders, name, monkeypatch):
    for step in ("load_data", "load_processor", "build_model"):
        monkeypatch.setattr(f"modeling_moextend.training.stages.{step}", lambda *args: pytest.fail("it was loaded"))
    wrong = WRONG if name == "all of them" else {name: WRONG[name]}
    encoder = {"encoder": folders / "encoder", "align_data": folders / "data.json"}
    stages = ("align", "finetune") if "plan" in wrong else ("align", "extend", "finetune")
    arguments = options(folders, **encoder, **{} if name == "all of them" else {"adapter": folders / "base"})
    arguments += [part for option, value in wrong.items() for part in (f"--{option}", value)]
    with pytest.raises(ValueError, match="Nothing was loaded or trained") as refusal:
        run_stages(*parse(*arguments, "--stages", *stages))
    lines = str(refusal.value).splitlines()[1:]
    assert len(lines) == len(wrong)
    assert all(any(f"{option}={value!r}" in line for line in lines) for option, value in wrong.items())


def test_a_folder_without_a_model_and_a_name_that_the_hub_lacks_are_no_base(folders):
    (folders / "empty").mkdir()
    for base, error, message in (
        (folders / "empty", ValueError, "holds no config.json"),
        (folders / "data.json", ValueError, "is a file: give a folder"),
        ("me/nowhere", OSError, "base='me/nowhere' is no folder here, and can't be read from the Hub"),
    ):
        with pytest.raises(error, match=message):
            check_location("base", base)
    with pytest.raises(ValueError, match="encoder='nowhere/at/all': there is no such folder"):
        MoExtendForCausalLM.from_base(folders / "base", {1: [0]}, encoder="nowhere/at/all")


@pytest.mark.slow
def test_whoever_stops_a_run_is_told_where_and_how_to_go_on(folders, monkeypatch, capsys):
    encoder = {"encoder": folders / "encoder", "align_data": folders / "data.json"}
    arguments = options(folders, **encoder, max_steps=3, save_strategy="steps", save_steps=1)

    def stop_at(step):
        def on_step_end(self, args, state, control, **kwargs):
            if (args.stage, state.global_step) == step:
                raise KeyboardInterrupt

        monkeypatch.setattr("modeling_moextend.training.trainer.AdapterReport.on_step_end", on_step_end)

    def stopped():
        with pytest.raises(SystemExit) as end:
            run_script(lambda: run_stages(*parse(*arguments)))
        assert end.value.code == 130
        return capsys.readouterr().err.splitlines()[-1]

    stop_at(("align", 1))
    assert stopped().startswith("Stopped: in stage align at step 1 of 2; no checkpoint is there")
    stop_at(("finetune", 2))
    assert stopped() == (
        "Stopped: in stage finetune at step 2 of 3; resume_from_checkpoint=True (--resume_from_checkpoint true) goes "
        f"on from {folders / 'out' / 'checkpoint-1'}"
    )
    monkeypatch.setattr(
        "modeling_moextend.training.stages.extend", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert stopped().endswith(f"go on with --stages extend finetune --adapter {folders / 'out' / 'align'}")
    monkeypatch.setattr(
        "modeling_moextend.training.stages.build_model", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert stopped() == "Stopped: nothing was written; the same command begins anew"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"calibration": "all"}, "selection='exclusive' with calibration='all' has no meaning"),
        ({"scope": "modality"}, "scope='modality' needs an encoder"),
        ({"selection": "both"}, "selection='both' must be one of"),
    ],
    ids=str,
)
def test_routing_without_meaning_is_refused_before_the_probe_of_a_text_only_run(folders, values, message, monkeypatch):
    write_text_data(folders)
    monkeypatch.setattr("modeling_moextend.training.stages.extend", lambda *args: pytest.fail("the probe ran"))
    arguments = options(folders, **values, data=folders / "text.json", assistant_only_loss="false")
    with pytest.raises(ValueError, match=message):
        run_stages(*parse(*arguments, "--stages", "extend", "finetune"))


def test_an_adapter_keeps_its_own_routing_unless_another_is_chosen(folders):
    encoder = {"encoder": folders / "encoder", "align_data": folders / "data.json"}
    aligned = MoExtendForCausalLM.from_base(folders / "base", encoder=folders / "encoder", paper=True)
    aligned.save_pretrained(folders / "aligned")
    for values, expected in (
        ({}, ("all", "compete", "all")),
        ({"calibration": "routed"}, ("all", "compete", "routed")),
        ({"paper": "true"}, ("all", "compete", "all")),
        (
            {"scope": "modality", "selection": "exclusive", "calibration": "none"},
            ("modality", "exclusive", "none"),
        ),
    ):
        config, _ = parse(*options(folders, **encoder, **values, adapter=folders / "aligned"))
        model = build_model(config, processor=None).config
        assert (model.scope, model.selection, model.calibration) == expected
    MoExtendForCausalLM.from_base(folders / "base", encoder=folders / "encoder").save_pretrained(folders / "default")
    config, _ = parse(*options(folders, **encoder, paper="true", adapter=folders / "default"))
    model = build_model(config, processor=None).config
    assert (model.scope, model.selection, model.calibration) == ("all", "compete", "all")


def test_a_text_only_extension_needs_no_encoder(folders):
    write_text_data(folders)
    little = {"retention_tokens": 200, "retention_length": 16, "gate_steps": 40, "gate_learning_rate": 0.02}
    little["gate_task_weight"] = 100.0  # what a random base writes looks like any text
    arguments = options(folders, **little, data=folders / "text.json", layers="all", assistant_only_loss="false")
    (folders / "base/chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    model = run_stages(*parse(*arguments, "--stages", "extend", "finetune"))
    assert sorted(model.config.extended_layers) == [0, 1, 2, 3] and model.encoder is None
    assert (model.config.scope, model.config.selection, model.config.calibration) == ("gate", "exclusive", "none")
    assert all(len(sources) == 4 for sources in model.config.extended_layers.values())


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


# ------------------------------------------------------------------ scope="gate"


GATE = {
    "scope": "gate",
    "selection": "exclusive",
    "calibration": "none",
    "new_experts": 2,
    "retention_tokens": 300,
    "retention_length": 8,
    "gate_steps": 60,
    "gate_learning_rate": 0.02,
}


def write_retention(folders):
    rows = [{"text": " ".join(WORDS[(i + 3 * j) % 6 + 5] for j in range(6))} for i in range(20)]
    (folders / "retention.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"retention_data": folders / "retention.jsonl", "retention_cache_dir": folders / "cache"}


def test_retention_text_is_read_from_a_file(folders):
    given = write_retention(folders)
    data = load_any(str(given["retention_data"]))
    assert len(data) == 20 and data.column_names == ["text"]


@pytest.mark.slow
def test_a_text_only_run_trains_its_gate_on_the_given_retention_text(folders, capsys):
    entries = json.loads((folders / "data.json").read_text())
    for entry in entries:
        del entry["image"]
        entry["conversations"][0]["value"] = "what is in the image ?"
    (folders / "text.json").write_text(json.dumps(entries))
    (folders / "base/chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    values = {**GATE, **write_retention(folders), "data": folders / "text.json", "assistant_only_loss": "false"}
    model = run_stages(*parse(*options(folders, **values), "--stages", "extend", "finetune"))
    printed = capsys.readouterr().out
    assert "of task tokens through" in printed and "no retention_dataset" not in printed
    assert not (folders / "cache").exists()
    assert model.config.scope == "gate" and model.gate.fc2.weight.abs().sum() > 0
    loaded = MoExtendForCausalLM.from_pretrained(folders / "out")
    for name, tensor in loaded.adapter_tensors().items():
        assert torch.equal(tensor, model.adapter_tensors()[name].to(tensor.dtype)), name


def test_a_gate_comes_with_the_experts_of_an_aligned_adapter_and_is_trained(folders, capsys):
    """`extend` on a model without any expert, as after stage align."""
    encoder = {"encoder": folders / "encoder", "align_data": folders / "data.json"}
    values = {**GATE, **encoder, **write_retention(folders)}
    model = run_stages(*parse(*options(folders, **values), "--plan", '{"1": [0, 2]}', "--stages", "align", "finetune"))
    assert model.config.extended_layers == {1: [0, 2]} and model.projector is not None
    assert model.gate.fc2.weight.abs().sum() > 0
    printed = capsys.readouterr().out
    assert printed.index("stage align") < printed.index("of task tokens through") < printed.index("stage finetune")
    assert printed.count("of task tokens through") == 1


def test_json_lines_with_messages_are_data_as_they_are(folders):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (folders / "chats.jsonl").write_text("\n".join([json.dumps(chat)] * 3))
    data = load_data(
        str(folders / "chats.jsonl"), StagesConfig(base="base", data="chats.jsonl", plan="{}", stages=["finetune"])
    )
    assert len(data) == 3 and data[0] == chat
