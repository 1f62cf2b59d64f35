"""Collators: what makes a batch of samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

AUDIO_COLUMNS = ("audio", "audios")


@dataclass
class MaskImageLabels:
    """A collator around another one: ids that stand for features, or lie past the head, are no labels.

    Done here and not with the loss, because Trainer counts labels for its mean before the loss is computed.

    Args:
        collator: gives a batch with `input_ids` and `labels`, both [B, S].
        placeholder_ids: of all senses; none for a text-only model.
        vocab_size: ids from here on are masked as well.
    """

    collator: Callable[[list[dict]], dict[str, Any]]
    placeholder_ids: Sequence[int]
    vocab_size: int

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        batch = self.collator(examples)
        labels = batch["labels"]
        no_label = labels >= self.vocab_size
        for one in self.placeholder_ids:
            no_label = no_label | (labels == one)
        batch["labels"] = labels.masked_fill(no_label, -100)
        return batch


@dataclass
class AudioInMessages:
    """A collator around TRL's for images: the clips of a sample's `audio` (one) or `audios` (a list) go into its
    messages, in reading order, where TRL has no audio columns.

    Raises:
        ValueError: a prompt and a completion apart; other numbers of clips and of audio parts.
    """

    collator: Callable[[list[dict]], dict[str, Any]]

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        return self.collator([self.with_audio(index, example) for index, example in enumerate(examples)])

    def with_audio(self, index: int, example: dict[str, Any]) -> dict[str, Any]:
        """One sample with its clips in its messages."""
        if not any(name in example for name in AUDIO_COLUMNS):
            return example
        example = {"images": [], **example}
        clips = example.pop("audios", None) or []
        clips = [example.pop("audio"), *clips] if example.get("audio") is not None else clips
        example.pop("audio", None)
        if not clips:
            return example
        if "messages" not in example:
            raise ValueError(
                "Audio is trained on in `messages` (assistant_only_loss=True: the answers alone): TRL's collator "
                "has no place for it beside a prompt and a completion."
            )
        messages, rest = [dict(message) for message in example["messages"]], iter(clips)
        if not any(part["type"] == "audio" for message in messages for part in parts_of(message)):
            first = next((message for message in messages if message["role"] == "user"), None)  # as TRL puts images
            if first is None:
                raise ValueError(
                    f"Sample {index} of the batch has {len(clips)} clips, and no user's message for them."
                )
            first["content"] = [{"type": "audio"}] * len(clips) + parts_of(first)
        number = sum(part["type"] == "audio" for message in messages for part in parts_of(message))
        if number != len(clips):
            raise ValueError(
                f"Sample {index} of the batch has {len(clips)} clips and {number} audio parts in its text."
            )
        for message in messages:
            if not isinstance(message["content"], str):
                message["content"] = [
                    {"type": "audio", "audio": next(rest)} if part["type"] == "audio" else part
                    for part in message["content"]
                ]
        return {**example, "messages": messages}


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message's content as a list of parts."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])


def prepare_collator(trainer: Any, placeholder_ids: Sequence[int], vocab_size: int) -> None:
    """Has a trainer of TRL's that was made for images take audio as well, and count no placeholder as a label."""
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = [*trainer._signature_columns, *AUDIO_COLUMNS]
    trainer.data_collator = MaskImageLabels(AudioInMessages(trainer.data_collator), placeholder_ids, vocab_size)


def pad_ids(ids: Sequence[Sequence[int] | torch.Tensor], pad: int, side: str) -> dict[str, torch.Tensor]:
    """Lists (or tensors) of ids as `input_ids` and `attention_mask`, [B, longest], filled with `pad` on the `side`."""
    tensors = [torch.as_tensor(one) for one in ids]
    fill = {"batch_first": True, "padding_side": side}
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(tensors, padding_value=pad, **fill),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tensors], **fill),
    }
