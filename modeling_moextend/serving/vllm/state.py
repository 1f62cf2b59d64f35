"""What scope has to remember of a sequence, in vLLM's own paged cache: one float32 vector a token.

A cache layer without attention: vLLM gives it pages, shares them among requests with a common prefix, frees them and
has them computed again, all by the block table of the attention layers. So prefix caching, chunked prefill and
preemption stay vLLM's work.

Letters: T tokens of a step, R requests in it, W width of a token's state.
"""

from typing import NamedTuple

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec


class Step(NamedTuple):
    """Where the tokens of a step lie, and those before them."""

    num_tokens: int  # T; a batch may be padded to more
    starts: torch.Tensor  # [R + 1] first token of each request in the step
    lengths: torch.Tensor  # [R] tokens of each request after the step
    blocks: torch.Tensor  # [R, most blocks of a request] their numbers
    slots: torch.Tensor  # [T] where each token's state belongs


class StepBuilder(AttentionMetadataBuilder):
    def __init__(self, *args, **kwargs):  # abstract in vLLM
        super().__init__(*args, **kwargs)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        step = common_attn_metadata
        return Step(
            step.num_actual_tokens,
            step.query_start_loc[: step.num_reqs + 1],
            step.seq_lens[: step.num_reqs],
            step.block_table_tensor,
            step.slot_mapping,
        )


class StateBackend(AttentionBackend):
    supported_dtypes = (torch.float32, torch.bfloat16)

    @staticmethod
    def get_name():
        return "MOEXTEND_STATE"

    @staticmethod
    def get_impl_cls():
        return None

    @staticmethod
    def get_builder_cls():
        return StepBuilder


class StateCache(nn.Module, AttentionLayerBase):
    """Running sums of each sequence, of `width` float32 values (an even number) a token.

    `name`: as of the cache layers of a model; it has to hold one whole number, by which vLLM sorts them.
    """

    def __init__(self, width: int, name: str, vllm_config: VllmConfig):
        super().__init__()
        self.width, self.name = width, name
        self.kv_cache = torch.tensor([])  # [blocks, 1, tokens in a block, W] once vLLM has bound its own
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self):
        return StateBackend

    def get_kv_cache_spec(self, vllm_config):
        size = vllm_config.cache_config.block_size
        return FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=self.width // 2, dtype=torch.float32)

    def add(self, terms: torch.Tensor) -> torch.Tensor:
        """Sums [T, W] of `terms` [T, W] over each token's own sequence so far; they are kept in the cache."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # a dry run, to measure memory
            return terms.clone()
        step = metadata[self.name]
        count, size = step.num_tokens, self.kv_cache.shape[2]
        first = step.starts[:-1].long()
        lengths = step.starts[1:].long() - first
        request = torch.arange(len(lengths), device=terms.device).repeat_interleave(lengths, output_size=count)
        past = step.lengths.long() - lengths
        last = (past - 1).clamp(min=0)
        block = step.blocks.gather(1, (last // size).unsqueeze(1).to(step.blocks.dtype)).squeeze(1).long()
        slots = step.slots[:count].long()
        sums = terms[:count].double().cumsum(0)
        before_first = torch.cat([sums.new_zeros(1, self.width), sums])[first]
        own = sums - before_first[request]

        def cached():
            """[R, W]: the sums after the last token before this step."""
            found = self.kv_cache[block, 0, last % size].double()
            return found.masked_fill((past == 0).unsqueeze(1), 0)

        # Requests of one step share the blocks of a common prefix: what one of them reads may be written by another in
        # this very step, whose own beginning may be a third one's. So write, and read again until nothing moves.
        before = cached()
        for _ in range(len(lengths)):
            sums = (own + before[request]).float()
            self.kv_cache[slots // size, 0, slots % size] = sums
            now = cached()
            if torch.equal(now, before):
                break
            before = now
        result = torch.zeros_like(terms)
        result[:count] = sums
        return result
