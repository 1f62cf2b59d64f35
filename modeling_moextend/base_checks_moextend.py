"""May this base be extended, and is it the adapter's own: layout (docs/layouts.md), plan, rule and fingerprint."""

import functools

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .families_moextend import ROUTER_NAMES, check_routers
from .gate_moextend import is_at_hand
from .layers_moextend import is_extended
from .package_moextend import from_package
from .routing_moextend import Rule
from .tensors_moextend import DTensor, changed_tensors, is_plain, same_fingerprint, snapshot

QUANTISED_LINEAR = ("bitsandbytes", "torchao")  # quantise only nn.Linear, so experts and routers stay as they are


def quantisation_of(config):
    """The quantisation that a base's config names for it or for its language model, or `None`."""
    configs = (config, config.get_text_config(decoder=True))
    return next((one.quantization_config for one in configs if getattr(one, "quantization_config", None)), None)


def check_method(quantisation, advice="Load it dequantised, or the checkpoint that it was quantised from, "):
    """Refuses every quantisation but those of linear layers alone that were tried."""
    method = str(getattr(quantisation.quant_method, "value", quantisation.quant_method))
    if method not in QUANTISED_LINEAR:
        raise ValueError(
            f"The base is quantised with {method!r}, and packed experts can't be copied. Allowed: none, or that of "
            f"linear layers alone by {' or '.join(QUANTISED_LINEAR)}. {advice}in bfloat16 where memory is short."
        )


def check_loaded(base):
    """Refuses a loaded base that carries an adapter, is sharded over processes, or quantised to its experts."""
    if base.config.model_type == "moextend" or any(is_extended(module) for module in base.modules()):
        raise ValueError("The base is extended already: use model.extend(plan), or pass what model.detach() returns.")
    for name, module in base.named_modules():
        if type(module).__module__.startswith("peft.") and name.split(".")[-1] in ("experts", *ROUTER_NAMES):
            raise ValueError(
                f"The base's {name} is wrapped by PEFT (LoRA with target_parameters), and new experts are copied from "
                "plain ones: merge the LoRA first (merge_and_unload()), or take it off (unload(), delete_adapter)."
            )
    if any(getattr(module, "_is_expert_parallel", False) for module in base.modules()):
        raise ValueError(sharded_message("the base's experts are spread over processes (expert parallel)"))
    sharded = next((name for name, p in base.named_parameters() if isinstance(p, DTensor)), None)
    if sharded is not None:
        raise ValueError(sharded_message(f"the base's {sharded} is sharded over processes (tp_plan or FSDP)"))
    if getattr(base, "is_quantized", False):  # set by transformers' quantisers, and only by them
        check_method(quantisation_of(base.config))


def check_layer(index, layer):
    """Refuses to extend a `MoELayer` that is kernelised, sharded, or whose experts or router aren't plain numbers."""
    check_forwards(index, layer, [one for one in (layer.router, layer.experts) if not is_extended(one)])
    for module in (layer.router, layer.experts):
        for name, tensor in module.named_parameters():
            if isinstance(tensor, DTensor):
                raise ValueError(sharded_message(f"{name} of layer {index} is sharded over processes"))
            if not is_plain(tensor):
                kind = tensor.dtype if type(tensor) is nn.Parameter else f"{type(tensor).__name__}, {tensor.dtype}"
                raise ValueError(
                    f"{type(module).__name__}.{name} in layer {index} of the base is quantised ({kind}): load it "
                    "dequantised, or with experts and routers left as they are (llm_int8_skip_modules=[...] of "
                    "BitsAndBytesConfig, modules_to_not_convert=[...] of TorchAoConfig)."
                )


def sharded_message(found):
    return (
        f"A base can't be extended where its tensors are spread over processes: {found}. Load it without "
        "distributed_config, tp_plan or enable_expert_parallel; device_map spreads it over the devices of one "
        "process, and FSDP2 shards the extended model for training."
    )


def check_pass(model, selection):
    """Refuses a pass in which new experts would take no part (patches may come at any time), or train wrongly."""
    if not selection.enabled:
        return
    if torch.is_grad_enabled():
        check_gradients(model)
    for index in {layer for adapter in selection.adapters.values() for layer in adapter.layers}:
        check_forwards(index, model.moe_layers[index])


def check_ids(input_ids, model):
    """Refuses `input_ids` [B, S] that the embedding of `model` has no row for, where they are at hand."""
    if not input_ids.numel() or not is_at_hand(input_ids):
        return
    size, (lowest, highest) = model.get_input_embeddings().num_embeddings, torch.aminmax(input_ids)
    if lowest < 0 or highest >= size:
        unknown = (input_ids < 0) | (input_ids >= size)
        raise ValueError(
            f"input_ids hold {input_ids[unknown].unique().tolist()[:8]}, but the base's vocabulary has {size} tokens, "
            "and its embedding is never resized (tokenizer.convert_ids_to_tokens names them). Take the base's own "
            "tokenizer, without tokens added to it; to pad with, tokenizer.pad_token = tokenizer.eos_token."
        )


def check_forwards(index, layer, changing=()):
    """Refuses a layer a call of which does not run the forward of its modules' classes: directly, bound (which would
    outlive the class of those that are `changing` it), or inside accelerate's hook."""
    for module in (layer.block, layer.router, layer.experts):
        forward = module.__dict__.get("forward")
        hooked = isinstance(forward, functools.partial)
        forward = module.__dict__.get("_old_forward", forward) if hooked else forward  # what accelerate's hook calls
        own = getattr(forward, "__func__", None) is type(module).forward
        if forward is None or (own and (hooked or module not in changing)):
            continue
        found = getattr(forward, "__qualname__", type(forward).__name__)
        raise ValueError(
            f"In layer {index}, {found} lies before {type(module).__name__}.forward on the instance (a hub kernel or "
            "another patch), so new experts would take no part. Load the base without use_kernels, or with a kernel "
            "mapping that leaves MoE blocks and routers out: KernelConfig({'RMSNorm': ...}, inherit_mapping=False)."
        )


def check_gradients(model):
    """Refuses to train over a quantised base whose linear layers hand on no gradient, or a wrong one: bitsandbytes'
    4-bit layers on a CPU with AVX512-BF16 after the first inference, torchao's with quantised activations always."""
    if quantisation_of(model.base.config) is None or model.__dict__.get("_gradients_pass"):
        return
    for name, linear in model.base.named_modules():
        if isinstance(linear, nn.Linear) and not hands_on_gradients(linear):
            raise ValueError(
                f"{name} of the quantised base ({type(linear).__name__}, {type(linear.weight).__name__}) hands on no "
                "gradient on this device. For inference use torch.no_grad(). To train, load the base with "
                "BitsAndBytesConfig(load_in_8bit=True), TorchAoConfig(Int8WeightOnlyConfig()), or unquantised."
            )
    model.__dict__["_gradients_pass"] = True


def hands_on_gradients(linear):
    """Whether a gradient passes a linear layer; where torchao's tensors decide about it, by asking the layer."""
    if linear.weight.device.type == "cpu" and getattr(linear, "support_avx512bf16_for_cpu", False):
        return False  # bitsandbytes, 4-bit
    if not is_traceable_wrapper_subclass(linear.weight):
        return True
    like = {"dtype": linear.weight.dtype, "device": linear.weight.device, "requires_grad": True}
    with torch.enable_grad():
        return linear(torch.ones(2, linear.in_features, **like)).requires_grad


def check_plan(layers, plan):
    """Refuses layers that are no MoE layers or in a layout that can't be extended, and source experts out of range."""
    wrong = sorted(plan.keys() - layers.keys())
    if wrong:
        raise ValueError(f"Layers {wrong} are not MoE layers of this base; its MoE layers are {sorted(layers)}.")
    for layer, sources in plan.items():
        check_layer(layer, layers[layer])
        bad = [source for source in sources if not 0 <= source < layers[layer].num_experts]
        if bad:
            last = layers[layer].num_experts - 1
            raise ValueError(f"Source experts {bad} of layer {layer} are out of range: it has experts 0 to {last}.")


def check_fingerprint(role, recorded, found, advice=None):
    """Refuses a base or encoder with the fingerprint `found`, if it is not the one the adapter was made on."""
    if recorded and found is not None and not same_fingerprint(recorded, found):
        raise ValueError(
            f"This is a different {role} than the adapter was made on: its weights do not match the adapter's "
            f"{role} fingerprint. {advice or f'Pass {role}=<the right one>'}; check_base=False loads it all the same."
        )


def check_in_memory(model, adapter_name):
    """Refuses to save what was made on a base or encoder that has changed since it was loaded."""
    adapter, (base, values) = model.adapters[adapter_name], model.loaded_base
    parts = [("encoder", adapter.encoder_values[modality], one) for modality, one in adapter.encoders.items()]
    for role, before, module in (("base", values, base), *parts):
        changed = changed_tensors(before, snapshot(module))
        if changed:
            raise ValueError(
                f"The {role} in memory is no longer the one that was loaded: {', '.join(changed[:8])} ({len(changed)} "
                "tensors changed, were added or went, as by training or a LoRA), so the adapter is not saved. Load it "
                "anew, and the adapter onto it, or save it (model.detach().save_pretrained(folder)) and extend that."
            )


def base_rule(config, layers):
    """The routing `Rule` of the base that `layers` (index -> `MoELayer`) are of, to be kept in `config`; the layers of
    the plan have to follow it. The package finds it for a new base, and for adapters of the first version."""
    recorded = config.routing_rule or {}
    if set(recorded) < set(Rule._fields):
        attaching = from_package("attaching", "Finding the routing rule of a base for which none is recorded")
        recorded = attaching.complete_rule(recorded, layers, config.extended_layers)._asdict()
    rule = Rule(**recorded)
    check_routers(layers, config.extended_layers, rule)
    if rule.jitter is not None and config.calibration != "none":
        raise ValueError(
            f"calibration={config.calibration!r} has no meaning for a base that weighs its experts by SparseMixer: "
            "it mends shares of a softmax over all of them. Use calibration='none'."
        )
    config.routing_rule = rule._asdict()
    return rule
