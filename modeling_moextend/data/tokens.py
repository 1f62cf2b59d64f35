"""Tokens that a base has no embedding for, such as an added pad token: named before anything runs.

The base's embedding is never resized, so only the image token, whose place features take, may lie past it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..senses_moextend import is_multimodal
from .processors import text_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset
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
        self.placeholders = getattr(self.model, "placeholder_ids", [])
        base = getattr(self.model, "base", self.model).config
        self.puts_own = is_multimodal(base)  # images of its own, perhaps where there is no embedding
        vocab = text_tokenizer(self.tokenizer).get_vocab().items()
        size, known = self.vocab_size, self.placeholders
        self.unknown = {number: token for token, number in vocab if number >= size and number not in known}

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

    def checked(self, row: dict[str, Any]) -> dict[str, Any]:
        """A tokenised row of streamed retention text, once it is checked."""
        self.check(row["input_ids"], "A row of the retention dataset")
        return row

    def check_dataset(self, dataset: Dataset, name: str, read_as_they_are: bool) -> None:
        """Refuses a tokenised dataset with such an id; if its ids are `read_as_they_are`, and not by a collator of the
        user's, also one that is no token at all.

        Raises:
            ValueError: names the row; see `check`.
        """
        row, kind = 0, getattr(dataset.features["input_ids"], "feature", None)
        if not str(getattr(kind, "dtype", None)).startswith(("int", "uint")):
            return
        for table in dataset.select_columns("input_ids").with_format("arrow").iter(1000):
            extremes = pc.min_max(pc.list_flatten(table["input_ids"])).as_py()
            if extremes["min"] is not None and not 0 <= extremes["min"] <= extremes["max"] < self.vocab_size:
                for number, ids in enumerate(table["input_ids"].to_pylist(), start=row):
                    where = f"Row {number} of the {name} dataset, as it is tokenised"
                    self.check(ids, where)
                    wrong = [one for one in ids if not 0 <= one < self.vocab_size and one not in self.placeholders]
                    if wrong and read_as_they_are and not self.puts_own:
                        raise ValueError(
                            f"{where}: {wrong[0]} is no token of the tokenizer, and the base's embedding has "
                            f"{self.vocab_size} rows. Tokenise it with the base's own tokenizer."
                        )
            row += len(table)


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
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    known = KnownTokens(trainer.model, trainer.processing_class)
    tokenizer = text_tokenizer(trainer.processing_class)
    for role in ("pad_token", "eos_token"):
        known.check([getattr(tokenizer, f"{role}_id")], f"The tokenizer's {role}")
    trls = isinstance(trainer.data_collator, DataCollatorForLanguageModeling)
    datasets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    for name, dataset in {"train": trainer.train_dataset, **datasets}.items():
        if hasattr(dataset, "__len__") and "input_ids" in dataset.column_names:  # not a stream
            known.check_dataset(dataset, name, trls)
    if known.unknown:
        trainer.data_collator = CheckTokens(trainer.data_collator, known)
