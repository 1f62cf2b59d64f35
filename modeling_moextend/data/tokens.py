"""Tokens that a base has no embedding for, such as an added pad token: named before anything runs.

The base's embedding is never resized, so only the image token, whose place features take, may lie past it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .processors import text_tokenizer

if TYPE_CHECKING:
    from trl import SFTTrainer


@dataclass
class KnownTokens:
    """What a model can read of a tokenizer's tokens.

    Args:
        model: a MoExtend model or any causal LM.
        tokenizer: the one that text comes from, or a processor that holds it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin

    def __post_init__(self):
        self.vocab_size = self.model.get_input_embeddings().num_embeddings
        image = self.model.config.image_token_id if getattr(self.model, "encoder", None) is not None else None
        vocab = text_tokenizer(self.tokenizer).get_vocab().items()
        self.unknown = {number: token for token, number in vocab if number >= self.vocab_size and number != image}

    def check(self, ids: Iterable[int], where: str) -> None:
        """Refuses token ids past the embedding that are not the image token.

        Raises:
            ValueError: names the token, its id and the size of the vocabulary.
        """
        found = next((number for number in ids if number in self.unknown), None) if self.unknown else None
        if found is not None:
            raise ValueError(
                f"{where}: {self.unknown[found]!r} has the id {found}, but the base's embedding has {self.vocab_size} "
                "rows and is never resized. Take the base's own tokenizer, without tokens added to it; to pad with, "
                "tokenizer.pad_token = tokenizer.eos_token."
            )


@dataclass
class CheckTokens:
    """A collator around another one, whose batches may hold known tokens only."""

    collator: Callable[[list[dict]], dict[str, Any]]
    known: KnownTokens

    def __call__(self, examples: list[dict]) -> dict[str, Any]:
        batch = self.collator(examples)
        self.known.check(batch["input_ids"].flatten().tolist(), "A batch")
        return batch


def check_trainer_tokens(trainer: SFTTrainer) -> None:
    """Refuses a pad or end token that the base has no embedding for, and datasets that hold such a token: at once
    where they are tokenised already, in the batch that has it where they are not (images, streaming).

    Raises:
        ValueError: see `KnownTokens.check`.
    """
    known = KnownTokens(trainer.model, trainer.processing_class)
    if not known.unknown:
        return
    tokenizer = text_tokenizer(trainer.processing_class)
    for role in ("pad_token", "eos_token"):
        known.check([getattr(tokenizer, f"{role}_id")], f"The tokenizer's {role}")
    datasets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    for name, dataset in {"train": trainer.train_dataset, **datasets}.items():
        if hasattr(dataset, "__len__") and "input_ids" in dataset.column_names:  # not a stream
            for row, ids in enumerate(dataset["input_ids"]):
                known.check(ids, f"Row {row} of the {name} dataset, as it is tokenised")
    trainer.data_collator = CheckTokens(trainer.data_collator, known)
