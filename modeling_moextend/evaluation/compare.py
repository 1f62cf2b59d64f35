"""What an adapter gained and what its base lost: one pass over texts the base knew, one over questions it did not.

    records = compare_with_base(model, tokenizer, read_documents("held_out.jsonl"))
    base_retention(records)["perplexity_ratio"]                       # 1.0: nothing forgotten
    score(answer(model, tokenizer, prompts), references)              # share of right answers

Any causal LM can be measured against another one (`base=`); a MoExtend model is measured against its own base.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..data.collators import pad_ids
from ..data.processors import text_tokenizer
from ..data.tokens import KnownTokens
from ..metrics import load_metric
from ..processing_moextend import to_rgb
from ..routing_moextend import RoutingRecord
from ..tools.modes import evaluation_mode, is_moextend

CHUNK = 256  # tokens whose distributions over the vocabulary are compared at once, in float32


# ---------------------------------------------------------------- metrics


def base_retention(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The metric `base_retention` of the records of `compare_with_base`; its values: see metrics/base_retention.py."""
    predictions = [
        {
            **{name: record[name] for name in ("nll", "kl", "top1")},
            "captured": [{"layer": layer, "tokens": tokens} for layer, tokens in record.get("captured", {}).items()],
        }
        for record in records
    ]
    references = [
        {"nll": record["base_nll"], "top1": record["base_top1"], "domain": record["domain"]} for record in records
    ]
    return load_metric("base_retention").compute(predictions=predictions, references=references)


def score(answers: Sequence[str], references: Sequence[str | list[str]], metric: str = "exact_match") -> float:
    """Share of right answers in [0, 1], by "exact_match" or "vqa_accuracy".

    A reference is a text, or a list of them: what several people answered, for the latter.
    """
    if metric == "vqa_accuracy":
        references = [[reference] if isinstance(reference, str) else reference for reference in references]
    return load_metric(metric).compute(predictions=answers, references=references)[metric]


# ---------------------------------------------------------------- the base's own text


@torch.no_grad()
def compare_with_base(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    documents: list[dict[str, Any]],
    *,
    base: PreTrainedModel | None = None,
    max_length: int = 256,
    batch_size: int = 16,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """The adapted model beside its base, token by token.

    Args:
        model: a MoExtend model, or any causal LM with `base=`. Its mode (training or evaluation) is given back.
        tokenizer: the base's, or a processor that holds it.
        documents: [{"domain", "text"}] or [{"domain", "messages"}]; at least two tokens each.
        base: the causal LM to compare with; default: `model` with its adapter off.
        max_length: tokens of a document that count.
        batch_size: documents at once, of similar length.
        progress: show a bar.

    Returns:
        One record a document, in their order, with S tokens of which S - 1 are predicted: `domain`; `nll`, `base_nll`,
        `kl` (nats, KL(base || model)), `top1`, `base_top1`: S - 1 values; `bit_equal`: every logit is the base's. Of a
        MoExtend model also, by layer: `captured` (0 or 1 for each of S tokens: it selects a new expert), `experts`
        (how often each of E + N experts is selected) and, with scope "gate", `gate` (margin z of each of S tokens, of
        the layer in which the gate stands).

    Raises:
        ValueError: no documents; one of less than two tokens, or with a token that the model has no embedding for; a
            plain model without `base`; unequal vocabularies.
    """
    if base is None and not is_moextend(model):
        raise ValueError(
            f"{type(model).__name__} is no MoExtend model: say what to compare it with, base=<causal LM>."
        )
    ids = document_ids(tokenizer, documents, max_length)
    known = KnownTokens(model, tokenizer)
    for number, document in enumerate(ids):
        known.check(document, f"Document {number} ({documents[number]['domain']!r})")
    records = [None] * len(ids)
    models = [model] if base is None else [model, base]
    with evaluation_mode(*models), bar(len(ids), "texts of the base", progress) as counter:
        for indices in batches([len(document) for document in ids], batch_size):
            compared = compare_batch(model, base, [ids[index] for index in indices], pad_id(tokenizer))
            for index, record in zip(indices, compared, strict=True):
                records[index] = {"domain": documents[index]["domain"], **record}
            counter.update(len(indices))
    return records


def document_ids(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin, documents: list[dict[str, Any]], max_length: int
) -> list[list[int]]:
    """Token ids of each document, at most `max_length`.

    Raises:
        ValueError: no documents, or one of less than two tokens.
    """
    if not documents:
        raise ValueError("There are no documents: retention is measured on texts that the base knew.")
    ids = []
    for number, document in enumerate(documents):
        if "messages" in document:
            text = tokenizer.apply_chat_template(document["messages"], tokenize=False)
            token_ids = text_tokenizer(tokenizer)(text, add_special_tokens=False, verbose=False).input_ids
        else:
            token_ids = text_tokenizer(tokenizer)(document["text"], verbose=False).input_ids
        if len(token_ids) < 2 or max_length < 2:
            raise ValueError(
                f"Document {number} ({document['domain']!r}) has {min(len(token_ids), max_length)} tokens; at least "
                "two are needed, for the first one is not predicted."
            )
        ids.append(token_ids[:max_length])
    return ids


def compare_batch(
    model: PreTrainedModel, base: PreTrainedModel | None, ids: list[list[int]], pad: int
) -> list[dict[str, Any]]:
    """A record a document, see `compare_with_base`, without its domain. `ids`: lists of token ids."""
    inputs = pad_ids(ids, pad, "right")
    recording = model.record_routing() if is_moextend(model) else contextlib.nullcontext({})
    with recording as routing:
        logits = logits_of(model, inputs)
    with base_of(model, base) as reference:
        base_logits = logits_of(reference, inputs).to(logits.device)
    if logits.shape != base_logits.shape:
        raise ValueError(f"The model's vocabulary has {logits.shape[-1]} tokens, the base's {base_logits.shape[-1]}.")
    results = []
    for number, document in enumerate(ids):
        own, reference_logits = logits[number, : len(document)], base_logits[number, : len(document)]
        result = {
            **compare_tokens(own, reference_logits, torch.tensor(document[1:])),
            "bit_equal": torch.equal(own, reference_logits),
        }
        results.append({**result, **routing_of(routing, number, len(document), logits.shape[1])})
    return results


@contextlib.contextmanager
def base_of(model: PreTrainedModel, base: PreTrainedModel | None = None) -> Iterator[PreTrainedModel]:
    """Yields the causal LM to compare with: `base`, or `model`, which is its base inside the block."""
    with model.disable_adapter() if base is None else contextlib.nullcontext():
        yield model if base is None else base


def logits_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, S, vocabulary] of right-padded `inputs`."""
    return model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, use_cache=False).logits


def compare_tokens(logits: torch.Tensor, base_logits: torch.Tensor, targets: torch.Tensor) -> dict[str, list]:
    """Lists of S - 1 values from two [S, vocabulary] and the [S - 1] next tokens; see `compare_with_base`."""
    values = {name: [] for name in ("nll", "base_nll", "kl", "top1", "base_top1")}
    chunks = (each[: len(targets)].split(CHUNK) for each in (logits, base_logits))
    for own, base, target in zip(*chunks, targets.to(logits.device).split(CHUNK), strict=True):
        own, base = own.float().log_softmax(-1), base.float().log_softmax(-1)
        values["nll"] += (-own.gather(-1, target[:, None])).squeeze(-1).tolist()
        values["base_nll"] += (-base.gather(-1, target[:, None])).squeeze(-1).tolist()
        values["kl"] += (base.exp() * (base - own)).sum(-1).clamp(min=0).tolist()  # rounding may dip below 0
        values["top1"] += own.argmax(-1).tolist()
        values["base_top1"] += base.argmax(-1).tolist()
    return values


def routing_of(records: dict[int, RoutingRecord], item: int, length: int, width: int) -> dict[str, dict[int, list]]:
    """`captured`, `experts` and `gate` by layer, of the first `length` tokens of one item of a [B, width] batch."""
    if not records:
        return {}
    routing = {"captured": {}, "experts": {}}
    tokens = slice(item * width, item * width + length)
    for layer, record in records.items():
        total = record.num_base + record.num_new
        routing["experts"][layer] = count_selected(record.index[tokens].cpu(), total).tolist()
        if record.num_new:
            routing["captured"][layer] = record.selects_new[tokens].int().tolist()
        if getattr(record, "gate", None) is not None:
            routing.setdefault("gate", {})[layer] = record.gate.reshape(-1)[tokens].float().tolist()
    return routing


def count_selected(index: torch.Tensor, num_experts: int, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """[E] int64: how often each expert is in `index` [T, K], for tokens that `attention_mask` [B, S] marks (`None`:
    all). Empty slots count for none."""
    if attention_mask is not None:
        index = index[attention_mask.reshape(-1).bool().to(index.device)]
    return torch.bincount(index[index >= 0], minlength=num_experts)


def expert_use(records: list[dict[str, Any]]) -> dict[str, dict[int, list[float]]]:
    """{domain: {layer: [share of the domain's selections that each of E + N experts gets]}}; each list sums to 1."""
    counts = {}
    for record in records:
        for layer, numbers in record.get("experts", {}).items():
            total = counts.setdefault(record["domain"], {}).setdefault(
                layer, torch.zeros(len(numbers), dtype=torch.long)
            )
            total += torch.tensor(numbers)
    return {
        domain: {layer: (total.double() / max(int(total.sum()), 1)).tolist() for layer, total in layers.items()}
        for domain, layers in sorted(counts.items())
    }


# ---------------------------------------------------------------- the new task


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    prompts: list[list[dict[str, Any]]],
    *,
    images: list[list] | None = None,
    audio: list[list] | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: bool = True,
) -> list[str]:
    """The model's greedy answers.

    Args:
        model: any causal LM; with images a MoExtend model with an encoder. Its mode is given back.
        tokenizer: with a chat template; with images the processor.
        prompts: lists of messages, each ending with what is asked.
        images, audio: for each prompt a list of images (PIL or paths), or of clips (paths, or what a processor
            takes), in reading order; default: none.
        max_new_tokens: an answer is cut there, or at its end token.
        batch_size: prompts at once, of similar length.
        progress: show a bar.

    Returns:
        an answer a prompt, without special tokens and white space around.

    Raises:
        ValueError: images for an adapter without an encoder; a token that the model has no embedding for.
    """
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    given = {name: own or [[] for _ in texts] for name, own in (("images", images), ("audio", audio))}
    if any(given["images"]) and is_moextend(model) and model.encoder is None:
        raise ValueError("The questions come with images, but this adapter has no encoder to see them.")
    if any(given["audio"]) and is_moextend(model) and model.audio_encoder is None:
        raise ValueError("The questions come with audio, but this adapter has no encoder to hear it.")
    answers = [None] * len(texts)
    known, stop = KnownTokens(model, tokenizer), generation_ends(model, tokenizer)
    with evaluation_mode(model), bar(len(texts), "questions", progress) as counter:
        for indices in batches([len(text) for text in texts], batch_size):
            own = {name: [inputs[index] for index in indices] for name, inputs in given.items()}
            inputs = encode(tokenizer, [texts[index] for index in indices], **own)
            for index, ids in zip(indices, inputs["input_ids"].tolist(), strict=True):
                known.check(ids, f"Prompt {index}, padded")
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, **stop)
            output = text_tokenizer(tokenizer).batch_decode(
                output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for index, text in zip(indices, output, strict=True):
                answers[index] = text.strip()
            counter.update(len(indices))
    return answers


def encode(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    texts: list[str],
    images: list[list],
    audio: list[list] = (),
) -> dict[str, torch.Tensor]:
    """Left-padded inputs of one batch; images and audio go to the processor."""
    if not any(images) and not any(audio):
        return pad_ids(text_tokenizer(tokenizer)(texts, add_special_tokens=False).input_ids, pad_id(tokenizer), "left")
    images = [[to_rgb(image) for image in sample] for sample in images]
    options = {"add_special_tokens": False, "padding": True, "padding_side": "left", "return_tensors": "pt"}
    given = {name: own for name, own in (("images", images), ("audio", audio)) if any(own)}
    return dict(tokenizer(text=texts, **given, **options))


def generation_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> dict[str, Any]:
    """Where `generate` stops: at the model's own end tokens and at the tokenizer's."""
    own = model.generation_config.eos_token_id
    own = {own} if isinstance(own, int) else set(own or ())
    ends = sorted(own | ({text_tokenizer(tokenizer).eos_token_id} - {None}))
    return {"pad_token_id": pad_id(tokenizer), "eos_token_id": ends or None}


# ---------------------------------------------------------------- thresholds


def threshold_curve(
    model: PreTrainedModel,
    measure: Callable[[], dict[str, Any]],
    thresholds: Sequence[float],
    *,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """What `measure()` finds at every threshold of the gate; the model's own threshold is given back, also on errors.

    Every threshold is measured by passes of its own: what a token that is let through becomes, and with it every later
    token, no pass at another threshold can tell.

    Args:
        model: a MoExtend model with `scope="gate"`.
        measure: called without arguments at each threshold; returns a dict.
        thresholds: values of `model.gate_threshold`; higher ones let fewer tokens use new experts.

    Returns:
        [{"threshold": float, **measure()}], in the order given.

    Raises:
        ValueError: a model with another scope.
    """
    check_gate(model)
    before, curve = model.gate_threshold, []
    try:
        with bar(len(thresholds), "thresholds", progress) as counter:
            for threshold in map(float, thresholds):
                model.gate_threshold = threshold
                curve.append({"threshold": threshold, **measure()})
                counter.update(1)
    finally:
        model.gate_threshold = before
    return curve


def check_gate(model: PreTrainedModel) -> None:
    """Refuses a model whose tokens no gate chooses.

    Raises:
        ValueError: names its scope.
    """
    scope = getattr(model.config, "scope", None)
    if scope != "gate":
        raise ValueError(
            f"A threshold curve needs a model with scope='gate', but this one's scope is {scope!r}: leave out the "
            "thresholds."
        )


# ---------------------------------------------------------------- tools


def pad_id(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> int:
    """An id to fill sequences with; the attention mask says that it is none of the text."""
    tokenizer = text_tokenizer(tokenizer)
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Lists of indices, longest first: what is too long for the memory shows at once, and little is padding."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + size] for start in range(0, len(order), size)]


def bar(total: int, title: str, progress: bool) -> tqdm:
    return tqdm(total=total, desc=title, disable=not progress, file=sys.stderr)
