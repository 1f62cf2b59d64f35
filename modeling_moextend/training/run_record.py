"""What determines a run: recorded in its checkpoints, and held against the run that goes on from one."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from itertools import islice
from typing import Any

import numpy
import pyarrow
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerControl
from transformers.trainer_callback import ExportableState
from trl import SFTTrainer

from .config import MoExtendSFTConfig, retention_of

LIBRARIES = ("accelerate", "torch", "transformers", "trl")
GIVEN = ("compute_loss_func", "data_collator", "formatting_func", "optimizers", "optimizer_cls_and_kwargs")
ROWS = 1000  # of a dataset, hashed at a time
NOT_COMPARED = {  # options that leave the run's losses and tensors as they are; every other one is compared
    "adapter_dtype", "batch_eval_metrics", "check_resume", "dataloader_in_order", "dataloader_multiprocessing_context",
    "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataset_num_proc",
    "ddp_timeout", "debug", "disable_tqdm", "do_eval", "do_predict", "do_train", "enable_jit_checkpoint",
    "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "hub_always_push", "hub_model_id",
    "hub_private_repo", "hub_revision", "hub_strategy", "hub_token", "ignore_data_skip", "include_for_metrics",
    "include_num_input_tokens_seen", "local_rank", "log_level", "log_level_replica", "log_on_each_node",
    "logging_first_step", "logging_nan_inf_filter", "logging_steps", "logging_strategy", "output_dir",
    "per_device_eval_batch_size", "prediction_loss_only", "project", "push_to_hub", "report_to",
    "restore_callback_states_from_checkpoint", "resume_from_checkpoint", "retention_cache_dir", "run_name",
    "save_on_each_node", "save_only_model", "save_steps", "save_strategy", "save_total_limit", "skip_memory_metrics",
    "torch_empty_cache_steps", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id", "verify_base",
}  # fmt: skip


def describe_run(trainer: SFTTrainer, given: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What determines the losses and tensors of a run, ready for JSON: part -> {name: value}.

    Args:
        given: names of what the trainer was made with (`GIVEN`).
    """
    core = trainer.core
    data = {"training data": trainer.train_dataset, "retention data": trainer.retention_dataset}
    if str(getattr(trainer.args.eval_strategy, "value", trainer.args.eval_strategy)) != "no":
        data["evaluation data"] = trainer.eval_dataset
    data = {name: data_hash(dataset) for name, dataset in data.items()}
    data["first samples, as the model gets them"] = batch_hash(trainer)
    config = core.base.config.to_dict()
    parts = {
        "settings": compared_settings(trainer.args, hasattr(trainer.train_dataset, "__len__")),
        "data": data,
        "base's config": {name: value for name, value in config.items() if not name.startswith("_")},
        "run": {
            "dtype of the base": dtypes_of(core.base),
            "dtype of the encoder": dtypes_of(core.encoder),
            **({} if core.audio_encoder is None else {"dtype of the audio encoder": dtypes_of(core.audio_encoder)}),
            "attention": core.base.config._attn_implementation,
            "experts": getattr(core.base.config, "_experts_implementation", None),
            "processes": trainer.accelerator.num_processes,
            "distribution": str(trainer.accelerator.distributed_type),
            "mixed precision": trainer.accelerator.mixed_precision,
            "precision of float32 products": torch.get_float32_matmul_precision(),
            "device": device_name(trainer.args.device),
            **given,
        },
        "versions": {name: version(name) for name in LIBRARIES},
    }
    parts["base's config"].pop("transformers_version", None)
    parts["settings"]["prefix_cache"] = bool(trainer.args.prefix_cache)  # which batches there are, wherever it lies
    parts["settings"]["retention_weight"] = retention_of(trainer.args, bool(core.config.deltas))[1]  # also where unset
    return json.loads(json.dumps(parts, default=name_of))


def dtypes_of(part: nn.Module | None) -> list[str] | None:
    """Dtypes of a base's or encoder's own tensors: fingerprints are the same, whatever it is loaded in."""
    if part is None:
        return None
    return sorted({str(tensor.dtype) for name, tensor in part.named_parameters() if ".moextend." not in name})


def compared_settings(args: MoExtendSFTConfig, has_length: bool) -> dict[str, Any]:
    """The options that matter; the number of workers decides how a streamed dataset is dealt out, and only there."""
    left_out = NOT_COMPARED | ({"dataloader_num_workers"} if has_length else set())
    return {name: value for name, value in args.to_dict().items() if name not in left_out}


def name_of(thing: object) -> str | list[str]:
    """What to call something that JSON can't hold: a function or a class by its name, others by their class."""
    if isinstance(thing, tuple):
        return [name_of(part) for part in thing]
    return getattr(thing, "__qualname__", None) or type(thing).__qualname__


def device_name(device: torch.device) -> str:
    """The kind of device. Sums are done in another order on another one, and on a CPU by other numbers of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return device.type


# ---------------------------------------------------------------- data


def data_hash(data: object) -> str | dict[str, str] | None:
    """sha256 over rows and columns of a dataset; of a mapping of datasets, for each. Images that are paths count as
    paths. "streamed" where rows can't be read without an end."""
    if data is None:
        return None
    if isinstance(data, Mapping):
        return {name: data_hash(part) for name, part in data.items()}
    if not isinstance(data, Dataset):
        return "streamed"
    digest, table_type = hashlib.sha256(), None
    for table in data.with_format("arrow").iter(ROWS):
        if table_type is None:
            table_type = [(field.name, str(field.type)) for field in table.schema]
            digest.update(json.dumps(table_type).encode())
        alike = table.take(pyarrow.array(numpy.arange(len(table))))  # in buffers that hold these rows and nothing else
        for rows in alike.combine_chunks().to_batches():
            digest.update(rows.serialize())
    return digest.hexdigest()


def batch_hash(trainer: SFTTrainer) -> str:
    """sha256 of the first samples of the training data, collated: what tokenizer, chat template and images make of
    them."""
    data, number = trainer.train_dataset, trainer.args.per_device_train_batch_size
    rows = (data[i] for i in range(len(data))) if hasattr(data, "__len__") else iter(data)
    digest = hashlib.sha256()
    for name, value in sorted(collated(trainer, islice(rows, number)).items()):
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(str(value.shape).encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def collated(trainer: SFTTrainer, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A micro-batch of training rows as the model gets it, on the CPU. Random numbers are as they were afterwards."""
    states = random.getstate(), numpy.random.get_state()
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            random.seed(0)
            numpy.random.seed(0)
            return trainer._get_collator_with_removed_columns(trainer.data_collator)(list(rows))
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


# ---------------------------------------------------------------- held against a checkpoint


def differences(recorded: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each thing that is not as it was: what it was in the checkpoint's run, and what it is now."""
    lines = []
    for part in sorted(recorded.keys() | now.keys()):
        before, after = recorded.get(part, {}), now.get(part, {})
        prefix = "" if part in ("run", "settings", "data") else f"{part}: "
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                was, is_now = before.get(name), after.get(name)
                lines.append(
                    f"{name}: not the same" if part == "data" else f"{prefix}{name}: it was {was!r}, now {is_now!r}"
                )
    return lines


def stateful_callbacks(trainer: SFTTrainer, recorded: Mapping[str, Any]) -> list[str]:
    """One line for each callback whose state (an early stopping's patience) the resumed run would not have.

    Args:
        recorded: `stateful_callbacks` of the checkpoint's trainer state.
    """
    now = {type(one).__name__ for one in trainer.callback_handler.callbacks if isinstance(one, ExportableState)}
    before = set(recorded) - {TrainerControl.__name__}
    lines = [f"callback {name}: it was there, now it is not" for name in sorted(before - now)]
    lines += [f"callback {name}: it was not there, now it is" for name in sorted(now - before)]
    if before & now and not trainer.args.restore_callback_states_from_checkpoint:
        names = ", ".join(sorted(before & now))
        lines.append(f"callback {names}: set restore_callback_states_from_checkpoint=True, or it begins anew")
    return lines


def check_same_run(checkpoint: str, changes: Callable[[], list[str] | None], refuse: bool) -> list[str]:
    """Refuses to go on from a checkpoint with another run than the one that wrote it; -> what to say.

    Args:
        changes: -> what is not as it was; `None`: an earlier version wrote it, and nothing can be compared.

    Raises:
        ValueError: one message with every difference.
    """
    found = changes()
    if found is None:
        return [
            f"MoExtend: {checkpoint} was written by an earlier version, which did not record what determined its run: "
            "whether settings, data and versions are the same is not checked."
        ]
    lines = "".join(f"\n  {line}" for line in found)
    if found and refuse:
        raise ValueError(
            f"The run that wrote {checkpoint} was another one, and resumed like this it would end elsewhere than "
            f"either. Set these back, or go on all the same with check_resume=False.{lines}"
        )
    return [f"MoExtend: goes on from {checkpoint} with what has changed (check_resume=False).{lines}"] if found else []
