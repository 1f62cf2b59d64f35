"""Continuous batching (`generate_batch`, `transformers serve --continuous-batching`) with gates and encoders.

Requests share one paged cache there, and no pass has a cache of its own in which a gate could keep its sums. So each
gate gets layers of its own in the paged cache, which no attention uses, and its sums lie where a layer has keys and
values. Blocks are shared between requests, copied for forks, moved to the CPU, freed and found again as a whole, with
the pages of all their layers: what becomes of a token's keys becomes of its sums.

Letters: S tokens of a step, R requests in it, D gate size, W float32 numbers that a layer has room for, a token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from ..gate_moextend import GatedPass

if TYPE_CHECKING:
    from ..modeling_moextend import MoExtendForCausalLM
    from ..scope_moextend import PassInputs, Selection

FULL = "full_attention"
LEFT_OUT = (  # what a manager with gates is made without: none of it has been run with one
    "max_blocks_per_request",
    "use_cuda_graph",
    "use_async_batching",
    "varlen_compile_config",
    "decode_compile_config",
    "default_compile_level",
)


def manager_with_gates(
    init: Callable[..., ContinuousBatchingManager],
    selection: Selection,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    workload_hints: Any = None,
) -> ContinuousBatchingManager:
    """What `init` (transformers' `init_continuous_batching`) makes, with a place for what the gates of `selection`
    remember. It has no decode fast path, no graphs, no asynchronous steps and nothing compiled.

    Raises:
        ValueError: one of these was asked for.
    """
    own = init.__self__.generation_config if generation_config is None else generation_config
    given = continuous_batching_config or getattr(own, "continuous_batching_config", None)
    config = copy.deepcopy(given or ContinuousBatchingConfig())
    values = {name: getattr(config, name) for name in LEFT_OUT}
    asked = {name: value for name, value in values.items() if value and value != (False, False)}
    if asked:
        raise ValueError(
            f"Continuous batching with a gate or an encoder goes without {asked}: leave them out of "
            "ContinuousBatchingConfig, or use adapters of scope='all' without an encoder."
        )
    config.max_blocks_per_request, config.use_cuda_graph, config.use_async_batching = 0, False, False
    manager = init(generation_config, config, workload_hints)
    if manager.batch_processor is None:  # else it was kept from an earlier call, with its cache
        manager.__class__, manager.selection = GatedBatching, selection
    return manager


class GatedBatching(ContinuousBatchingManager):
    """transformers' manager, whose paged cache has layers for what gates remember."""

    selection: Selection

    def add_request(self, input_ids: list[int], *args: Any, **kwargs: Any) -> str | None:
        """As in transformers. `ValueError`: the prompt holds image tokens."""
        self.model.check_prompts([input_ids])
        return super().add_request(input_ids, *args, **kwargs)

    def _create_batch_processor(self) -> Any:
        model, config = self.model, self.model.config.get_text_config()
        layers = layers_of_gates(self.selection, config, model.dtype)
        extended = with_layers(config, sum(map(len, layers.values())))
        self.model = View(model, config=View(model.config, get_text_config=lambda: extended))
        try:
            processor = super()._create_batch_processor()
        finally:
            self.model = model
        if not hasattr(processor.cache, "moextend_gates"):
            processor.cache.moextend_gates = PagedGates(model, processor.cache, layers)
        return processor


class View:
    """An object, some of whose attributes have another value."""

    def __init__(self, of: Any, **values: Any):
        self.__dict__.update(values, of=of)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)


def layers_of_gates(selection: Selection, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, range]:
    """Adapter name -> indices of its gate's layers in the cache, after those of the base's text `config`; `dtype`: the
    cache's."""
    width, layers, first = layer_width(config, dtype), {}, config.num_hidden_layers
    for name in selection.taking_part:
        if (gate := selection.adapters[name].gate) is not None:
            layers[name] = range(first, first - (-2 * gate.key.out_features // width))
            first = layers[name].stop
    return layers


def layer_width(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """W: keys and values of a token in one layer, counted in float32."""
    num_bytes = find_num_key_value_heads(config) * find_head_dim(config) * dtype.itemsize
    if num_bytes % torch.float32.itemsize:
        raise ValueError(
            f"Continuous batching keeps a gate's sums in the place of keys, of which a token has {num_bytes} bytes in "
            "this base: no whole float32 numbers. Use generate."
        )
    return 2 * num_bytes // torch.float32.itemsize


def with_layers(config: PreTrainedConfig, extra: int) -> PreTrainedConfig:
    """`config` with `extra` layers more, of full attention where the base has any."""
    config, types = copy.copy(config), getattr(config, "layer_types", None)
    config.num_hidden_layers += extra
    if types is not None:
        config.layer_types = [*types, *[FULL if FULL in types else types[0]] * extra]
    return config


class Places(NamedTuple):
    """Where the tokens of one step lie in the cache, in the layers of one kind."""

    request: torch.Tensor  # [S] the request of each token
    first: torch.Tensor  # [R] the first token of each request
    is_begun: torch.Tensor  # [R] bool: tokens of it are in the cache
    before: torch.Tensor  # [R] slot of the last one of these
    slots: torch.Tensor  # [S] slot of each token

    @classmethod
    def of_step(cls, inputs: Mapping[str, Any], allocator: Any) -> Places:
        """From the `inputs` of a pass. A full layer writes before it reads, and its `read_index` holds each request's
        whole sequence; a sliding one reads first, and its ends in as many empty entries as there are new tokens. So in
        both, the last token in the cache stands before the new ones."""
        bounds, position_ids = inputs["cu_seq_lens_q"].long(), inputs["position_ids"][0]
        num_tokens, first = len(position_ids), bounds[:-1]
        tokens = torch.arange(num_tokens, device=bounds.device)
        request = torch.searchsorted(bounds[1:].contiguous(), tokens, right=True).clamp(max=len(first) - 1)
        is_begun = position_ids[first.clamp(max=num_tokens - 1)] > 0
        read, ends = inputs["read_index"][allocator.index], inputs["cu_seq_lens_k"][allocator.layer_type][1:].long()
        last = (ends - bounds.diff() - 1).clamp(min=0)
        before = read[last] if len(read) else torch.zeros_like(last)
        return cls(request, first, is_begun, before, inputs["write_index"][allocator.index][:num_tokens])


class PagedGates:
    """What the gates of a manager remember, in the layers that a paged cache has for them."""

    def __init__(self, model: MoExtendForCausalLM, cache: Any, layers: dict[str, range]):
        self.model, self.pages, self.allocators = model, {}, {}
        for name, indices in layers.items():
            self.allocators[name] = cache.layer_to_allocator[indices[0]]
            views = [view for index in indices for view in self.allocators[name]._kv_token_views[index]]
            self.pages[name] = [view.flatten(1).view(torch.float32) for view in views]  # [tokens of the cache, W / 2]

    def passes(self, inputs: dict[str, Any]) -> Callable[..., GatedPass]:
        """What makes a gate's `GatedPass` in the pass with these `inputs`, as `scope_moextend.gated_pass` does.

        A placeholder among the inputs was generated, for no prompt has one: as in `generate`, another token's
        embedding stands for it, and no image begins.
        """
        if placeholders := self.model.placeholder_ids:
            tokens = inputs["input_ids"]
            is_placeholder = torch.isin(tokens, torch.tensor(placeholders, device=tokens.device))
            inputs["input_ids"] = tokens.masked_fill(is_placeholder, 0)

        def paged_pass(name: str, given: PassInputs, past_length: int, served: Any, threshold: float) -> GatedPass:
            places = Places.of_step(inputs, self.allocators[name])
            return PagedPass(given.tokens, threshold, places, self.pages[name])

        return paged_pass


class PagedPass(GatedPass):
    """A step of many requests as a gate sees it: S tokens in one row, which follow on what the cache holds of each."""

    def __init__(self, tokens: torch.Tensor, threshold: float, places: Places, pages: list[torch.Tensor]):
        super().__init__(torch.ones_like(tokens, dtype=torch.bool), torch.full_like(tokens, -1), threshold=threshold)
        self.places, self.pages = places, pages

    def add(self, terms: torch.Tensor) -> torch.Tensor:
        """Sums [1, S, 2 D] of `terms` over each token's request so far; the cache gets them as well."""
        places, width = self.places, terms.shape[-1]
        wide = torch.float32 if terms.device.type == "mps" else torch.float64
        exact = terms[0].to(wide).cumsum(dim=0)
        start = F.pad(exact, (0, 0, 1, 0))[places.first.clamp(max=len(exact))]
        cached = torch.cat([page[places.before] for page in self.pages], dim=-1)[:, :width]
        cached = cached.masked_fill(~places.is_begun.unsqueeze(-1), 0)
        sums = (exact - start[places.request] + cached[places.request]).float()
        room = sum(page.shape[-1] for page in self.pages)
        for page, part in zip(
            self.pages, F.pad(sums, (0, room - width)).split(len(self.pages[0][0]), -1), strict=True
        ):
            page.index_copy_(0, places.slots, part)
        return sums.unsqueeze(0)
