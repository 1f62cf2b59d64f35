"""The quickstart's measures, against hand-made tables."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from measure import accuracy, blind_readers, read_questions


def row(question, answer):
    kind = "yes/no" if answer in ("yes", "no") else "open"
    return {"image": "0.png", "question": question, "answer": answer, "kind": kind}


def test_accuracy_is_exact_match_by_kind():
    rows = [row("colour?", "red"), row("colour?", "blue"), row("red?", "yes")]
    assert accuracy(rows, [" Red ", "green", "yes"]) == {"open": 0.5, "yes/no": 1.0}
    assert accuracy(rows[:2], ["red", "blue"]) == {"open": 1.0, "yes/no": None}


def test_blind_readers_know_the_commonest_answer_and_the_commonest_to_a_question():
    known = [row("colour?", a) for a in ("red", "red", "blue")] + [row("shape?", "circle"), row("red?", "no")]
    asked = [row("colour?", "red"), row("shape?", "circle"), row("new?", "red"), row("red?", "yes")]
    readers = blind_readers(known, asked)
    assert readers["majority answer"] == {"open": pytest.approx(2 / 3), "yes/no": 0.0}  # red, red, red; no
    assert readers["question-only reader"] == {"open": 1.0, "yes/no": 0.0}  # red, circle, red; no


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_questions_come_from_the_files_folder_and_without_an_image_not_at_all(tmp_path, ending):
    turns = [{"from": "human", "value": "<image>\nred?"}, {"from": "gpt", "value": "Yes"}]
    entries = [{"image": "a/1.png", "conversations": turns}, {"conversations": turns}]
    lines = [json.dumps(entry) for entry in entries]
    path = tmp_path / f"test.{ending}"
    path.write_text("\n".join(lines) if ending == "jsonl" else f"[{','.join(lines)}]")
    (found,) = read_questions(path)
    assert found["image"] == str(tmp_path / "a/1.png") and found["kind"] == "yes/no"
    path.write_text("[]" if ending == "json" else "")
    with pytest.raises(ValueError, match="no question about an image"):
        read_questions(path)


def test_questions_come_from_a_dataset_in_trls_format(tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    messages = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "no"}]
    rows = {"images": [[Image.new("RGB", (4, 4), "red")]], "messages": [messages]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "test-0.parquet")
    (found,) = read_questions(str(tmp_path))
    assert found["question"] == "<image>red?" and found["answer"] == "no" and found["image"].size == (4, 4)
