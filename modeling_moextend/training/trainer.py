"""`MoExtendSFTTrainer`: TRL's `SFTTrainer` for a model of which only the adapter trains, is saved and is resumed."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, save_fsdp_optimizer
from datasets import Dataset, IterableDataset
from huggingface_hub import CommitInfo, HfApi
from torch.utils.data import RandomSampler
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, SaveStrategy, TrainOutput
from transformers.utils import PushInProgress
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..data.collators import prepare_collator
from ..data.rows import check_datasets, check_rows, template_errors_named
from ..data.tokens import check_trainer_tokens
from ..publishing.facts import folder_card, write_facts
from ..publishing.hub import check_published, upload
from ..routing_moextend import RoutingRecord
from ..tensors_moextend import DTensor, not_finite, reshard, stored_dtype
from ..tools.files import alone_in, write_text
from ..tools.hashes import base_tensors_hash
from ..tools.interrupts import stopped_at
from ..tools.modes import dtypes_kept
from ..tools.progress import show_progress, without_our_warnings
from .checkpoints import (
    TRAINER_STATE,
    begin_checkpoint,
    checkpoint_to_resume,
    last_checkpoint,
    read_record,
    write_record,
)
from .checks import (
    allow_missing_base,
    check_arguments,
    check_frozen,
    check_gate_open,
    check_gate_trained,
    check_image_token,
    check_model,
    check_options,
    check_retention,
    check_rows_left,
    check_sharding,
    default_processor,
    say_unsharded,
)
from .config import MoExtendSFTConfig, retention_of
from .gate import train_gate
from .groups import default_rate, kind_of, own_settings, split_groups, stream_size
from .prefix_cache import PrefixCache, SameBatches
from .resuming import load_adapter_tensors
from .retention import last_hidden_states, prompt_distance
from .retention_text import retention_text, text_distance
from .run_record import GIVEN, check_same_run, describe_run, differences, name_of, stateful_callbacks

if TYPE_CHECKING:
    from ..modeling_moextend import MoExtendForCausalLM

TRAINING_ARGS = "training_args.bin"
SCHEDULER = "scheduler.pt"
CARD_SETTINGS = (
    "stage",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "seed",
)
CARD_GATE = ("gate_steps",)  # of scope "gate" only
CARD_LOGS = {"task_loss": "last task loss", "train_runtime": "seconds of training"}  # what the log calls them


class MoExtendSFTTrainer(SFTTrainer):
    """
    Trains the adapter of a [`MoExtendForCausalLM`] (stages align and finetune of the paper); the base stays as it is.

    Takes what [`trl.SFTTrainer`] takes, except `peft_config`, and `retention_dataset`: with `scope="gate"`, text that
    the gate leaves to the base (text or chat, in any format of TRL's); without it, text sampled from the base. Logs
    beside TRL's metrics, for training and (with the prefix `eval_`) for evaluation: `task_loss` (nats a token),
    `balance_loss` (1 when even) and in training, with a gate, `retention_loss` (see `retention_weight`), whose
    weighted sum is the loss; `new_expert_share/layer_{i}` (share of non-padding tokens that select at least one new
    expert of layer i, 0 to 1), `new_expert_share` (its mean over extended layers) and `tokens_per_second`
    (non-padding tokens of all processes).

    Checkpoints hold the adapter in float32 beside optimiser, scheduler and random states; `save_model` writes the
    adapter in `args.adapter_dtype`. Neither holds the base. A resumed run continues exactly, as long as the collator
    and the dataset's transforms draw no random numbers: Trainer fetches a resumed run's first batches before it
    restores the random state. `train(resume_from_checkpoint=True)` takes the last whole checkpoint and says which ones
    a killed process or a full disk left unfinished; another run (other settings, data, base, dtype, processes,
    versions, device) than the one that wrote it is refused, unless `args.check_resume` is `False`.

    A run stops with a `ValueError` at the first loss or gradient that is not finite (a gradient scaled for float16 is
    skipped instead, as long as its scale is above 1). After such a loss it saves nothing; NaN and infinity are never
    saved.

    Runs under DDP, FSDP2 and DeepSpeed ZeRO-1 and 2 (see `configuration/accelerate`); call `save_model` and
    `push_to_hub` on every process.

    Raises:
        ValueError: a model that is no MoExtend model, options that would train or push something else, or a way of
            sharding that is not supported.
    """

    _name = "MoExtend"
    _tag_names = ["moextend", "trl", "sft"]

    def __init__(
        self,
        model: MoExtendForCausalLM,
        args: MoExtendSFTConfig | None = None,
        *,
        retention_dataset: Dataset | IterableDataset | None = None,
        **kwargs: Any,
    ):
        """Sets what trains, and takes the load-balancing loss out of TRL's hands: TRL's needs layers of one width."""
        check_model(model)
        if args is None:
            args = MoExtendSFTConfig("moextend-sft")
        check_arguments(args)
        if args.learning_rate is None:
            args = copy.copy(args)  # another trainer that takes them may have another base
            args.learning_rate = default_rate(args.stage, model.config.get_text_config().hidden_size)
        coefficient = model.router_aux_loss_coef if args.router_aux_loss_coef is None else args.router_aux_loss_coef
        check_options(args, coefficient, kwargs)
        if args.push_to_hub:  # said before the training, not after it
            check_published(model.config)
        check_retention(model, args, retention_dataset)
        retention_dataset = check_rows(retention_dataset, "retention", args.dataset_text_field, False)
        if kwargs.get("processing_class") is None:
            kwargs["processing_class"] = default_processor(model, args.assistant_only_loss)
        datasets = {name: kwargs[name] for name in ("train_dataset", "eval_dataset") if name in kwargs}
        kwargs |= check_datasets(args, kwargs["processing_class"], datasets, kwargs)
        original, args.router_aux_loss_coef = args.router_aux_loss_coef, 0.0
        try:
            with template_errors_named(kwargs["processing_class"], datasets):
                super().__init__(model, args, **kwargs)
        finally:
            args.router_aux_loss_coef = original
        check_rows_left(self.train_dataset, args)
        check_sharding(self.accelerator, self.model)
        say_unsharded(self.accelerator)
        check_image_token(self.model, self.processing_class)
        self.router_aux_loss_coef = coefficient
        self._trained = set(self.model.set_trainable(stage=args.stage, train_projector=args.train_projector))
        self.adapter_name = self.model.resolve_name()
        if self.is_deepspeed_enabled:
            self.model.register_load_state_dict_post_hook(allow_missing_base)
        if not isinstance(self.data_collator, DataCollatorForLanguageModeling):  # that one has no images
            vocab_size = self.model.config.get_text_config().vocab_size
            ids = self.model.placeholder_ids or [self.model.image_token_id]
            prepare_collator(self, [one for one in ids if one is not None], vocab_size)
        check_trainer_tokens(self)
        self.retention_dataset, self.gate_report, self.retention_text = retention_dataset, None, None
        self.retention = "prompts", 0.0  # kind and weight of the retention loss
        if args.stage == "finetune" and self.model.gate is not None:
            self.retention = retention_of(args, bool(self.model.config.deltas))
        self.prefix_cache = None
        self._stream_size = None  # measured before the first step
        self._drawn = -1, 0  # step, and the last of its micro-batches that has drawn retention text
        self._throughput = {}  # mode -> [tokens, start in seconds]
        self._in_checkpoint = False
        self._diverged = None  # what is wrong with the loss, once it is no longer finite
        self._given = {name: name_of(kwargs[name]) for name in GIVEN if kwargs.get(name) is not None}
        self._run = None
        self.add_callback(AdapterReport(self))
        show_progress(self, f"stage {args.stage}")

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """What trains: name -> parameter. Asked of the model each time, for sharding replaces its parameters."""
        tensors = self.core.adapter_tensors(self.adapter_name)
        return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}

    @property
    def core(self) -> MoExtendForCausalLM:
        """The MoExtend model itself, as long as its adapter is the one that this trainer was made for.

        Raises:
            ValueError: it has been switched to another one.
        """
        core = self.accelerator.unwrap_model(self.model)
        if core.passes.current.trained != self.adapter_name:
            raise ValueError(
                f"This trainer trains and saves the adapter {self.adapter_name!r}, but by now the model's active ones "
                f"are {list(core.passes.current.active)}: set_adapter back to what it was when the trainer was made."
            )
        return core

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As in Trainer; with `scope="gate"`, stage finetune begins with the gate's own training (`train_gate`).

        A resumed run has its gate in the checkpoint; a trainer that trains a second time keeps the gate it has.
        """
        if set(self.trainable) != self._trained:
            raise ValueError(
                "What trains has changed since this trainer was made (set_adapter makes whole adapters trainable): "
                "make a new trainer."
            )
        check_frozen(self.core)
        self._diverged = None
        alone = alone_in(self.args.output_dir, "train") if self.is_world_process_zero() else nullcontext()
        with alone, without_our_warnings(), stopped_at(self._where):
            return self._train_alone(resume_from_checkpoint, **kwargs)

    def _where(self):
        """What to say to whoever stops the training: how far it came, and how to go on."""
        last, _ = last_checkpoint(self.args.output_dir)
        begins = "no checkpoint is there (save_strategy, save_steps), so the same command begins anew"
        goes_on = f"resume_from_checkpoint=True (--resume_from_checkpoint true) goes on from {last}"
        step = f"step {self.state.global_step} of {self.state.max_steps}" if self.state.max_steps else "its beginning"
        return f"in stage {self.args.stage} at {step}; {begins if last is None else goes_on}"

    def _train_alone(self, resume_from_checkpoint, **kwargs):
        """As `train`, of which there is no other in this folder."""
        self._run = None
        if self.args.should_save and self.args.save_strategy != SaveStrategy.NO:
            self._described_run()  # before anything is sharded
        if resume_from_checkpoint:
            resume_from_checkpoint = self._check_resumed(resume_from_checkpoint)
        gate = self.core.gate
        trains_gate = gate is not None and self.args.stage == "finetune" and not resume_from_checkpoint
        trains_gate = (
            trains_gate and self.gate_report is None
        )  # trained again, it would leave experts trained behind the old one
        if trains_gate and not self.args.gate_steps:
            check_gate_trained(gate)
        elif trains_gate:
            before = base_tensors_hash(self.model) if self.args.verify_base else None
            self.gate_report = train_gate(self)
            check_gate_open(self.gate_report)
            if before is not None:
                check_unchanged(before, base_tensors_hash(self.model))
        if self.args.stage == "finetune" and self._stream_size is None:  # a second training finds a sharded model
            self._stream_size = stream_size(self)
        if self._retains("text") and self.retention_text is None:
            if resume_from_checkpoint:  # with the gate that chooses its pieces
                load_adapter_tensors(self.core, resume_from_checkpoint)
            self.retention_text = retention_text(self)
        self.prefix_cache = PrefixCache(self, self._described_run()) if self.args.prefix_cache else None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _described_run(self):
        """What determines this run, as it was when it began (see `describe_run`)."""
        if self._run is None:
            self._run = describe_run(self, self._given)
        return self._run

    def _check_resumed(self, resume):
        """The checkpoint to go on from; one process looks, for the others may have another disk."""
        checkpoint, error = None, None
        if self.is_world_process_zero():
            try:
                checkpoint, said = checkpoint_to_resume(resume, self.args.output_dir)
                more = check_same_run(checkpoint, partial(self._changes, checkpoint), self.args.check_resume)
                if not hasattr(self.train_dataset, "__len__"):
                    more = [*more, "MoExtend: training data is streamed, so only its first samples were compared."]
                for line in (*said, *more):
                    print(line)
            except ValueError as refusal:
                error = str(refusal)
        checkpoint, error = broadcast_object_list([checkpoint, error])
        if error is not None:
            raise ValueError(error)
        self._check_random_state(checkpoint)
        return checkpoint

    def _changes(self, checkpoint):
        """What is not as it was when `checkpoint` was written; `None` where that does not say."""
        record = read_record(Path(checkpoint))
        if record is None:
            return None
        state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE))
        found = differences(record["run"], self._described_run())
        found += stateful_callbacks(self, state.stateful_callbacks or {})
        if self.args.ignore_data_skip:
            found.append("ignore_data_skip=True: it begins again with the first samples of its epoch")
        return found

    def _check_random_state(self, checkpoint):
        """Trainer goes on with other random numbers, and says nothing, where a process does not find its own."""
        name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if self.args.check_resume and not os.path.isfile(os.path.join(checkpoint, name)):
            raise ValueError(
                f"{checkpoint} has no {name}, the random state of process {self.args.process_index}: resume with as "
                "many processes as wrote it, where each finds its files, or with check_resume=False."
            )

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As in Trainer, with groups of their own for what has a learning rate or decay of its own."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not given:
            settings = own_settings(self.args, self._stream_size or 1.0)
            kinds = {tensor: kind_of(name) for name, tensor in self.trainable.items()}
            split_groups(optimizer, kinds, settings)
        return optimizer

    def _get_train_sampler(self, train_dataset=None):
        """Gives grouping by length random numbers of its own, per epoch: a resumed run would group otherwise. With
        `prefix_cache`, batches are drawn once."""
        sampler = super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator()
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(seed + epoch)
        if self.args.prefix_cache and isinstance(sampler, LengthGroupedSampler | RandomSampler):
            sampler.generator = torch.Generator().manual_seed(seed)
            return SameBatches(list(sampler), self.args.train_batch_size, seed)
        return sampler

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Adds the load-balancing loss, which TRL cannot compute over layers of uneven width, and with `scope="gate"`
        the retention loss (see `prompt_distance`, `text_distance`); logs the parts and the routing."""
        mode = "train" if self.model.training else "eval"
        attention_mask = inputs.get("attention_mask")
        throughput = self._throughput.setdefault(mode, [0, time.perf_counter()])
        core = self.accelerator.unwrap_model(model)
        prefix = self.prefix_cache if mode == "train" else None
        served = nullcontext() if prefix is None else prefix.serving(inputs)
        with core.record_routing() as records, last_hidden_states(core) as hidden, served:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        # With num_items_in_batch, the micro-batches of a step sum up to its loss; else Trainer averages them.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        parts = {"task_loss": loss.detach() * steps}
        if self.router_aux_loss_coef:
            balance = (core if prefix is None else prefix).balance_loss(records, attention_mask).to(loss.device)
            loss = loss + self.router_aux_loss_coef * balance / steps
            parts["balance_loss"] = balance.detach()
        if mode == "train" and self._retains():
            distance = self._distance(model, core, hidden[-1], inputs)
            loss = loss + self.retention[1] * distance.to(loss.device) / steps
            parts["retention_loss"] = distance.detach()
        throughput[0] += self._log_parts(mode, parts, records, attention_mask)
        return (loss, outputs) if return_outputs else loss

    def _retains(self, *kinds):
        """Whether training has a retention loss, of one of these kinds."""
        kind, weight = self.retention
        return weight > 0 and (not kinds or kind in kinds)

    def _distance(self, model, core, hidden, inputs):
        """The retention loss of a micro-batch, of which `hidden` are the last hidden states."""
        if self._retains("text"):
            return self._text_distance(core)
        with nullcontext() if self.prefix_cache is None else self.prefix_cache.again():
            return prompt_distance(model, core, hidden, inputs)

    def _text_distance(self, core):
        """The retention loss on the text of this micro-batch; processes draw what one would in as many of them."""
        step, number = self.state.global_step, self._drawn[1] + 1 if self._drawn[0] == self.state.global_step else 0
        self._drawn = step, number
        micro_batch = number * self.args.world_size + self.args.process_index
        return text_distance(core, self.retention_text.draw(self.args.seed, step, micro_batch, 0))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in Trainer, which leaves base, encoder and adapter in half precision after a full evaluation in it
        (`bf16_full_eval`, `fp16_full_eval`) outside training; here they are what they were.

        Raises:
            ValueError: under FSDP or DeepSpeed, whose shards would stay cast.
        """
        if self.is_in_train or not (self.args.bf16_full_eval or self.args.fp16_full_eval):
            return super().evaluation_loop(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "bf16_full_eval and fp16_full_eval outside training would leave shards of FSDP and DeepSpeed in half "
                "precision: leave them out, or load the base with dtype='bfloat16'."
            )
        with dtypes_kept(self.model):
            return super().evaluation_loop(*args, **kwargs)

    def _log_parts(self, mode, parts, records, attention_mask):
        """Hands losses (mean over processes) and shares of new experts to TRL's metrics; returns the token count."""
        counts, tokens = new_expert_counts(records, attention_mask)
        totals = [value.float().to(self.args.device) for value in (*parts.values(), *counts.values(), tokens)]
        totals = self.accelerator.reduce(torch.stack(totals), reduction="sum").tolist()
        metrics, tokens = self._metrics[mode], totals.pop()
        wrong = [f"{name} is {total}" for name, total in zip(parts, totals, strict=False) if not math.isfinite(total)]
        if wrong and mode == "train":
            self._diverged = diverged_message(self.state.global_step + 1, ", ".join(wrong))
            raise ValueError(self._diverged)
        for name in parts:
            metrics[name].append(totals.pop(0) / self.accelerator.num_processes)
        shares = {layer: count / max(tokens, 1) for layer, count in zip(counts, totals, strict=True)}
        for layer, share in shares.items():
            metrics[f"new_expert_share/layer_{layer}"].append(share)
        if shares:
            metrics["new_expert_share"].append(sum(shares.values()) / len(shares))
        return tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds tokens per second since the last log; time spent in an evaluation is not training time."""
        mode = "train" if self.model.training else "eval"
        tokens, start = self._throughput.pop(mode, (0, 0.0))
        elapsed = time.perf_counter() - start
        if tokens:
            self._metrics[mode]["tokens_per_second"].append(tokens / elapsed)
        if tokens and mode == "eval" and "train" in self._throughput:
            self._throughput["train"][1] += elapsed
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        """Marks what is saved meanwhile as part of a checkpoint: float32, with the training arguments."""
        if self.args.should_save:
            begin_checkpoint(Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}"))
        with self._saving(checkpoint=True):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        """The last that every process writes; then comes the record, and only `trainer_state.json` after it."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_record(Path(output_dir), self._described_run())

    @contextmanager
    def _saving(self, checkpoint):
        before, self._in_checkpoint = self._in_checkpoint, checkpoint
        try:
            yield
        finally:
            self._in_checkpoint = before

    def save_model(self, output_dir: str | os.PathLike | None = None, _internal_call: bool = False) -> None:
        """Goes straight to `_save`: Trainer would gather the whole base first, or save nothing (sharded states)."""
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir=None, state_dict=None):
        """Writes the adapter in place of the whole model, and the pickled arguments into checkpoints only.

        Every process comes here: together they make sharded tensors whole, and one of them writes.
        """
        if self._diverged is not None:
            raise ValueError(f"{self._diverged} model.save_pretrained(folder) saves it all the same.")
        output_dir = self.args.output_dir if output_dir is None else output_dir
        dtype = torch.float32 if self._in_checkpoint else torch_dtype(self.args.adapter_dtype)
        options = {"adapter_dtype": dtype, "with_code": not self._in_checkpoint}
        self.core.save_pretrained(output_dir, is_main_process=self.args.should_save, **options)
        if not self.args.should_save:
            return
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        if self._in_checkpoint:
            torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS))
        else:
            write_facts(output_dir, training=self.card_settings())

    def _save_optimizer_and_scheduler(self, output_dir):
        """Keeps the base out of what FSDP and DeepSpeed write beside the optimiser state."""
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            reshard(self.model)  # torch looks for the optimiser's parameters in the model, and those are the shards
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER))
            return
        if self.is_deepspeed_enabled:
            engine = self.model_wrapped
            engine.save_checkpoint = partial(type(engine).save_checkpoint, engine, exclude_frozen_parameters=True)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Reads the adapter: Trainer looks for standard weight names only, and would not notice a missing tensor."""
        state_file = os.path.join(resume_from_checkpoint, TRAINER_STATE)
        load_adapter_tensors(self.core, resume_from_checkpoint)
        # TRL's running count of tokens is in no state; the last one logged is where it goes on.
        history = TrainerState.load_from_json(state_file).log_history
        self._total_train_tokens = next((log["num_tokens"] for log in reversed(history) if "num_tokens" in log), 0)

    def _load_best_model(self):
        """Reads the best checkpoint's adapter, for the same reason."""
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Pushes the adapter as `save_model` writes it; Trainer would copy standard weight names and a pickle."""
        if self.args.hub_strategy == HubStrategy.END:
            return
        running = getattr(self, "push_in_progress", None)  # known to one process; pushing takes all of them
        busy = running is not None and not running.is_done() and not self.args.hub_always_push
        if broadcast_object_list([busy])[0]:
            return
        with self._saving(checkpoint=False):
            push = self.push_to_hub(f"Training in progress, step {self.state.global_step}", blocking=False)
        if push is not None:
            self.push_in_progress = PushInProgress([push])

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | Future | None:
        """As in Trainer, but one commit of exactly the adapter's files: Trainer sends all that lies in the folder.

        Args:
            **card: see `card_facts` (`dataset_name`, `report`, `shift`, `license`, ...).

        Raises:
            ValueError: the base or the encoder is not on the Hub.
        """
        config, token = self.core.config, token or self.args.hub_token
        check_published(config)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if self.is_world_process_zero():
            self._finish_current_push()  # it reads the files that are written next
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        options = {"revision": revision or self.args.hub_revision, "commit_message": commit_message, "token": token}
        options["card"] = self.card_facts(**card)
        send = partial(upload, Path(self.args.output_dir), self.hub_model_id, config, **options)
        return send() if blocking else HfApi(token=token).run_as_future(send)  # a training does not wait for the Hub

    def create_model_card(self, **card: Any) -> None:
        """Writes MoExtend's card: TRL's shows a way of loading that an adapter does not have. See `card_facts`."""
        if not self.is_world_process_zero():
            return
        core, folder = self.core, Path(self.args.output_dir)
        dtype = torch_dtype(self.args.adapter_dtype) or core.base.dtype
        tensors = {  # the folder's own file is older, or not there yet
            name: torch.empty(tensor.shape, dtype=stored_dtype(name, dtype), device="meta")
            for name, tensor in core.adapter_tensors().items()
        }
        facts = {"tensors": tensors, **self.card_facts(**card)}
        write_text(folder / "README.md", str(folder_card(folder, core.config, self.hub_model_id, **facts)))

    def card_facts(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        **card: Any,
    ) -> dict[str, Any]:
        """Arguments of `folder_card`, from those that TRL hands to `create_model_card` and any of its own (`card`).

        `model_name` is not used: the repository has a name.
        """
        tags = [*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])]
        facts = {"tags": tags, "training": self.card_settings()}
        return facts | ({"datasets": dataset_name} if dataset_name else {}) | card

    def card_settings(self) -> dict[str, Any]:
        """How the adapter was trained, for the card: setting -> number, text or `None`."""
        names = CARD_SETTINGS if self.core.gate is None else CARD_SETTINGS + CARD_GATE
        settings = {name: plain(getattr(self.args, name)) for name in names}
        if self.core.gate is not None:
            settings["retention_loss"], settings["retention_weight"] = self.retention
        settings["processes"] = self.args.world_size
        settings["steps"] = self.state.global_step or None
        for log in self.state.log_history:
            settings |= {CARD_LOGS[name]: log[name] for name in CARD_LOGS if name in log}
        return settings | {library: version(library) for library in ("transformers", "trl", "torch")}


class AdapterReport(TrainerCallback):
    """Says before the first step what trains and what it costs, and stops at a gradient that is not finite; with
    `verify_base`, holds the base to its hashes."""

    def __init__(self, trainer: MoExtendSFTTrainer):
        self.trainer = trainer
        self.hashes = None

    def on_train_begin(
        self, args: MoExtendSFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            print(training_summary(self.trainer.model, self.trainer.trainable, args))
        if self.trainer.gate_report is not None:
            self.log_gate(args, state, control, **kwargs)
        if args.verify_base:
            self.hashes = base_tensors_hash(self.trainer.model)

    def log_gate(self, args: MoExtendSFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The gate's own training, which came before, for the trackers: by its own steps, and in no log history."""
        report, step = self.trainer.gate_report, state.global_step
        logs = [(number, {"gate/loss": loss}) for number, loss in report.curve]
        logs.append((args.gate_steps, {"gate/routed": report.routed, "gate/captured": report.captured}))
        for state.global_step, values in logs:
            self.trainer.callback_handler.on_log(args, state, control, values)
        state.global_step = step

    def on_pre_optimizer_step(
        self, args: MoExtendSFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops at the first gradient that is not finite; the scaler skips one that its scale may have made so."""
        accelerator, scaler = self.trainer.accelerator, self.trainer.accelerator.scaler
        if scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1:
            return
        wrong = not_finite(gradients(self.trainer.trainable))
        found = accelerator.reduce(torch.tensor(len(wrong), device=args.device), reduction="sum")  # shards differ
        if found:
            names = f"{', '.join(wrong[:8])} ({len(wrong)} tensors)" if wrong else "tensors of another process"
            raise ValueError(diverged_message(state.global_step + 1, f"NaN or infinity in the gradients of {names}"))

    def on_train_end(
        self, args: MoExtendSFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.verify_base:
            check_unchanged(self.hashes, base_tensors_hash(self.trainer.model))


def new_expert_counts(
    records: dict[int, RoutingRecord], attention_mask: torch.Tensor | None
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Tokens that select at least one new expert, per extended layer.

    Args:
        records: layer index -> `RoutingRecord`.
        attention_mask: [B, S], 0 for padding; `None` where every token is real (padding-free batches).

    Returns:
        (layer index -> count, number of non-padding tokens), all int64 scalars.
    """
    index = next(iter(records.values())).index
    real = torch.ones(len(index), dtype=torch.bool, device=index.device)
    if attention_mask is not None:
        real = attention_mask.reshape(-1).bool()
    counts = {}
    for layer, record in records.items():
        if record.num_new:
            counts[layer] = (record.selects_new & real.to(record.index.device)).sum()
    return counts, real.sum()


def training_summary(
    model: MoExtendForCausalLM, trainable: dict[str, torch.nn.Parameter], args: MoExtendSFTConfig
) -> str:
    """One line: trainable parameters, adapter bytes on disk, optimiser bytes in memory (before any sharding)."""
    optimizer, rank = optimizer_bytes(args.optim, trainable.values()), model.config.expert_rank
    return (
        f"MoExtend, stage {args.stage}: {sum(p.numel() for p in trainable.values()):,} trainable parameters; "
        f"learning rate {args.learning_rate:.2g}; "
        f"adapter {model.adapter_bytes(torch_dtype(args.adapter_dtype)) / 2**20:,.1f} MiB"
        f"{'' if rank is None else f' (new experts of rank {rank})'}; "
        f"optimiser {'unknown' if optimizer is None else f'{optimizer / 2**20:,.1f} MiB'} ({plain(args.optim)})"
    )


def optimizer_bytes(name: str, parameters: Iterable[torch.Tensor]) -> int | None:
    """Bytes of optimiser state: two moments a parameter for the Adam family, none for plain SGD, else `None`."""
    name = plain(name)
    if name == "sgd":
        return 0
    if not name.startswith(("adamw", "paged_adamw", "adam")):
        return None
    return sum(2 * p.numel() * (1 if "8bit" in name else p.element_size()) for p in parameters)


def gradients(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """name -> gradient, where there is one; of a sharded parameter that of this process's shard."""
    found = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    return {name: grad.to_local() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def diverged_message(step: int, found: str) -> str:
    return (
        f"Training stopped in step {step}: {found}. What was saved before is untouched; this model's adapter may be "
        "ruined. Begin anew with a lower learning_rate or max_grad_norm, from the base or from the last checkpoint "
        "(MoExtendForCausalLM.from_pretrained(<checkpoint>)). In the first step it is more likely the base: load one "
        "that overflows in float16 with dtype='bfloat16' or 'float32'."
    )


def plain(setting: Any) -> Any:
    """A setting as people write it: the value of an enum, `None` for "not set" (-1 steps)."""
    setting = getattr(setting, "value", setting)
    return None if setting == -1 else setting


def torch_dtype(name: str | None) -> torch.dtype | None:
    """`"bfloat16"` -> `torch.bfloat16`; `None` (the base's dtype) stays `None`."""
    return None if name is None else getattr(torch, name)


def check_unchanged(before: dict[str, str], after: dict[str, str]) -> None:
    """Holds hashes of base and encoder tensors against each other.

    Raises:
        RuntimeError: names every tensor that changed.
    """
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise RuntimeError(
            f"Training changed {len(changed)} tensors that must never change: {', '.join(changed)}. A callback or "
            "another optimiser wrote to the base or the encoder; the adapter just trained belongs to a base that no "
            "longer exists."
        )
