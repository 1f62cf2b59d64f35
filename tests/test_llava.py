"""LLaVA JSON: what is read, what is refused, what is skipped, and that TRL's collator trains on it."""

import json
import logging
import pickle
import sys

import datasets
import pytest
from PIL import Image
from test_processing_moextend import build_processor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from modeling_moextend.data import llava
from modeling_moextend.data.llava import load_llava, read_entries

IMAGE = {"type": "image", "text": None}
STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])


def part(text):
    return {"type": "text", "text": text}


def turns(*values):
    """Human and gpt in turn."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def entry(name="a", image="red.png", *values):
    return {"id": name, "image": image, "conversations": turns(*(values or ("<image>\nWhat?", "A dog")))}


def text_entry(name="t"):
    return {"id": name, "conversations": turns("Hi", "Yo")}


@pytest.fixture
def folder(tmp_path):
    """red.png, grey.png (mode L), broken.png (no image), cut.png (its second half is missing)."""
    Image.new("RGB", (40, 50), (255, 0, 0)).save(tmp_path / "red.png")
    Image.new("L", (40, 50), 9).save(tmp_path / "grey.png")
    (tmp_path / "broken.png").write_text("not an image")
    noise = Image.effect_noise((64, 64), 90)
    noise.save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    return tmp_path


def write(folder, entries, name="data.json"):
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(item) + "\n" for item in entries))
    else:
        path.write_text(json.dumps(entries, indent=1))
    return path


# Samples


@STREAMING
def test_an_answer_before_the_first_question_is_dropped(folder, streaming):
    first, system = text_entry(), text_entry()
    first["conversations"].insert(0, {"from": "gpt", "value": "Ask me."})
    system["conversations"][:0] = [{"from": "system", "value": "Be kind."}, {"from": "gpt", "value": "Ask me."}]
    rows = list(load_llava(write(folder, [text_entry(), first, system]), streaming=streaming))
    assert rows[1]["messages"] == rows[0]["messages"]
    assert rows[2]["messages"][1:] == rows[0]["messages"] and rows[2]["messages"][0]["role"] == "system"


@STREAMING
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_samples(folder, streaming, name):
    several = entry(7, ["grey.png", "red.png"], "See <image> <image>.", "Yes", "<b>?", "No")
    several["conversations"].insert(0, {"from": "system", "value": "Be kind."})
    path = write(folder, [entry(), text_entry(), several], name)
    first, second, third = load_llava(path, streaming=streaming)
    assert first["messages"] == [
        {"role": "user", "content": [IMAGE, part("\nWhat?")]},
        {"role": "assistant", "content": [part("A dog")]},
    ]
    assert [(image.mode, image.size, image.getpixel((0, 0))) for image in first["images"]] == [
        ("RGB", (40, 50), (255, 0, 0))
    ]
    assert (first["id"], second["id"], third["id"]) == ("a", "t", "7")
    assert second["images"] == []
    assert [message["role"] for message in third["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert third["messages"][1]["content"] == [part("See "), IMAGE, part(" "), IMAGE, part(".")]
    assert [(image.mode, image.getpixel((0, 0))) for image in third["images"]] == [
        ("RGB", (9, 9, 9)),
        ("RGB", (255, 0, 0)),
    ]


@STREAMING
def test_prompt_completion(folder, streaming):
    path = write(folder, [entry("a", "red.png", "<image>One?", "1", "Two?", "")])
    (sample,) = load_llava(path, streaming=streaming, prompt_completion=True)
    assert "messages" not in sample
    assert sample["prompt"] == [
        {"role": "user", "content": [IMAGE, part("One?")]},
        {"role": "assistant", "content": [part("1")]},
        {"role": "user", "content": [part("Two?")]},
    ]
    assert sample["completion"] == [{"role": "assistant", "content": [part("")]}]


def test_image_folder(folder, tmp_path_factory):
    elsewhere = write(tmp_path_factory.mktemp("json"), [entry()])
    assert len(load_llava(elsewhere, folder)[0]["images"]) == 1
    with pytest.raises(ValueError, match="red.png does not exist"):
        load_llava(elsewhere)


def test_images_are_opened_only_when_taken(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(llava, "_open_image", lambda path, sample: opened.append(path))
    path = write(folder, [entry("a"), entry("b"), entry("c")])
    dataset = load_llava(path)
    assert opened == []
    assert dataset[1]["id"] == "b"
    assert opened == [str(folder / "red.png")]
    next(iter(load_llava(path, streaming=True)))
    assert len(opened) == 2


def test_map_style_survives_what_a_trainer_does_to_it(folder):
    path = write(folder, [entry("a"), text_entry("b"), entry("c", "broken.png")])
    dataset = pickle.loads(pickle.dumps(load_llava(path))).remove_columns(["id"])
    assert [len(sample["images"]) for sample in dataset.select([1, 0])] == [0, 1]
    with pytest.raises(ValueError, match=r"sample 'c' \(index 2 of .*broken.png"):  # though the id column is gone
        list(dataset.shuffle(seed=1))


@STREAMING
def test_a_top_level_system_text_is_the_system_turn(folder, streaming):
    turn = {"from": "system", "value": "Answer in French."}
    top, first = {**text_entry(), "system": turn["value"]}, text_entry()
    first["conversations"].insert(0, turn)
    none = {**text_entry(), "system": "", "tools": [], "images": None}
    rows = [row["messages"] for row in load_llava(write(folder, [top, first, none]), streaming=streaming)]
    assert rows[0] == rows[1] and rows[0][0] == {"role": "system", "content": [part("Answer in French.")]}
    assert rows[2] == rows[0][1:]


@STREAMING
def test_ignored_keys_and_metadata_are_left_out(folder, streaming):
    weighted = {**entry(), "weight": 0.5, "source": "mine", "width": 40}
    weighted["conversations"][1]["weight"] = 0
    path = write(folder, [weighted])
    (row,) = load_llava(path, streaming=streaming, ignore_keys=["weight"])
    assert row["messages"] == next(iter(load_llava(write(folder, [entry()], "b.json"))))["messages"]


# Bad samples


@STREAMING
@pytest.mark.parametrize(
    "bad, message",
    [
        (entry("x", None), "its conversation has 1 '<image>' but it has 0 images"),
        (entry("x", ["red.png", "red.png"]), "its conversation has 1 '<image>' but it has 2 images"),
        (entry("x", {"path": "red.png"}), "'image' must be a path or a list of paths, not {'path': 'red.png'}"),
        ({"id": "x"}, "'conversations' is missing or empty"),
        ({"id": "x", "conversations": []}, "'conversations' is missing or empty"),
        ({"id": "x", "conversations": [{"from": "human"}]}, "turn 0 must be an object with 'from' and a text 'value'"),
        (
            {"id": "x", "conversations": [{"from": "bot", "value": ""}]},
            "turn 0 is from 'bot'; allowed: 'human', 'gpt', 'system'",
        ),
        (
            {"id": "x", "conversations": [*turns("Hi", "Yo"), {"from": "gpt", "value": "again"}]},
            "turn 2 is from 'gpt', but 'human' must come there",
        ),
        (
            {"id": "x", "conversations": [*turns("Hi", "Yo"), {"from": "system", "value": "late"}]},
            "turn 2 is from 'system', but 'human' must come there",
        ),
        ({"id": "x", "conversations": [{"from": "gpt", "value": "Hi"}]}, "turn 0 is from 'gpt', but 'human' must"),
        (
            {"id": "x", "conversations": [{"from": "gpt", "value": ""}] * 2},
            "turn 1 is from 'gpt', but 'human' must come there",
        ),
        ({"id": "x", "conversations": turns("Hi")}, "the last turn is from 'human'; it must be from 'gpt'"),
        ({"id": "x", "conversations": [{"from": "system", "value": ""}]}, "the last turn is from 'system'"),
        ({**text_entry("x"), "system": ["Be kind."]}, r"'system' must be a text, not \['Be kind.'\]"),
        (
            {"id": "x", "system": "A", "conversations": [{"from": "system", "value": "B"}, *turns("Hi", "Yo")]},
            "it has a 'system' and a turn from 'system': leave out one of the two",
        ),
        (
            {**text_entry("x"), "tools": "[{}]"},
            r"its key 'tools' is not read, and '\[{}\]' would be dropped",
        ),
        ({**text_entry("x"), "video": "a.mp4"}, r"its key 'video' .*ignore_keys=\['video'\]"),
        ({**text_entry("x"), "images": ["red.png"]}, "its key 'images' is not read"),
        ({**text_entry("x"), "weight": 0}, "its key 'weight' is not read"),
        (
            {"id": "x", "conversations": [*turns("Hi"), {"from": "gpt", "value": "Yo", "train": False}]},
            "its key 'train' is not read, and 'False' would be dropped",
        ),
        (entry("x", "gone.png"), "image .*gone.png does not exist"),
        (entry("x", "broken.png"), "image .*broken.png cannot be read: UnidentifiedImageError"),
        (entry("x", "cut.png"), "image .*cut.png cannot be read: OSError: .*truncated"),
    ],
)
def test_a_bad_sample_is_named(folder, streaming, bad, message):
    path = write(folder, [text_entry(), bad])
    with pytest.raises(ValueError, match=rf"sample 'x' \(index 1 of .*data.json\): {message}"):
        list(load_llava(path, streaming=streaming))
    kept = load_llava(path, streaming=streaming, on_error="skip")
    assert [sample["id"] for sample in kept] == ["t"]


@STREAMING
def test_an_entry_that_is_no_object(folder, streaming):
    with pytest.raises(ValueError, match="index 0 of .*data.json: it must be an object with 'conversations', not str"):
        list(load_llava(write(folder, ["Hi"]), streaming=streaming))


@STREAMING
def test_a_completion_takes_no_images(folder, streaming):
    path = write(folder, [entry("x", "red.png", "Draw", "<image>")])
    with pytest.raises(ValueError, match="its last turn has 1 '<image>', and a completion takes no images"):
        list(load_llava(path, streaming=streaming, prompt_completion=True))


@STREAMING
def test_skipped_samples_are_counted_and_the_first_few_named(folder, streaming, caplog):
    bad = [entry(f"bad{i}", "gone.png") for i in range(7)]
    path = write(folder, [text_entry("one"), *bad, text_entry("two")])
    with caplog.at_level(logging.WARNING, logger="modeling_moextend.data.llava"):
        kept = [sample["id"] for sample in load_llava(path, streaming=streaming, on_error="skip")]
    assert kept == ["one", "two"]
    (report,) = caplog.messages
    assert report.startswith(f"Skipped 7 of 9 samples of {path}:\nsample 'bad0' (index 1 of {path}): image ")
    assert "'bad4'" in report and "'bad5'" not in report
    assert report.endswith("... and 2 more")


@STREAMING
def test_nothing_is_reported_where_nothing_is_skipped(folder, streaming, caplog):
    assert len(list(load_llava(write(folder, [entry()]), streaming=streaming, on_error="skip"))) == 1
    assert caplog.messages == []


def test_no_sample_left(folder):
    with pytest.raises(ValueError, match="data.json has no sample to train on"):
        load_llava(write(folder, [entry("x", "gone.png")]), on_error="skip")


def test_unknown_on_error(folder):
    with pytest.raises(ValueError, match="on_error='ignore' is unknown; it must be 'raise' or 'skip'"):
        load_llava(folder / "data.json", on_error="ignore")


def test_missing_datasets_is_an_import_error_that_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="load_llava needs the datasets library: pip install 'moextend"):
        load_llava(write(folder, [entry()]))


# Reading


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_entries_across_chunks(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(llava, "CHUNK", chunk)
    entries = [{"id": i, "value": 'a "]," [{ \\ é 犬' * i} for i in range(20)]
    path = tmp_path / "data.json"
    for text in (json.dumps(entries), json.dumps(entries, indent=2, ensure_ascii=False), "\ufeff \n[ ]"):
        path.write_text(text, encoding="utf-8")
        expected = [] if text[0] == "\ufeff" else entries
        assert list(read_entries(path)) == list(enumerate(expected))


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"id": 1}', r"must hold a list of entries, \[{...}, ...\]; one entry a line is a .jsonl file"),
        ('[{"id": 1}, {"id"', "is not valid JSON, or cut off, at index 1: Expecting ':' delimiter"),
        ('[{"id": 1},', "is not valid JSON, or cut off, at index 1: Expecting value"),
        ('[{"id": 1}, {"id": nope}]', "is not valid JSON, or cut off, at index 1: Expecting value"),
    ],
)
def test_broken_json(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_entries(tmp_path / "data.json"))


def test_broken_line(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"id": 1}\n\n{"id"\n')
    with pytest.raises(ValueError, match="data.jsonl, line 3, is not valid JSON: Expecting ':' delimiter"):
        list(read_entries(tmp_path / "data.jsonl"))


class Counting:
    """A text file that counts what was read of it."""

    def __init__(self, text):
        self.text, self.position, self.sizes = text, 0, []

    def read(self, size):
        self.sizes.append(size)
        self.position += size
        return self.text[self.position - size : self.position]


def test_reading_is_incremental(monkeypatch):
    monkeypatch.setattr(llava, "CHUNK", 100)
    file = Counting(json.dumps([{"id": i} for i in range(1000)]))
    entries = llava._read_list(file, "data.json")
    assert [next(entries)[0] for _ in range(5)] == list(range(5))
    assert file.position == 100


def test_a_long_entry_is_read_in_growing_steps_and_the_next_in_small_ones(monkeypatch):
    monkeypatch.setattr(llava, "CHUNK", 100)
    file = Counting(json.dumps(["x" * 5000, *range(1000)]))
    assert len(list(llava._read_list(file, "data.json"))) == 1001
    assert file.sizes[:8] == [100, 100, 200, 400, 800, 1600, 3200, 100]


def test_a_broken_entry_does_not_read_the_rest_of_the_file(monkeypatch):
    monkeypatch.setattr(llava, "CHUNK", 100)
    monkeypatch.setattr(llava, "MAX_ENTRY", 1000)
    file = Counting('[{"id": nope}, ' + json.dumps(["x"] * 10_000)[1:])
    with pytest.raises(ValueError, match="at index 0: Expecting value"):
        list(llava._read_list(file, "data.json"))
    assert file.position < 3000


# Training


@STREAMING
def test_labels_through_trls_collator(folder, streaming):
    two = entry("c", ["red.png", "grey.png"], "<image>Both<image>?", "a cat", "Sure?", "Yes")
    samples = list(load_llava(write(folder, [entry(), text_entry(), two]), streaming=streaming))
    processor = build_processor()
    batch = DataCollatorForVisionLanguageModeling(processor, max_length=200, assistant_only_loss=True)(samples)
    trained = [processor.decode(row[row != -100]) for row in batch["labels"]]
    assert trained == [" A dog</s>", " Yo</s>", " a cat</s> Yes</s>"]
    assert processor.image_token_id not in batch["labels"]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    texts = [
        processor.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    image = "<image>" * 4
    assert texts[0] == f"<s>USER: {image}\nWhat? ASSISTANT: A dog</s>"
    assert texts[2] == f"<s>USER: {image}Both{image}? ASSISTANT: a cat</s>USER: Sure? ASSISTANT: Yes</s>"
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    # the red image, the red one, then the grey one: dark, and so below 0 after normalisation
    assert [value > 0 for value in batch["pixel_values"][:, 0].mean(dim=(1, 2))] == [True, True, False]


def test_a_batch_without_images_through_trls_collator(folder):
    samples = list(load_llava(write(folder, [text_entry("a"), text_entry("b")])))
    batch = DataCollatorForVisionLanguageModeling(build_processor(), assistant_only_loss=True)(samples)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert (batch["labels"] != -100).sum(dim=1).tolist() == [4, 4]  # " ", "Y", "o", "</s>"


def test_prompt_completion_labels_through_trls_collator(folder):
    path = write(folder, [entry("a", "red.png", "<image>One?", "1", "Two?", "2"), text_entry()])
    samples = list(load_llava(path, prompt_completion=True))
    processor = build_processor()
    batch = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(samples)
    assert [processor.decode(row[row != -100]) for row in batch["labels"]] == [" 2</s>", " Yo</s>"]
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [4, 0]
    assert batch["pixel_values"].shape == (1, 3, 32, 32)


def test_streaming_is_an_iterable_dataset(folder):
    dataset = load_llava(write(folder, [entry("a"), entry("b"), entry("c")]), streaming=True)
    assert isinstance(dataset, datasets.IterableDataset)
    assert [sample["id"] for sample in dataset.skip(1).take(1)] == ["b"]
    assert [sample["id"] for sample in dataset] == ["a", "b", "c"]  # it can be gone through again
