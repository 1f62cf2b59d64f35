"""The retention loss on text: what the base would say of retention text, held where new tensors run on all of it.

A gate lets a token of the base's through by mistake now and then, and that token should find the base all the same.
So pieces of retention text that look most like the task to the gate are run with the gate open, and the model's
next-token distribution is held to the base's. The task's own prompts stay free to move, and no second pass over them
is needed.

Letters: N pieces, L tokens a piece, V vocabulary, M the base's likeliest next tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch.nn import functional as F
from tqdm.auto import trange
from trl import SFTTrainer

from ..layers_moextend import input_device
from ..tools.modes import evaluation_mode
from .gate import pad_texts, retention_from_base, retention_from_dataset
from .retention import closed_gate, opened_gate

if TYPE_CHECKING:
    from ..modeling_moextend import MoExtendForCausalLM

DRAWN, KEPT = 1024, 256  # pieces of retention text, and those of them that look most like the task
LENGTH = 32  # tokens a piece
LIKELIEST = 64  # next tokens that are told apart; all others count as one
PIECES_A_STEP = 8  # of a micro-batch
SMALLEST = -30.0  # of a log-probability: the rest of a distribution may be nothing


class RetentionText(NamedTuple):
    """Pieces of text and what the base says comes next.

    input_ids, attention_mask [N, L]; index [N, L, M]: the likeliest next tokens; log_probs [N, L, M + 1]: theirs, and
    that of all others together.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    index: torch.Tensor
    log_probs: torch.Tensor

    def draw(self, *key: int) -> RetentionText:
        """`PIECES_A_STEP` of them: by `key` alone, so that a resumed run draws what it would have drawn."""
        seed = 0
        for number in key:
            seed = (seed * 1_000_003 + number) % 2**63
        chosen = torch.randint(len(self.input_ids), (PIECES_A_STEP,), generator=torch.Generator().manual_seed(seed))
        return RetentionText(*(tensor[chosen] for tensor in self))


def retention_text(trainer: SFTTrainer) -> RetentionText:
    """The `RetentionText` of a `MoExtendSFTTrainer` whose gate is trained; one process makes it for all."""
    model, args, text = trainer.accelerator.unwrap_model(trainer.model), trainer.args, None
    samples = retention_from_dataset(trainer)  # on every process: TRL's preparation waits for all of them
    tokens = args.retention_tokens if args.gate_steps else min(args.retention_tokens, DRAWN * LENGTH)
    samples = retention_from_base(trainer, tokens) if samples is None else samples
    if trainer.accelerator.is_main_process:
        pieces = cut_pieces((sample["input_ids"] for sample in samples), tokens, args.seed)
        text = read_base(model, pieces, max(args.per_device_train_batch_size, PIECES_A_STEP), not args.disable_tqdm)
    return broadcast_object_list([text])[0]


def cut_pieces(texts: Iterable[list[int]], tokens: int, seed: int) -> list[list[int]]:
    """`DRAWN` pieces of at most `LENGTH` tokens of the first `tokens` tokens of `texts`; every other one a beginning.

    Raises:
        ValueError: there is no text of two tokens.
    """
    sequences = []
    for ids in texts:
        if tokens <= 0:
            break
        tokens -= len(ids)
        sequences += [list(ids)] if len(ids) > 1 else []
    if not sequences:
        raise ValueError("The retention text has no sample of two tokens or more: give longer text.")
    generator, pieces = torch.Generator().manual_seed(seed), []
    for number in range(DRAWN):
        ids = sequences[int(torch.randint(len(sequences), (1,), generator=generator))]
        start = int(torch.randint(max(len(ids) - LENGTH, 0) + 1, (1,), generator=generator)) if number % 2 else 0
        pieces.append(ids[start : start + LENGTH])
    return pieces


@torch.no_grad()
def read_base(
    model: MoExtendForCausalLM, pieces: list[list[int]], batch_size: int, progress: bool = False
) -> RetentionText:
    """What the base (with the adapters below, if there are any) says of the `KEPT` of `pieces` that look most like the
    task to the gate."""
    batch, margins, found = pad_texts([{"input_ids": ids} for ids in pieces]), [], []
    handle = model.gate.register_forward_hook(lambda module, args, output: margins.append(output.cpu()))
    try:
        with evaluation_mode(model), model.passes.using(enabled=True), closed_gate(model):
            for first in trange(0, len(pieces), batch_size, desc="reading retention text", disable=not progress):
                part = {name: tensor[first : first + batch_size] for name, tensor in batch.items()}
                on_device = {name: tensor.to(input_device(model.base)) for name, tensor in part.items()}
                log_probs = model(**on_device, use_cache=False).logits.float().log_softmax(-1)
                top = log_probs.topk(min(LIKELIEST, log_probs.shape[-1] - 1))
                found.append((top.indices.cpu(), with_rest(log_probs, top.indices).cpu()))
    finally:
        handle.remove()
    margins = torch.cat(margins).masked_fill(~batch["attention_mask"].bool(), -torch.inf).amax(dim=1)
    kept = margins.argsort(descending=True, stable=True)[:KEPT]
    index, log_probs = (torch.cat(parts) for parts in zip(*found, strict=True))
    return RetentionText(*(tensor[kept] for tensor in (*batch.values(), index, log_probs)))


def with_rest(log_probs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [..., V] at `index` [..., M], and that of all others together: [..., M + 1]."""
    rest = log_probs.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, index), rest], dim=-1).clamp_min(SMALLEST)


def text_distance(model: MoExtendForCausalLM, text: RetentionText) -> torch.Tensor:
    """The retention loss on text: mean KL divergence (nats a token) of the model, its gate open, from the base.

    Args:
        model: the MoExtend model itself, not as it is wrapped for training.
        text: the pieces of this step.
    """
    text = RetentionText(*(tensor.to(input_device(model.base)) for tensor in text))
    with opened_gate(model):
        logits = model(input_ids=text.input_ids, attention_mask=text.attention_mask, use_cache=False).logits
    index, real = text.index.to(logits.device), text.attention_mask.to(logits.device).bool()
    found = with_rest(logits.float().log_softmax(-1), index)
    return F.kl_div(found, text.log_probs.to(logits.device), reduction="none", log_target=True).sum(-1)[real].mean()
