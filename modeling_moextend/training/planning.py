"""What a run would take, from configs alone: parameters, bytes, memory, operations and hours, before a GPU is paid.

The base is built on the meta device and extended there, so parameters and bytes are counted, not estimated. Memory and
operations follow from the sizes of its layers, by the formulas of `Layer`; tests hold them against passes that ran.

Letters: H hidden size, K experts a token selects, N new experts of a layer, I inner size of an expert, S tokens of a
sequence, b bytes of the base's dtype.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..attaching.fresh import check_causal_lm
from ..attaching.rules import check_family
from ..configuration_moextend import normalise_plan
from ..deltas_moextend import attention_projections, decoder_layers
from ..families_moextend import find_moe_layers
from ..loading_moextend import auto_class_for, check_no_adapter
from ..modeling_moextend import MoExtendForCausalLM
from ..tools.locations import check_location

TRAINED = 16  # bytes a trained parameter: weight, gradient and AdamW's two moments in float32
FREE = 0.92  # of a GPU's memory: the rest goes to the driver, and to gaps between tensors
LORA_RANK = 16
MOST = {"sequence": 10**7, "batch": 10**6, "gpus": 10**6, "new_experts": 10**4}


class Layer(NamedTuple):
    """Sizes of one decoder layer, in parameters or elements a token."""

    linear: int  # parameters of its linear layers and router
    wide: int  # outputs of linear layers outside attention, as of a dense MLP or shared experts
    heads: int  # outputs of attention's queries
    keys: int  # outputs of its keys
    normed: int  # outputs of queries and keys, where these are normed
    expert: int  # parameters of an expert; 0: no MoE layer
    inner: int  # I
    top_k: int  # K
    num_experts: int

    def forward(self, length: int) -> float:
        """Operations a token: two a parameter that it meets, and of attention with all `length` tokens."""
        return 2 * (self.linear + self.top_k * self.expert) + 4 * length * self.heads

    def saved(self, hidden: int, size: int) -> float:
        """Bytes a token that are kept for a backward pass through frozen weights: two norms in float32; queries, keys,
        values and attention's output; three times the inner size, and the output, of each expert."""
        own = 2 * self.heads + 2 * self.keys + 1.5 * self.wide + self.top_k * (3 * self.inner + hidden)
        return 8 * hidden + 4 * self.normed + size * own

    def saved_for_weights(self, hidden: int, size: int) -> float:
        """Bytes a token beside `saved` where weights train: what goes into them."""
        return size * (4 * hidden + self.normed + 0.5 * self.wide + self.top_k * (self.inner + hidden))


class Model(NamedTuple):
    """Sizes of a base."""

    layers: dict[int, Layer]
    hidden: int
    vocabulary: int
    parameters: int
    bytes: int
    size: int  # b


def plan_training(
    base: str | os.PathLike | PreTrainedModel,
    *,
    layers: Iterable[int] | None = None,
    fraction: float = 0.5,
    new_experts: int = 4,
    expert_rank: int | None = None,
    scope: str | None = None,
    deltas: Iterable[str] | Mapping[str, int] | None = None,
    sequence: int = 2048,
    batch: int = 1,
    checkpointing: bool = True,
    gpus: int = 1,
    gpu_memory: float = 80e9,
    tokens: float | None = None,
    tflops: float = 200.0,
    dtype: str = "bfloat16",
    **hub: Any,
) -> dict[str, Any]:
    """Plans the training of new experts, and beside it LoRA and full fine-tuning of the same base.

    Args:
        base: folder, Hub id or config.json, of which only the config is read; or a model, as one on the meta device,
            which stays as it was.
        layers: decoder layers that get new experts; default: the upper `fraction` of its MoE layers.
        new_experts: N of each of them.
        expert_rank, scope, deltas: as in `from_base`.
        sequence, batch: tokens of a sequence, sequences a GPU and step.
        checkpointing: gradient checkpointing, as TRL has it by default.
        gpu_memory: bytes of each of the `gpus`.
        tokens: of the data, all epochs together, for the hours.
        tflops: 10^12 operations a second that a GPU reaches in training.
        dtype: the base's; what trains is in float32.
        **hub: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`.

    Returns:
        a dict for JSON: `base`, `layers`, `adapter` (parameters, bytes), and `methods`: for each method the
        `parameters` that train, `flops` of a step and GPU, `memory` in bytes by part, `per_gpu` ("ddp", "fsdp2":
        bytes, and whether they fit), and `hours`.

    Raises:
        ValueError: a base that can't be extended; no such layer; numbers out of range.
        OSError: no config there.
    """
    numbers = {"sequence": sequence, "batch": batch, "gpus": gpus, "new_experts": new_experts}
    wrong = [f"{name}={value!r}" for name, value in numbers.items() if not 1 <= value <= MOST[name]]
    wrong += [] if 0 < fraction <= 1 else [f"fraction={fraction!r}"]
    if wrong:
        allowed = ", ".join(f"{name} 1 to {most:,}" for name, most in MOST.items())
        raise ValueError(f"{', '.join(wrong)}: out of range ({allowed}, fraction above 0 and up to 1).")
    model = base if isinstance(base, PreTrainedModel) else on_meta(base, dtype, hub)
    check_causal_lm(model, AutoModelForCausalLM)
    check_family(model.get_decoder())
    sizes, moe = sizes_of(model), sorted(find_moe_layers(model.get_decoder()))
    chosen = moe[len(moe) - max(1, round(fraction * len(moe))) :] if layers is None else list(layers)
    sources = {layer: max(sizes.layers[layer].num_experts, 1) for layer in chosen if layer in sizes.layers}
    plan = normalise_plan({layer: [n % sources.get(layer, 1) for n in range(new_experts)] for layer in chosen})
    trained = {"LoRA": lora_parameters(model), "full fine-tuning": sizes.parameters}
    extended = MoExtendForCausalLM.from_base(model, plan, expert_rank=expert_rank, scope=scope, deltas=deltas)
    stored = sum(tensor.numel() for tensor in extended.adapter_tensors().values())
    trained["MoExtend"] = sum(tensor.numel() for tensor in extended.set_trainable().values())
    work = {
        "MoExtend": moextend_work(sizes, extended, sequence, checkpointing),
        "LoRA": lora_work(sizes, sequence, checkpointing),
        "full fine-tuning": full_work(sizes, sequence, checkpointing),
    }
    methods = {}
    for name, each in work.items():
        memory = memory_of(each, trained[name], sizes, sequence * batch, frozen=name != "full fine-tuning")
        needs = {"ddp": sum(memory.values()), "fsdp2": sharded(memory, sizes, gpus)}
        methods[name] = {
            "parameters": trained[name],
            "flops": each.flops * sequence * batch,
            "memory": memory,
            "per_gpu": {way: {"bytes": size, "fits": size <= FREE * gpu_memory} for way, size in needs.items()},
            "hours": None if tokens is None else each.flops * tokens / (gpus * tflops * 1e12) / 3600,
        }
    name, adapter = model.config.name_or_path or type(model).__name__, extended.adapter_bytes()
    extended.detach()  # a model that was given is what it was
    return {
        "base": {"name": name, "parameters": sizes.parameters, "bytes": sizes.bytes},
        "layers": sorted(plan),
        "adapter": {"parameters": stored, "bytes": adapter},
        "methods": methods,
    }


def memory_of(work: Work, trained: int, sizes: Model, tokens: int, frozen: bool) -> dict[str, int]:
    """Bytes of a step over so many `tokens`, by part; weights that train are counted where they are trained."""
    return {
        "weights": sizes.bytes if frozen else 0,
        "trained": TRAINED * trained,
        "activations": round(work.kept * tokens + work.working),
        "logits": tokens * sizes.vocabulary * (sizes.size + 12),  # in float32, their softmax and gradient
    }


def sharded(memory: Mapping[str, int], sizes: Model, gpus: int) -> int:
    """Bytes a GPU of a step whose weights and what trains are spread over `gpus`; two layers are gathered at once."""
    gathered = 2 * sizes.bytes / len(sizes.layers) if gpus > 1 else 0
    shared = memory["weights"] + memory["trained"]
    return round(shared / gpus + gathered + memory["activations"] + memory["logits"])


def on_meta(base: str | os.PathLike, dtype: str, hub: Mapping[str, Any]) -> PreTrainedModel:
    """A base without weights, from its config."""
    check_no_adapter(base, hub)
    if not os.path.isfile(base):
        check_location("base", base, **hub)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False, **hub)
        auto_class = auto_class_for(config, AutoModelForCausalLM)
        with torch.device("meta"):
            return auto_class.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    except Exception as error:  # a stranger's config may hold anything
        lines = [line.strip() for line in str(error).splitlines()]
        said = " ".join(line for line in lines if "://" not in line and "trust_remote_code" not in line)
        reason = "it is of another kind" if "Unrecognized configuration class" in said else said.removesuffix(".")
        raise ValueError(
            f"base={str(base)!r}: transformers makes no causal LM of its config, without code of others: {reason}. "
            "Give the folder, Hub id or config.json of a Mixture-of-Experts model."
        ) from error


# ---------------------------------------------------------------- sizes


def sizes_of(model: PreTrainedModel) -> Model:
    """The sizes of a base, wherever its weights are."""
    decoder, text = model.get_decoder(), model.config.get_text_config()
    moe, layers = find_moe_layers(decoder), {}
    for index, layer in decoder_layers(decoder).items():
        experts, rows = (moe[index].experts, moe[index].router) if index in moe else (None, None)
        inside = set() if experts is None else set(experts.modules())
        projections = attention_projections(layer)
        linears = [one for one in layer.modules() if isinstance(one, nn.Linear) and one not in inside]
        linear = sum(one.weight.numel() for one in linears)
        linear += 0 if rows is None else sum(p.numel() for p in rows.parameters(recurse=False) if p.dim() == 2)
        attention = set(projections.values())
        wide = sum(one.out_features for one in linears if one not in attention and one.out_features > one.in_features)
        stacks = [] if experts is None else [p for p in experts.parameters(recurse=False) if p.dim() == 3]
        inner = 0 if experts is None else inner_size(experts, text.hidden_size)
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = size * text.num_attention_heads
        keys = size * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        layers[index] = Layer(
            linear,
            wide,
            heads if attention else 0,
            keys if attention else 0,
            heads + keys if attention and has_norms(layer) else 0,
            sum(stack[:1].numel() for stack in stacks),
            inner,
            0 if experts is None else text.num_experts_per_tok,
            0 if experts is None else moe[index].num_experts,
        )
    tensors = list(model.parameters())
    head = model.get_output_embeddings().weight
    return Model(
        layers,
        text.hidden_size,
        head.shape[0],
        sum(p.numel() for p in tensors),
        sum(p.nbytes for p in tensors),
        head.dtype.itemsize,
    )


def inner_size(experts: nn.Module, hidden: int) -> int:
    """I, of a stack [E, H, I] or [E, I, H]."""
    return next((size for size in experts.down_proj.shape[1:] if size != hidden), hidden)


def has_norms(layer: nn.Module) -> bool:
    """Whether the attention of a decoder layer norms its queries and keys."""
    mixers = [child for name, child in layer.named_children() if "attn" in name]
    return any("norm" in name for mixer in mixers for name, _ in mixer.named_children())


# ---------------------------------------------------------------- what a step takes


class Work(NamedTuple):
    """What a training step takes for each token, and at once."""

    flops: float  # operations a token
    kept: float  # bytes a token for the backward pass
    working: float = 0.0  # bytes beside these, whatever the number of tokens


def full_work(sizes: Model, length: int, checkpointing: bool) -> Work:
    """Full fine-tuning. Backward takes twice the forward's products, attention's two and a half times, as flash
    attention counts it; a checkpointed layer takes its forward again."""
    flops, kept = 3 * 2 * sizes.hidden * sizes.vocabulary, []
    for layer in sizes.layers.values():
        forward, attention = layer.forward(length), 4 * length * layer.heads
        flops += 3 * (forward - attention) + 3.5 * attention + checkpointing * forward
        kept.append(layer.saved(sizes.hidden, sizes.size) + layer.saved_for_weights(sizes.hidden, sizes.size))
    return Work(flops, kept_bytes(kept, sizes, checkpointing))


def moextend_work(sizes: Model, model: MoExtendForCausalLM, length: int, checkpointing: bool) -> Work:
    """New experts and deltas, where every token uses them. Below the lowest extended layer there is a forward pass and
    nothing else; what new experts keep is in float32."""
    config, tensors = model.config, model.adapter_tensors()
    exclusive, lowest, working = config.selection == "exclusive", min(config.extended_layers), []
    deltas = sum(t.numel() for name, t in tensors.items() if ".attention." in name or name == "output.weight")
    flops, kept = 2 * 2 * sizes.hidden * sizes.vocabulary + 3 * 2 * deltas, []
    for index, layer in sizes.layers.items():
        new = len(config.extended_layers.get(index, ()))
        pairs = min(layer.top_k, new) if new and exclusive else layer.top_k
        forward = layer.forward(length) - 2 * (layer.top_k - pairs) * layer.expert
        attention = 4 * length * layer.heads
        flops += forward
        if index < lowest:
            continue
        flops += checkpointing * forward
        saved = layer.saved(sizes.hidden, sizes.size)
        if new:
            own = 3 * layer.inner + sizes.hidden  # of an expert, as in `Layer.saved`
            flops += 2 * pairs * layer.expert  # the gradients of their weights
            saved += pairs * 4 * (own + layer.inner + sizes.hidden) - layer.top_k * sizes.size * own
            saved += layer.top_k * sizes.size * sizes.hidden  # outputs, before they are weighted
            working.append(4 * new * layer.expert if config.expert_rank else 0)  # whole weights of a low rank
        if index > lowest:
            flops += forward + 1.5 * attention
        else:  # a gradient goes through the last product of its experts, and no further
            flops += 2 * pairs * layer.inner * sizes.hidden
            saved -= 4 * sizes.hidden + 2 * sizes.size * (layer.heads + layer.keys)
        kept.append(saved)
    at_once = max(working, default=0) if checkpointing else sum(working)
    return Work(flops, kept_bytes(kept, sizes, checkpointing), at_once)


def lora_work(sizes: Model, length: int, checkpointing: bool) -> Work:
    """LoRA on attention and experts, by PEFT, which makes all experts' weights anew in every pass, and so has whole
    gradients of them; of attention's weights it needs none."""
    flops, kept, working = 2 * 2 * sizes.hidden * sizes.vocabulary, [], []
    for layer in sizes.layers.values():
        forward, attention = layer.forward(length), 4 * length * layer.heads
        product = 2 * LORA_RANK * layer.num_experts * layer.expert / length  # B A of every expert, once a sequence
        flops += 2 * (forward - attention) + 3.5 * attention + checkpointing * forward
        flops += 2 * layer.top_k * layer.expert + 3 * product
        kept.append(layer.saved(sizes.hidden, sizes.size) + layer.saved_for_weights(sizes.hidden, sizes.size))
        working.append(sizes.size * layer.num_experts * layer.expert)
    at_once = 3 * max(working) if checkpointing else sum(working) + 2 * max(working)  # delta, sum, gradient
    return Work(flops, kept_bytes(kept, sizes, checkpointing), at_once)


def lora_parameters(model: PreTrainedModel) -> int:
    """Parameters of a LoRA of rank 16 on attention and experts, as PEFT makes them."""
    count, moe = 0, find_moe_layers(model.get_decoder())
    for index, layer in decoder_layers(model.get_decoder()).items():
        count += sum(LORA_RANK * (one.in_features + one.out_features) for one in attention_projections(layer).values())
        if index in moe:
            stacks = [p for p in moe[index].experts.parameters(recurse=False) if p.dim() == 3]
            count += sum(LORA_RANK * len(stack) * sum(stack.shape[1:]) for stack in stacks)
    return count


def kept_bytes(kept: list[float], sizes: Model, checkpointing: bool) -> float:
    """Bytes a token of all layers that have a backward pass; with checkpointing of one, and of every layer's input."""
    return max(kept) + len(kept) * sizes.size * sizes.hidden if checkpointing else sum(kept)
