"""Rows that no trainer could train on are named with their number, before anything runs."""

import pytest
from datasets import Dataset, IterableDataset
from PIL import Image
from test_sft_trainer import config, image_data, losses, make_model, make_processor, make_tokenizer, text_data

from modeling_moextend.data.processors import default_chat_template
from modeling_moextend.data.rows import check_rows
from modeling_moextend.extender import measure_router_shift
from modeling_moextend.training.trainer import MoExtendSFTTrainer

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
GOOD = {"messages": [USER, ASSISTANT]}


def check(rows, assistant_only_loss=False, stream=False):
    data = Dataset.from_list(rows)
    checked = check_rows(data.to_iterable_dataset() if stream else data, "train", "text", assistant_only_loss)
    return list(checked)


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    "good, bad, problem",
    [
        (GOOD, {"messages": []}, r"its messages are \[\], not a list of messages"),
        (GOOD, {"messages": None}, "its messages are None, not a list"),
        (GOOD, {"messages": [{"role": "user", "content": None}]}, "message 0 of its messages is .* without content"),
        (GOOD, {"messages": [USER, {"role": None, "content": "b"}]}, "message 1 of its messages .* without a role"),
        (
            {"conversations": [{"from": "user", "value": "a"}]},
            {"conversations": [{"from": "user", "value": None}]},
            "message 0 of its conversations",
        ),
        ({"text": "a"}, {"text": None}, "its text is None, not a text"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}, "its completion are None"),
        (
            {"prompt": [USER], "completion": [ASSISTANT]},
            {"prompt": [USER], "completion": [USER]},
            r"its completion have no turn of the assistant.*\['user'\]",
        ),
        ({"input_ids": [1]}, {"input_ids": []}, "its input_ids are empty"),
    ],
)
def test_a_row_is_named_with_its_number_and_what_was_expected(good, bad, problem, stream):
    assert check([good, good], stream=stream) == check([good, good])
    with pytest.raises(ValueError, match=f"Row 2 of the train dataset: {problem}.* Expected: `messages`"):
        check([good, good, bad], stream=stream)


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_a_row_without_a_turn_of_the_assistant(stream):
    rows = [GOOD, {"messages": [USER, {"role": "tool", "content": "c"}]}]
    check(rows, stream=stream)
    with pytest.raises(ValueError, match=r"Row 1 of .* no turn of the assistant, .* roles are \['user', 'tool'\]"):
        check(rows, assistant_only_loss=True, stream=stream)


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    "row, problem",
    [
        ({"question": "a", "answer": "b"}, "has the columns 'question', 'answer', and none that is known"),
        ({"prompt": "a"}, "Row 0 of the train dataset: it has no completion beside its prompt"),
        ({"completion": "a"}, "Row 0 of the train dataset: it has no prompt beside its completion"),
        ({"prompt": "a", **GOOD}, "Row 0 of the train dataset: it has no completion"),  # where TRL looks first
    ],
)
def test_a_dataset_in_no_known_format(row, problem, stream):
    with pytest.raises(ValueError, match=f"{problem}.* Expected: `messages`.*`text`"):
        check([row], stream=stream)


@pytest.mark.parametrize(
    "row", [{"text": "<image> a"}, {"input_ids": [1]}, {"conversations": [{"from": "user", "value": "a"}]}]
)
def test_beside_images_only_what_is_read_there_is_known(row):
    rows = Dataset.from_list([{**row, "images": [Image.new("RGB", (4, 4))]}])
    with pytest.raises(
        ValueError, match="'images', and, beside images, none that is known.*for images one of the first"
    ):
        check_rows(rows, "train", "text", False)
    if "text" in row:
        assert check_rows(rows, "train", "text", False, drops_columns=False) is rows


def test_a_dataset_without_rows_is_named():
    for rows in (Dataset.from_list([]), Dataset.from_list([GOOD]).select([])):
        with pytest.raises(ValueError, match="The eval dataset is empty"):
            check_rows(rows, "eval", "text", True)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_streams_own_format_is_read(kind):
    rows = Dataset.from_list([{"input_ids": [1, 2]}, {"input_ids": [3]}]).to_iterable_dataset().with_format(kind)
    assert [row["input_ids"].tolist() for row in check_rows(rows, "train", "text", False)] == [[1, 2], [3]]


def test_what_cannot_be_known_is_left_alone():
    assert check_rows(None, "eval", "text", True) is None
    made = Dataset.from_list([{"a": "x"}]).with_transform(lambda rows: {"text": rows["a"]})
    assert list(check_rows(made, "train", "text", False)) == [{"text": "x"}]
    image = Image.new("RGB", (4, 4))
    beside = Dataset.from_list([{"prompt": "a", "images": [image], **GOOD}])
    assert check_rows(beside, "train", "text", True) is beside  # with images, TRL looks for messages first


def trainer(folder, train, **options):
    given = {key: options.pop(key) for key in ("eval_dataset", "formatting_func") if key in options}
    tokenizer = options.pop("tokenizer", None) or make_tokenizer()
    return MoExtendSFTTrainer(
        make_model(), config(folder, **options), train_dataset=train, processing_class=tokenizer, **given
    )


def test_the_trainer_names_rows_of_every_dataset(tmp_path):
    bad = Dataset.from_dict({"text": ["a", None]})
    with pytest.raises(ValueError, match="Row 1 of the train dataset: its text is None"):
        trainer(tmp_path, bad)
    with pytest.raises(ValueError, match="Row 1 of the eval dataset: its text is None"):
        trainer(tmp_path, text_data(), eval_dataset=bad)
    with pytest.raises(ValueError, match="Row 1 of the second dataset: its text is None"):
        trainer(tmp_path, text_data(), eval_dataset={"first": text_data(), "second": bad})
    with pytest.raises(ValueError, match="The train dataset has the columns 'word', and none that is known"):
        trainer(tmp_path, text_data().rename_column("text", "word"))
    trainer(tmp_path, text_data().rename_column("text", "word"), dataset_text_field="word")
    trainer(tmp_path, text_data().rename_column("text", "word"), formatting_func=lambda row: row["word"])
    with pytest.raises(ValueError, match="The train dataset has the columns 'word', and none that is known"):
        data = text_data().rename_column("text", "word")
        measure_router_shift(make_model(), data, text_data(), config(tmp_path), make_tokenizer())


def test_assistant_only_loss_needs_a_template(tmp_path):
    rows, tokenizer = Dataset.from_list([GOOD] * 2), make_tokenizer()
    with pytest.raises(ValueError, match="assistant_only_loss=True needs a chat template.*has none.*load_processor"):
        trainer(tmp_path, rows, assistant_only_loss=True)
    tokenizer.chat_template = default_chat_template()
    with pytest.raises(ValueError, match="Row 2 of the train dataset: its messages have no turn of the assistant"):
        trainer(
            tmp_path,
            Dataset.from_list([GOOD, GOOD, {"messages": [USER]}]),
            tokenizer=tokenizer,
            assistant_only_loss=True,
        )


@pytest.mark.slow
def test_a_stream_of_images_trains_as_the_dataset_does(tmp_path):
    def run(data):
        given = {"train_dataset": data, "processing_class": make_processor()}
        args = config(tmp_path, train_sampling_strategy="sequential")
        run = MoExtendSFTTrainer(make_model(encoder=True), args, **given)
        run.train()
        return losses(run)

    data = image_data(8)
    assert run(data) == run(data.to_iterable_dataset()) == run(IterableDataset.from_generator(data.__iter__))


def test_rows_of_which_truncation_leaves_none_are_named(tmp_path):
    options = {"max_length": 2, "completion_only_loss": True}
    data = Dataset.from_list([{"prompt": "a dog " * 9, "completion": "b"}] * 3)
    with pytest.raises(ValueError, match="No row of train_dataset is left to train on: cut at max_length=2.*Raise"):
        MoExtendSFTTrainer(
            model=make_model(), args=config(tmp_path, **options), train_dataset=data, processing_class=make_tokenizer()
        )


@pytest.mark.parametrize("part", ["train", "eval", "held out"])
def test_a_row_that_the_chat_template_refuses_is_named(tmp_path, part):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = default_chat_template()
    good, bad = Dataset.from_list([GOOD] * 3), Dataset.from_list([GOOD, {"messages": [USER, {**USER, "role": "x"}]}])
    data = {"train_dataset": bad if part == "train" else good}
    data["eval_dataset"] = {part: bad} if part == "held out" else bad if part == "eval" else None
    with pytest.raises(ValueError, match=f"Row 1 of the {part} dataset can't be rendered .*: Unknown role: x"):
        MoExtendSFTTrainer(make_model(), config(tmp_path), processing_class=tokenizer, **data)
