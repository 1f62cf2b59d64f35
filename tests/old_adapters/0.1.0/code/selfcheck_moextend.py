"""The self-check at attach: each extended layer is tried on a few random tokens, before and after.

With the new experts off a layer must answer bit for bit as before. What new experts are computed by must hold for the
base's own: choice and weights are those of the rule, the experts' output is a sum over (token, expert) pairs. And a
copied row must give its source's logit, a copied expert its source's output. So a family that is described wrongly is
refused by name, never silently wrong.
"""

import contextlib

import torch

from .families_moextend import (
    ask,
    correction_of,
    family_of,
    given_to,
    is_top_k,
    materialised,
    num_groups,
    tensor_at,
)
from .layers_moextend import run_pairs
from .routing_moextend import SCORES, choice_keys, sharing, weigh

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
            logits = check_rows(layers[index], name, rule, tokens, plan[index], expected[0])
            check_rule(layers[index], rule, tokens[0], logits, expected[:-1])
            check_pairs(layers[index].experts, tokens[1], *expected[1:3], expected[-1])
            check_copies(layers[index].experts, name, tokens[1][:2], plan[index])
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
    with evaluating(layer.router), evaluating(layer.experts):
        told, weights, index, *rest = ask(layer.router, tokens[0].clone(), *given_to(layer, rule))
        return told, weights, index, *rest, layer.experts.forward(tokens[1].clone(), index, weights)


@contextlib.contextmanager
def evaluating(module):
    """Inside, `module` and its children are in evaluation mode: in training some draw at random."""
    modes = [(part, part.training) for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


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


def tolerance_of(tokens):
    return TOLERANCE.get(tokens.dtype, HALF)


def apart(found, expected):
    """How far tensors are apart, and the largest value expected."""
    found, expected = found.float(), expected.float()
    return (found - expected).abs().amax().item(), expected.abs().amax().item()


@torch.no_grad()
def check_rows(layer, name, rule, tokens, sources, told):
    """Asserts that copied rows give their sources' logits, and that logits are what the router goes by; returns the
    base's logits [T, E]."""
    extension = layer.router.moextend
    with materialised(layer.router) as router:
        base_logits, new_logits = extension.logits(router, tokens[0], told, [name])
    pairs = [(new_logits[name], base_logits[:, sources])]
    if rule.answers != "logits":
        pairs.append((SCORES[rule.score](base_logits.float()), told))
    for found, expected in pairs:
        error, size = apart(found, expected)
        assert not error > tolerance_of(tokens[0]) * max(1.0, size), (
            f"a copied router row gives another logit than its source (they are {error:.2g} apart)"
        )
    return base_logits.float()


@torch.no_grad()
def check_rule(layer, rule, tokens, logits, answer):
    """Asserts that the layer's own numbers choose and weigh as the rule says: it was found with numbers made up."""
    _, weights, index, *_ = answer
    tolerance, correction = tolerance_of(tokens), correction_of(layer, rule)
    keys = choice_keys(logits, rule, None if correction is None else correction.float())
    if num_groups(layer.router) == 1 and bool(keys.isfinite().all()):  # a group's best may be filled up with others
        slack = tolerance * keys.abs().amax().item()
        assert is_top_k(index, keys, 1, slack), "it does not choose the top k by its rule"
    if rule.jitter is not None and tolerance == HALF:
        return  # SparseMixer has thresholds, which rounded logits may lie on either side of
    with materialised(layer.router) as router:
        scale = tensor_at(router, rule.expert_scale) if rule.expert_scale else None
    found = weigh(logits, index, sharing(rule, logits, answer) if rule.shared else rule, expert_scale=scale)
    error, size = apart(found, weights)
    assert not error > tolerance * size, f"its weights are not those of its rule (they are {error:.2g} apart)"


@torch.no_grad()
def check_pairs(experts, tokens, weights, index, output):
    """Asserts that the output is the sum of what each chosen expert gives alone: so new experts are run and added."""
    with evaluating(experts):
        pairs = run_pairs(experts.forward, tokens, index, weights, torch.arange(index.numel(), device=index.device), 0)
    error, size = apart(pairs.view(*index.shape, -1).float().sum(dim=1), output)
    assert not error > tolerance_of(tokens) * size, (
        f"the output of its experts is not the sum of what each of them gives (they are {error:.2g} apart)"
    )


@torch.no_grad()
def check_copies(experts, name, tokens, sources):
    """Asserts that new experts are copies: what tells experts apart may lie elsewhere than in their parameters."""
    new, weights = experts.moextend[name], tokens.new_ones(len(tokens), 1)
    for place, source in enumerate(sources):
        with evaluating(experts):
            expected = experts.forward(tokens.clone(), torch.full_like(weights, source, dtype=torch.long), weights)
            try:
                found = new.forward(
                    tokens.to(new.down_proj.dtype), torch.full_like(weights, place, dtype=torch.long), weights
                )
            except Exception as error:
                raise AssertionError(f"a new expert can't run ({type(error).__name__}: {error})") from error
        error, size = apart(found, expected)
        assert not error > tolerance_of(tokens) * size, (
            f"a copied expert gives another output than its source (they are {error:.2g} apart)"
        )
