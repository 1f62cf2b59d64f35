"""Pieces that the library does without, for the ablation table: each changes a model with a gate before it trains.

A run is a process of its own, so nothing is changed back.
"""

import torch
from torch import nn

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.families_moextend import find_moe_layers
from modeling_moextend.gate_moextend import TokenGate
from modeling_moextend.training import checks, trainer
from modeling_moextend.training import gate as gate_training

RANK = 16


def hidden_state_only(model: MoExtendForCausalLM) -> None:
    """The gate judges a token by itself: its columns for the context stay zero."""
    weight = model.gate.fc1.weight
    width = model.gate.value.weight.shape[0]
    keep_zero(weight, torch.arange(weight.shape[1]) >= weight.shape[1] - width)


def plain_mean(model: MoExtendForCausalLM) -> None:
    """All tokens before weigh the same: the gate's scores stay zero."""
    for parameter in (model.gate.key.weight, model.gate.key.bias):
        keep_zero(parameter, torch.ones_like(parameter, dtype=torch.bool))


def keep_zero(parameter: nn.Parameter, mask: torch.Tensor) -> None:
    """Entries that are zero and get no gradient."""
    parameter.requires_grad_(True)
    parameter.data.masked_fill_(mask, 0.0)
    parameter.register_hook(lambda gradient: gradient.masked_fill(mask, 0.0))


def gate_a_layer(model: MoExtendForCausalLM) -> None:
    """Every extended layer has a gate of its own, trained as the first is, on what the base gives that layer.

    Answers are generated without a cache: it has room for one gate's sums.
    """
    layers = find_moe_layers(model.get_decoder())
    first, *others = model.config.extended_layers
    model.generation_config.use_cache = False
    fit, inputs = gate_training.fit_gate, {}

    def gate_inputs(model, batches, plain=gate_training.gate_inputs):
        batches, plan = list(batches), model.config.extended_layers
        for layer in (*others, first):
            model.config.extended_layers = {layer: plan[layer]}
            inputs.setdefault(layer, []).append(plain(model, batches))
        model.config.extended_layers = plan
        return inputs[first][-1]

    def fit_gate(gate, task, retention, **options):
        for layer in others:
            rows = layers[layer].router.moextend.adapters["default"]
            rows.gate = TokenGate(rows.weight.shape[-1], model.config.gate_hidden_size)
            fit(rows.gate, *inputs[layer], **options)
        return fit(gate, task, retention, **options)

    gate_training.gate_inputs, gate_training.fit_gate = gate_inputs, fit_gate


def gated_lora(model: MoExtendForCausalLM) -> None:
    """Attention LoRA for the tokens that the gate lets through, in every layer above the gate."""
    checks.check_frozen = trainer.check_frozen = lambda model: None  # what it learns is measured, and never saved
    for layer in list(model.config.extended_layers)[1:]:
        attention = model.get_decoder().layers[layer].self_attn
        for linear in [module for module in attention.modules() if isinstance(module, nn.Linear)]:
            pair = nn.Sequential(
                nn.Linear(linear.in_features, RANK, bias=False), nn.Linear(RANK, linear.out_features, bias=False)
            )
            nn.init.zeros_(pair[1].weight)
            linear.moextend = pair
            linear.register_forward_hook(lambda module, args, output: add_lora(model, module, args[0], output))


def add_lora(
    model: MoExtendForCausalLM, linear: nn.Linear, hidden: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """What a linear layer gives [B, S, out], with its LoRA for the tokens of `hidden` [B, S, in] in scope."""
    gated = model.passes.plan.gates.get("default")
    if gated is None or gated.in_scope is None:  # the adapter is off, or its gate has not decided yet
        return output
    return output + linear.moextend(hidden) * gated.in_scope.view(*hidden.shape[:2], 1)


VARIANTS = {function.__name__: function for function in (hidden_state_only, plain_mean, gate_a_layer, gated_lora)}
