"""The Extender (stage 2 of the paper): which layers' routing reacts to new data, and so deserves new experts.

Routers alone train on the new data, as a difference from their weights that is thrown away afterwards. What counts is
how far each layer's choice of experts moved.

Letters: L MoE layers, E experts of a layer, T tokens (rows times sequence), K experts a token selects.
"""

import contextlib
import copy
import json
import math
import os
import tempfile
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig, SFTTrainer

from .layers_moextend import find_moe_layers
from .sft_trainer import MaskImageLabels

CHOICES = ("all", "first-half", "second-half", "interval")
FILE_FORMAT = 1
MODES = ("training", "gradient_checkpointing")  # what trainers switch on every module


@dataclass
class RouterShift:
    """How often each expert is selected on held-out samples, before and after only the routers trained.

    Args:
        layers: decoder layer indices of the L MoE layers, ascending.
        counts_before, counts_after: [L, E] int64, selections by non-padding tokens (r_ij of the paper).
    """

    layers: list[int]
    counts_before: torch.Tensor
    counts_after: torch.Tensor

    def __post_init__(self):
        self.counts_before = torch.as_tensor(self.counts_before, dtype=torch.int64)
        self.counts_after = torch.as_tensor(self.counts_after, dtype=torch.int64)
        shapes = tuple(self.counts_before.shape), tuple(self.counts_after.shape)
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != len(self.layers):
            raise ValueError(
                f"counts_before and counts_after must be [{len(self.layers)} layers, experts], got {shapes[0]} and "
                f"{shapes[1]}."
            )
        if (self.counts_before.sum(dim=1) == 0).any() or (self.counts_after.sum(dim=1) == 0).any():
            raise ValueError("A layer without a single selection has no distribution: no token was counted there.")

    @property
    def per_layer(self):
        """d_j, [L] float64: standard deviation over experts of the change of their shares (Eq. 5 and 6)."""
        return (shares(self.counts_before) - shares(self.counts_after)).std(dim=1, correction=0)

    def select(self, fraction=None, layers=None, num_new=1):
        """The plan: which layers to extend, and from which source experts.

        Args:
            fraction (`float`, *optional*, defaults to 0.5): p; the floor(p * L) layers of largest d_j are extended.
            layers (`list[int]` or `str`, *optional*): instead of `fraction`, the layers themselves, or `"all"`,
                `"first-half"`, `"second-half"` or `"interval"` (every other layer): the paper's comparisons.
            num_new (`int`): new experts a layer. Sources are the experts most selected after training (Eq. 8; counts
                after, as in the authors' code), in descending order, from the top again where these run out.

        Returns:
            `dict[int, list[int]]`: decoder layer index -> source experts, what `from_base` takes.

        Raises:
            ValueError: a fraction outside (0, 1] or too small for one layer, an unknown name, a layer that is no MoE
                layer, or `num_new` below 1.
        """
        if num_new < 1:
            raise ValueError(f"num_new must be at least 1, not {num_new}.")
        if layers is None:
            chosen = self._most_shifted(0.5 if fraction is None else fraction)
        elif fraction is not None:
            raise ValueError("Give either fraction or layers, not both.")
        else:
            chosen = self._named(layers) if isinstance(layers, str) else self._checked(layers)
        return {layer: self._sources(layer, num_new) for layer in chosen}

    def _most_shifted(self, fraction):
        """The floor(fraction * L) layers of largest d_j, ascending; of equal ones the lower."""
        if isinstance(fraction, str) or not 0 < fraction <= 1:
            hint = f" For {fraction!r}, write layers={fraction!r}." * (fraction in CHOICES)
            raise ValueError(f"fraction must lie in (0, 1], not {fraction!r}.{hint}")
        number = math.floor(fraction * len(self.layers) + 1e-9)  # 0.29 * 100 is 28.999999999999996
        if number == 0:
            raise ValueError(
                f"fraction={fraction} of {len(self.layers)} MoE layers is less than one layer: give at least "
                f"{1 / len(self.layers):.3g}."
            )
        order = self.per_layer.sort(descending=True, stable=True).indices[:number]
        return sorted(self.layers[place] for place in order.tolist())

    def _named(self, name):
        half = len(self.layers) // 2
        named = {
            "all": self.layers,
            "first-half": self.layers[:half],
            "second-half": self.layers[half:],
            "interval": self.layers[1::2],
        }
        if name not in named:
            raise ValueError(f"layers={name!r} is unknown; give a list or one of {', '.join(map(repr, CHOICES))}.")
        return list(named[name])

    def _checked(self, layers):
        layers = sorted(set(layers))
        wrong = [layer for layer in layers if layer not in self.layers]
        if wrong or not layers:
            raise ValueError(f"{wrong or layers} are no MoE layers of this model; its MoE layers are {self.layers}.")
        return layers

    def _sources(self, layer, num_new):
        counts = self.counts_after[self.layers.index(layer)]
        ranked = [e for e in counts.sort(descending=True, stable=True).indices.tolist() if counts[e] > 0]
        return [ranked[place % len(ranked)] for place in range(num_new)]

    def save(self, path):
        """Writes JSON to `path`; whoever reads meanwhile sees the old file or the new one."""
        content = {
            "moextend_router_shift": FILE_FORMAT,
            "layers": self.layers,
            "counts_before": self.counts_before.tolist(),
            "counts_after": self.counts_after.tolist(),
            "per_layer": self.per_layer.tolist(),  # for readers; `load` works it out again
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path):
        """Reads what `save` wrote.

        Raises:
            ValueError: another kind of file, or one of a newer format.
        """
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        written = content.get("moextend_router_shift") if isinstance(content, dict) else None
        if written is None:
            raise ValueError(f"{path} is not a router shift: write one with RouterShift.save.")
        if written > FILE_FORMAT:
            raise ValueError(f"{path} has format {written}; this version reads up to {FILE_FORMAT}. Upgrade moextend.")
        return cls(content["layers"], content["counts_before"], content["counts_after"])

    def plot(self, path, plan=None):
        """A picture: the shares of the experts before and after as heat maps, and d_j as bars, the plan's layers dark.

        Args:
            path: image file; its ending says the format.
            plan (`dict[int, list[int]]`, *optional*): default `select()`.

        Raises:
            ImportError: matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib: `pip install matplotlib`.") from error
        chosen = self.select() if plan is None and len(self.layers) > 1 else plan or {}
        before, after = shares(self.counts_before).numpy(), shares(self.counts_after).numpy()
        # A Figure of its own draws without pyplot, whose backend is global and may want a display.
        figure = Figure(figsize=(11, 2.4 + 0.16 * len(self.layers)), layout="constrained")
        maps = figure.subplots(1, 3, sharey=True)
        highest = max(before.max(), after.max())
        for axes, values, title in zip(maps, (before, after), ("before", "after"), strict=False):
            image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=highest, interpolation="nearest")
            axes.set(title=f"share of selections, {title}", xlabel="expert")
        figure.colorbar(image, ax=maps[:2], shrink=0.8)
        colours = ["tab:blue" if layer in chosen else "lightgrey" for layer in self.layers]
        maps[2].barh(range(len(self.layers)), self.per_layer.numpy(), color=colours)
        maps[2].set(title="router shift $d_j$ (blue: extended)", xlabel="standard deviation of the change")
        maps[0].set_yticks(range(len(self.layers)), self.layers)
        maps[0].set_ylabel("decoder layer")
        figure.savefig(path, dpi=150)


def shares(counts):
    """[L, E] counts -> [L, E] float64, each row summing to 1 (Eq. 5)."""
    return counts.double() / counts.sum(dim=1, keepdim=True)


class RouterDelta(nn.Module):
    """`weight + delta` for one router tensor; delta [as weight] starts at zero, in float32: bf16 swallows steps."""

    def __init__(self, weight):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    def forward(self, weight):
        return (weight.detach().float() + self.delta).to(weight.dtype)


def measure_router_shift(
    model, train_dataset, eval_dataset, args=None, processing_class=None, trainer_class=SFTTrainer, **trainer_kwargs
):
    """
    Measures how far training only the routers on new data moves each layer's choice of experts (section 3.2).

    The model comes back as it was, also after an exception: routers train as a difference that is thrown away.

    Args:
        model: a transformers MoE causal LM, or a `MoExtendForCausalLM` (aligned, so that its projector makes sense of
            images); new experts it already has sit out.
        train_dataset: samples the routers train on (S_t), in any form TRL's `SFTTrainer` takes.
        eval_dataset: held-out samples (S_e; the paper: 10,000) the experts are counted on.
        args (`SFTConfig`, *optional*): default `probe_config(output_dir)`: the paper's 1,000 steps at 1e-3. Nothing is
            saved whatever it says, and the load-balancing loss is off unless `router_aux_loss_coef` is given.
        processing_class: tokenizer, or `MoExtendProcessor` for images.
        trainer_class: a subclass of `SFTTrainer`.
        trainer_kwargs: more for the trainer: `data_collator`, `callbacks`, `formatting_func`, ...

    Returns:
        `RouterShift`

    Raises:
        ValueError: an empty dataset, or a model without MoE layers or with layers of different numbers of experts.
    """
    check_datasets(train_dataset, eval_dataset)
    layers = find_moe_layers(decoder_of(model))
    if len({layer.num_experts for layer in layers.values()}) > 1:
        raise ValueError("measure_router_shift needs the same number of experts in every MoE layer.")
    with contextlib.ExitStack() as stack:
        args = quiet(args or probe_config(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.enter_context(unchanged(model))
        stack.enter_context(new_experts_off(model))
        stack.enter_context(router_deltas(model, layers))
        trainer = trainer_class(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **trainer_kwargs,
        )
        mask_image_labels(trainer)
        before = count_selections(trainer, layers, "counting experts before")
        trainer.train()
        after = count_selections(trainer, layers, "counting experts after")
    return RouterShift(list(layers), before, after)


def probe_config(output_dir, **overrides):
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
    return SFTConfig(output_dir=output_dir, **{**settings, **overrides})


def quiet(args):
    """A copy of `args` that saves and pushes nothing, and leaves the load-balancing loss out unless asked for it."""
    args = copy.copy(args)
    args.save_strategy = SaveStrategy.NO
    args.load_best_model_at_end = args.push_to_hub = False
    if args.router_aux_loss_coef is None:  # it pulls every layer to an even use of experts: not the data's doing
        args.router_aux_loss_coef = 0.0
    return args


def check_datasets(train_dataset, eval_dataset):
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


def decoder_of(model):
    """The base's decoder, of a plain causal LM or of a MoExtend model."""
    base = model.base if getattr(model.config, "model_type", None) == "moextend" else model
    return base.get_decoder()


@contextlib.contextmanager
def router_deltas(model, layers):
    """Inside, all of `model` is frozen but a `RouterDelta` on every router's weight and bias.

    Outside, class, parameters and their order are the very objects they were.
    """
    model.requires_grad_(False)
    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            for module, name in router_tensors(layer):
                stack.enter_context(one_delta(module, name))
        yield


@contextlib.contextmanager
def one_delta(module, name):
    order = list(module._parameters)
    parametrize.register_parametrization(module, name, RouterDelta(module._parameters[name]))
    try:
        yield
    finally:
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        module._parameters.update({key: module._parameters.pop(key) for key in order if key in module._parameters})


def router_tensors(layer):
    """(module, name) of every tensor with one row an expert in a layer's router: weight, and bias if there is one."""
    for path, module in layer.router.named_modules():
        if path.split(".")[0] == "moextend":
            continue  # rows of new experts, which sit out
        for name in ("weight", "bias"):
            tensor = module._parameters.get(name)
            if tensor is not None and tensor.shape[0] == layer.num_experts:
                yield module, name


def new_experts_off(model):
    """Leaves the new experts of a MoExtend model out, and only them: `disable_adapter` would refuse images as well."""
    if getattr(model.config, "model_type", None) != "moextend":
        return contextlib.nullcontext()
    return model.routing.using(groups=())


@contextlib.contextmanager
def unchanged(model):
    """Gives `model` back as it came: what trains, modes, configs and forward, all of which trainers write to."""
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, {k: v for k, v in module.__dict__.items() if k in MODES}) for module in model.modules()]
    hooked = bool(getattr(model, "_require_grads_hooks", None))
    holders = [model.config, model.config.get_text_config(), getattr(model, "generation_config", None), model]
    saved = [(holder.__dict__, dict(holder.__dict__)) for holder in holders if holder is not None]
    try:
        yield
    finally:
        if not hooked:
            model.disable_input_require_grads()  # gradient checkpointing asks for gradients of embeddings
        for attributes, values in saved:
            attributes.clear()
            attributes.update(values)
        for parameter, requires_grad in frozen:
            parameter.requires_grad_(requires_grad)
        for module, values in modes:
            for name in MODES:  # where the class has a default, the instance may have had none of its own
                module.__dict__.pop(name, None)
            module.__dict__.update(values)


def mask_image_labels(trainer):
    """Keeps image tokens out of the labels of a model that has any."""
    image_token_id = getattr(trainer.model.config, "image_token_id", None)
    if image_token_id is not None and not isinstance(trainer.data_collator, MaskImageLabels):
        vocab_size = trainer.model.config.get_text_config().vocab_size
        trainer.data_collator = MaskImageLabels(trainer.data_collator, image_token_id, vocab_size)


def count_selections(trainer, layers, title):
    """How often each expert is selected by the non-padding tokens of the evaluation samples: [L, E] int64.

    Counted is what the routers really answer. Each process counts its own share of the samples.
    """
    model, accelerator = trainer.model, trainer.accelerator
    num_experts = next(iter(layers.values())).num_experts
    counts = torch.zeros(len(layers), num_experts, dtype=torch.int64, device=accelerator.device)
    inputs = {}  # the current batch

    def count(place, _, __, answer):
        counts[place] += count_answer(answer, inputs.get("attention_mask"), num_experts).to(counts.device)

    routers = [layer.router for layer in layers.values()]
    hooks = [router.register_forward_hook(partial(count, place)) for place, router in enumerate(routers)]
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(held_out_batches(trainer), desc=title, disable=not accelerator.is_main_process):
            inputs = trainer._prepare_inputs(batch)
            with torch.no_grad(), accelerator.autocast():
                # The body alone: nobody needs logits over the vocabulary.
                model.base_model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return accelerator.reduce(counts, reduction="sum").cpu()


def held_out_batches(trainer):
    """This process' share of the evaluation samples, prepared by TRL; no sample comes twice to fill a last batch."""
    state, dataset = trainer.accelerator.state, trainer.eval_dataset
    if state.num_processes > 1:
        dataset = split_dataset_by_node(dataset, rank=state.process_index, world_size=state.num_processes)
    if not isinstance(dataset, IterableDataset):
        dataset = trainer._remove_unused_columns(dataset, description="evaluation")
    return DataLoader(dataset, batch_size=trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator)


def count_answer(answer, attention_mask, num_experts):
    """[E] int64: selections in one router's answer, by the tokens `attention_mask` [B, S] marks (`None`: all)."""
    index = next(part for part in reversed(answer) if torch.is_tensor(part) and not part.is_floating_point())
    if attention_mask is not None:
        index = index[attention_mask.reshape(-1).bool().to(index.device)]
    return torch.bincount(index.reshape(-1), minlength=num_experts)
