"""Two processes: sharded parameters (FSDP2) train, save and resume as whole ones do; what can't is refused first."""

import gc
import os
import types
import weakref
from pathlib import Path

import pytest
import test_audio
import torch
import yaml
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from conftest import in_processes, leave_group, make_base, shake
from safetensors.torch import load_file
from test_sft_trainer import (
    ADAPTER,
    GATED,
    assert_equal,
    config,
    frozen_tensors,
    gated_trainer,
    image_data,
    make_model,
    make_processor,
)
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.low_rank_moextend import LowRankExperts
from modeling_moextend.training.checks import allow_missing_base, check_sharding
from modeling_moextend.training.trainer import MoExtendSFTTrainer

CONFIGURATION = Path(__file__).resolve().parents[1] / "configuration" / "accelerate"
STEPS = 4
FSDP = {"version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"}


EXCLUSIVE = {"selection": "exclusive", "calibration": "none", "deltas": {"embedding": 2, "attention": 2, "output": 0}}
LOW_RANK = {"expert_rank": 3, "selection": "compete", "calibration": "none"}


def start(folder, fsdp=None, callbacks=None, choices=None, **overrides):
    """Samples in order, one a process: process 1 sees images in some steps in which process 0 sees none."""
    model = shake(make_model(encoder=True, scope="modality", **(choices or {})))
    model.to(torch.bfloat16 if overrides.get("bf16") else torch.float32)  # what trains is float32 again
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "train_sampling_strategy": "sequential",
        "router_aux_loss_coef": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "ddp_timeout": 300,
        "adapter_dtype": "float32",
        "ddp_find_unused_parameters": False,
    }
    if fsdp is not None:
        settings |= {"fsdp": True, "fsdp_config": {**FSDP, **fsdp}}
    args = config(folder, **{**settings, **overrides})
    if fsdp is not None:  # of CPU processes accelerate makes DDP, whatever was asked for
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    data = {"train_dataset": image_data(), "eval_dataset": image_data(4)}
    return MoExtendSFTTrainer(model=model, args=args, processing_class=make_processor(), callbacks=callbacks, **data)


def whole(trainer):
    """Every new tensor as the optimiser knows it."""
    tensors = trainer.model.adapter_tensors()
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for name, t in tensors.items()}


def history(trainer):
    names = ("loss", "task_loss", "balance_loss", "new_expert_share", "grad_norm", "num_tokens", "eval_loss")
    return [{name: entry[name] for name in names if name in entry} for entry in trainer.state.log_history[:-1]]


def run_and_resume(folder, fsdp=None, **overrides):
    """A run of four steps, and one resumed in the middle of it."""
    trainer = start(folder, fsdp, **overrides)
    trainer.train()
    trainer.save_model(f"{folder}/final")
    resumed = start(f"{folder}/resumed", fsdp, **overrides)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    return {
        "history": history(trainer),
        "tensors": whole(trainer),
        "resumed history": history(resumed),
        "resumed tensors": whole(resumed),
    }


def run_ddp(folder):
    return run_and_resume(folder)


def run_full(folder):
    return run_and_resume(folder, {})


def run_states_sharded(folder):
    return run_and_resume(folder, {"state_dict_type": "SHARDED_STATE_DICT"})


def run_half(folder):
    """What a run on GPUs looks like: layers compute in bf16 and are recomputed for backward, steps accumulate."""
    more = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "bf16": True, "choices": EXCLUSIVE}
    return run_and_resume(folder, {}, **more)


def run_low_rank(folder):
    """New experts of a low rank, in bf16 layers that are recomputed: sources and factors are gathered together."""
    more = {"gradient_checkpointing": True, "bf16": True, "choices": LOW_RANK}
    return run_and_resume(folder, {}, **more)


def run_low_rank_ddp(folder):
    return run_and_resume(folder, choices=LOW_RANK)


def run_low_rank_full(folder):
    """An evaluation in between: what it makes of sharded factors is not there in the next."""
    trainer = start(folder, {}, choices=LOW_RANK)
    trainer.train()
    trainer.save_model(f"{folder}/final")
    kept = [module.merged for module in trainer.model.modules() if isinstance(module, LowRankExperts)]
    return {"history": history(trainer), "tensors": whole(trainer), "kept": kept}


def run_shards(folder):
    """Each process has its part of every tensor only, and the whole ones are gone."""
    trainer = start(folder, {}, max_steps=1, save_strategy="no")
    before = [weakref.ref(parameter) for parameter in trainer.model.parameters()]
    trainer.train()
    gc.collect()
    trainer.model.reshard()
    parameters = list(trainer.model.parameters())
    return {
        "alive": sum(ref() is not None for ref in before),
        "number": len(before),
        "all": sum(p.numel() for p in parameters),
        "here": sum(p.to_local().numel() for p in parameters),
    }


class EarlierIsBetter(TrainerCallback):
    """Takes the number of steps for the loss."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = float(state.global_step)


def run_best(folder):
    """The first checkpoint counts as best, and comes back after an evaluation of the last step."""
    best = {"load_best_model_at_end": True, "greater_is_better": False, "metric_for_best_model": "eval_loss"}
    trainer = start(folder, {}, bf16=True, **best)
    trainer.add_callback(EarlierIsBetter())
    trainer.train()
    trainer.save_model(f"{folder}/final")
    return {"best": trainer.state.best_model_checkpoint, "tensors": whole(trainer)}


class TamperShard(TrainerCallback):
    """Changes one value of each process's shard."""

    name = "base.model.layers.0.self_attn.q_proj.weight"

    def on_step_end(self, args, state, control, model, **kwargs):
        with torch.no_grad():
            model.get_parameter(self.name).to_local().view(-1)[3] += 1.0


def run_verify(folder):
    settings = {"verify_base": True, "max_steps": 2, "save_strategy": "no", "bf16": True}
    honest = start(folder, {}, **settings)
    frozen = frozen_tensors(honest.model)
    honest.train()
    honest.model.reshard()
    after = {
        name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in frozen_tensors(honest.model).items()
    }
    dishonest = start(folder, {}, callbacks=[TamperShard()], **settings)
    with pytest.raises(RuntimeError, match=f"changed 1 tensors that must never change: {TamperShard.name}"):
        dishonest.train()
    return {"before": frozen, "after": after}


def run_push(folder):
    """A push is under way; only process 0 knows."""
    trainer = start(folder, {}, max_steps=1, save_strategy="no")
    pushed = []
    trainer.push_to_hub = lambda *args, **kwargs: pushed.append(args)
    if trainer.is_world_process_zero():
        trainer.push_in_progress = types.SimpleNamespace(is_done=lambda: False)
    trainer._push_from_checkpoint(folder)
    return {"pushed": len(pushed)}


def run_refused(folder):
    with pytest.raises(ValueError, match="fsdp_activation_checkpointing is not supported"):
        start(folder, {"activation_checkpointing": True})
    return {}


def train_on_audio(folder, **fsdp):
    """Samples in order, one a process: only process 1 has a clip in the first step, only process 0 in the second."""
    Path(folder).mkdir(exist_ok=True)
    data, processor = test_audio.spoken(Path(folder), silent=(0, 3)), test_audio.make_processor()
    model = test_audio.hearing(processor=processor, scope="modality")
    options = {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential", "ddp_timeout": 300}
    options |= {"ddp_find_unused_parameters": False, "adapter_dtype": "float32", **fsdp}
    trainer = test_audio.make_trainer(f"{folder}/run", model, processor, data, **options)
    trainer.train()
    return {"tensors": whole(trainer), "history": [entry["loss"] for entry in trainer.state.log_history[:-1]]}


def run_audio_ddp(folder):
    return train_on_audio(folder)


def run_audio(folder):
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # as in `start`
    return train_on_audio(folder, fsdp=True, fsdp_config=FSDP)


RUNS = {
    run.__name__: run
    for run in (
        run_ddp,  # first: accelerate remembers FSDP in the environment
        run_low_rank_ddp,
        run_audio_ddp,
        run_audio,
        run_low_rank_full,
        run_low_rank,
        run_full,
        run_states_sharded,
        run_half,
        run_shards,
        run_best,
        run_verify,
        run_push,
        run_refused,
    )
}


def work(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, run in RUNS.items():
        torch.save(run(f"{folder}/{name}"), f"{folder}/{name}.{rank}.pt")
    leave_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs of two processes, in one start of them: it takes longer than the runs."""
    folder = tmp_path_factory.mktemp("distributed")
    in_processes(work, folder)
    return folder


def results(folder, run):
    """(process 0's, process 1's)."""
    return [torch.load(folder / f"{run}.{rank}.pt") for rank in (0, 1)]


def optimizer_names(checkpoint):
    """Names of the parameters of which a checkpoint holds optimiser state."""
    if (checkpoint / "optimizer.bin").exists():
        return set(torch.load(checkpoint / "optimizer.bin")["state"])
    keys = FileSystemReader(checkpoint / "optimizer_0").read_metadata().state_dict_metadata
    return {key.split(".", 2)[2].rsplit(".", 1)[0] for key in keys if key.startswith("optimizer.state.")}


# ------------------------------------------------------------------ training, saving, resuming


@pytest.mark.slow
@pytest.mark.parametrize("run", ["run_full", "run_states_sharded", "run_low_rank_full"])
def test_sharded_training_is_the_training_of_whole_tensors(folder, run):
    unsharded = "run_low_rank_ddp" if "low_rank" in run else "run_ddp"
    for sharded, ddp in zip(results(folder, run), results(folder, unsharded), strict=True):
        for one, other in zip(sharded["history"], ddp["history"], strict=True):
            assert one == pytest.approx(other, rel=1e-4)
        for name, tensor in ddp["tensors"].items():
            torch.testing.assert_close(sharded["tensors"][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_audio_of_some_processes_trains_sharded_as_whole(folder):
    for sharded, ddp in zip(results(folder, "run_audio"), results(folder, "run_audio_ddp"), strict=True):
        assert sharded["history"] == pytest.approx(ddp["history"], rel=1e-4)
        assert ddp["tensors"].keys() == sharded["tensors"].keys()
        for name, tensor in ddp["tensors"].items():
            torch.testing.assert_close(sharded["tensors"][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_no_process_keeps_whole_experts_of_sharded_factors(folder):
    assert [set(result["kept"]) for result in results(folder, "run_low_rank_full")] == [{None}, {None}]


@pytest.mark.slow
@pytest.mark.parametrize("run", ["run_ddp", "run_full", "run_states_sharded", "run_half", "run_low_rank"])
def test_whole_tensors_are_saved(folder, run):
    """In checkpoints and by `save_model`; with bf16, not the rounded copies that an evaluation leaves behind."""
    first, second = results(folder, run)
    assert_equal(first["tensors"], second["tensors"])
    for place in (f"checkpoint-{STEPS}", "final"):
        assert_equal(load_file(folder / run / place / ADAPTER), first["tensors"])
    projector = first["tensors"]["projector.linear_1.weight"]
    assert not torch.equal(projector, projector.bfloat16().float())


@pytest.mark.slow
@pytest.mark.parametrize(
    "run", ["run_ddp", "run_full", "run_half", "run_states_sharded", "run_low_rank", "run_low_rank_ddp"]
)
def test_a_resumed_run_is_the_run_that_never_stopped(folder, run):
    for result in results(folder, run):
        assert result["resumed history"] == result["history"]
        assert_equal(result["resumed tensors"], result["tensors"])


@pytest.mark.slow
@pytest.mark.parametrize("run", ["run_full", "run_states_sharded", "run_half"])
def test_checkpoints_hold_the_adapter_and_its_optimiser_state_only(folder, run):
    checkpoint = folder / run / "checkpoint-2"
    model = make_model(encoder=True, **(EXCLUSIVE if run == "run_half" else {}))
    model.set_trainable()
    assert optimizer_names(checkpoint) == {name for name, p in model.named_parameters() if p.requires_grad}
    names = {path.name for path in checkpoint.iterdir() if path.suffix not in (".py", ".jinja")}
    optimizer = "optimizer_0" if run == "run_states_sharded" else "optimizer.bin"
    rest = {
        "scheduler.pt",
        "trainer_state.json",
        "run.json",
        "training_args.bin",
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    processor = {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == {ADAPTER, "config.json", optimizer} | rest | processor


@pytest.mark.slow
def test_what_was_saved_loads_without_any_process_group(folder):
    loaded = MoExtendForCausalLM.from_pretrained(
        folder / "run_full" / "final", base=make_base(), encoder=make_model(encoder=True).encoder
    )
    tensors = {name: tensor.detach() for name, tensor in loaded.adapter_tensors().items()}
    assert_equal(tensors, results(folder, "run_full")[0]["tensors"])


@pytest.mark.slow
def test_the_best_checkpoint_comes_back_into_the_shards(folder):
    for result in results(folder, "run_best"):
        assert result["best"].endswith("checkpoint-2")
        assert_equal(result["tensors"], load_file(folder / "run_best" / "checkpoint-2" / ADAPTER))
    assert_equal(result["tensors"], load_file(folder / "run_best" / "final" / ADAPTER))


@pytest.mark.slow
def test_no_process_keeps_the_whole_base(folder):
    first, second = results(folder, "run_shards")
    assert first["alive"] == second["alive"] == 0 < first["number"]
    assert first["here"] + second["here"] == first["all"]


@pytest.mark.slow
def test_verify_base_hashes_shards(folder):
    for result in results(folder, "run_verify"):
        assert_equal(result["before"], result["after"])


@pytest.mark.slow
def test_all_processes_skip_a_push_together(folder):
    assert [result["pushed"] for result in results(folder, "run_push")] == [0, 0]


# ------------------------------------------------------------------ the gate


def run_gate(folder, rank, retention):
    """Process 1's gate starts elsewhere: only what process 0 hands over makes the two equal."""
    settings = {"per_device_train_batch_size": 1, "ddp_timeout": 300, "ddp_find_unused_parameters": False}
    settings["retention_loss"] = "text" if retention is None else "prompts"
    model = make_model(**GATED | {"deltas": {"embedding": 2, "attention": 2}})
    trainer = gated_trainer(folder, model, retention_dataset=retention, max_steps=3, **settings)
    with torch.no_grad():
        for tensor in trainer.model.gate.parameters():
            tensor.add_(rank)
    trainer.train()
    report = trainer.gate_report
    return {"tensors": whole(trainer), "report": tuple(report), "history": history(trainer)}


def work_gate(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, retention in (("sampled", None), ("given", "text")):
        torch.save(run_gate(Path(folder, name), rank, retention), f"{folder}/{name}.{rank}.pt")
    leave_group()


@pytest.mark.slow
def test_one_process_trains_the_gate_and_all_have_it(tmp_path):
    in_processes(work_gate, tmp_path)
    for name in ("sampled", "given"):
        first, second = results(tmp_path, name)
        assert_equal(first["tensors"], second["tensors"])
        assert first["report"] == second["report"]
        assert first["history"] == second["history"] and len(first["history"]) == 3
        assert first["tensors"]["gate.fc2.weight"].abs().sum() > 0
    first, _ = results(tmp_path, "given")
    assert first["report"][1] > 0.7 and first["report"][2] < 0.2
    assert first["history"][0]["new_expert_share"] > 0.8


# ------------------------------------------------------------------ refusals


def refuse(fsdp=None, deepspeed=None, parallelism=None):
    state = types.SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=deepspeed)
    check_sharding(types.SimpleNamespace(state=state, parallelism_config=parallelism), make_model())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_version": 1}, "FSDP1 is not supported.*fsdp_version: 2"),
        ({"activation_checkpointing": True}, "fsdp_activation_checkpointing.*gradient_checkpointing=True"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading.*Set it to false"),
        ({"ignored_modules": [torch.nn.Linear(1, 1)]}, "fsdp_ignored_modules is not supported"),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 9}, "TRANSFORMER_BASED_WRAP.*MixtralDecoderLayer"),
        (
            {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_cls_names_to_wrap": ["CLIPEncoderLayer"]},
            "TRANSFORMER_BASED_WRAP.*MixtralDecoderLayer",
        ),
    ],
)
def test_sharding_that_would_lose_or_change_the_adapter_is_refused(monkeypatch, settings, message):
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING", raising=False)
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **settings})
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING", raising=False)  # the plugin sets it
    with pytest.raises(ValueError, match=message):
        refuse(fsdp=plugin)


def test_deepspeed_zero_3_is_refused_and_zero_2_is_not():
    with pytest.raises(ValueError, match="ZeRO-3 is not supported.*ZeRO-2.*FSDP2"):
        refuse(deepspeed=types.SimpleNamespace(zero_stage=3))
    refuse(deepspeed=types.SimpleNamespace(zero_stage=2))


@pytest.mark.parametrize("kind", ["tp", "cp", "sp"])
def test_other_parallelism_is_refused(kind):
    with pytest.raises(ValueError, match=f"{kind}_size > 1 is not supported"):
        refuse(parallelism=types.SimpleNamespace(**{f"{kind}_enabled": True}))
    refuse(parallelism=types.SimpleNamespace(**{f"{kind}_enabled": False}))


@pytest.mark.slow
def test_the_trainer_refuses_before_the_first_step(folder):
    assert results(folder, "run_refused") == [{}, {}]


@pytest.mark.parametrize("path", sorted(CONFIGURATION.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_setting(path):
    settings = load_config_from_file(str(path))
    options = vars(launch_command_parser().parse_args(["train.py"]))
    assert not [name for name in getattr(settings, "fsdp_config", None) or () if name not in options]
    assert not [name for name in getattr(settings, "deepspeed_config", None) or () if name not in options]


def test_the_fsdp_configuration_is_not_refused(monkeypatch):
    settings = yaml.safe_load((CONFIGURATION / "fsdp2.yaml").read_text())
    for name, value in settings["fsdp_config"].items():  # as `accelerate launch` hands them on
        monkeypatch.setenv(name.upper(), str(value))
    plugin = FullyShardedDataParallelPlugin(fsdp_version=None)
    assert plugin.reshard_after_forward is True
    refuse(fsdp=plugin)
    model = make_model(encoder=True)
    plugin.set_auto_wrap_policy(model)  # finds every class it is to wrap
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {type(model.base.model.layers[0])}


# ------------------------------------------------------------------ DeepSpeed's own checkpoint


def test_deepspeed_is_told_to_leave_out_what_is_frozen(tmp_path, monkeypatch):
    saved = []

    class Engine:
        def save_checkpoint(self, folder, exclude_frozen_parameters=False):
            saved.append((folder, exclude_frozen_parameters))

    trainer = start(tmp_path)
    trainer.is_deepspeed_enabled, trainer.model_wrapped, trainer.lr_scheduler = True, Engine(), None
    monkeypatch.setattr("transformers.trainer.DeepSpeedSchedulerWrapper", type(None), raising=False)
    trainer._save_optimizer_and_scheduler("checkpoint-2")
    assert saved == [("checkpoint-2", True)]


def test_a_checkpoint_without_the_base_loads_strictly():
    """DeepSpeed loads with strict=True what it saved without frozen parameters."""
    model = make_model()
    trained = set(model.set_trainable().keys())
    model.register_load_state_dict_post_hook(allow_missing_base)
    state = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(state) == len(trained)
    model.load_state_dict(state, strict=True)
    name, _ = state.popitem()
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        model.load_state_dict(state, strict=True)
