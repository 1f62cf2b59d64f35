"""The router probe of the Extender (stage 2 of the paper): which layers' routing reacts to new data.

Routers alone train on the new data, as a difference from their weights that is thrown away afterwards. What counts is
how far each layer's choice of experts moved.

Letters: L MoE layers, E experts of a layer, T tokens of a batch, K experts a token selects.
"""

import contextlib
import copy
import os
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig, SFTTrainer

from ..data.collators import MaskImageLabels, prepare_collator
from ..data.rows import check_datasets
from ..data.tokens import check_trainer_tokens
from ..evaluation.compare import count_selected
from ..families_moextend import MoELayer, find_moe_layers
from ..tools.modes import evaluation_mode, is_moextend
from ..tools.progress import show_progress, without_our_warnings
from .router_shift import RouterShift

MODES = ("training", "gradient_checkpointing")  # what trainers switch on every module


class RouterDelta(nn.Module):
    """`weight + delta` for one router tensor; delta [as weight] starts at zero, in float32: bf16 swallows steps."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight.detach().float() + self.delta).to(weight.dtype)


def measure_router_shift(
    model: PreTrainedModel,
    train_dataset: Dataset | IterableDataset,
    eval_dataset: Dataset | IterableDataset,
    args: SFTConfig | None = None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    trainer_class: type[SFTTrainer] = SFTTrainer,
    **trainer_kwargs: Any,
) -> RouterShift:
    """
    Measures how far training only the routers on new data moves each layer's choice of experts (section 3.2).

    The model comes back as it was, also after an exception: routers train as a difference that is thrown away.

    Args:
        model: a transformers MoE causal LM, or a `MoExtendForCausalLM` (aligned, so that its projector makes sense of
            images); new experts it already has sit out.
        train_dataset: samples the routers train on (S_t), in any form TRL's `SFTTrainer` takes.
        eval_dataset: held-out samples (S_e; the paper: 10,000) the experts are counted on.
        args: default `probe_config(output_dir)`: the paper's 1,000 steps at 1e-3. Nothing is
            saved whatever it says, and the load-balancing loss is off unless `router_aux_loss_coef` is given.
        processing_class: tokenizer, or `MoExtendProcessor` for images.
        trainer_class: a subclass of `SFTTrainer`.
        trainer_kwargs: more for the trainer: `data_collator`, `callbacks`, `formatting_func`, ...

    Returns:
        `RouterShift`

    Raises:
        ValueError: an empty dataset, or a model without MoE layers or with layers of different numbers of experts.
    """
    check_samples(train_dataset, eval_dataset)
    layers = find_moe_layers(model.get_decoder())
    if len({layer.num_experts for layer in layers.values()}) > 1:
        raise ValueError("measure_router_shift needs the same number of experts in every MoE layer.")
    with contextlib.ExitStack() as stack:
        args = without_saving(args or probe_config(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.enter_context(restored(model))
        stack.enter_context(new_experts_off(model))
        stack.enter_context(router_deltas(model, layers))
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        trainer = trainer_class(
            model=model,
            args=args,
            **check_datasets(args, processing_class, datasets, trainer_kwargs),
            processing_class=processing_class,
            **trainer_kwargs,
        )
        mask_image_labels(trainer)
        check_trainer_tokens(trainer)
        before = count_selections(trainer, layers, "counting experts before")
        show_progress(trainer, "router probe")
        with without_our_warnings():
            trainer.train()
        after = count_selections(trainer, layers, "counting experts after")
    return RouterShift(list(layers), before, after)


def probe_config(output_dir: str | os.PathLike, **overrides: Any) -> SFTConfig:
    """The paper's settings of stage 2 as an `SFTConfig`: 1,000 steps, 1e-3, cosine, warm-up 3%, no weight decay."""
    settings = {
        "max_steps": 1000,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # below 1: a share of all steps
        "weight_decay": 0.0,
        "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(),
    }
    with without_our_warnings():
        return SFTConfig(output_dir=output_dir, **{**settings, **overrides})


def without_saving(args: SFTConfig) -> SFTConfig:
    """A copy of `args` that saves and pushes nothing, and leaves the load-balancing loss out unless asked for it."""
    args = copy.copy(args)
    args.save_strategy = SaveStrategy.NO
    args.load_best_model_at_end = args.push_to_hub = False
    if args.router_aux_loss_coef is None:  # it pulls every layer to an even use of experts: not the data's doing
        args.router_aux_loss_coef = 0.0
    return args


def check_samples(train_dataset: Dataset | IterableDataset, eval_dataset: Dataset | IterableDataset) -> None:
    """Refuses empty datasets, and warns where samples are counted that were trained on.

    Raises:
        ValueError: names the empty dataset.
    """
    for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        if dataset is None or next(iter(dataset), None) is None:
            raise ValueError(f"{name} is empty: the router shift needs samples to train on and others to count on.")
    fingerprints = [getattr(dataset, "_fingerprint", None) for dataset in (train_dataset, eval_dataset)]
    if train_dataset is eval_dataset or (fingerprints[0] is not None and fingerprints[0] == fingerprints[1]):
        warnings.warn(
            "train_dataset and eval_dataset are the same samples; the paper counts on samples held out from training.",
            stacklevel=3,
        )


@contextlib.contextmanager
def router_deltas(model: PreTrainedModel, layers: dict[int, MoELayer]) -> Iterator[None]:
    """Inside, all of `model` is frozen but a `RouterDelta` on every router's weight and bias.

    Outside, class, parameters and their order are the very objects they were.
    """
    model.requires_grad_(False)
    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            for module, name in router_tensors(layer):
                stack.enter_context(router_delta(module, name))
        yield


@contextlib.contextmanager
def router_delta(module: nn.Module, name: str) -> Iterator[None]:
    order = list(module._parameters)
    parametrize.register_parametrization(module, name, RouterDelta(module._parameters[name]))
    try:
        yield
    finally:
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        module._parameters.update({key: module._parameters.pop(key) for key in order if key in module._parameters})


def router_tensors(layer: MoELayer) -> Iterator[tuple[nn.Module, str]]:
    """(module, name) of every tensor with one row an expert in a layer's router: weight, and bias if there is one."""
    for path, module in layer.router.named_modules():
        if path.split(".")[0] == "moextend":
            continue  # rows of new experts, which sit out
        for name in ("weight", "bias"):
            tensor = module._parameters.get(name)
            if tensor is not None and tensor.shape[0] == layer.num_experts:
                yield module, name


def new_experts_off(model: PreTrainedModel) -> contextlib.AbstractContextManager:
    """Leaves the new experts of a MoExtend model out, and only them: `disable_adapter` would refuse images as well."""
    if not is_moextend(model):
        return contextlib.nullcontext()
    return model.passes.using(selection=model.select_adapters()._replace(groups=()))


@contextlib.contextmanager
def restored(model: PreTrainedModel) -> Iterator[None]:
    """Gives `model` back as it came: what trains, modes, configs and forward, all of which trainers write to."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, {k: v for k, v in module.__dict__.items() if k in MODES}) for module in model.modules()]
    hooked = bool(getattr(model, "_require_grads_hooks", None))
    holders = [model.config, model.config.get_text_config(), getattr(model, "generation_config", None), model]
    attributes = [(holder.__dict__, dict(holder.__dict__)) for holder in holders if holder is not None]
    try:
        yield
    finally:
        if not hooked:
            model.disable_input_require_grads()  # gradient checkpointing asks for gradients of embeddings
        for current, values in attributes:
            current.clear()
            current.update(values)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for module, values in modes:
            for name in MODES:  # where the class has a default, the instance may have had none of its own
                module.__dict__.pop(name, None)
            module.__dict__.update(values)


def mask_image_labels(trainer: SFTTrainer) -> None:
    """Keeps image tokens out of the labels of a model that has any."""
    config = trainer.model.config
    names = ("image_token_id", "audio_token_id")
    ids = [one for name in names if (one := getattr(config, name, None)) is not None]
    if ids and not isinstance(trainer.data_collator, MaskImageLabels):
        prepare_collator(trainer, ids, config.get_text_config().vocab_size)


def count_selections(trainer: SFTTrainer, layers: dict[int, MoELayer], title: str) -> torch.Tensor:
    """How often each expert is selected by the non-padding tokens of the evaluation samples: [L, E] int64.

    Counted is what the routers really answer. Each process counts its own share of the samples.
    """
    model, accelerator = trainer.model, trainer.accelerator
    num_experts = next(iter(layers.values())).num_experts
    counts = torch.zeros(len(layers), num_experts, dtype=torch.int64, device=accelerator.device)
    inputs = {}  # the current batch

    def count(number, _, __, output):
        counts[number] += count_output(output, inputs.get("attention_mask"), num_experts).to(counts.device)

    routers = [layer.router for layer in layers.values()]
    hooks = [router.register_forward_hook(partial(count, number)) for number, router in enumerate(routers)]
    try:
        with evaluation_mode(model), torch.no_grad(), accelerator.autocast():
            for batch in tqdm(held_out_batches(trainer), desc=title, disable=not accelerator.is_main_process):
                inputs = trainer._prepare_inputs(batch)
                # The body alone: nobody needs logits over the vocabulary.
                model.base_model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return accelerator.reduce(counts, reduction="sum").cpu()


def held_out_batches(trainer: SFTTrainer) -> DataLoader:
    """This process' share of the evaluation samples, prepared by TRL; no sample comes twice to fill a last batch."""
    state, dataset = trainer.accelerator.state, trainer.eval_dataset
    if state.num_processes > 1:
        dataset = split_dataset_by_node(dataset, rank=state.process_index, world_size=state.num_processes)
    if not isinstance(dataset, IterableDataset):
        dataset = trainer._remove_unused_columns(dataset, description="evaluation")
    return DataLoader(dataset, batch_size=trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator)


def count_output(
    output: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None, num_experts: int
) -> torch.Tensor:
    """[E] int64: selections in one router's answer, by the tokens `attention_mask` [B, S] marks (`None`: all)."""
    index = next(part for part in reversed(output) if torch.is_tensor(part) and not part.is_floating_point())
    return count_selected(index, num_experts, attention_mask)
