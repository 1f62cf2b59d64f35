"""The self-check at attach: each extended layer is tried on a few random tokens, before and after.

With the new experts off a layer must answer bit for bit as before; a copied row must give its source's logit, and a
copied expert its source's output. A family that a rule describes wrongly is so refused by name, never silently wrong.
"""

import contextlib

import torch

from .families_moextend import ask, family_of, given_to, materialised, tensor_at
from .routing_moextend import SCORES

NUM_TOKENS = 8
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest logit; other dtypes: half precision
HALF = 0.03


@contextlib.contextmanager
def self_checked(layers, plan, rule, state, name):
    """Tries the layers of `plan` around the block, which puts new experts of the adapter `name` into them.

    Raises:
        ValueError: a layer that is not what it was, or whose new rows or experts are no copies; says family and layer.
    """
    before = {index: sample(layers[index], rule) for index in plan}
    with state.using(enabled=False):
        outputs = {index: run(layers[index], rule, tokens) for index, tokens in before.items() if tokens is not None}
    yield
    for index, expected in outputs.items():
        tokens = before[index]
        try:
            with state.using(enabled=False):
                check_off(lambda: run(layers[index], rule, tokens), expected)  # noqa: B023
            check_rows(layers[index], name, rule, tokens, plan[index], expected[0])
            check_experts(layers[index].experts, name, tokens[1][:2], plan[index])
        except AssertionError as error:
            raise ValueError(
                f"Layer {index} of {family_of(layers[index].router)} can't be extended: {error}. Please report this "
                f"with the version of transformers; the rule that was found is {rule}."
            ) from error


def sample(layer, rule):
    """Random tokens (router's input [T, H], experts' input [T, H or a latent size]); `None` where there are no weights
    to compute with (meta device)."""
    experts = layer.experts
    with materialised(layer.router), materialised(experts):
        rows, down = tensor_at(layer.router, rule.rows), experts.down_proj
        if rows.is_meta or down.is_meta:
            return None
        dtype = down.dtype if down.is_floating_point() and down.itemsize > 1 else rows.dtype
        generator = torch.Generator().manual_seed(0)
        sizes = rows.shape[-1], down.shape[2 if experts.is_transposed else 1]
        return [
            torch.randn(NUM_TOKENS, size, generator=generator, device="cpu").to(rows.device, dtype) for size in sizes
        ]


@torch.no_grad()
def run(layer, rule, tokens):
    """What the router answers and then the experts' output, for tokens of `sample`; forward hooks don't see it."""
    training = layer.router.training
    layer.router.training = False  # some routers draw at random in training
    try:
        told, weights, index, *rest = ask(layer.router, tokens[0].clone(), *given_to(layer, rule))
    finally:
        layer.router.training = training
    return told, weights, index, *rest, layer.experts.forward(tokens[1].clone(), index, weights)


def check_off(again, expected):
    """Asserts that a layer with its new experts off answers as before."""
    found = again()
    if same(found, expected):
        return
    deterministic = same(again(), found)  # some kernels never give the same bits twice
    assert not deterministic and all(torch.allclose(*pair, rtol=0.02) for pair in zip(found, expected, strict=True)), (
        "with the new experts off it does not answer as before"
    )


def same(ones, others):
    """Whether tensors are equal bit for bit, NaN counted as equal to NaN."""
    return all(
        one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
        for one, other in zip(ones, others, strict=True)
    )


@torch.no_grad()
def check_rows(layer, name, rule, tokens, sources, told):
    """Asserts that copied rows give their sources' logits, and that logits are what the router goes by."""
    extension = layer.router.moextend
    with materialised(layer.router) as router:
        base_logits, new_logits = extension.logits(router, tokens[0], told, [name])
    pairs = [(new_logits[name], base_logits[:, sources])]
    if rule.answers != "logits":
        pairs.append((SCORES[rule.score](base_logits.float()), told))
    tolerance = TOLERANCE.get(tokens[0].dtype, HALF)
    for found, expected in pairs:
        error = (found - expected.float()).abs().amax().item()
        assert not error > tolerance * max(1.0, expected.float().abs().amax().item()), (
            f"a copied router row gives another logit than its source (they are {error:.2g} apart)"
        )


@torch.no_grad()
def check_experts(experts, name, tokens, sources):
    """Asserts that new experts are copies: what tells experts apart may lie elsewhere than in their parameters."""
    new, weights = experts.moextend[name], tokens.new_ones(len(tokens) * len(sources), 1)
    rows = tokens.repeat(len(sources), 1)
    places = torch.tensor([sources, list(range(len(sources)))], device=rows.device)
    of_source, of_new = places.repeat_interleave(len(tokens), dim=1).unsqueeze(-1)
    expected = experts.forward(rows.clone(), of_source, weights).float()
    try:
        found = new.forward(rows.to(new.down_proj.dtype), of_new, weights).float()
    except Exception as error:
        raise AssertionError(f"a new expert can't run ({type(error).__name__}: {error})") from error
    error = (found - expected).abs().amax().item()
    assert not error > TOLERANCE.get(tokens.dtype, HALF) * expected.abs().amax().item(), (
        f"a copied expert gives another output than its source (they are {error:.2g} apart)"
    )
