"""The metrics against tables made by hand; that they load without a hub."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_moextend.metrics import load_metric

ROOT = Path(__file__).resolve().parents[1]


def logs(*values):
    return [math.log(value) for value in values]


def prediction(nll, kl, top1, captured=()):
    return {"nll": nll, "kl": kl, "top1": top1, "captured": [{"layer": 2, "tokens": list(captured)}] * bool(captured)}


def reference(domain, nll, top1):
    return {"domain": domain, "nll": nll, "top1": top1}


PREDICTIONS = [
    prediction(logs(4, 16), [0.1, 0.3], [1, 2], [0, 1, 1]),
    prediction(logs(8), [0.7], [5], [1, 1]),
    prediction(logs(8), [0.5], [4], [0, 0]),
]
REFERENCES = [reference("a", logs(2, 8), [1, 3]), reference("b", logs(1), [6]), reference("a", logs(4), [4])]


def compute(name, predictions, references):
    return load_metric(name).compute(predictions=predictions, references=references)


def test_base_retention_counts_tokens_within_a_domain():
    a = compute("base_retention", PREDICTIONS, REFERENCES)["domains"]["a"]
    assert a["perplexity_before"] == pytest.approx(4) and a["perplexity_after"] == pytest.approx(8)
    assert a["perplexity_ratio"] == pytest.approx(2)
    assert a["kl"] == pytest.approx(0.3)  # by document it would be 0.35
    assert a["top1_changed"] == pytest.approx(1 / 3)
    assert a["captured"] == {2: pytest.approx(2 / 5)} and a["captured_mean"] == pytest.approx(2 / 5)
    assert (a["documents"], a["tokens"]) == (2, 3)


def test_base_retention_counts_domains_alike():
    found = compute("base_retention", PREDICTIONS, REFERENCES)
    assert found["perplexity_before"] == pytest.approx(2)  # sqrt(4 * 1)
    assert found["perplexity_after"] == pytest.approx(8)  # sqrt(8 * 8)
    assert found["perplexity_ratio"] == pytest.approx(4)  # sqrt(2 * 8), not their mean 5
    assert found["kl"] == pytest.approx(0.5) and found["top1_changed"] == pytest.approx(2 / 3)
    assert found["captured"] == {2: pytest.approx(0.7)}
    assert (found["documents"], found["tokens"]) == (3, 4)


def test_base_retention_without_new_experts_has_no_captured_tokens():
    found = compute("base_retention", [prediction(logs(2), [0.0], [1])], [reference("a", logs(2), [1])])
    assert found["captured"] == {} and found["captured_mean"] is None and found["perplexity_ratio"] == 1.0


@pytest.mark.parametrize(
    "predictions, references, message",
    [
        ([], [], "no documents"),
        (PREDICTIONS, REFERENCES[:2], "Mismatch"),
        ([prediction([], [], [])], [reference("a", [], [])], "fewer than two tokens"),
        ([prediction([1.0], [1.0, 2.0], [1])], [reference("a", [1.0], [1])], "must have one length"),
        ([prediction([math.nan], [1.0], [1])], [reference("a", [1.0], [1])], r"predictions\['nll'\] has NaN"),
        ([prediction([1.0], [1.0], [1])], [reference("a", [math.inf], [1])], r"references\['nll'\] has NaN or inf"),
        ([PREDICTIONS[0], prediction([1.0], [1.0], [1])], REFERENCES[:2], r"layers \[\], document 0 of layers \[2\]"),
    ],
)
def test_base_retention_refuses(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        compute("base_retention", predictions, references)


def test_exact_match_passes_over_case_and_space_only():
    answers, wanted = [" Red  car\n", "red", "red.", "blue"], ["red car", "RED", "red", "red"]
    assert compute("exact_match", answers, wanted) == {"exact_match": 0.5}
    with pytest.raises(ValueError, match="no answers"):
        compute("exact_match", [], [])
    with pytest.raises(ValueError, match="Mismatch"):
        compute("exact_match", ["a"], ["a", "b"])


@pytest.mark.parametrize("people, expected", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_by_how_many_of_ten_people_agree(people, expected):
    references = [["cat"] * people + ["dog"] * (10 - people)]
    assert compute("vqa_accuracy", ["cat"], references)["vqa_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "answer, reference",
    [
        ("The two dogs!", "2 dogs"),
        ("An  apple", "apple"),
        ("none", "0"),
        ("Ten.", "10"),
        ("dont know", "don't know"),
        ("couldn'tve", "couldn't've"),
        ("black/white", "black white"),
        ("black , white", "black white"),
        ("1,000", "1000"),
        ("top-left", "top left"),
    ],
)
def test_vqa_answers_are_normalised_before_they_are_compared(answer, reference):
    assert compute("vqa_accuracy", [answer], [[reference]]) == {"vqa_accuracy": 1.0}


@pytest.mark.parametrize("answer, reference", [("1.5", "15"), ("lets", "let's"), ("twos", "2s"), ("another", "other")])
def test_vqa_normalisation_keeps_what_differs(answer, reference):
    assert compute("vqa_accuracy", [answer], [[reference]]) == {"vqa_accuracy": 0.0}


@pytest.mark.parametrize("references", [[], ["a", "b"], ["a", "b", "c"]])
def test_vqa_accuracy_refuses_numbers_of_people_that_cannot_agree(references):
    with pytest.raises(ValueError, match=f"got {len(references)} references"):
        compute("vqa_accuracy", ["a"], [references])


def test_an_unknown_metric_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="no metric 'bleu'; there are base_retention, exact_match, vqa_accuracy"):
        load_metric("bleu")


@pytest.mark.parametrize("name", ["base_retention", "exact_match", "vqa_accuracy"])
def test_every_metric_explains_itself(name):
    metric = load_metric(name)
    for word in ("question:", "direction", "range", "unit", "source:"):
        assert word in metric.description.lower()
    assert "Raises:" in metric.inputs_description


def run(code, folder=ROOT, **environment):
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_the_evaluate_library_loads_them_by_path_without_a_hub(tmp_path):
    code = (
        "import evaluate; m = evaluate.load('modeling_moextend/metrics/exact_match.py');"
        "print(m.compute(predictions=['a', 'b'], references=['A', 'c']))"
    )
    assert run(code, HF_MODULES_CACHE=str(tmp_path)) == "{'exact_match': 0.5}"


@pytest.mark.slow
def test_a_script_called_evaluate_that_hides_the_library_is_named(tmp_path):
    (tmp_path / "evaluate.py").touch()
    code = (
        "from modeling_moextend.metrics import load_metric\n"
        "try: load_metric('exact_match')\n"
        "except ImportError as error: print(error)"
    )
    found = run(code, folder=tmp_path)
    assert str(tmp_path / "evaluate.py") in found and "rename that file" in found
