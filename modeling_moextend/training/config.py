"""`MoExtendSFTConfig`: TRL's `SFTConfig` and what an adapter adds to it."""

import math
import os
from dataclasses import dataclass, field

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from ..tools.progress import without_our_warnings
from .trainable import STAGES

GROUP_SETTINGS = ("router_learning_rate", "delta_learning_rate", "embedding_learning_rate", "delta_weight_decay")
ADAPTER_DTYPES = ("float32", "bfloat16", "float16")
RETENTIONS = ("self",)
RETENTION_LOSSES = {"prompts": 5.0, "text": 2.0}  # what is kept -> weight where none is given
SMALLEST = {  # smallest allowed value
    "retention_tokens": 1,
    "retention_length": 8,
    "gate_steps": 0,
    "learning_rate": 0.0,
    "gate_learning_rate": 0.0,
    "gate_task_weight": 0.0,
    "gate_retention_weight": 0.0,
    "retention_weight": 0.0,
    "router_learning_rate": 0.0,
    "delta_learning_rate": 0.0,
    "embedding_learning_rate": 0.0,
    "delta_weight_decay": 0.0,
}
OPTIONAL = (*GROUP_SETTINGS, "learning_rate", "retention_weight")


@dataclass
class MoExtendSFTConfig(SFTConfig):
    r"""
    Configuration of [`MoExtendSFTTrainer`]. Everything else is [`trl.SFTConfig`]'s.

    For conversations, `assistant_only_loss=True` is what the paper's recipe trains on. `router_aux_loss_coef` weights
    the load-balancing loss over base and new experts (unset: the base's own coefficient; the paper: 0.001).
    `bf16` is, where it is not given, whether the machine has a GPU that computes in bfloat16.

    Parameters:
        stage:
            What trains. `"align"` (stage 1): the projector only. `"finetune"` (stage 3): new experts, their router
            rows, the calibration, and the projector.
        train_projector:
            Whether the projector trains in stage `"finetune"`. Unset: yes where the model has one.
        adapter_dtype:
            Dtype of the adapter that `save_model` writes: `"float32"`, `"bfloat16"` or `"float16"`. Unset: the base's.
            Checkpoints always hold float32, so that a resumed run is exact.
        retention:
            What the gate of `scope="gate"` learns to leave to the base, where no `retention_dataset` is given to the
            trainer: `"self"`, text sampled from the base itself. Unset: the same, and the trainer says so.
        retention_tokens:
            At most so many tokens of retention text, and as many of the task, train the gate. Their hidden states are
            kept in memory meanwhile; the trainer says how much that is.
        retention_length:
            Tokens a sampled sequence; a longer one of `retention_dataset` is cut there.
        retention_cache_dir:
            Where sampled text is kept for the next run. Unset: `moextend` in the Hugging Face home.
        gate_steps:
            Steps that the gate trains before the first step of stage `"finetune"`; 0 leaves it as it is.
        gate_learning_rate:
            Peak learning rate of the gate.
        gate_task_weight, gate_retention_weight:
            Weights of the gate's two losses: tokens of the task that it holds back, retention tokens that it lets
            through. Where the two can't be told apart, the larger one decides.
        retention_loss:
            With `scope="gate"`, what the retention loss of stage `"finetune"` keeps. `"prompts"`: what the base makes
            of the task's prompts, whose first words no gate can tell from its own conversations; needs prompts (tokens
            without labels, as with `assistant_only_loss=True`) and one more forward pass of the base a step. `"text"`:
            what the base says of retention text, were the gate to let all of it through; the task's prompts are free
            to move, and a step costs eight short texts more. Unset: `"text"` for an adapter with deltas, which move
            what reads the prompts; else `"prompts"`.
        retention_weight:
            Weight of the retention loss. Unset: 5 for `"prompts"`, 2 for `"text"`; 0 leaves it out.
        learning_rate:
            Peak learning rate. Unset: 1e-3 in stage `"align"`, as LLaVA-1.5's; else 0.6 / hidden size of the base,
            for an optimiser of Adam's kind moves a wider layer's output further at one rate (arXiv 2203.03466).
        router_learning_rate, delta_learning_rate, embedding_learning_rate:
            Peak learning rates of new router rows, of deltas, and of the embedding's delta, whose rows train only in
            the steps that see their tokens. Unset: `learning_rate`, as for new experts; the embedding's: that of the
            other deltas, times five, times the size (root mean square) of what it is added to.
        delta_weight_decay:
            Weight decay of deltas. Unset: `weight_decay`, as for new experts.
        prefix_cache:
            Folder in which the hidden states below the lowest extended layer are kept, so that from the second epoch
            on, and in later runs on the same data, only the layers from that one on are computed, with the same
            numbers to the bit. A row is then in a batch with the same rows in every epoch. The size is said before
            the first step; delete the folder when it is no longer needed. Unset: nothing is kept.
        verify_base:
            Whether to hash every base and encoder tensor before the first and after the last step, and to fail if a
            single bit changed. Costs two passes over the weights (a minute or two for 47B parameters).
        check_resume:
            Whether a run resumed from a checkpoint must be the one that wrote it: the same settings, data, base and
            dtype, number of processes, versions and kind of device. `False`: it goes on with what has changed, and
            says what.

    Raises:
        ValueError: an unknown `stage`, `adapter_dtype` or `retention`, `stage="align"` with `train_projector=False`, a
            number out of range, or one of several launched processes that do not know of each other.
    """

    stage: str = field(
        default="finetune",
        metadata={
            "help": "What trains: 'align' the projector only, 'finetune' new experts, their router rows, the "
            "calibration and the projector.",
            "choices": list(STAGES),
        },
    )
    train_projector: bool | None = field(
        default=None,
        metadata={"help": "Whether the projector trains in stage 'finetune'. Unset: yes where the model has one."},
    )
    adapter_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the adapter that save_model writes. Unset: the base's. Checkpoints are always float32.",
            "choices": list(ADAPTER_DTYPES),
        },
    )
    retention: str | None = field(
        default=None,
        metadata={
            "help": "With scope 'gate' and no retention_dataset: 'self' samples retention text from the base itself "
            "(also done where unset, with a word about it).",
            "choices": list(RETENTIONS),
        },
    )
    retention_tokens: int = field(
        default=400_000,
        metadata={"help": "At most so many tokens of retention text, and as many of the task, train the gate."},
    )
    retention_length: int = field(
        default=256, metadata={"help": "Tokens a sampled retention sequence; longer given ones are cut there."}
    )
    retention_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where sampled retention text is kept. Unset: moextend in the Hugging Face home."},
    )
    gate_steps: int = field(
        default=600, metadata={"help": "Steps that the gate trains before stage finetune; 0 leaves it as it is."}
    )
    gate_learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of the gate."})
    gate_task_weight: float = field(
        default=1.0, metadata={"help": "Weight of the gate's loss on task tokens that it holds back."}
    )
    gate_retention_weight: float = field(
        default=10.0, metadata={"help": "Weight of the gate's loss on retention tokens that it lets through."}
    )
    retention_loss: str | None = field(
        default=None,
        metadata={
            "help": "With scope 'gate', what the retention loss keeps: the base's own continuation of the task's "
            "'prompts', or of retention 'text' that is run with the gate open. Unset: text for an adapter with "
            "deltas, else prompts.",
            "choices": list(RETENTION_LOSSES),
        },
    )
    retention_weight: float | None = field(
        default=None, metadata={"help": "Weight of the retention loss; 0: without. Unset: 5 for prompts, 2 for text."}
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate. Unset: 1e-3 in stage align, else 0.6 / hidden size of the base."},
    )
    router_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of new router rows. Unset: learning_rate."}
    )
    delta_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of deltas. Unset: learning_rate."}
    )
    embedding_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of the embedding's delta. Unset: by what it is added to."},
    )
    delta_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of deltas. Unset: weight_decay."}
    )
    prefix_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the hidden states below the lowest extended layer: from the second epoch on they are "
            "read, not computed. Rows stay in the same batches in every epoch."
        },
    )
    verify_base: bool = field(
        default=False,
        metadata={
            "help": "Whether to hash every base and encoder tensor before the first and after the last step, and to "
            "fail if a single bit changed."
        },
    )
    check_resume: bool = field(
        default=True,
        metadata={
            "help": "Whether a resumed run must be the one that wrote the checkpoint. false: it goes on with other "
            "settings, data or versions, and says what has changed."
        },
    )

    def __post_init__(self):
        if not self.use_cpu and not torch.accelerator.is_available():
            check_processes(1, self.output_dir)  # transformers' own refusals hide what is wrong
        if self.deepspeed and self.learning_rate is None:
            raise ValueError(
                "DeepSpeed's configuration is completed before the model is known, whose width says the learning rate "
                "where none is given: give learning_rate."
            )
        if self.bf16 is None and not self.fp16:
            self.bf16 = not self.use_cpu and is_torch_bf16_gpu_available()
        with without_our_warnings():
            super().__post_init__()
        check_processes(self.world_size, self.output_dir)
        if self.stage not in STAGES:
            hint = " Stage 'extend' trains nothing that is kept: call measure_router_shift." * (self.stage == "extend")
            raise ValueError(f"stage must be one of {', '.join(map(repr, STAGES))}, not {self.stage!r}.{hint}")
        if self.adapter_dtype is not None and self.adapter_dtype not in ADAPTER_DTYPES:
            raise ValueError(
                f"adapter_dtype must be one of {', '.join(map(repr, ADAPTER_DTYPES))} or None (the base's dtype), not "
                f"{self.adapter_dtype!r}."
            )
        if self.retention is not None and self.retention not in RETENTIONS:
            raise ValueError(
                f"retention must be 'self' or None, not {self.retention!r}. Text of your own goes to the trainer: "
                "MoExtendSFTTrainer(..., retention_dataset=...)."
            )
        if self.retention_loss is not None and self.retention_loss not in RETENTION_LOSSES:
            allowed = ", ".join(map(repr, RETENTION_LOSSES))
            raise ValueError(f"retention_loss must be one of {allowed}, not {self.retention_loss!r}.")
        for name, smallest in SMALLEST.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            if not isinstance(value, type(smallest) | int) or not smallest <= value < math.inf:
                kind = "an integer" if isinstance(smallest, int) else "a finite number"
                raise ValueError(f"{name} must be {kind} of at least {smallest}, not {value!r}.")
        if self.stage == "align" and self.train_projector is False:
            raise ValueError(
                "stage='align' trains the projector and nothing else, so train_projector=False leaves nothing to "
                "train: leave it unset, or use stage='finetune'."
            )


def retention_of(args: MoExtendSFTConfig, has_deltas: bool) -> tuple[str, float]:
    """(kind, weight) of the retention loss, for an adapter with or without deltas."""
    kind = args.retention_loss or ("text" if has_deltas else "prompts")
    return kind, RETENTION_LOSSES[kind] if args.retention_weight is None else args.retention_weight


def check_processes(world_size: int, output_dir: str | None) -> None:
    """Refuses one of several processes that a launcher started for one training, where each would train by itself.

    accelerate and torchrun start them whether there are GPUs or not; without any, they find each other with `use_cpu`
    only.

    Raises:
        ValueError: says how many there are, and how they find each other.
    """
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched.isdecimal() and int(launched) > 1 and world_size == 1:
        raise ValueError(
            f"This is one of {launched} processes that were launched as one training, but without a GPU it trains by "
            f"itself: all of them would write to {output_dir}. Launch one process, or on CPUs add --use_cpu true "
            "(use_cpu=True): then they train together."
        )
