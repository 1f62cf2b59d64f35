"""Whether vLLM's router of a layer works by the rule that was recorded with an adapter, in transformers."""

import torch
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from ...families_moextend import close, is_top_k
from ...routing_moextend import Rule, choice_keys, expert_weights


@torch.no_grad()
def check_router(layer: int, router: BaseRouter, rule: Rule, extended: BaseRouter) -> None:
    """Refuses a router that chooses or weighs otherwise: random logits are shown to it."""
    bias, groups = getattr(router, "e_score_correction_bias", None), getattr(router, "num_expert_group", None) or 1
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "device": "cpu", "dtype": torch.float32}  # whatever vLLM builds models in
    logits = torch.randn(64, router.global_num_experts, **options)
    logits = logits.to("cpu" if bias is None else bias.device)
    hidden_states = logits.new_zeros(len(logits), extended.hidden_size)
    weights, index = router._compute_routing(hidden_states, logits, None)
    keys = choice_keys(logits, rule, None if bias is None else bias.float())
    chooses = bool(rule.correction) == (bias is not None) and is_top_k(index.long(), keys, groups)
    if not chooses or not close(expert_weights(logits, index.long(), rule), weights):
        what = "weighs" if chooses else "chooses"
        raise ValueError(
            f"In layer {layer} vLLM's router {what} experts otherwise than the adapter's base does in transformers "
            f"({rule}): the base itself is not served right by this vLLM, and so its adapters are refused."
        )
