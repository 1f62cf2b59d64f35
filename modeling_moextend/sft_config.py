"""`MoExtendSFTConfig`: TRL's `SFTConfig` and what an adapter adds to it."""

from dataclasses import dataclass, field

from trl import SFTConfig

STAGES = ("align", "finetune")
ADAPTER_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class MoExtendSFTConfig(SFTConfig):
    r"""
    Configuration of [`MoExtendSFTTrainer`]. Everything else is [`trl.SFTConfig`]'s.

    For conversations, `assistant_only_loss=True` is what the paper's recipe trains on. `router_aux_loss_coef` weights
    the load-balancing loss over base and new experts (unset: the base's own coefficient; the paper: 0.001).

    Parameters:
        stage (`str`, *optional*, defaults to `"finetune"`):
            What trains. `"align"` (stage 1): the projector only. `"finetune"` (stage 3): new experts, their router
            rows, the calibration, and the projector.
        train_projector (`bool`, *optional*):
            Whether the projector trains in stage `"finetune"`. Unset: yes where the model has one.
        adapter_dtype (`str`, *optional*):
            Dtype of the adapter that `save_model` writes: `"float32"`, `"bfloat16"` or `"float16"`. Unset: the base's.
            Checkpoints always hold float32, so that a resumed run is exact.
        verify_base (`bool`, *optional*, defaults to `False`):
            Whether to hash every base and encoder tensor before the first and after the last step, and to fail if a
            single bit changed. Costs two passes over the weights (a minute or two for 47B parameters).

    Raises:
        ValueError: an unknown `stage` or `adapter_dtype`, or `stage="align"` with `train_projector=False`.
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
    verify_base: bool = field(
        default=False,
        metadata={
            "help": "Whether to hash every base and encoder tensor before the first and after the last step, and to "
            "fail if a single bit changed."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.stage not in STAGES:
            hint = " Stage 'extend' trains nothing that is kept: call measure_router_shift." * (self.stage == "extend")
            raise ValueError(f"stage must be one of {', '.join(map(repr, STAGES))}, not {self.stage!r}.{hint}")
        if self.adapter_dtype is not None and self.adapter_dtype not in ADAPTER_DTYPES:
            raise ValueError(
                f"adapter_dtype must be one of {', '.join(map(repr, ADAPTER_DTYPES))} or None (the base's dtype), not "
                f"{self.adapter_dtype!r}."
            )
        if self.stage == "align" and self.train_projector is False:
            raise ValueError(
                "stage='align' trains the projector and nothing else, so train_projector=False leaves nothing to "
                "train: leave it unset, or use stage='finetune'."
            )
