"""Exact match: an `evaluate.Metric`, loaded without a hub by `evaluate.load(path of this file)`."""

import datasets
import evaluate

DESCRIPTION = """
Question: how many answers are the reference, word for word?
Unit: share of the answers. Range: 0 to 1. Direction: higher is better.
Capital letters and the amount of white space don't count; everything else does, punctuation too.
Source: the usual exact match of question answering (Rajpurkar et al. 2016, arXiv 1606.05250), without its removal of
articles and punctuation.
"""
INPUTS = """
Args:
    predictions (`list[str]`): one answer a question.
    references (`list[str]`): one reference a question.

Returns:
    `exact_match` (`float`): in [0, 1].

Raises:
    ValueError: no answers, or not as many answers as references.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class ExactMatch(evaluate.Metric):
    def _info(self):
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=datasets.Features(features)
        )

    def _compute(self, predictions, references):
        if not len(predictions):
            raise ValueError("exact_match got no answers: give at least one prediction and its reference.")
        pairs = zip(predictions, references, strict=True)
        return {"exact_match": sum(plain(one) == plain(other) for one, other in pairs) / len(predictions)}


def plain(text: str) -> str:
    """`text` in lower case, white space at the ends gone and one space where there was any amount inside."""
    return " ".join(text.lower().split())
