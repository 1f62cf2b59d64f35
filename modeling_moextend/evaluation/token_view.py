"""Which tokens of a text used new experts, and in which layers: as records, as a page of HTML, in a terminal.

tokens = token_view(model, tokenizer, ids)
Path("tokens.html").write_text(tokens_page([("an answer", tokens)]))
print(tokens_line(tokens))
"""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data.processors import text_tokenizer
from ..modeling_moextend import MoExtendForCausalLM
from ..tools.modes import evaluation_mode

BEFORE = 8  # tokens that a token's text is told by: tokenizers join words, and bytes of a character, across tokens
MARK, PLAIN = "\x1b[1;30;46m", "\x1b[0m"  # bold black on cyan


class TokenUse(NamedTuple):
    """A token, or a run of image tokens: its text and, for each extended layer, the share of it that used new experts.

    A share is 0 or 1 for a single token.
    """

    text: str
    layers: dict[int, float]

    @property
    def share(self) -> float:
        """Mean over the extended layers, 0 to 1."""
        return sum(self.layers.values()) / max(len(self.layers), 1)


@torch.no_grad()
def token_view(
    model: MoExtendForCausalLM,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    input_ids: Sequence[int] | torch.Tensor,
    **inputs: torch.Tensor,
) -> list[TokenUse]:
    """A `TokenUse` for each token of one sequence, by one forward pass.

    Routing is causal, so that what was generated step by step is read as it was written, up to rounding.

    Args:
        model: a MoExtend model, as its adapters are switched; with none, no token uses a new expert.
        tokenizer: the base's, or a processor that holds it.
        input_ids: of one sequence, [S] or [1, S].
        **inputs: what else its forward takes, like `pixel_values`.
    """
    ids = torch.as_tensor(input_ids).reshape(1, -1)
    device = model.get_input_embeddings().weight.device
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    with evaluation_mode(model), model.record_routing() as records:
        model(input_ids=ids.to(device), **inputs, use_cache=False, logits_to_keep=1)
    ids = ids[0].tolist()
    selected = {layer: record.selects_new.tolist() for layer, record in records.items() if record.num_new}
    placeholders = {sense.token_id: modality for modality, sense in model.senses.items()}
    texts, found, start = token_texts(text_tokenizer(tokenizer), ids), [], 0
    while start < len(ids):
        stop = start + 1
        while ids[start] in placeholders and stop < len(ids) and ids[stop] == ids[start]:
            stop += 1
        text = texts[start] if stop == start + 1 else f"<{placeholders[ids[start]]}: {stop - start} tokens>"
        shares = {layer: sum(used[start:stop]) / (stop - start) for layer, used in selected.items()}
        found.append(TokenUse(text, shares))
        start = stop
    return found


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; of a character in several tokens, all is with the last of them."""
    texts, held = [], 0  # tokens that are part of an unfinished character
    for number in range(len(ids)):
        first = max(0, number - held - BEFORE)
        before = tokenizer.decode(ids[first : number - held])
        text = tokenizer.decode(ids[first : number + 1])[len(before) :]
        unfinished = text.endswith("\ufffd") and held < 3
        texts.append("" if unfinished else text)
        held = held + 1 if unfinished else 0
    return texts


def summary(tokens: Sequence[TokenUse]) -> str:
    """How many tokens used new experts, in words."""
    used = sum(token.share > 0 for token in tokens)
    return f"{used} of {len(tokens)} tokens used new experts"


def tokens_line(tokens: Sequence[TokenUse], colour: bool = True) -> str:
    """The text for a terminal, tokens that used new experts marked: by colour, or else in [brackets].

    Runs of marked tokens are marked as one. Characters that a terminal would act on are written as escapes.
    """
    open_, close = (MARK, PLAIN) if colour else ("[", "]")
    parts, marked = [], False
    for token in tokens:
        if bool(token.share) != marked:
            parts.append(close if marked else open_)
            marked = not marked
        parts.append("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in token.text))
    return "".join([*parts, close if marked else ""])


def tokens_page(parts: Sequence[tuple[str, Sequence[TokenUse]]], title: str = "Which tokens used new experts") -> str:
    """A page of HTML that stands alone: each part a heading and its tokens, layers told on hover or by keyboard."""
    body = "".join(
        f"<h2>{html.escape(heading)}</h2>\n<p class=text>{''.join(map(span, tokens))}</p>\n"
        f"<p class=note>{summary(tokens)}</p>\n"
        for heading, tokens in parts
    )
    return PAGE.format(title=html.escape(title), body=body)


def tokens_fragment(tokens: Sequence[TokenUse]) -> str:
    """The tokens as a piece of HTML for a page of another's."""
    style = "font-family:ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere"
    return f'<p style="{style}">{"".join(map(span, tokens))}</p>'


def span(token: TokenUse) -> str:
    """One token: the darker and the thicker its line, the more layers used new experts."""
    layers = ", ".join(f"{layer}: {share_text(share)}" for layer, share in token.layers.items())
    text = html.escape(token.text).replace("\n", "&#8629;<br>") or "&#8203;"
    if not token.share:
        return f'<span title="layer {layers}">{text}</span>'
    shade, line = 0.12 + 0.4 * token.share, 1 + 2 * token.share
    style = f"background:rgba(0,114,178,{shade:.2f});border-bottom:{line:.0f}px solid #0072b2"
    return f'<span class=new tabindex=0 title="layer {layers}" style="{style}">{text}</span>'


def share_text(share: float) -> str:
    return {0: "base", 1: "new"}.get(share, f"{100 * share:.0f}% new")


def as_records(tokens: Sequence[TokenUse]) -> list[dict[str, Any]]:
    """For JSON: [{"text", "layers": {layer: share}}]."""
    return [{"text": token.text, "layers": dict(token.layers)} for token in tokens]


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.7 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
h1 {{ font-size: 1.3rem }} h2 {{ font-size: 1rem; margin-bottom: 0 }}
.text {{ font-family: ui-monospace, monospace; margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere }}
.note {{ color: #555; margin: 0; font-size: .9rem }}
</style>
<h1>{title}</h1>
<p class=note>Marked: selects a new expert in at least one layer; darker: in more of them. Point at a token for its
layers.</p>
{body}</html>
"""
