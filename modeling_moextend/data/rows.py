"""Rows of a dataset that a trainer could not train on: named with their number before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .collators import AUDIO_COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from trl import SFTConfig

COLUMNS = ("input_ids", "prompt", "completion", "messages", "conversations")  # and the one with text
IMAGE_COLUMNS = ("prompt", "completion", "messages")  # the one with text only where Trainer leaves it there
EXPECTED = (
    "`messages` ([{{'role': 'user', 'content': ...}}, {{'role': 'assistant', 'content': ...}}, ...]), `prompt` and "
    "`completion` (texts, or lists of such messages), `{text}` or tokenised `input_ids`; for images one of the first "
    "two and `images`"
)


def check_rows(
    dataset: Dataset | IterableDataset | None,
    name: str,
    text_field: str,
    assistant_only_loss: bool,
    drops_columns: bool = True,
) -> Dataset | IterableDataset | None:
    """Refuses rows in no format that TRL's `SFTTrainer` knows, and, with `assistant_only_loss`, those without a turn
    of the assistant. A stream's rows are looked at as they come.

    Args:
        dataset: what a trainer is given, or `None`.
        name: what errors call it.
        text_field: the column that holds text.
        assistant_only_loss: whether nothing but the assistant's turns is trained on.
        drops_columns: Trainer's `remove_unused_columns`, by which text beside images goes.

    Returns:
        the dataset; a stream as one that checks each row.

    Raises:
        ValueError: names the dataset, the row, and what was expected.
    """
    if dataset is None:
        return None
    sample = next(iter(dataset), None)
    if sample is None:
        raise ValueError(f"The {name} dataset is empty: give rows, or leave it out.")
    images = bool({"image", "images", *AUDIO_COLUMNS} & set(sample))
    columns = (*(IMAGE_COLUMNS if images else COLUMNS), *(() if images and drops_columns else (text_field,)))
    if not set(sample) & set(columns):
        beside = ", beside images," if images else ""
        raise ValueError(
            f"The {name} dataset has the columns {', '.join(map(repr, sample))}, and{beside} none that is known. "
            f"Expected: {EXPECTED.format(text=text_field)}."
        )
    options = {"images": images, "text_field": text_field, "assistant_only_loss": assistant_only_loss}

    def check(row, number):
        found = row_problem(row, **options)
        if found is not None:
            raise ValueError(
                f"Row {number} of the {name} dataset: {found}. Expected: {EXPECTED.format(text=text_field)}."
            )
        return row

    if not hasattr(dataset, "__len__"):
        return dataset.map(check, with_indices=True)
    columns = [column for column in columns if column in dataset.column_names]
    if columns:  # a transform may make them of others
        for number, row in enumerate(dataset.with_format(None).select_columns(columns)):
            check(row, number)
    return dataset


def row_problem(row: dict[str, Any], images: bool, text_field: str, assistant_only_loss: bool) -> str | None:
    """What is wrong with a row, or `None`; the formats in the order in which TRL looks for them."""
    if "input_ids" in row and not images:
        ids = row["input_ids"]  # in a stream's own format, which may be a tensor
        return "its input_ids are empty" if ids is None or len(ids) == 0 else None
    if "prompt" in row and not images:
        return pair_problem(row)
    for name in ("messages",) if images else ("messages", "conversations"):
        if name in row:
            return messages_problem(row[name], name, assistant_only_loss)
    if text_field in row:
        return None if isinstance(row[text_field], str) else f"its {text_field} is {row[text_field]!r}, not a text"
    return pair_problem(row)


def pair_problem(row: dict[str, Any]) -> str | None:
    """What is wrong with a row's `prompt` and `completion`, or `None`."""
    for name in ("prompt", "completion"):
        if name not in row:
            return f"it has no {name} beside its {', '.join(row)}"
        if not isinstance(row[name], str):
            problem = messages_problem(row[name], name, name == "completion")
            if problem is not None:
                return problem
    return None


def messages_problem(messages: Any, name: str, needs_assistant: bool) -> str | None:
    """What is wrong with a list of messages, or `None`; TRL takes `from` and `value` for `role` and `content`."""
    if not isinstance(messages, list) or not messages:
        return f"its {name} are {messages!r}, not a list of messages"
    roles = []
    for number, message in enumerate(messages):
        role = (message.get("role") or message.get("from")) if isinstance(message, dict) else None
        if not isinstance(role, str) or all(message.get(key) is None for key in ("content", "value", "tool_calls")):
            return f"message {number} of its {name} is {str(message)[:200]}, without a role or without content"
        contents = [message[key] for key in ("content", "value") if message.get(key) is not None]
        if role != "tool" and not all(map(is_content, contents)):  # a tool's is any, which the template writes out
            return f"message {number} of its {name} is {str(message)[:200]}, whose content is no text or list of parts"
        roles.append(role)
    if needs_assistant and "assistant" not in roles:
        return f"its {name} have no turn of the assistant, and nothing else is trained on: their roles are {roles}"
    return None


def is_content(content: Any) -> bool:
    """Whether a message may hold it: a text, or parts like {"type": "image"}."""
    return isinstance(content, str) or isinstance(content, list) and all(isinstance(part, dict) for part in content)


def check_datasets(
    args: SFTConfig,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    datasets: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """What a trainer is to be given in place of `datasets`, its arguments {"train_dataset": ..., "eval_dataset": ...}.

    Nothing is looked at that the user prepares by code of their own: `formatting_func` in `options`, a collator for
    images, `skip_prepare_dataset`.

    Raises:
        ValueError: see `check_rows`; `assistant_only_loss` without a chat template.
    """
    template = getattr(processing_class, "chat_template", None) or args.chat_template_path
    if args.assistant_only_loss and processing_class is not None and not template:
        raise ValueError(
            "assistant_only_loss=True needs a chat template that marks the assistant's text, but this "
            f"{type(processing_class).__name__} has none. Make one with load_processor(base, "
            "assistant_only_loss=True), or set chat_template = default_chat_template() (both of "
            "modeling_moextend.data.processors)."
        )
    own = options.get("formatting_func") or (args.dataset_kwargs or {}).get("skip_prepare_dataset")
    if own or options.get("data_collator"):
        return datasets
    check = partial(
        check_rows,
        text_field=args.dataset_text_field,
        assistant_only_loss=args.assistant_only_loss,
        drops_columns=args.remove_unused_columns,
    )

    def checked(given: Any, name: str) -> Any:
        if isinstance(given, dict):
            return {key: check(dataset, str(key)) for key, dataset in given.items()}
        return check(given, name) if is_dataset(given) else given

    hears = getattr(processing_class, "audio_token", None) is not None

    def for_trl(given: Any, name: str) -> Any:
        if isinstance(given, dict):
            return {key: for_trl(dataset, str(key)) for key, dataset in given.items()}
        return with_image_column(given, name, hears) if is_dataset(given) else given

    checked_ = {key: checked(dataset, key.removesuffix("_dataset")) for key, dataset in datasets.items()}
    return {key: for_trl(dataset, key.removesuffix("_dataset")) for key, dataset in checked_.items()}


def with_image_column(dataset: Any, name: str, hears: bool) -> Any:
    """A dataset with audio as one with (no) images too: TRL would prepare it as text.

    Raises:
        ValueError: it has audio, and the processor takes none.
    """
    names = dataset.column_names or list(next(iter(dataset), {}))
    audio = sorted(set(AUDIO_COLUMNS) & set(names))
    if audio and not hears:
        raise ValueError(
            f"The {name} dataset has a column {audio[0]!r}, and the processing class takes no audio: give the "
            f"processor of an adapter with an encoder of audio, or dataset.remove_columns({audio})."
        )
    if not audio or {"image", "images"} & set(names):
        return dataset
    if hasattr(dataset, "add_column") and hasattr(dataset, "__len__"):
        return dataset.add_column("images", [[]] * len(dataset))
    return dataset.map(lambda row: {"images": []})


@contextmanager
def template_errors_named(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, datasets: dict[str, Any]
) -> Iterator[None]:
    """Gives what a chat template raises in the block, of a role that it does not know, say, the number of the row.

    Raises:
        ValueError: names the dataset and the row.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.split(".")[0] == "jinja2":
            for key, given in datasets.items():
                name = key.removesuffix("_dataset")
                for part, dataset in given.items() if isinstance(given, dict) else [(name, given)]:
                    row = first_not_rendered(processing_class, dataset)
                    if row is not None:
                        raise ValueError(
                            f"Row {row} of the {part} dataset can't be rendered by the chat template: {error}. Write "
                            "it with the roles that the template knows, or give a tokenizer with another template."
                        ) from error
        raise


def first_not_rendered(processing_class: PreTrainedTokenizerBase | ProcessorMixin, dataset: Any) -> int | None:
    """The first row of a dataset whose chat the template refuses; `None`: there is none, or it is a stream."""
    for number, row in enumerate(dataset) if hasattr(dataset, "__len__") else ():
        chat = row.get("messages") or row.get("conversations") or [*row.get("prompt", []), *row.get("completion", [])]
        turns = [one for one in chat if isinstance(one, dict)]
        turns = [{**one, "role": one.get("role") or one.get("from")} for one in turns]
        turns = [{**one, "content": one.get("content") or one.get("value")} for one in turns]
        try:
            processing_class.apply_chat_template(turns, tokenize=False)
        except Exception:  # whatever a template raises
            return number
    return None


def is_dataset(given: object) -> bool:
    """Whether `given` is one of datasets' own; what else a user gives, the trainer judges."""
    return isinstance(given, Iterable) and hasattr(given, "column_names") and hasattr(given, "with_format")
