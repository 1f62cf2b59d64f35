"""The adapter of assets/numbers, which README loads first: it answers, its base does not, and the folder is whole."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_moextend import compare_with_base
from modeling_moextend.data.files import read_documents
from modeling_moextend.evaluation.compare import answer, score

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "assets" / "numbers"
sys.path.append(str(ROOT / "benchmarks"))

from generated import in_words  # noqa: E402
from tasks import messages, number_records  # noqa: E402


@pytest.fixture(scope="module")
def loaded():
    """As a user loads it, with code from the folder; where its base lies is said, for the test may run anywhere."""
    options = {"trust_remote_code": True, "base": str(ROOT / "assets/tiny-moe"), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(FOLDER, **options).eval()
    return model, AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)


def test_it_says_held_out_numbers_in_words_and_the_base_does_not(loaded):
    records = number_records()["test"][:100]
    assert all(
        record["answer"] == in_words(int("".join(filter(str.isdigit, record["question"])))) for record in records
    )
    prompts, words = [messages(record, answer=False) for record in records], [record["answer"] for record in records]
    options = {"max_new_tokens": 24, "progress": False}
    assert score(answer(*loaded, prompts, **options), words) >= LEAST
    with loaded[0].disable_adapter():
        assert score(answer(*loaded, prompts, **options), words) == 0


LEAST = 0.95  # its card says 99.8%, of all held-out numbers


def test_the_bases_own_text_is_bit_equal(loaded):
    documents = read_documents(ROOT / "assets/tiny-moe/held_out.jsonl")[::10]
    compared = compare_with_base(*loaded, documents, progress=False)
    assert len(compared) >= 20 and all(document["bit_equal"] for document in compared)


def test_its_code_is_the_librarys_and_it_is_small():
    code = {path.name: path for path in (ROOT / "modeling_moextend").glob("*_moextend.py")}
    assert {path.name for path in FOLDER.glob("*_moextend.py")} == code.keys(), "ln -s ../../modeling_moextend/..."
    assert all((FOLDER / name).read_bytes() == path.read_bytes() for name, path in code.items())
    own = [path for path in FOLDER.iterdir() if path.name not in (*code, "tokenizer.json")]  # those are links
    assert sum(path.stat().st_size for path in own) <= 2_000_000


def test_its_card_is_complete():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for part in (
        "license: apache-2.0",
        "## Use",
        "## Training",
        "## Results",
        "## Forgetting",
        "exact match",
        "gate_steps",
    ):
        assert part in card
    assert "Nothing was measured" not in card and "No licence is named" not in card
