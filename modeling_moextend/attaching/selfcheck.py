"""The self-check at attach: each extended layer is tried on a few random tokens, before and after.

With the new experts off a layer must answer bit for bit as before. What new experts are computed by must hold for the
base's own: choice and weights are those of the rule, the experts' output is a sum over (token, expert) pairs. And a
copied row must give its source's logit, a copied expert its source's output. So a family that is described wrongly is
refused by name, never silently wrong.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from ..families_moextend import (
    MoELayer,
    call_router,
    correction_of,
    family_of,
    is_top_k,
    num_groups,
    onloaded,
    tensor_at,
)
from ..layers_moextend import is_extended, run_pairs
from ..routing_moextend import SCORES, RouterOutput, Rule, choice_keys, expert_weights, rule_with_shared_experts
from ..tools.modes import evaluation_mode

NUM_TOKENS = 8
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest logit; other dtypes: half precision
HALF = 0.03


@contextlib.contextmanager
def self_checked(layers: dict[int, MoELayer], plan: dict[int, list[int]], rule: Rule, name: str) -> Iterator[None]:
    """Tries the layers of `plan` around the block, which puts new experts of the adapter `name` into them.

    Raises:
        ValueError: a layer that is not what it was, or whose new rows or experts are no copies; says family and layer.
    """
    tokens = {index: sample_tokens(layers[index], rule) for index in plan}
    with without_new_experts(layers):
        outputs = {
            index: run_layer(layers[index], rule, sampled) for index, sampled in tokens.items() if sampled is not None
        }
    yield
    for index, expected in outputs.items():
        try:
            with without_new_experts(layers):
                check_disabled(lambda: run_layer(layers[index], rule, tokens[index]), expected)  # noqa: B023
            check_layer(layers[index], name, rule, tokens[index], plan[index], expected)
        except AssertionError as error:
            raise ValueError(
                f"Layer {index} of {family_of(layers[index].router)} can't be extended: {error}. Please report this "
                f"with the version of transformers; the rule that was found is {rule}."
            ) from error


def without_new_experts(layers: dict[int, MoELayer]) -> AbstractContextManager:
    """Context in which layers that are extended already run without new experts."""
    router = next(iter(layers.values())).router
    return router.moextend.passes.using(enabled=False) if is_extended(router) else contextlib.nullcontext()


def sample_tokens(layer: MoELayer, rule: Rule) -> list[torch.Tensor] | None:
    """Random tokens (router's input [T, H], experts' input [T, H or a latent size]); `None` where there are no weights
    to compute with (meta device)."""
    experts = layer.experts
    with onloaded(layer.router), onloaded(experts):
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
def run_layer(layer: MoELayer, rule: Rule, tokens: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """What the router answers and then the experts' output, for sampled tokens; forward hooks don't see it."""
    correction = (correction_of(layer, rule),) if ":" in rule.correction else ()
    with evaluation_mode(layer.router, layer.experts):
        output = call_router(layer.router, tokens[0].clone(), *correction)
        _, weights, index, *_ = output
        return *output, layer.experts.forward(tokens[1].clone(), index, weights)


def check_disabled(run_again: Callable[[], tuple[torch.Tensor, ...]], expected: tuple[torch.Tensor, ...]) -> None:
    """Asserts that a layer with its new experts off answers as before."""
    outputs = run_again()
    if bit_equal(outputs, expected):
        return
    deterministic = bit_equal(run_again(), outputs)  # some kernels never give the same bits twice
    assert not deterministic and all(
        torch.allclose(*pair, rtol=0.02) for pair in zip(outputs, expected, strict=True)
    ), "with the new experts off it does not answer as before"


def bit_equal(ones: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> bool:
    """Whether tensors are equal bit for bit, NaN counted as equal to NaN."""
    return all(
        one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
        for one, other in zip(ones, others, strict=True)
    )


def assert_near(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str, at_least: float = 0.0
) -> None:
    """Asserts that tensors differ by no more than `tolerance` of the largest value expected (or `at_least`)."""
    actual, expected = actual.float(), expected.float()
    error = (actual - expected).abs().amax().item()
    size = max(at_least, expected.abs().amax().item())
    assert not error > tolerance * size, f"{what} (they are {error:.2g} apart)"


@torch.no_grad()
def check_layer(
    layer: MoELayer,
    name: str,
    rule: Rule,
    tokens: list[torch.Tensor],
    sources: list[int],
    expected: tuple[torch.Tensor, ...],
) -> None:
    """Asserts that rule, rows and experts of an extended layer are what they were taken for.

    `expected`: what `run_layer` gave before: parts of a `RouterOutput`, and the experts' output.
    """
    output, tolerance = RouterOutput(*expected[:-1]), TOLERANCE.get(tokens[0].dtype, HALF)
    logits = check_rows(layer, name, rule, tokens[0], sources, output.router_logits, tolerance)
    check_rule(layer, rule, logits, output, tolerance)
    with evaluation_mode(layer.experts):
        check_pairs(layer.experts, tokens[1], output, expected[-1], tolerance)
        check_copies(layer.experts, name, tokens[1][:2], sources, tolerance)


def check_rows(
    layer: MoELayer,
    name: str,
    rule: Rule,
    tokens: torch.Tensor,
    sources: list[int],
    router_logits: torch.Tensor,
    tolerance: float,
) -> torch.Tensor:
    """Asserts that copied rows give their sources' logits, and that logits are what the router goes by; returns the
    base's logits [T, E]."""
    extension = layer.router.moextend
    with onloaded(layer.router) as router:
        rows = {name: extension.adapters[name]}
        base_logits, new_logits = extension.logits(router, tokens, router_logits, rows)
    pairs = [(new_logits[name], base_logits[:, sources])]
    if rule.answers != "logits":
        pairs.append((SCORES[rule.score](base_logits.float()), router_logits))
    for actual, expected in pairs:
        assert_near(actual, expected, tolerance, "a copied router row gives another logit than its source", 1.0)
    return base_logits.float()


def check_rule(layer: MoELayer, rule: Rule, logits: torch.Tensor, output: RouterOutput, tolerance: float) -> None:
    """Asserts that the layer's own numbers choose and weigh as the rule says: it was found with numbers made up."""
    correction = correction_of(layer, rule)
    keys = choice_keys(logits, rule, None if correction is None else correction.float())
    if num_groups(layer.router) == 1 and bool(keys.isfinite().all()):  # a group's best may be filled up with others
        slack = tolerance * keys.abs().amax().item()
        assert is_top_k(output.top_k_index, keys, 1, slack), "it does not choose the top k by its rule"
    if rule.jitter is not None and tolerance == HALF:
        return  # SparseMixer has thresholds, which rounded logits may lie on either side of
    with onloaded(layer.router) as router:
        scale = tensor_at(router, rule.expert_scale) if rule.expert_scale else None
    weight_rule = rule_with_shared_experts(rule, logits, output) if rule.shared else rule
    weights = expert_weights(logits, output.top_k_index, weight_rule, expert_scale=scale)
    assert_near(weights, output.top_k_weights, tolerance, "its weights are not those of its rule")


def check_pairs(
    experts: nn.Module, tokens: torch.Tensor, output: RouterOutput, expected: torch.Tensor, tolerance: float
) -> None:
    """Asserts that the output is the sum of what each chosen expert gives alone, times its weight: so new experts are
    run and added."""
    weights, index = output.top_k_weights, output.top_k_index
    pairs = run_pairs(experts.forward, tokens, index, torch.arange(index.numel(), device=index.device), 0)
    alone = experts.forward(tokens.repeat_interleave(index.shape[1], dim=0), index.view(-1, 1), weights.view(-1, 1))
    for each in (pairs.view(*index.shape, -1) * weights.unsqueeze(-1), alone.view(*index.shape, -1)):
        summed = each.float().sum(dim=1)
        assert_near(summed, expected, tolerance, "the output of its experts is not the sum of what each of them gives")


def check_copies(experts: nn.Module, name: str, tokens: torch.Tensor, sources: list[int], tolerance: float) -> None:
    """Asserts that new experts are copies: what tells experts apart may lie elsewhere than in their parameters."""
    new, weights = experts.moextend.adapters[name], tokens.new_ones(len(tokens), 1)
    if hasattr(new, "whole"):  # of a low rank, by whichever code the model was loaded with
        with onloaded(experts):
            new = new.whole(experts, keep=False)
    for number, source in enumerate(sources):
        expected = experts.forward(tokens.clone(), torch.full_like(weights, source, dtype=torch.long), weights)
        index = torch.full_like(weights, number, dtype=torch.long)
        try:
            actual = new.forward(tokens.to(new.down_proj.dtype), index, weights)
        except Exception as error:
            raise AssertionError(f"a new expert can't run ({type(error).__name__}: {error})") from error
        assert_near(actual, expected, tolerance, "a copied expert gives another output than its source")
