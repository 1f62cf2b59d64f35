"""Retention text: what the base must go on treating as it does, from a dataset or sampled from the base itself.

Sampling needs no data of the user's, for a base draws from what it was trained on. Where a sample starts decides what
is drawn: from the start of a document alone, whole domains never come up. A gate trained on such text let a third of
all code through.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.constants import HF_HOME
from torch import nn
from tqdm.auto import tqdm
from transformers import Cache, GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import CacheLayerMixin

from ..folder_moextend import locked
from ..senses_moextend import INPUTS
from ..tools.files import replace_file
from ..tools.interrupts import stopped_at
from ..tools.modes import evaluation_mode

if TYPE_CHECKING:
    from ..modeling_moextend import MoExtendForCausalLM

STARTS = ("document", "1 random token", "3 random tokens", "chat")
FORWARD_KEYS = ("input_ids", "attention_mask", "position_ids", *(name for names in INPUTS.values() for name in names))
BATCH, LARGEST = 32, 512  # sequences sampled together: where memory says nothing, and at most
SHARE, COPIES = 0.7, 6  # of an accelerator's memory, which sampling may fill; of float32 logits, at their peak
TIMED = 6  # tokens that are timed before sampling
SAMPLER = 2  # counts up when the same settings would give other text, so that no stale cache is read


def sample_retention(
    model: MoExtendForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    length: int,
    seed: int = 0,
    batch_size: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> list[list[int]]:
    """Text that the base writes when nobody asks it anything: temperature 1, no truncation, nothing ends a sample.

    A quarter of the samples begins each as a document, after one random token, after three, and as a user's turn (the
    chat template up to a message's content); a base without a chat template has three kinds. A second call with the
    same base and settings reads the first one's samples from disk. Of several processes each samples its share; call
    it on all of them. The text is the same, whatever their number.

    Args:
        model: a MoExtend model; it is sampled with the adapter off.
        tokenizer: the base's.
        tokens: how many to sample, in sequences of `length`, start tokens included.
        batch_size: sequences sampled together; default: what fits in the memory of the model's devices.
        cache_dir: folder; default: `moextend` in the Hugging Face home.

    Returns:
        list of token id lists, each of `length`; the same on every process.
    """
    state = PartialState()
    batch_size = min(gather_object([batch_size or batch_size_by_memory(model, length)]))
    settings = {"tokens": tokens, "length": length, "seed": seed, "sampler": SAMPLER}
    settings |= {"base": model.config.base_fingerprint, "chat": chat_start(tokenizer), "batch_size": batch_size}
    settings |= {
        "first": first_token(tokenizer),
        "words": len(tokenizer),
        "special": sorted(tokenizer.all_special_ids),
    }
    settings |= {"image": drawn_image_token(model)}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(cache_dir or Path(HF_HOME, "moextend"), f"self-retention-{key}.parquet")
    damaged = path.is_file()
    sequences = of_first_process(lambda: read_samples(path))
    if sequences is not None:
        return sequences
    path.parent.mkdir(parents=True, exist_ok=True)  # before hours of sampling, not after
    generator = torch.Generator().manual_seed(seed)
    starts = [start_of(kind, tokenizer, model, generator) for kind in cycle(STARTS, -(-tokens // length), tokenizer)]
    sampled = path.with_suffix(f".unfinished-{state.process_index}.jsonl")
    sampled.touch()
    with locked(sampled):  # another run that samples the same text is waited for
        sequences = of_first_process(lambda: None if damaged else read_samples(path))
        if sequences is None:
            sequences = draw(model, starts, length, batch_size, seed, progress, sampled)
            if state.is_main_process:
                table = Dataset.from_dict({"input_ids": sequences})
                replace_file(path, lambda unfinished: table.to_parquet(str(unfinished)))
    state.wait_for_everyone()
    for left in (sampled, *(unfinished_files(path) if state.is_main_process else ())):
        left.unlink(missing_ok=True)
    return sequences


def of_first_process(ask: Callable[[], Any]) -> Any:
    """What `ask` answers on the first process, on all of them: the others may have another disk."""
    return broadcast_object_list([ask() if PartialState().is_main_process else None])[0]


def read_samples(path: Path) -> list[list[int]] | None:
    """Token id lists of a file that `sample_retention` wrote; `None`: there is none, or it can't be read."""
    try:
        return Dataset.from_parquet(str(path), keep_in_memory=True)["input_ids"][:] if path.is_file() else None
    except (DatasetGenerationError, OSError, pyarrow.ArrowException) as error:
        warnings.warn(f"{path} can't be read ({error}): the text is sampled anew.", stacklevel=2)
        return None


def unfinished_files(path: Path) -> list[Path]:
    """Those in which processes keep what they have sampled for `path`, of a run that was stopped too."""
    return sorted(path.parent.glob(f"{path.name.partition('.')[0]}.unfinished-*.jsonl"))


def batch_size_by_memory(model: MoExtendForCausalLM, length: int) -> int:
    """Sequences of `length` whose caches and logits fit beside the model in `SHARE` of its accelerators' memory, a
    power of two; `BATCH` where there is none. By the size of devices, not by what is free: so it is the same again."""
    parameters = [parameter for parameter in model.parameters() if parameter.device.type == "cuda"]
    if not parameters:
        return BATCH
    devices = {parameter.device for parameter in parameters}
    memory = sum(torch.cuda.get_device_properties(device).total_memory for device in devices)
    return fitting(SHARE * memory - sum(parameter.nbytes for parameter in parameters), row_bytes(model, length))


def fitting(memory: float, row: int) -> int:
    """The largest power of two of rows of so many bytes that `memory` holds, 1 to `LARGEST`."""
    return 1 << (max(1, min(LARGEST, int(memory // row))).bit_length() - 1)


@torch.no_grad()
def row_bytes(model: MoExtendForCausalLM, length: int, tried: int = 8) -> int:
    """Bytes that sampling a sequence takes: its cache, by that of `tried` tokens, and logits in a few copies."""
    ids = torch.zeros(1, tried, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    with evaluation_mode(model), model.disable_adapter():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
    cache = {id(tensor): tensor.nbytes for tensor in tensors_in(output.past_key_values)}
    return sum(cache.values()) * length // tried + COPIES * 4 * output.logits.shape[-1]


def tensors_in(held: object) -> Iterator[torch.Tensor]:
    """Every tensor of a cache, in whatever lists, mappings and objects it keeps them."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, list | tuple | dict):
        for part in held.values() if isinstance(held, dict) else held:
            yield from tensors_in(part)
    elif isinstance(held, Cache | CacheLayerMixin):
        yield from tensors_in(vars(held))


def cycle(kinds: Iterable[str], number: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """`number` kinds of start in equal shares, one kind after the other: a batch then has starts of one width."""
    kinds = [kind for kind in kinds if kind != "chat" or chat_start(tokenizer)]
    return sorted((kinds[index % len(kinds)] for index in range(number)), key=kinds.index)


def chat_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the chat template up to the first user message's content; `[]` without a template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return []
    chats = [[{"role": "user", "content": content}] for content in ("alpha", "7 beta")]
    one, other = (tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in chats)
    return list(one[: common_prefix([one, other])])


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading entries that all sequences share."""
    length = min(map(len, sequences))
    equal_at = (all(sequence[index] == sequences[0][index] for sequence in sequences) for index in range(length))
    return next((index for index, equal in enumerate(equal_at) if not equal), length)


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What a document begins with: bos or, where there is none, eos; `None` where there is neither."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def drawn_image_token(model: MoExtendForCausalLM) -> int | list[int] | None:
    """The image token's id where the base could draw it, `None` elsewhere: text has no images."""
    drawn = [one for one in model.placeholder_ids if 0 <= one < model.config.get_text_config().vocab_size]
    return None if not drawn else drawn[0] if len(drawn) == 1 else drawn


def start_of(
    kind: str, tokenizer: PreTrainedTokenizerBase, model: MoExtendForCausalLM, generator: torch.Generator
) -> list[int]:
    """Token ids a sample begins with."""
    if kind == "chat":
        return chat_start(tokenizer)
    first = first_token(tokenizer)
    special = {*tokenizer.all_special_ids, model.image_token_id, *model.placeholder_ids}
    known = min(len(tokenizer), model.get_input_embeddings().num_embeddings)  # tokens may have been added
    words = torch.tensor([token for token in range(known) if token not in special])
    number = 0 if kind == "document" else int(kind[0])
    drawn = words[torch.randint(len(words), (number,), generator=generator)].tolist()
    return ([] if first is None and drawn else [first or 0]) + drawn


@torch.no_grad()
def draw(
    model: MoExtendForCausalLM,
    starts: list[list[int]],
    length: int,
    batch_size: int,
    seed: int,
    progress: bool,
    path: Path,
) -> list[list[int]]:
    """Samples one sequence of `length` a start, each process its share of the batches, each batch by random numbers of
    its own. The process's stay as they are.

    Args:
        path: JSON lines to which this process adds every batch as it comes; those that any process has already are
            not sampled again, however many there were.

    Raises:
        KeyboardInterrupt: says how many are there.
    """
    image, state = drawn_image_token(model), PartialState()
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=length,
        pad_token_id=0,
        eos_token_id=model.config.get_text_config().vocab_size,  # never drawn: a chat goes on with its next turn
        suppress_tokens=[image] if isinstance(image, int) else image,
    )
    device = model.get_input_embeddings().weight.device
    groups = batches(starts, batch_size)
    done = kept_batches(path, groups, length, device)
    there = set(gather_object(list(done)))
    left = [index for index in range(len(groups)) if index not in there][state.process_index :: state.num_processes]
    own_config = model.generation_config
    devices = [device] if device.type == "cuda" else []
    model.generation_config = GenerationConfig()  # generate fills in from it what `settings` leaves open
    try:
        with (
            torch.random.fork_rng(devices),
            evaluation_mode(model),
            model.disable_adapter(),
            stopped_at(
                lambda: (
                    f"while sampling retention text, {sum(map(len, done.values()))} of {len(starts)} sequences are "
                    f"there, in {path}; the same command goes on with the next"
                )
            ),
        ):
            if left and state.is_main_process:
                print(sampling_time(model, [groups[index] for index in left], length, device), flush=True)
            bar = {
                "desc": "sampling retention text",
                "disable": not (progress and state.is_main_process),
                "initial": len(groups) - len(left),
                "total": len(groups),
            }
            for index in tqdm(left, **bar):
                torch.manual_seed((seed + index * 1_000_003) % 2**63)
                ids = torch.tensor(groups[index], device=device)
                output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
                done[index] = output.tolist()
                add_batch(path, index, done[index], device)
    finally:
        model.generation_config = own_config
    done = dict(gather_object(list(done.items())))
    return [sequence for index in range(len(groups)) for sequence in done[index]]


def sampling_time(model: MoExtendForCausalLM, groups: list[list[list[int]]], length: int, device: torch.device) -> str:
    """One line: how long sampling these will take, by a few tokens of the first batch, and what is quicker."""
    ids = torch.tensor(groups[0], device=device)
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings = GenerationConfig(**settings, max_new_tokens=TIMED, min_new_tokens=TIMED)
    for _ in range(2):  # the first time kernels are chosen
        start = time.perf_counter()
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        seconds = time.perf_counter() - start
    tokens, processes = sum(length * len(group) for group in groups), PartialState().num_processes
    share = "" if processes == 1 else f" on each of {processes} processes"
    needed = sum(len(group) / len(groups[0]) * (length - len(group[0])) for group in groups) * seconds / TIMED
    return (
        f"MoExtend, gate: samples {tokens:,} tokens of retention text from the base{share}, about {duration(needed)}, "
        "kept for the next run. Quicker: your own text (retention_dataset=, --retention_data), or fewer tokens "
        "(retention_tokens=50_000, --retention_tokens 50000)"
    )


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def add_batch(path: Path, index: int, batch: list[list[int]], device: torch.device) -> None:
    """One more line: which batch, its token ids, and the kind of device that drew it."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"batch": index, "input_ids": batch, "device": device.type}) + "\n")


def kept_batches(
    path: Path, groups: list[list[list[int]]], length: int, device: torch.device
) -> dict[int, list[list[int]]]:
    """Index -> batch of a sampling that was stopped; what is no sample of `groups`, or of another kind of device, is
    passed over."""
    found = {}
    for file in {path, *unfinished_files(path)}:
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
                entry = json.loads(line)
                fits = entry["device"] == device.type and all(
                    len(ids) == length and ids[: len(start)] == start
                    for ids, start in zip(entry["input_ids"], groups[entry["batch"]], strict=True)
                )
                if fits:
                    found[entry["batch"]] = entry["input_ids"]
        if file == path and text and not text.endswith("\n"):  # cut off in the middle of a line
            with open(path, "a", encoding="utf-8") as own:
                own.write("\n")
    return found


def batches(starts: list[list[int]], size: int) -> list[list[list[int]]]:
    """Starts in batches of one width."""
    groups = {}
    for start in starts:
        groups.setdefault(len(start), []).append(start)
    return [group[first : first + size] for group in groups.values() for first in range(0, len(group), size)]


# ---------------------------------------------------------------- while the new experts train


@contextlib.contextmanager
def last_hidden_states(model: MoExtendForCausalLM) -> Iterator[list[torch.Tensor]]:
    """Yields a list to which every forward pass of the base's decoder inside adds its last hidden states [B, S, H]."""
    states = []
    hook = model.get_decoder().register_forward_hook(lambda module, args, output: states.append(output[0]))
    try:
        yield states
    finally:
        hook.remove()


def prompt_distance(
    model: nn.Module, core: MoExtendForCausalLM, hidden: torch.Tensor, inputs: dict[str, Any]
) -> torch.Tensor:
    """How far new experts move what the base makes of a prompt: the retention loss of stage finetune.

    Mean, over prompt tokens (those whose next token is no label), of |h - h_0|^2 / |h_0|^2, where h are the last
    hidden states and h_0 the base's. A prompt's first words can be a base conversation's as well; no gate can tell
    them apart, and nobody asks for another continuation of them. Keeping it the base's costs the task little: what
    answers are made of passes through the layers below the last.

    Args:
        model, core: a MoExtend model with `scope="gate"`, as it is wrapped for training and as it is.
        hidden: [B, S, H] of the pass with the adapter on.
        inputs: the batch, with `labels` [B, S]; -100: no label.

    Returns:
        scalar; 0 where every token is a label.
    """
    batch = {key: inputs[key] for key in FORWARD_KEYS if inputs.get(key) is not None}
    with torch.no_grad(), closed_gate(core), last_hidden_states(core) as base:
        model(**batch, use_cache=False, logits_to_keep=1)  # on every process, whatever its batch: sharded ones meet
    chosen = prompt_tokens(inputs, hidden).unsqueeze(-1)
    base = base[-1].float()
    moved = (hidden.float() - base).masked_fill(~chosen, 0).square().sum(-1)
    size = base.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (moved / size).sum() / chosen.sum().clamp(min=1)


def closed_gate(model: MoExtendForCausalLM) -> contextlib.AbstractContextManager:
    """Inside, no token of this thread's passes is let through; images are still seen, unlike with the adapter off."""
    return model.passes.using(thresholds={model.leading: math.inf})


def opened_gate(model: MoExtendForCausalLM) -> contextlib.AbstractContextManager:
    """Inside, every token of this thread's passes is let through."""
    return model.passes.using(thresholds={model.leading: -math.inf})


def prompt_tokens(inputs: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    """[B, S] bool: tokens whose next one is of the same sequence and no label."""
    labels = inputs.get("labels")
    chosen = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if labels is None or labels.shape != chosen.shape:
        return chosen
    chosen[:, :-1] = labels[:, 1:] == -100
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if isinstance(mask, torch.Tensor) and mask.shape == chosen.shape:
        chosen[:, :-1] &= mask[:, 1:].bool() & mask[:, :-1].bool()
    if positions is not None:  # the last token of a packed sequence has no next one
        positions = positions.expand_as(labels)
        chosen[:, :-1] &= positions[:, 1:] > positions[:, :-1]
    return chosen
