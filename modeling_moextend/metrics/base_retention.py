"""Base retention: an `evaluate.Metric`, loaded without a hub by `evaluate.load(path of this file)`.

Its inputs are measured by `compare_with_base` in `modeling_moextend/evaluation/compare.py` and handed on by
`base_retention` there.
"""

import math
from statistics import fmean
from typing import Any

import datasets
import evaluate

DESCRIPTION = """
Question: how far does an adapted model leave its base on text that the base already knew?

| value | unit | range | direction |
|---|---|---|---|
| `perplexity_before`, `perplexity_after` (base, adapted) | tokens to choose from | 1 to infinity | lower is better |
| `perplexity_ratio` | after / before | 0 to infinity, 1: nothing lost | lower is better |
| `kl`: KL(base, adapted) of the next-token distributions | nats a token | 0 to infinity | lower is better |
| `top1_changed` | share of tokens whose likeliest successor is another one | 0 to 1 | lower is better |
| `captured[layer]` | share of tokens that select at least one new expert of the layer | 0 to 1 | lower is better |

Each value is given by domain and overall. Within a domain every token counts the same; overall every domain counts
the same: perplexities and their ratio are geometric means over the domains, the other values arithmetic means.

Source: perplexity and KL are the usual ones (Kullback and Leibler 1951); captured tokens: MoExtend (arXiv 2408.03511)
and this repository's `scope`.
"""
INPUTS = """
Args:
    predictions (`list[dict]`): one a document, of the adapted model: `nll` (nats, one a predicted token), `kl` (nats,
        KL(base || model), one a predicted token), `top1` (the likeliest token, one a predicted token) and `captured`,
        which may be empty: a list of {"layer": int, "tokens": 0 or 1 for every token of the document}.
    references (`list[dict]`): one a document, of the base: `nll`, `top1` and `domain` (`str`).

Returns:
    `perplexity_before`, `perplexity_after`, `perplexity_ratio`, `kl`, `top1_changed`, `captured` ({layer: share}),
    `captured_mean` (mean over the layers, `None` without any), `documents`, `tokens` (how many were predicted), and
    `domains`: {domain: the same values}.

Raises:
    ValueError: no documents; a document without tokens; sequences of unequal length; NaN or infinite values; documents
    with captured tokens of different layers.
"""
MEANS = ("kl", "top1_changed", "captured_mean")


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class BaseRetention(evaluate.Metric):
    def _info(self):
        number, token = datasets.Value("float64"), datasets.Value("int64")
        captured = {"layer": datasets.Value("int64"), "tokens": datasets.Sequence(datasets.Value("int8"))}
        prediction = {"nll": datasets.Sequence(number), "kl": datasets.Sequence(number)}
        prediction |= {"top1": datasets.Sequence(token), "captured": [captured]}
        reference = {"nll": datasets.Sequence(number), "top1": datasets.Sequence(token)}
        reference |= {"domain": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": prediction, "references": reference}),
        )

    def _compute(self, predictions, references):
        if not len(predictions):
            raise ValueError("base_retention got no documents: give at least one.")
        check_layers([[captured["layer"] for captured in prediction["captured"]] for prediction in predictions])
        domains = {}
        for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            check_document(number, prediction, reference)
            domains.setdefault(reference["domain"], []).append((prediction, reference))
        domains = {domain: domain_values(documents) for domain, documents in sorted(domains.items())}
        return {**overall(list(domains.values())), "domains": domains}


def check_document(number: int, prediction: dict[str, Any], reference: dict[str, Any]) -> None:
    """Refuses a document that can't be counted.

    Raises:
        ValueError: names the document's number and what is wrong with it.
    """
    series = {f"predictions[{name!r}]": prediction[name] for name in ("nll", "kl", "top1")}
    series |= {f"references[{name!r}]": reference[name] for name in ("nll", "top1")}
    lengths = {name: len(values) for name, values in series.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"Document {number}: the sequences must have one length, but have {lengths}.")
    if 0 in lengths.values():
        raise ValueError(f"Document {number} has no predicted token: leave out documents of fewer than two tokens.")
    for name, values in series.items():
        if not all(value is not None and math.isfinite(value) for value in values):
            raise ValueError(
                f"Document {number}: {name} has NaN or infinite values: the model's logits overflow. Evaluate in "
                "float32 or bfloat16, or leave the document out."
            )
    for captured in prediction["captured"]:
        if not captured["tokens"]:
            raise ValueError(f"Document {number}: captured tokens of layer {captured['layer']} are an empty list.")


def check_layers(layers: list[list[int]]) -> None:
    """Refuses documents whose captured tokens are of different layers, e.g. of two models.

    Raises:
        ValueError: names the first such document and both lists of layers.
    """
    for number, own in enumerate(layers):
        if own != layers[0]:
            raise ValueError(
                f"Document {number} has captured tokens of layers {own}, document 0 of layers {layers[0]}: measure "
                "all documents with one model."
            )


def perplexity(nats: float) -> float:
    """e^nats; a diverged model's stays at e^700, the largest that a float can take part in sums with."""
    return math.exp(min(nats, 700.0))


def domain_values(documents: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """The values of one domain: every token counts the same."""
    nll = [value for prediction, _ in documents for value in prediction["nll"]]
    base_nll = [value for _, reference in documents for value in reference["nll"]]
    top1 = [
        one != other
        for prediction, reference in documents
        for one, other in zip(prediction["top1"], reference["top1"], strict=True)
    ]
    captured = captured_shares([prediction["captured"] for prediction, _ in documents])
    return {
        "perplexity_before": perplexity(fmean(base_nll)),
        "perplexity_after": perplexity(fmean(nll)),
        "perplexity_ratio": perplexity(fmean(nll) - fmean(base_nll)),
        "kl": fmean(value for prediction, _ in documents for value in prediction["kl"]),
        "top1_changed": fmean(top1),
        "captured": captured,
        "captured_mean": fmean(captured.values()) if captured else None,
        "documents": len(documents),
        "tokens": len(nll),
    }


def captured_shares(documents: list[list[dict[str, Any]]]) -> dict[int, float]:
    """{layer: share of the tokens of all documents that select a new expert of the layer}."""
    tokens = {}
    for captured in (captured for document in documents for captured in document):
        tokens.setdefault(captured["layer"], []).extend(captured["tokens"])
    return {layer: fmean(values) for layer, values in tokens.items()}


def overall(domains: list[dict[str, Any]]) -> dict[str, Any]:
    """The values over all domains: every domain counts the same."""
    values = {
        name: perplexity(fmean(math.log(domain[name]) for domain in domains))
        for name in ("perplexity_before", "perplexity_after", "perplexity_ratio")
    }
    for name in MEANS:
        known = [domain[name] for domain in domains if domain[name] is not None]
        values[name] = fmean(known) if known else None
    layers = domains[0]["captured"]
    values["captured"] = {layer: fmean(domain["captured"][layer] for domain in domains) for layer in layers}
    return values | {name: sum(domain[name] for domain in domains) for name in ("documents", "tokens")}
