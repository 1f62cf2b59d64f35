"""The quickstart's measures, against hand-made tables."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import make_base, shake
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.quickstart.measure import accuracy, base_on_text, blind_readers, read_questions


def asked(question, answer):
    kind = "yes/no" if answer in ("yes", "no") else "open"
    return {"image": "0.png", "question": question, "answer": answer, "kind": kind}


def test_accuracy_is_exact_match_by_kind():
    questions = [asked("colour?", "red"), asked("colour?", "blue"), asked("red?", "yes")]
    assert accuracy(questions, [" Red ", "green", "yes"]) == {"open": 0.5, "yes/no": 1.0}
    assert accuracy(questions[:2], ["red", "blue"]) == {"open": 1.0, "yes/no": None}


def test_blind_readers_know_the_commonest_answer_and_the_commonest_to_a_question():
    known = [asked("colour?", a) for a in ("red", "red", "blue")] + [asked("shape?", "circle"), asked("red?", "no")]
    questions = [asked("colour?", "red"), asked("shape?", "circle"), asked("new?", "red"), asked("red?", "yes")]
    readers = blind_readers(known, questions)
    assert readers["majority answer"] == {"open": pytest.approx(2 / 3), "yes/no": 0.0}  # red, red, red; no
    assert readers["question-only reader"] == {"open": 1.0, "yes/no": 0.0}  # red, circle, red; no


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_questions_come_from_the_files_folder_and_without_an_image_not_at_all(tmp_path, ending):
    turns = [{"from": "human", "value": "<image>\nred?"}, {"from": "gpt", "value": "Yes"}]
    more = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Light."}]
    entries = [{"image": "a/1.png", "conversations": turns + more}, {"conversations": more}]
    lines = [json.dumps(entry) for entry in entries]
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a/1.png")
    path = tmp_path / f"test.{ending}"
    path.write_text("\n".join(lines) if ending == "jsonl" else f"[{','.join(lines)}]")
    (found,) = read_questions(path)
    image = str(tmp_path / "a/1.png")
    assert found == {"image": image, "question": "<image>\nred?", "answer": "Yes", "kind": "yes/no"}
    path.write_text(lines[1] if ending == "jsonl" else f"[{lines[1]}]")
    with pytest.raises(ValueError, match="no question about an image"):
        read_questions(path)


def test_a_sample_has_as_many_open_questions_as_yes_and_no(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "1.png")
    answers = ["red", "blue", "green", "yes", "no", "no", "yes"]
    turns = [[{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": answer}] for answer in answers]
    (tmp_path / "q.json").write_text(json.dumps([{"image": "1.png", "conversations": turn} for turn in turns]))
    found = read_questions(tmp_path / "q.json", number=4)
    assert [question["kind"] for question in found] == ["open"] * 2 + ["yes/no"] * 2
    assert found == read_questions(tmp_path / "q.json", number=4) and len(read_questions(tmp_path / "q.json")) == 7


def test_questions_come_from_a_dataset_in_trls_format(tmp_path):
    datasets = pytest.importorskip("datasets")

    messages = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "no"}]
    rows = {"images": [[Image.new("RGB", (4, 4), "red")]], "messages": [messages]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "test-0.parquet")
    (found,) = read_questions(str(tmp_path))
    assert found["question"] == "<image>red?" and found["answer"] == "no" and found["image"].size == (4, 4)


def test_questions_of_a_dataset_are_written_with_their_images(tmp_path):
    pytest.importorskip("easy_vqa")
    from modeling_moextend.quickstart.run import write_questions

    image = Image.new("RGBA", (4, 4), (255, 0, 0, 10))
    questions = [asked("<image>red?", "no") | {"image": image}, asked("<image>?", "red") | {"image": "here.png"}]
    path = write_questions(questions, tmp_path / "questions")
    first, second = json.loads(path.read_text())
    assert [turn["value"] for turn in first["conversations"]] == ["<image>red?", "no"]
    assert Image.open(first["image"]).getpixel((0, 0)) == (255, 0, 0), "as the processor would see it"
    assert second["image"] == str(Path("here.png").absolute())


def perplexities(model, tokenizer, documents):
    """By domain, in which every token counts the same, and their geometric mean."""
    nats, tokens = {}, {}
    for document in documents:
        ids, domain = tokenizer(document["text"], return_tensors="pt").input_ids, document["domain"]
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        nats[domain] = nats.get(domain, 0.0) + loss * (ids.shape[1] - 1)
        tokens[domain] = tokens.get(domain, 0) + ids.shape[1] - 1
    logs = [nats[domain] / tokens[domain] for domain in nats]
    domains = dict(zip(nats, map(math.exp, logs), strict=True))
    return {"geometric mean": math.exp(sum(logs) / len(logs)), **domains}


@pytest.mark.parametrize("scope", ["all", "gate"])
def test_the_base_on_text_beside_the_adapter(tmp_path, scope):
    model = shake(MoExtendForCausalLM.from_base(make_base(), {1: [0, 2]}, scope=scope)).eval()
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate("? red blue what is".split())}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    texts = {"a": ["red red blue", "what is red?"], "b": ["blue red"]}
    documents = [{"domain": domain, "text": text} for domain, part in texts.items() for text in part]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, documents)))
    if scope == "gate":
        model.gate_threshold = 1e9
    found = base_on_text(model, tokenizer, tmp_path / "text.jsonl")
    assert found["after"] == pytest.approx(perplexities(model, tokenizer, documents), rel=1e-5)
    with model.disable_adapter():
        assert found["before"] == pytest.approx(perplexities(model, tokenizer, documents), rel=1e-5)
    assert found["bit_equal"] == (found["before"] == found["after"]) == (scope == "gate")
