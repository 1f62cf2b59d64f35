"""What the trainer refuses before it trains, and the processor it takes where it gets none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from torch import nn
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import HubStrategy

from ..base_checks_moextend import check_gradients, check_in_memory
from ..data.collators import AUDIO_COLUMNS
from ..data.processors import COUNTED, load_processor
from ..gate_moextend import TokenGate
from ..tools.modes import is_moextend
from .config import GROUP_SETTINGS, MoExtendSFTConfig, retention_of
from .gate import GateReport

if TYPE_CHECKING:
    from ..modeling_moextend import MoExtendForCausalLM

RETENTION_COLUMNS = ("messages", "conversations", "completion", "input_ids")


def check_model(model: object) -> None:
    """Refuses a model that has no adapter to train, is wrapped, or whose base trains too, has changed since it was
    loaded, or is quantised and hands on no gradient.

    Raises:
        ValueError: says what was given and how to make or load one that trains.
    """
    if not is_moextend(model):
        description = repr(model) if isinstance(model, str) else type(model).__name__
        raise ValueError(
            f"MoExtendSFTTrainer trains the adapter of a MoExtend model, but got {description}. Make one with "
            "MoExtendForCausalLM.from_base(base, extended_layers=...), or load one with "
            "MoExtendForCausalLM.from_pretrained(folder)."
        )
    if not hasattr(type(model), "adapter_tensors"):
        raise ValueError(
            f"The MoExtend model is inside a {type(model).__name__}: what that adds would train and be saved, the "
            "adapter not (PEFT, torch.compile and their like). Pass the MoExtend model itself; torch_compile=True in "
            "the arguments compiles it."
        )
    if not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} has no head, so there is nothing to predict. Pass the model that it is the body "
            "of, or load it with MoExtendForCausalLM.from_pretrained(folder)."
        )
    check_frozen(model)
    check_in_memory(model, model.resolve_name())
    check_gradients(model)


def check_frozen(model: MoExtendForCausalLM) -> None:
    """Refuses to train a base or encoder.

    Raises:
        ValueError: names the parameters that ask for gradients.
    """
    new = {id(tensor) for name in model.adapters for tensor in model.adapter_tensors(name).values()}
    wrong = [name for name, tensor in model.named_parameters() if tensor.requires_grad and id(tensor) not in new]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong[:8])} ({len(wrong)} tensors) ask for gradients, but MoExtend never changes a base or "
            "encoder, and would not save what they learn. Freeze them (model.base.requires_grad_(False)); a LoRA is "
            "taken off by PEFT's unload()."
        )


def check_retention(
    model: MoExtendForCausalLM, args: MoExtendSFTConfig, retention_dataset: Dataset | IterableDataset | None
) -> None:
    """Refuses retention text where nothing would use it, or from two sources.

    Raises:
        ValueError: says which scope has a gate, and what the others need instead.
    """
    has_text = retention_dataset is not None or args.retention is not None
    if has_text and model.config.scope != "gate":
        why = {
            "modality": "scope='modality' needs none: text without images is bit-equal to the base by construction",
            "all": "scope='all' has no gate that could learn from it; use scope='gate'",
        }[model.config.scope]
        raise ValueError(f"Retention text trains the gate of scope='gate'. {why}. Leave retention out.")
    kind, weight = retention_of(args, bool(model.config.deltas))
    in_loss = kind == "text" and weight > 0
    if has_text and (args.stage != "finetune" or (args.gate_steps == 0 and not in_loss)):
        raise ValueError(
            f"Retention text trains the gate, but with stage={args.stage!r} and gate_steps={args.gate_steps} nothing "
            "does. Leave retention out, or set stage='finetune' and gate_steps above 0."
        )
    if retention_dataset is not None and not isinstance(retention_dataset, Dataset | IterableDataset):
        kind = type(retention_dataset).__name__
        raise ValueError(
            f"retention_dataset must be a datasets.Dataset or IterableDataset, not {kind}. Of a DatasetDict take one "
            "split; make a list one with Dataset.from_list([{'text': ...}, ...])."
        )
    columns = getattr(retention_dataset, "column_names", None)
    allowed = (args.dataset_text_field, *RETENTION_COLUMNS)
    if columns and not set(columns) & set(allowed):
        raise ValueError(f"retention_dataset has the columns {columns}; one of them must be {', '.join(allowed)}.")
    if columns and {"image", "images", *AUDIO_COLUMNS} & set(columns):
        raise ValueError(
            f"retention_dataset has the columns {columns}, but retention data is text: what the base knew without "
            "images or audio. Leave out the samples with them and the column."
        )
    if hasattr(retention_dataset, "__len__") and len(retention_dataset) == 0:
        raise ValueError("retention_dataset is empty: give text, or leave it out to have text sampled from the base.")
    if retention_dataset is not None and args.retention is not None:
        raise ValueError("Give retention_dataset=... or retention='self', not both.")


def check_gate_trained(gate: TokenGate) -> None:
    """Refuses to finetune behind a gate that nobody has trained: not one token would reach a new expert.

    Raises:
        ValueError: the gate is as it was made.
    """
    if not gate.fc2.weight.any():
        raise ValueError(
            "gate_steps=0 leaves the gate as it is, but it was never trained and lets no token through: the new "
            "experts would learn nothing. Set gate_steps above 0."
        )


def check_gate_open(report: GateReport) -> None:
    """Refuses to finetune behind a gate that stays closed on the task.

    Raises:
        ValueError: says what to change.
    """
    if report.routed == 0:
        raise ValueError(
            "The trained gate lets no token of the task through, so the new experts would learn nothing: the task "
            "looks like the retention text, or the gate was trained too little. Raise gate_steps or "
            "gate_task_weight, or lower gate_retention_weight."
        )


def default_processor(
    model: MoExtendForCausalLM, assistant_only_loss: bool
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer of the model's base, or the processor for base and encoder: TRL would look beside the adapter.

    Raises:
        ValueError: the model does not know where its base lies.
    """
    base = model.config.base_model_name_or_path
    encoders = [sense.encoder_name_or_path for sense in model.senses.values()]
    if base is None or None in encoders:
        raise ValueError("Pass processing_class=: the model does not say where its base and encoder lie.")
    counted = {name: getattr(model.config, name) for name in COUNTED}
    processor = load_processor(base, encoders or None, assistant_only_loss, **counted)
    for modality in model.senses:
        setattr(model.config, f"{modality}_token_id", getattr(processor, f"{modality}_token_id"))
    return processor


def check_rows_left(dataset: Dataset | IterableDataset | None, args: MoExtendSFTConfig) -> None:
    """Refuses data of which TRL, which leaves out rows without a token to learn, has left no row.

    Raises:
        ValueError: says what to change.
    """
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(
            f"No row of train_dataset is left to train on: cut at max_length={args.max_length}, none has a token that "
            "counts for the loss. Raise max_length, shorten the prompts, or give other data."
        )


def check_image_token(model: MoExtendForCausalLM, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
    """Refuses a processor that writes another image or audio token than the model looks for.

    Raises:
        ValueError: names both ids.
    """
    for modality, sense in model.senses.items():
        processor_id = getattr(processing_class, f"{modality}_token_id", None)
        if processor_id is not None and processor_id != sense.token_id:
            raise ValueError(
                f"The processor's {modality} token has id {processor_id}, the model looks for {sense.token_id}: build "
                f"the model with from_base(..., {modality}_token_id=processor.{modality}_token_id)."
            )


def allow_missing_base(model: nn.Module, keys: Any) -> None:
    """Post-hook of `load_state_dict`: a checkpoint holds no frozen tensors, and DeepSpeed would miss them."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]


def check_sharding(accelerator: Accelerator, model: MoExtendForCausalLM) -> None:
    """Refuses ways of spreading a model over processes under which the adapter would be lost or trained otherwise.

    Raises:
        ValueError: names the setting and what to set instead.
    """
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    parallelism = getattr(accelerator, "parallelism_config", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError(
            "DeepSpeed ZeRO-3 is not supported: it splits parameters in a way that the adapter can't be read from. "
            "Use ZeRO-2 (configuration/accelerate/deepspeed_zero2.yaml), or FSDP2 (fsdp2.yaml) to shard the base."
        )
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise ValueError(
            "FSDP1 is not supported: it flattens parameters, and shards would be saved as if they were whole. Set "
            "fsdp_version: 2 (configuration/accelerate/fsdp2.yaml)."
        )
    if fsdp is not None and fsdp.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing is not supported: it would recompute layers without knowing which tokens "
            "are in scope. Set it to false, and gradient_checkpointing=True in the training arguments."
        )
    if fsdp is not None and fsdp.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading is not supported: all processes but one would copy their new experts from "
            "empty weights. Set it to false."
        )
    if fsdp is not None and fsdp.ignored_modules:
        raise ValueError(
            "fsdp_ignored_modules is not supported: what trains there would differ between processes. Leave it out."
        )
    layers = set(model._no_split_modules)
    if fsdp is not None and (
        fsdp.auto_wrap_policy is size_based_auto_wrap_policy or set(fsdp.transformer_cls_names_to_wrap or ()) - layers
    ):
        raise ValueError(
            "FSDP may only wrap decoder layers: anything smaller runs on some processes and not on others, which then "
            "wait for ever. Set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, and fsdp_transformer_layer_cls_to_wrap "
            f"to nothing or {', '.join(sorted(layers))}."
        )
    for kind in ("tp", "cp", "sp"):
        if getattr(parallelism, f"{kind}_enabled", False):
            raise ValueError(
                f"parallelism_config with {kind}_size > 1 is not supported: new experts and the tokens in scope are "
                "not split that way. Use data parallelism (dp_shard_size, dp_replicate_size) only."
            )


def say_unsharded(accelerator: Accelerator) -> None:
    """Says where FSDP was asked for and is not done: of CPU processes accelerate makes DDP."""
    asked = getattr(accelerator.state, "fsdp_plugin", None) is not None
    if asked and accelerator.distributed_type != DistributedType.FSDP:
        accelerator.print(
            f"MoExtend: FSDP was asked for, but accelerate does {accelerator.distributed_type.value} on this device: "
            "nothing is sharded, every process holds the whole base"
        )


def check_arguments(args: object) -> None:
    """Refuses the arguments of another trainer.

    Raises:
        ValueError: names their class.
    """
    if not isinstance(args, MoExtendSFTConfig):
        raise ValueError(
            f"args must be a MoExtendSFTConfig, not {type(args).__name__}: it says which stage trains, and takes what "
            "SFTConfig takes."
        )


def check_options(args: MoExtendSFTConfig, coefficient: float, kwargs: dict[str, Any]) -> None:
    """Refuses options of TRL that would train, lose or push something else than the adapter.

    Raises:
        ValueError: names the option and the way out.
    """
    if kwargs.get("peft_config") is not None:
        raise ValueError("peft_config would train the base, which MoExtend never changes. Leave it out.")
    if coefficient and (args.label_smoothing_factor or kwargs.get("compute_loss_func") is not None):
        raise ValueError(
            "label_smoothing_factor and compute_loss_func run the model twice a step, and the load-balancing loss "
            "would lose its gradient. Leave them out, or set router_aux_loss_coef=0.0."
        )
    settings = [name for name in GROUP_SETTINGS if getattr(args, name) is not None]
    if settings and (kwargs.get("optimizers") or (None,))[0] is not None:
        raise ValueError(
            f"The trainer was given an optimizer, whose groups are its own, and {', '.join(settings)}. Put learning "
            "rates and decay into its groups, or leave one of both out."
        )
    if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"hub_strategy={args.hub_strategy.value!r} pushes optimiser states and pickled arguments. Use "
            "'every_save' or 'end', which push the adapter."
        )
