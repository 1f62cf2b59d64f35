"""VQA accuracy: an `evaluate.Metric`, loaded without a hub by `evaluate.load(path of this file)`."""

import re
from collections.abc import Sequence

import datasets
import evaluate

DESCRIPTION = """
Question: do people give the same answers to questions about images?
Unit: share of full agreement, mean over the questions. Range: 0 to 1. Direction: higher is better.
An answer that at least three of the other annotators gave counts 1, two 2/3, one 1/3. That is averaged over all ways
to leave one annotator out, so that people can be scored by the same rule. Both sides are normalised first: lower
case, no punctuation, no articles, number words as digits, contractions with their apostrophe. With a single
reference: 1 where the normalised answer equals it, else 0.
Source: Antol et al. 2015 (arXiv 1505.00468) and Goyal et al. 2017 (arXiv 1612.00837), the rules of their evaluation
code. One difference: that code leaves answers as they are where all annotators agree; here they are always normalised.
"""
INPUTS = """
Args:
    predictions (`list[str]`): one answer a question.
    references (`list[list[str]]`): the annotators' answers to each question: ten in VQAv2. One, or at least four.

Returns:
    `vqa_accuracy` (`float`): in [0, 1].

Raises:
    ValueError: no answers, not as many answers as lists of references, or none, two or three references to a question
    (two or three can never agree with three others).
"""
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")  # the decimal point of 1.5 and .5 stays
DIGIT_COMMA = re.compile(r"\d,\d")
NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
ARTICLES = {"a", "an", "the"}
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def missing_apostrophes(word: str) -> set[str]:
    """The ways to write a contraction with at least one of its apostrophes left out."""
    first, *rest = word.split("'")
    written = {first}
    for part in rest:
        written = {start + mark + part for start in written for mark in ("", "'")}
    return written - {word}


CONTRACTIONS = {written: word for word in CONTRACTED for written in missing_apostrophes(word)}


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class VQAAccuracy(evaluate.Metric):
    def _info(self):
        references = datasets.Sequence(datasets.Value("string"))
        features = {"predictions": datasets.Value("string"), "references": references}
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=datasets.Features(features)
        )

    def _compute(self, predictions, references):
        if not len(predictions):
            raise ValueError("vqa_accuracy got no answers: give at least one prediction and its references.")
        scores = [agreement(answer, own) for answer, own in zip(predictions, references, strict=True)]
        return {"vqa_accuracy": sum(scores) / len(scores)}


def agreement(answer: str, references: Sequence[str]) -> float:
    """The score in [0, 1] of one answer against the annotators' answers.

    Raises:
        ValueError: none, two or three references.
    """
    if len(references) in (0, 2, 3):
        raise ValueError(
            f"vqa_accuracy got {len(references)} references to a question; it takes one, or at least four (VQAv2 has "
            "ten): the full score needs three other annotators."
        )
    answer, same = normalise(answer), [normalise(reference) for reference in references]
    same = [reference == answer for reference in same]
    if len(same) == 1:
        return float(same[0])
    return sum(min((sum(same) - left_out) / 3, 1.0) for left_out in same) / len(same)


def normalise(text: str) -> str:
    """An answer as the evaluation of VQA compares it, e.g. "The two dogs!" -> "2 dogs".

    A punctuation mark beside a space vanishes and one between letters becomes a space, except that all vanish where
    a number is written with a comma (1,000).
    """
    text = " ".join(text.split())
    joined = bool(DIGIT_COMMA.search(text))
    without = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        without = without.replace(mark, "" if beside_space or joined else " ")
    words = PERIOD.sub("", without).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
