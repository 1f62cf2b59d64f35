"""Training the token gate, once, before stage finetune: on hidden states of the base, computed once.

The gate reads what the lowest extended layer gets, and no new expert has touched that: so neither the task's nor the
retention text's hidden states change while new experts train, and what the gate has learned stays true.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch.nn import functional as F
from tqdm.auto import tqdm, trange
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER
from trl import SFTTrainer

from ..data.collators import pad_ids
from ..data.processors import text_tokenizer
from ..data.tokens import KnownTokens
from ..gate_moextend import GatedPass, TokenGate
from ..layers_moextend import input_device
from ..tools.modes import evaluation_mode
from .config import MoExtendSFTConfig
from .retention import FORWARD_KEYS, common_prefix, sample_retention

if TYPE_CHECKING:
    from ..modeling_moextend import MoExtendForCausalLM

TOKENS_A_STEP = 2048  # of the task, and as many of retention text
CURVE = 20  # points of the loss curve that trackers get
HELD_OUT = 20  # every so many-th sequence is held out to measure on


class GateReport(NamedTuple):
    """What the gate does on sequences that it was not trained on.

    loss: hinge loss, mean of the last tenth of the steps. routed: share of task tokens let through, 0 to 1, higher is
    better. captured: share of retention tokens let through, 0 to 1, lower is better. prefix: leading tokens that all
    task samples share, and that count for neither. curve: (step, mean loss since the step before) in `CURVE` points.
    """

    loss: float
    routed: float
    captured: float
    prefix: int
    curve: tuple[tuple[int, float], ...] = ()


class StopPass(Exception):
    """Ends a forward pass whose rest nobody needs."""


def states_bytes(model: MoExtendForCausalLM, tokens: int) -> int:
    """Bytes that the hidden states of `tokens` tokens take in memory."""
    return tokens * model.gate.value.weight.shape[1] * model.base.dtype.itemsize


@torch.no_grad()
def gate_inputs(
    model: MoExtendForCausalLM, batches: Iterable[dict[str, torch.Tensor]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states that the gate will see: a list of (token ids [T], hidden states [T, H] in the base's dtype, CPU).

    Runs the base up to the lowest extended layer only. Padding is dropped, packed sequences come apart.

    Args:
        model: a MoExtend model with `scope="gate"`.
        batches: iterable of what its forward takes; `attention_mask`, `position_ids`, `pixel_values` where given.
    """
    router = model.moe_layers[min(model.config.extended_layers)].router
    device, inputs, sequences = input_device(model.base), [], []

    def record(module, args):
        inputs.append((args[0].detach(), model.passes.plan.gates[model.leading]))
        raise StopPass

    handle = router.register_forward_pre_hook(record)
    try:
        with evaluation_mode(model), model.passes.using(enabled=True):
            for batch in batches:
                try:
                    model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
                except StopPass:
                    hidden, gated = inputs.pop()
                    sequences += split_sequences(
                        batch["input_ids"], hidden.reshape(*batch["input_ids"].shape, -1), gated
                    )
    finally:
        handle.remove()
    return sequences


def split_sequences(
    input_ids: torch.Tensor, hidden: torch.Tensor, gated: GatedPass
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[B, S] and [B, S, H] -> a (ids, hidden states) pair a sequence, on the CPU."""
    pairs = []
    for ids, states, real, starts in zip(input_ids, hidden, gated.is_real, gated.starts, strict=True):
        for start in starts[real].unique():
            tokens = (real & (starts == start)).to(states.device)
            pairs.append((ids[tokens.to(ids.device)].cpu(), states[tokens].cpu()))
    return pairs


def shared_prefix(sequences: list[tuple[torch.Tensor, torch.Tensor]], placeholder_ids: Sequence[int] = ()) -> int:
    """Number of leading tokens that say nothing about the task: those that all its samples share (a chat template's).

    It ends before the first placeholder, whose id is shared and whose content is not.

    Raises:
        ValueError: all samples are the same text, so nothing tells the task.
    """
    sequence_ids = [ids.tolist() for ids, _ in sequences]
    prefix = common_prefix(sequence_ids)
    first = sequence_ids[0]
    prefix = min([prefix, *(first.index(one) for one in placeholder_ids if one in first)])
    if prefix == max(map(len, sequence_ids)):
        raise ValueError("The gate can't learn from this training data: all its samples are the same.")
    return prefix


def fit_gate(
    gate: TokenGate,
    task: list[tuple[torch.Tensor, torch.Tensor]],
    retention: list[tuple[torch.Tensor, torch.Tensor]],
    *,
    prefix: int,
    steps: int = 600,
    learning_rate: float = 3e-3,
    task_weight: float = 1.0,
    retention_weight: float = 10.0,
    threshold: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> GateReport:
    """Trains `gate` to let task tokens through and retention tokens not; hinge losses on the routing margin z.

    loss = task_weight * mean relu(1 - z) over task tokens + retention_weight * mean relu(1 + z) over retention tokens.
    AdamW, one-cycle learning rate. Where text of both kinds can't be told apart, the larger weight decides.

    Args:
        task, retention: lists of (ids [T], hidden states [T, H]); every 20th is held out for the report.
        prefix: leading task tokens that count for neither, see `shared_prefix`.

    Returns:
        `GateReport`.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = list(gate.parameters())
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 2))
    parts = [(task, prefix, 1.0, task_weight), (retention, 0, -1.0, retention_weight)]
    training_parts, losses = [without_held_out(part[0]) for part in parts], []
    with torch.enable_grad():
        for _ in trange(steps, desc="training the gate", disable=not progress):
            loss = 0.0
            for sequences, (_, skipped, sign, weight) in zip(training_parts, parts, strict=True):
                margins, counts = run_gate(gate, sample_batch(sequences, generator), skipped)
                hinge = F.relu(1 - sign * margins[counts]).sum() / counts.sum().clamp(min=1)
                loss = loss + weight * hinge
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ValueError(
                    f"The gate's loss is {losses[-1]} after {len(losses)} steps: lower gate_learning_rate, or look "
                    "for infinite hidden states of the base."
                )
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    shares = [share_routed(gate, part[0][::HELD_OUT], part[1], threshold) for part in parts]
    last_losses = losses[-max(1, steps // 10) :]
    return GateReport(sum(last_losses) / max(len(last_losses), 1), *shares, prefix, curve_of(losses))


def curve_of(losses: list[float]) -> tuple[tuple[int, float], ...]:
    """((step, mean loss since the last one), ...): at most `CURVE` points."""
    size = max(1, -(-len(losses) // CURVE))
    parts = [losses[first : first + size] for first in range(0, len(losses), size)]
    return tuple((min((number + 1) * size, len(losses)), sum(p) / len(p)) for number, p in enumerate(parts))


def without_held_out(sequences: list[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The sequences to train on: all but every 20th, or all where these are too few."""
    return [sequence for index, sequence in enumerate(sequences) if index % HELD_OUT] or sequences


def sample_batch(
    sequences: list[tuple[torch.Tensor, torch.Tensor]], generator: torch.Generator
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random sequences of together about `TOKENS_A_STEP` tokens, at least one."""
    chosen, tokens = [], 0
    for index in torch.randint(len(sequences), (TOKENS_A_STEP,), generator=generator).tolist():
        if chosen and tokens + len(sequences[index][0]) > TOKENS_A_STEP:
            break
        chosen.append(sequences[index])
        tokens += len(sequences[index][0])
    return chosen


def run_gate(
    gate: TokenGate, sequences: list[tuple[torch.Tensor, torch.Tensor]], skipped: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Margins [B, S] of padded sequences, and [B, S] bool: the tokens that count."""
    device = gate.fc1.weight.device
    hidden = torch.nn.utils.rnn.pad_sequence([states for _, states in sequences], batch_first=True).to(device)
    positions = torch.arange(hidden.shape[1], device=device).unsqueeze(0)
    real = positions < torch.tensor([len(ids) for ids, _ in sequences], device=device).unsqueeze(1)
    margins = gate(hidden, GatedPass(real, torch.full_like(real, -1, dtype=torch.long)))
    return margins, real & (positions >= skipped)


@torch.no_grad()
def share_routed(
    gate: TokenGate, sequences: list[tuple[torch.Tensor, torch.Tensor]], skipped: int, threshold: float
) -> float:
    """Share of the tokens of `sequences` that the gate lets through; NaN where none counts."""
    routed = total = 0
    for sequence in sequences:
        margins, counts = run_gate(gate, [sequence], skipped)
        routed, total = routed + int((margins[counts] > threshold).sum()), total + int(counts.sum())
    return routed / total if total else float("nan")


# ---------------------------------------------------------------- in the trainer


def train_gate(trainer: SFTTrainer) -> GateReport:
    """Trains the gate of a `MoExtendSFTTrainer`'s model on its training data and retention text; -> `GateReport`.

    Text is sampled on all processes, before anything is sharded; then one trains the gate and hands it to the others,
    which wait for it.
    """
    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    texts, report = retention_from_dataset(trainer), None  # on every process: TRL's preparation waits for all of them
    texts = retention_from_base(trainer, args.retention_tokens) if texts is None else texts
    for parameter in model.gate.parameters():
        parameter.data = parameter.data.float()
    if trainer.accelerator.is_main_process:
        size = 2 * states_bytes(model, args.retention_tokens) / 2**20
        print(
            f"MoExtend, gate: keeps hidden states of about {args.retention_tokens:,} task tokens and as many of "
            f"retention text, {size:,.0f} MiB of memory and at most a batch more"
        )
        task = gate_inputs(model, read_batches("the task", task_samples(trainer), trainer.data_collator, args))
        retention = gate_inputs(model, read_batches("retention text", texts, pad_texts, args))
        report = fit_gate(
            model.gate,
            task,
            retention,
            prefix=shared_prefix(task, model.placeholder_ids),
            steps=args.gate_steps,
            learning_rate=args.gate_learning_rate,
            task_weight=args.gate_task_weight,
            retention_weight=args.gate_retention_weight,
            threshold=model.gate_threshold,
            seed=args.seed,
            progress=not args.disable_tqdm,
        )
        print(gate_summary(report))
    broadcast(list(model.gate.parameters()))
    return broadcast_object_list([report])[0]


def task_samples(trainer: SFTTrainer) -> Iterable[dict[str, Any]]:
    """Training samples, in an order of their own; a streamed dataset's in its own order."""
    data = trainer.train_dataset
    if not hasattr(data, "__len__"):
        return data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(trainer.args.seed))
    return (data[index] for index in order.tolist())


def retention_from_dataset(trainer: SFTTrainer) -> Iterator[dict[str, Any]] | None:
    """The retention dataset as [{"input_ids"}], as TRL tokenises it; `None` where none was given."""
    if trainer.retention_dataset is None:
        return None
    reader = copy(trainer)  # all text counts here, whatever is a label in training
    reader.args, reader.completion_only_loss = copy(trainer.args), False
    reader.args.assistant_only_loss, reader.args.max_length = False, None
    tokenizer = copy(text_tokenizer(trainer.processing_class))
    tokenizer.model_max_length = VERY_LARGE_INTEGER  # texts are cut below: it is no news that they are long
    data = reader._prepare_dataset(trainer.retention_dataset, tokenizer, reader.args, False, None, "retention")
    known, length = KnownTokens(trainer.model, tokenizer), trainer.args.retention_length
    if hasattr(data, "__len__"):
        known.check_dataset(data, "retention", True)
    elif known.unknown:
        data = data.map(known.checked)
    return ({"input_ids": text["input_ids"][:length]} for text in data.shuffle(seed=reader.args.seed))


def retention_from_base(trainer: SFTTrainer, tokens: int) -> list[dict[str, list[int]]]:
    """Text of so many tokens sampled from the base as [{"input_ids"}], by all processes together."""
    args = trainer.args
    if args.retention is None and trainer.gate_report is None and trainer.accelerator.is_main_process:
        print("MoExtend, gate: no retention_dataset was given, so text is sampled from the base itself")
    sequences = sample_retention(
        trainer.accelerator.unwrap_model(trainer.model),
        text_tokenizer(trainer.processing_class),
        tokens=tokens,
        length=args.retention_length,
        seed=args.seed,
        cache_dir=args.retention_cache_dir,
        progress=not args.disable_tqdm,
    )
    return [{"input_ids": ids} for ids in sequences]


def read_batches(
    name: str,
    samples: Iterable[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    args: MoExtendSFTConfig,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `samples` as a forward pass takes them, until they hold `args.retention_tokens` tokens."""
    samples, tokens_left = iter(samples), args.retention_tokens
    with tqdm(total=tokens_left, desc=f"reading {name}", unit="token", disable=args.disable_tqdm) as bar:
        while tokens_left > 0 and (chunk := list(islice(samples, args.per_device_train_batch_size))):
            batch = {key: value for key, value in collate(chunk).items() if key in FORWARD_KEYS}
            tokens = int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
            tokens_left -= tokens
            bar.update(tokens)
            yield batch
        bar.total = bar.n  # there may be less than was asked for


def pad_texts(texts: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """[{"input_ids"}] -> `input_ids` and `attention_mask`, padded on the right."""
    return pad_ids([text["input_ids"] for text in texts], 0, "right")


def gate_summary(report: GateReport) -> str:
    """One line: what the trained gate does on sequences that it was not trained on; and a warning where it fails."""
    line = (
        f"MoExtend, gate: lets {100 * report.routed:.1f}% of task tokens through (the {report.prefix} tokens that all "
        f"samples begin with left out) and captures {100 * report.captured:.3f}% of retention tokens"
    )
    if report.routed < 0.5:
        line += (
            ". WARNING: most of the task stays with the base; it looks like the retention text. Train the gate longer "
            "(gate_steps), or lower gate_retention_weight"
        )
    return line
