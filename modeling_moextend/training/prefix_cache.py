"""Hidden states below the lowest extended layer, kept on disk: computed in the first epoch, read in all others.

Nothing trains below that layer, and no delta acts there, so a micro-batch enters it with the same hidden states in
every epoch and every run on the same data. They are kept for a micro-batch as a whole, padding included: a row in
another batch is a product of another shape, whose sums may be done in another order. So rows that are in one batch
stay in one batch (`SameBatches`), and what is read is what would be computed, to the bit. An entry is found by all
that determines it: another batch, base or version has another entry.

Letters: B items of the batch, S tokens an item, H hidden size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Sampler
from trl import SFTTrainer

from ..deltas_moextend import decoder_layers, family_of
from ..layers_moextend import input_device
from ..routing_moextend import RoutingRecord
from ..tensor_files_moextend import read_each, read_tensor
from ..tools.files import replace_file
from ..tools.hashes import base_tensors_hash, bytes_of
from ..tools.modes import evaluation_mode
from .retention import last_hidden_states
from .run_record import collated

if TYPE_CHECKING:
    from ..modeling_moextend import MoExtendForCausalLM

MEASURED = 8  # micro-batches, of which the size of all is told
RANDOM = re.compile("drop|jitter")  # settings of a base that make its passes differ
OF_THE_RUN = ("processes", "distribution")  # parts of a run's record that change no hidden state
SAME = 1e-2  # relative difference of last hidden states that an accelerator's kernels may make; none on a CPU


class SameBatches(Sampler[int]):
    """Rows, the same ones in a batch in every epoch; batches come in an order of the epoch's own, a short one last."""

    def __init__(self, order: list[int], batch_size: int, seed: int):
        self.batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        self.number, self.seed, self.epoch = len(order), seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[int]:
        whole = len(self.batches) - (len(self.batches[-1]) < len(self.batches[0]))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = [*torch.randperm(whole, generator=generator).tolist(), *range(whole, len(self.batches))]
        return (row for index in order for row in self.batches[index])


class Prefix(NamedTuple):
    """What a micro-batch brings to the lowest extended layer: hidden [B, S, H] (some families: [B, S, streams, H]) in
    the base's dtype, and balance [MoE layers below], their terms of the load-balancing loss."""

    hidden: torch.Tensor
    balance: torch.Tensor


class PrefixCache:
    """Answers the layers below the lowest extended one of a `MoExtendSFTTrainer`, from `args.prefix_cache`.

    Raises:
        ValueError: something below that layer trains or draws random numbers, batches or processes can't be the same,
            the disk is too small, or the base's layers hand on more than what is kept.
    """

    def __init__(self, trainer: SFTTrainer, run: dict[str, dict[str, Any]]):
        """`run`: what determines it, see `describe_run`."""
        core = self.core = trainer.core
        self.lowest = check_prefix_cache(trainer)
        layers = decoder_layers(core.get_decoder())
        self.layers = [layers[index] for index in range(self.lowest)]
        self.determined_by = json.dumps(determined_by(core, run, self.lowest), sort_keys=True).encode()
        self.folder = Path(trainer.args.prefix_cache, hashlib.sha256(self.determined_by).hexdigest()[:16])
        self.held: Prefix | None = None  # that of the micro-batch under way
        self.space = self._prepare(trainer)  # entries that may still be written

    def _prepare(self, trainer: SFTTrainer) -> int:
        """Tries one micro-batch, says what all of them take; -> how many this process may write."""
        sampler = trainer._get_train_sampler(trainer.train_dataset)
        rows, size = list(sampler), trainer.args.train_batch_size
        number = max(1, len(rows) // size if trainer.args.dataloader_drop_last else -(-len(rows) // size))
        chosen = {index * number // MEASURED for index in range(MEASURED)}
        batches = [collated(trainer, [trainer.train_dataset[row] for row in rows[n * size :][:size]]) for n in chosen]
        with trainer.accelerator.autocast():
            a_token = self._try(batches[0])
        needed = sum(batch["input_ids"].numel() for batch in batches) / len(batches) * number * a_token
        error = None
        if trainer.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            there = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
            free = shutil.disk_usage(self.folder).free
            what = (
                f"hidden states below layer {self.lowest} of {number:,} micro-batches take about "
                f"{needed / 1e9:.3g} GB in {self.folder}, where {there / 1e9:.3g} GB of such are and "
                f"{free / 1e9:.3g} GB are free"
            )
            if needed - there > free:
                error = f"prefix_cache: {what}. Name a folder on a larger disk, or leave prefix_cache out."
            print(f"MoExtend, prefix cache: {what}")
        error = broadcast_object_list([error])[0]
        if error is not None:
            raise ValueError(error)
        self.folder.mkdir(parents=True, exist_ok=True)  # another process may have another disk
        return number

    @torch.no_grad()
    def _try(self, batch: dict[str, Any]) -> float:
        """Holds a pass with what is kept against one without; -> bytes of an entry a token."""
        core, device = self.core, input_device(self.core.base)
        inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        inputs.pop("labels", None)
        options = {"use_cache": False, "logits_to_keep": 1}
        try:
            with evaluation_mode(core), last_hidden_states(core) as states:
                with recorded(self.layers[-1]) as hidden:
                    core(**inputs, **options)
                with replayed(self.layers, hidden[-1]):
                    core(**inputs, **options)
            difference = ((states[1] - states[0]).float().norm() / states[0].float().norm()).item()
        except (TypeError, AttributeError, KeyError, IndexError, RuntimeError) as error:
            difference = f"{type(error).__name__}: {error}"
        if isinstance(difference, str) or not difference <= (0.0 if device.type == "cpu" else SAME):
            raise ValueError(
                f"prefix_cache: the layers of {type(core.get_decoder()).__name__} ({family_of(core.get_decoder())}) "
                f"hand on more than hidden states, or not the same ones twice ({difference}). Leave prefix_cache out."
            )
        return hidden[-1].nbytes / inputs["input_ids"].numel()

    @contextlib.contextmanager
    def serving(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Inside, one pass over the micro-batch `inputs` computes the layers from the lowest extended one on; all of
        them where it was never seen."""
        key = self._key(inputs)
        self.held = self._read(key, inputs["input_ids"].device)
        if self.held is not None:
            with self.again():
                yield
            return
        with self.core.record_routing() as records, recorded(self.layers[-1]) as hidden:
            yield
        with torch.no_grad():
            below = {layer: record for layer, record in records.items() if layer < self.lowest}
            below = self._terms(below, inputs.get("attention_mask"))
        self.held = Prefix(hidden[0], torch.stack(below) if below else torch.zeros(0))
        self._write(key, self.held)

    def again(self) -> contextlib.AbstractContextManager:
        """Inside, passes over the micro-batch served last compute the layers from the lowest extended one on."""
        return replayed(self.layers, self.held.hidden)

    def balance_loss(
        self, records: dict[int, RoutingRecord], attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As the model's, of the micro-batch that was served last: over all its MoE layers, recorded or not."""
        above = {layer: record for layer, record in records.items() if layer >= self.lowest}
        terms = self._terms(above, attention_mask)
        return torch.stack([*self.held.balance.to(terms[0].device), *terms]).mean()

    def _terms(self, records, attention_mask) -> list[torch.Tensor]:
        return [self.core.balance_loss({layer: record}, attention_mask) for layer, record in records.items()]

    def _key(self, inputs: dict[str, Any]) -> str:
        """By everything that the pass gets; labels are the loss's."""
        digest = hashlib.sha256(self.determined_by)
        for name, value in sorted(inputs.items()):
            if isinstance(value, torch.Tensor) and name != "labels":
                digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode() + bytes_of(value))
            elif name != "labels":
                digest.update(f"{name} {value!r} ".encode())
        return digest.hexdigest()

    def _read(self, key: str, device: torch.device) -> Prefix | None:
        path = self.folder / f"{key}.safetensors"
        if not path.is_file():
            return None
        try:
            tensors, _ = read_each(path, read_tensor)
            return Prefix(tensors["hidden"].to(device), tensors["balance"])
        except (ValueError, KeyError) as error:
            warnings.warn(f"{error} It is computed anew.", stacklevel=2)
            return None

    def _write(self, key: str, prefix: Prefix) -> None:
        if self.space == 0:
            warnings.warn(
                "prefix_cache: more micro-batches come than the data has, so nothing more is kept: its transforms or "
                "the collator draw random numbers.",
                stacklevel=2,
            )
        self.space -= 1
        if self.space < 0:
            return
        tensors = {name: tensor.cpu().contiguous() for name, tensor in prefix._asdict().items()}
        try:
            replace_file(self.folder / f"{key}.safetensors", lambda path: save_file(tensors, path))
        except OSError as error:
            warnings.warn(f"prefix_cache: nothing more is kept in {self.folder} ({error}).", stacklevel=2)
            self.space = -1


@contextlib.contextmanager
def recorded(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yields a list to which every pass inside adds what `layer` hands on."""
    found = []
    hook = layer.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        yield found
    finally:
        hook.remove()


@contextlib.contextmanager
def replayed(layers: Sequence[nn.Module], hidden: torch.Tensor) -> Iterator[None]:
    """Inside, `layers` compute nothing, and the last one hands on a copy of `hidden`."""
    own = [vars(layer).get("forward") for layer in layers]  # accelerate puts one there

    def skip(hidden_states, *args, **kwargs):
        return hidden_states

    try:
        for layer in layers[:-1]:
            layer.forward = skip
        layers[-1].forward = lambda *args, **kwargs: hidden.clone()
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward


def determined_by(core: MoExtendForCausalLM, run: dict[str, dict[str, Any]], lowest: int) -> dict[str, Any]:
    """What a hidden state depends on beside the micro-batch, ready for JSON."""
    above = [layer for index, layer in decoder_layers(core.get_decoder()).items() if index >= lowest]
    projectors = {name: tensor for name, tensor in core.adapter_tensors().items() if "projector." in name}
    return {
        "lowest layer": lowest,
        "base's config": run["base's config"],
        "base and encoders": base_tensors_hash(core, above),
        "projectors": {name: hashlib.sha256(bytes_of(tensor)).hexdigest() for name, tensor in projectors.items()},
        "run": {name: value for name, value in run["run"].items() if name not in OF_THE_RUN},
        "versions": {name: run["versions"][name] for name in ("torch", "transformers")},
    }


def check_prefix_cache(trainer: SFTTrainer) -> int:
    """Refuses what would make a kept hidden state another one than the computed; -> the lowest extended layer.

    Raises:
        ValueError: says what stands in the way, and that `prefix_cache` is to be left out.
    """
    core, args = trainer.core, trainer.args
    extended = [layer for name in core.passes.current.active for layer in core.adapters[name].config.extended_layers]
    lowest = min(extended, default=0)
    settings = numbers(core.base.config.to_dict())
    drawn = [f"{name}={value}" for name, value in settings if RANDOM.search(name) and value > 0]
    dropouts = {name: part for name, part in core.base.named_modules() if isinstance(part, nn.Dropout)}
    drawn += [f"{name} (p={part.p})" for name, part in dropouts.items() if part.p]
    obstacles = {
        "no decoder layer lies below an extended one": lowest == 0,
        "the projector trains, whose features the lowest layers get (train_projector=False leaves it)": any(
            "projector." in name for name in trainer.trainable
        ),
        f"layers of the base draw random numbers ({', '.join(drawn[:4])})": drawn,
        "neftune_noise_alpha adds noise to the embedding": args.neftune_noise_alpha,
        "torch_compile=True keeps the layers as they were": args.torch_compile,
        "streamed training data may be other data in the next epoch": not hasattr(trainer.train_dataset, "__len__"),
        "train_sampling_strategy='batch_rebalance' forms other batches in every epoch": (
            args.train_sampling_strategy == "batch_rebalance"
        ),
        "FSDP and DeepSpeed run every layer on all processes": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
        "torch.nn.DataParallel copies the layers (launch one process a GPU)": args.n_gpu > 1,
    }
    found = [text for text, stands in obstacles.items() if stands]
    if found:
        raise ValueError(f"prefix_cache can't be used: {'; '.join(found)}. Change that, or leave prefix_cache out.")
    return lowest


def numbers(config: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, value) of every number in a config and the configs inside."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value
