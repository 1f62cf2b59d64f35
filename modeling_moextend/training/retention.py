"""Retention text: what the base must go on treating as it does, from a dataset or sampled from the base itself.

Sampling needs no data of the user's, for a base draws from what it was trained on. Where a sample starts decides what
is drawn: from the start of a document alone, whole domains never come up. A gate trained on such text let a third of
all code through.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import torch
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.constants import HF_HOME
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..folder_moextend import locked
from ..senses_moextend import INPUTS
from ..tools.files import replace_file
from ..tools.interrupts import stopped_at
from ..tools.modes import evaluation_mode

if TYPE_CHECKING:
    from ..modeling_moextend import MoExtendForCausalLM

STARTS = ("document", "1 random token", "3 random tokens", "chat")
FORWARD_KEYS = ("input_ids", "attention_mask", "position_ids", *(name for names in INPUTS.values() for name in names))
TIMED = 6  # tokens that are timed before sampling
SAMPLER = 1  # counts up when the same settings would give other text, so that no stale cache is read


def sample_retention(
    model: MoExtendForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    length: int,
    seed: int = 0,
    batch_size: int = 32,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> list[list[int]]:
    """Text that the base writes when nobody asks it anything: temperature 1, no truncation, nothing ends a sample.

    A quarter of the samples begins each as a document, after one random token, after three, and as a user's turn (the
    chat template up to a message's content); a base without a chat template has three kinds. A second call with the
    same base and settings reads the first one's samples from disk.

    Args:
        model: a MoExtend model; it is sampled with the adapter off.
        tokenizer: the base's.
        tokens: how many to sample, in sequences of `length`, start tokens included.
        cache_dir: folder; default: `moextend` in the Hugging Face home.

    Returns:
        list of token id lists, each of `length`.
    """
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
    if damaged:
        try:
            return read_samples(path)
        except (DatasetGenerationError, OSError, pyarrow.ArrowException) as error:
            warnings.warn(f"{path} can't be read ({error}): the text is sampled anew.", stacklevel=2)
    path.parent.mkdir(parents=True, exist_ok=True)  # before hours of sampling, not after
    generator = torch.Generator().manual_seed(seed)
    starts = [start_of(kind, tokenizer, model, generator) for kind in cycle(STARTS, -(-tokens // length), tokenizer)]
    sampled = path.with_suffix(".unfinished.jsonl")
    sampled.touch()
    with locked(sampled):  # another process that samples the same text is waited for
        if path.is_file() and not damaged:
            sequences = read_samples(path)
        else:
            sequences = draw(model, starts, length, batch_size, seed, progress, sampled)
            table = Dataset.from_dict({"input_ids": sequences})
            replace_file(path, lambda unfinished: table.to_parquet(str(unfinished)))
    sampled.unlink(missing_ok=True)
    return sequences


def read_samples(path: Path) -> list[list[int]]:
    """Token id lists of a file that `sample_retention` wrote."""
    return Dataset.from_parquet(str(path), keep_in_memory=True)["input_ids"][:]


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
    path: Path | None = None,
) -> list[list[int]]:
    """Samples one sequence of `length` a start. The process's own random numbers stay as they are.

    Args:
        path: JSON lines to which every batch is added as it comes, with the random state after it; those that are
            there already are not sampled again.

    Raises:
        KeyboardInterrupt: says how many are there.
    """
    image = drawn_image_token(model)
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
    done, state = read_batches_of(path, groups, length, device)
    left = groups[len(done) :]
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
                    f"while sampling retention text, {sum(map(len, done))} of {len(starts)} sequences are there"
                    + (f", in {path}; the same command goes on with the next" if path is not None else "")
                )
            ),
        ):
            if left:
                print(sampling_time(model, left, length, device), flush=True)
            torch.manual_seed(seed)
            if state is not None:
                set_random_state(state, device)
            bar = {
                "desc": "sampling retention text",
                "disable": not progress,
                "initial": len(done),
                "total": len(groups),
            }
            for batch in tqdm(left, **bar):
                ids = torch.tensor(batch, device=device)
                output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
                done.append(output.tolist())
                if path is not None:
                    add_batch(path, done[-1], random_state(device))
    finally:
        model.generation_config = own_config
    return [sequence for batch in done for sequence in batch]


def sampling_time(model: MoExtendForCausalLM, groups: list[list[list[int]]], length: int, device: torch.device) -> str:
    """One line: how long sampling these will take, by a few tokens of the first batch, and what is quicker."""
    ids = torch.tensor(groups[0], device=device)
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings = GenerationConfig(**settings, max_new_tokens=TIMED, min_new_tokens=TIMED)
    for _ in range(2):  # the first time kernels are chosen
        start = time.perf_counter()
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        seconds = time.perf_counter() - start
    tokens = sum(length * len(group) for group in groups)
    needed = sum(len(group) / len(groups[0]) * (length - len(group[0])) for group in groups) * seconds / TIMED
    return (
        f"MoExtend, gate: samples {tokens:,} tokens of retention text from the base, about {duration(needed)}, kept "
        "for the next run. Quicker: your own text (retention_dataset=, --retention_data), or fewer tokens "
        "(retention_tokens=50_000, --retention_tokens 50000)"
    )


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def random_state(device: torch.device) -> dict[str, str]:
    """What torch's next random numbers depend on, by kind of device, as text."""
    states = {"cpu": torch.random.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {kind: base64.b64encode(state.numpy().tobytes()).decode() for kind, state in states.items()}


def set_random_state(states: dict[str, str], device: torch.device) -> None:
    """Back to what `random_state` gave."""
    tensors = {
        kind: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for kind, text in states.items()
    }
    torch.random.set_rng_state(tensors["cpu"])
    if "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


def add_batch(path: Path, batch: list[list[int]], state: dict[str, str]) -> None:
    """One more line: a batch's token ids, and the random state after it."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"input_ids": batch, "random_state": state}) + "\n")


def read_batches_of(
    path: Path | None, groups: list[list[list[int]]], length: int, device: torch.device
) -> tuple[list[list[list[int]]], dict[str, str] | None]:
    """(batches, random state after them) of a sampling that was stopped; a line that is cut off goes, and all of them
    where they are no samples of `groups` or come from another kind of device."""
    batches_, state, size = [], None, 0
    lines = path.read_bytes().splitlines(keepends=True) if path is not None and path.is_file() else []
    for line, starts in zip(lines, groups, strict=False):
        try:
            entry = json.loads(line)
            fits = all(
                len(ids) == length and ids[: len(start)] == start
                for ids, start in zip(entry["input_ids"], starts, strict=True)
            )
            if not (fits and line.endswith(b"\n") and ("cuda" in entry["random_state"]) == (device.type == "cuda")):
                break
        except (ValueError, KeyError, TypeError):
            break
        batches_.append(entry["input_ids"])
        state, size = entry["random_state"], size + len(line)
    if lines:
        os.truncate(path, size)
    return batches_, state


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
