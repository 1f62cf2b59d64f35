"""One step of a served model: which tokens are in the scope of which adapter, and what its tensors do to them.

torch.compile keeps what it sees once: a branch of the dry run, a threshold, whether a batch has tokens of an adapter.
So what adapters do is done in two opaque operators, which find the `ServingPass` of their model by name at run time.

Letters: T tokens of a step, E base experts, N new experts of a layer, K experts a token selects, H hidden size.
"""

from typing import NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.utils.torch_utils import direct_register_custom_op

from ...layers_moextend import RouterRows
from ...routing_moextend import RouterOutput, Rule, route
from .adapters import ServedAdapter
from .state import StateCache

NAME = "moextend"  # of the `ServingPass` in vLLM's static forward context
BASE = -1  # in place of an adapter's number: the base alone


class LayerPart(NamedTuple):
    """What one adapter adds to one MoE layer."""

    number: int  # of the adapter
    rows: RouterRows
    rule: Rule  # as vLLM's router of this layer answers
    experts: torch.Tensor  # [E + N + 1] what vLLM calls each expert, and at last what stands for `UNUSED`
    correction_bias: torch.Tensor | None  # [E + N]

    @property
    def first(self) -> int:
        """Of its new experts, among all that vLLM holds."""
        return int(self.experts[-1])


class ServingPass:
    """What the extended layers of one model share during a step.

    adapters: those that are served; `owners`: [most tokens of a step], the number of each token's adapter, or `BASE`;
    `None`: the only adapter serves all of them.
    """

    def __init__(self, adapters: list[ServedAdapter], config: VllmConfig):
        self.adapters, self.owners, self.input_ids = adapters, None, None
        self.layers = {}  # decoder layer -> (the base's `BaseRouter`, [`LayerPart`])
        self.sites = {}  # name of a layer of vLLM's -> number of an adapter -> what it adds there
        self.in_scope = {}  # number of an adapter -> indices of the tokens in its scope, if any; `None`: all
        widths = {"gate": lambda one: 2 * one.gate_hidden_size, "modality": lambda one: 2}
        self.states = {
            number: StateCache(widths[one.config.scope](one.config), f"moextend.{number}.state", config)
            for number, one in enumerate(adapters)
            if one.config.scope in widths
        }
        config.compilation_config.static_forward_context[NAME] = self

    def decide_scope(self, number: int, hidden_states: torch.Tensor) -> None:
        """Keeps in `in_scope` which of the tokens [T, H] are in the scope of an adapter, in its lowest layer."""
        self.in_scope.pop(number, None)
        own = None if self.owners is None else self.owners[: len(hidden_states)] == number
        if own is not None and not own.any():
            return
        adapter, scope = self.adapters[number], own
        if adapter.gate is not None:
            opened = adapter.gate(hidden_states, self.states[number]) > adapter.config.gate_threshold
            scope = opened if own is None else own & opened
        elif adapter.config.scope == "modality":  # how many image tokens a sequence has had so far
            is_image = self.input_ids[: len(hidden_states)] == adapter.config.image_token_id
            seen = self.states[number].add(is_image.unsqueeze(-1).float().expand(-1, 2))[:, 0] > 0
            scope = seen if own is None else own & seen
        tokens = None if scope is None else scope.nonzero().squeeze(-1)
        if tokens is None or len(tokens):
            self.in_scope[number] = tokens

    def route(self, layer: int, hidden_states, router_logits):
        """Weights and experts [T, K] of tokens [T, H]: the base's own, and those of adapters for tokens in scope."""
        router, parts = self.layers[layer]
        weights, index = router._compute_routing(hidden_states, router_logits, None)
        base = RouterOutput(router_logits, weights.float(), index.long())
        weights, index = base.top_k_weights.clone(), base.top_k_index.to(torch.int32)
        for part in parts:
            adapter = self.adapters[part.number]
            if layer == adapter.lowest:
                self.decide_scope(part.number, hidden_states)
            if part.number not in self.in_scope:
                continue
            tokens = self.in_scope[part.number]
            output = route(
                RouterOutput(*(rows_of(one, tokens) for one in base[:3])),
                part.rows(rows_of(hidden_states, tokens), part.rule),
                part.rule,
                selection=adapter.config.selection,
                calibrate=adapter.config.calibration,
                calibration=part.rows.calibration,
                correction_bias=part.correction_bias,
            )
            chosen = part.experts[output.top_k_index]  # index -1, `UNUSED`, is the last one, and has weight 0
            if tokens is None:
                weights, index = output.top_k_weights, chosen
            else:
                weights.index_copy_(0, tokens, output.top_k_weights)
                index.index_copy_(0, tokens, chosen)
        return weights, index

    def add_deltas(self, site: str, output: torch.Tensor, inputs: torch.Tensor | None) -> None:
        """Adds to `output` [T, out], in place, what adapters add for their tokens; `inputs`: `None` for token ids.

        Whole rows are added: on a CPU, rows of a part of the columns would be added one by one.
        """
        for number, delta in self.sites[site].items():
            if number in self.in_scope:
                tokens = self.in_scope[number]
                own = rows_of(self.input_ids[: len(output)] if inputs is None else inputs, tokens)
                change = delta(own).to(output.dtype)
                output.add_(change) if tokens is None else output.index_add_(0, tokens, change)


def rows_of(tensor: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    return tensor if tokens is None else tensor.index_select(0, tokens)


class ExtendedRouter(BaseRouter):
    """In the place of a base's router; see `ServingPass.route`."""

    routing_method_type = RoutingMethodType.Custom

    def __init__(self, layer: int, hidden_size: int, top_k: int, num_experts: int):
        super().__init__(top_k=top_k, global_num_experts=num_experts)
        self.layer, self.hidden_size = layer, hidden_size

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        hidden_states = hidden_states[..., : self.hidden_size]  # vLLM may have padded them
        weights, index = torch.ops.vllm.moextend_route(hidden_states, router_logits, self.layer, self.top_k)
        return weights, index if indices_type is None else index.to(indices_type)


def serving_pass() -> ServingPass:
    return get_forward_context().no_compile_layers[NAME]


def moextend_route(
    hidden_states: torch.Tensor, router_logits: torch.Tensor, layer: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return serving_pass().route(layer, hidden_states, router_logits)


def fake_route(
    hidden_states: torch.Tensor, router_logits: torch.Tensor, layer: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = hidden_states.shape[0], top_k
    return hidden_states.new_empty(shape, dtype=torch.float32), hidden_states.new_empty(shape, dtype=torch.int32)


def moextend_deltas(output: torch.Tensor, inputs: torch.Tensor | None, site: str) -> None:
    serving_pass().add_deltas(site, output, inputs)


def fake_deltas(output: torch.Tensor, inputs: torch.Tensor | None, site: str) -> None:
    return None


direct_register_custom_op("moextend_route", moextend_route, fake_impl=fake_route)
direct_register_custom_op("moextend_deltas", moextend_deltas, mutates_args=["output"], fake_impl=fake_deltas)
