"""The extended models: vLLM's own class of a base's architecture, with more experts and another router where the
adapters say so, and hooks where their deltas act.

Letters: E base experts, N new experts of a layer.
"""

import contextlib
from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from .adapters import load_adapters
from .delta_sites import add_hooks
from .images import with_images
from .refusals import check_engine
from .requests import carry_adapters
from .router_check import check_router
from .serving_pass import ExtendedRouter, LayerPart, ServingPass
from .supported import FAMILIES, PREFIX, SEEING, check_version

BASE_TENSORS = "base."  # before the names of the base's tensors where the adapter is in the model's place
ROUTER_OPTIONS = ("renormalize", "use_grouped_topk", "num_expert_group", "topk_group", "scoring_func")
ROUTER_OPTIONS += ("routed_scaling_factor", "e_score_correction_bias")
UNKNOWN = ("enable_eplb", "num_redundant_experts", "zero_expert_type", "custom_routing_function", "router")


class Builder:
    """Takes the place of vLLM's factory of MoE layers while a model is built: -> the layer, extended or not."""

    def __init__(self, serving: ServingPass):
        self.serving, self.runners = serving, {}  # decoder layer -> its runner, as vLLM calls an MoE layer

    def __call__(self, *, num_experts, top_k, hidden_size, prefix, **options):
        layer = extract_layer_index(prefix)
        adapters = [(k, one) for k, one in enumerate(self.serving.adapters) if layer in one.rows]
        given = {"top_k": top_k, "hidden_size": hidden_size, "prefix": prefix, **options}
        if not adapters:
            return FusedMoEFactory(num_experts=num_experts, **given)
        found = [name for name in UNKNOWN if options.get(name)]
        if found:
            raise ValueError(f"Layer {layer} of this base routes by {', '.join(found)}: it can't be served extended.")
        choices = {name: options[name] for name in ROUTER_OPTIONS if name in options}
        scaled_later = options.get("apply_routed_scale_to_output", False)
        if scaled_later:  # by the layer, whatever was chosen
            choices["routed_scaling_factor"] = 1.0
        router = create_fused_moe_router(top_k=top_k, global_num_experts=num_experts, **choices)
        parts, first = [], num_experts
        for number, adapter in adapters:
            rows, rule = adapter.rows[layer], adapter.rule
            rule = rule._replace(scale=rule.scale / options["routed_scaling_factor"]) if scaled_later else rule
            experts = [*range(num_experts), *range(first, first + rows.num_new), first]
            experts = torch.tensor(experts, dtype=torch.int32, device=rows.weight.device)
            parts.append(LayerPart(number, rows, rule, experts, None))
            first += rows.num_new
        self.serving.layers[layer] = router, parts
        extended = ExtendedRouter(layer, hidden_size, top_k, first)
        self.runners[layer] = FusedMoEFactory(num_experts=first, router=extended, **given)
        return self.runners[layer]

    def load(self) -> None:
        """Puts the new experts beside the base's, and finds what routes beside a correction bias; once the base's own
        tensors are there."""
        for layer, (router, parts) in self.serving.layers.items():
            bias = getattr(router, "e_score_correction_bias", None)
            for place, part in enumerate(parts):
                own = part.rows.correction_bias
                both = None if own is None else torch.cat([bias.detach().to(own), own])
                parts[place] = part._replace(correction_bias=both)
                check_router(layer, router, part.rule, self.runners[layer].router)
                experts = self.serving.adapters[part.number].experts.pop(layer)
                put_experts(self.runners[layer].routed_experts, experts, part.first)


def put_experts(module: nn.Module, experts: dict[str, torch.Tensor], first: int) -> None:
    """Writes new experts (name -> [n, ...]) to a layer's, from number `first` on, by vLLM's own loader of one."""
    transposed = hasattr(module, "_load_unquantized_expert")  # gpt-oss

    def put(parameter, tensor, shard, number, name):
        if not parameter.weight_loader(parameter, tensor.contiguous(), name, shard, number, return_success=True):
            raise ValueError(f"vLLM did not take {name} of new expert {number}.")

    for name, stack in experts.items():
        for number, tensor in enumerate(stack, first):
            if transposed:
                target = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}
                target |= {"gate_up_proj_bias": "w13_bias", "down_proj_bias": "w2_bias"}
                shard = "gpt_oss_w13" if name.startswith("gate_up") else "gpt_oss_w2"
                put(module.get_parameter(target[name]), tensor, shard, number, target[name])
            elif name == "gate_up_proj":
                for shard, half in zip(("w1", "w3"), tensor.chunk(2), strict=True):
                    put(module.w13_weight, half, shard, number, "w13_weight")
            elif name == "down_proj":
                put(module.w2_weight, tensor, "w2", number, "w2_weight")
            else:
                raise ValueError(f"New experts have {name}, which vLLM has no place for.")


def one_by_one(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """A base's stacks of experts as an expert each: vLLM's gpt-oss copies a whole stack over all experts it has."""
    for name, tensor in weights:
        before, separator, role = name.partition(".experts.")
        if not separator or "." in role:
            yield name, tensor
        else:
            yield from ((f"{before}.experts.{number}.{role}", one) for number, one in enumerate(tensor))


@contextlib.contextmanager
def building(base: type[nn.Module], builder: Builder, config: VllmConfig) -> Iterator[None]:
    """Has the file of `base` build its MoE layers by `builder`; as if no LoRA was asked for, because that would choose
    other kernels, and carries no more than names of adapters here."""
    names, lora = base.__init__.__globals__, config.lora_config
    assert names["FusedMoEFactory"] is FusedMoEFactory
    config.lora_config, names["FusedMoEFactory"] = None, builder
    try:
        yield
    finally:
        config.lora_config, names["FusedMoEFactory"] = lora, FusedMoEFactory


def rotate_every_head(model: nn.Module) -> None:
    """Has rotary embeddings computed by torch where vLLM has an operator for CPUs of its own: that takes a query
    [tokens, heads, size], as DeepSeek's attention hands it over, for one head's, and turns it wrongly."""
    if current_platform.is_cpu():
        for module in model.modules():
            if isinstance(module, RotaryEmbedding):
                module._forward_method = module.forward_native


def extend(base: type[nn.Module]) -> type[nn.Module]:
    """vLLM's class of a base, with adapters."""

    class Extended(base):
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
            check_version()
            model_config = vllm_config.model_config
            several = getattr(model_config.hf_config, "moextend_adapter", None) is None
            check_engine(vllm_config, several)
            adapters, source = load_adapters(vllm_config, vllm_config.device_config.device)
            # Compiled graphs are kept on disk by what the config says, and adapters decide what is in them.
            model_config.hf_config.moextend_content = [one.checksum for one in adapters]
            serving = ServingPass(adapters, vllm_config)
            builder = Builder(serving)
            with building(base, builder, vllm_config):
                super().__init__(vllm_config=vllm_config, prefix=prefix)
            if "Deepseek" in base.__name__:
                rotate_every_head(self)
            missing = sorted({layer for one in adapters for layer in one.rows} - builder.runners.keys())
            if missing:
                raise ValueError(f"vLLM builds no MoE layers {missing} for {base.__name__}.")
            add_hooks(self, serving)
            object.__setattr__(self, "moextend", (serving, builder))  # no modules: their tensors are no checkpoint's
            if not several:  # vLLM reads the adapter's files first, and we have
                self.allow_patterns_overrides = ["moextend_adapter*.safetensors"]
                options = {key: source.options.get(key) for key in ("revision", "subfolder")}
                options |= {"prefix": BASE_TENSORS, "fall_back_to_pt": False}
                self.secondary_weights = [DefaultModelLoader.Source(source.name, **options)]

        def forward(self, input_ids, positions, *args, **kwargs):
            self.moextend[0].input_ids = input_ids
            return super().forward(input_ids, positions, *args, **kwargs)

        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            if getattr(self, "secondary_weights", None):
                of_base = (pair for pair in weights if pair[0].startswith(BASE_TENSORS))
                weights = ((name.removeprefix(BASE_TENSORS), tensor) for name, tensor in of_base)
            loaded = super().load_weights(one_by_one(weights) if "GptOss" in base.__name__ else weights)
            self.moextend[1].load()
            return loaded

    Extended.__name__ = Extended.__qualname__ = PREFIX + base.__name__
    Extended.__module__ = __name__
    return Extended


@cache
def extended(architecture: str, sees: bool) -> type[nn.Module]:
    model = extend(ModelRegistry.models[architecture].load_model_cls())
    return with_images(model, SEEING + architecture) if sees else model


carry_adapters()


def __getattr__(name: str) -> type[nn.Module]:  # what `register` names
    for prefix in (SEEING, PREFIX):
        if name.startswith(prefix) and name.removeprefix(prefix) in FAMILIES:
            return extended(name.removeprefix(prefix), sees=prefix == SEEING)
    raise AttributeError(name)
