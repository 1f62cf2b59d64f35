"""Collators: what makes a batch of samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class MaskImageLabels:
    """A collator around another one: ids that stand for image features, or lie past the head, are no labels.

    Done here and not with the loss, because Trainer counts labels for its mean before the loss is computed.

    Args:
        collator: gives a batch with `input_ids` and `labels`, both [B, S].
        image_token_id: `None` for a text-only model.
        vocab_size: ids from here on are masked as well.
    """

    collator: Callable[[list[dict]], dict[str, Any]]
    image_token_id: int | None
    vocab_size: int

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        batch = self.collator(examples)
        labels = batch["labels"]
        no_label = labels >= self.vocab_size
        if self.image_token_id is not None:
            no_label = no_label | (labels == self.image_token_id)
        batch["labels"] = labels.masked_fill(no_label, -100)
        return batch


def pad_ids(ids: Sequence[Sequence[int] | torch.Tensor], pad: int, side: str) -> dict[str, torch.Tensor]:
    """Lists (or tensors) of ids as `input_ids` and `attention_mask`, [B, longest], filled with `pad` on the `side`."""
    tensors = [torch.as_tensor(one) for one in ids]
    fill = {"batch_first": True, "padding_side": side}
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(tensors, padding_value=pad, **fill),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tensors], **fill),
    }
