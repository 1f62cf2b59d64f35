"""Scoped deltas: shared layers of the base (embedding, attention, last hidden state) that only tokens in scope feel.

Letters: B items of the batch, S tokens of this pass, T = B * S, V vocabulary, H hidden size, r rank of a delta.

A delta is what full fine-tuning would add to a weight, kept beside it: [out, in] itself, or B A of rank r as in LoRA
(arXiv 2106.09685). It acts above the lowest extended layer, for the gate there has to see the base's own; a token out
of scope is computed as if there were none. A hook on the shared layer adds it, so the layer keeps class and names.
"""

import re
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_moextend import DELTAS
from .families_moextend import family_of, find_moe_layers
from .layers_moextend import Extension, keep_in_graph

HYPER_CONNECTIONS = ("hc_", "hyper_connection")
TOKEN_MIXERS = ("self_attn", "linear_attn")
OF_CACHED = ("kv_b_proj",)  # expands what the cache holds, also of tokens that are not in this pass


class Delta(nn.Module):
    """What one adapter adds to one shared layer: `weight`, or `lora_A` and `lora_B`, by these names."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        for name in sorted(tensors):  # a file may hold them in any order
            self.register_parameter(name, nn.Parameter(tensors[name]))


class LinearDelta(Delta):
    """weight [out, in], or lora_A [r, in] and lora_B [out, r]."""

    def forward(self, hidden_states):
        """[..., in] -> [..., out]"""
        half = hidden_states.dtype == torch.bfloat16  # computed so, though kept and trained in float32
        for weight in self._parameters.values():
            weight = weight.to(hidden_states.dtype) if half else weight
            hidden_states = F.linear(hidden_states.to(weight.dtype), weight)
        return hidden_states


class EmbeddingDelta(Delta):
    """weight [V, H], or lora_A [r, V] and lora_B [H, r]; ids past V stand for images, and get none."""

    def forward(self, input_ids):
        """[B, S] -> [B, S, H]"""
        weight, *others = self._parameters.values()
        rows = weight.T if others else weight
        input_ids = input_ids.to(weight.device)
        embedded = F.embedding(input_ids.clamp(max=len(rows) - 1), rows)
        embedded = F.linear(embedded, others[0]) if others else embedded
        return embedded.masked_fill((input_ids >= len(rows)).unsqueeze(-1), 0)


class Site(NamedTuple):
    """A shared layer that a delta acts on, and the sizes of the delta's weight."""

    module: nn.Module
    out_features: int
    in_features: int


class DeltaSite(Extension):
    """The hook on one shared layer, and its child: deltas of all adapters there, by name."""

    def __init__(self, name, passes):
        super().__init__(name, 0, passes)

    def forward(self, module, *args):
        """As a hook on `module`: its output, or input, with what its deltas add."""
        in_graph = self.passes.plan.fused and not torch.is_grad_enabled()
        return (self.act if in_graph else self.act_outside)(*args)

    @torch.compiler.disable  # guards on what asks for gradients fail where adapters are switched (torch 2.13)
    def act_outside(self, *args):
        return self.act(*args)

    def act(self, args, output):
        """`output` [..., out] of the shared layer, and what its deltas add for `args[0]` [..., in]."""
        deltas = self.deltas_of_pass()
        return output if deltas is None else self.add(deltas, output, args[0])

    def deltas_of_pass(self):
        """The `LayerPlan` of this layer, or `None` where it changes nothing: no token is in scope, nothing trains."""
        plan = self.passes.plan
        deltas = plan.layers.get(self.layer)
        return deltas if deltas and (torch.is_grad_enabled() or any(map(plan.reaches, deltas.parts))) else None

    def add(self, deltas, output, inputs):
        """`output` [B, S, out] with `deltas`, the layer's `LayerPlan`, for tokens in the scope of their adapter."""
        plan, unused = self.passes.plan, list(deltas.idle)
        for name, delta in deltas.parts.items():
            if not plan.reaches(name):
                unused.append(delta)
                continue
            change, scope = delta(inputs), plan.scope([name], output)
            self.check_shapes(change, scope, output)
            changed = output + change.to(output.device, output.dtype)
            output = changed if scope is None else torch.where(scope.view(*output.shape[:-1], 1), changed, output)
        if not torch.is_grad_enabled():
            return output
        # Those that train when first asked: what is computed again for backward must not depend on a later change.
        trained = [delta for delta in unused if any(p.requires_grad for p in delta.parameters())]
        trained = plan.found.setdefault((self.layer, "unused"), trained)
        return keep_in_graph(output, [parameter for delta in trained for parameter in delta.parameters()])

    def check_shapes(self, change, scope, output):
        """Refuses what does not hold one vector a token: which of them are in scope can't be said."""
        tokens = output.shape[:-1].numel() if scope is None else scope.numel()
        if change.shape != output.shape or output.dim() > 3 or output.shape[:-1].numel() != tokens:
            raise ValueError(
                f"The delta {self.layer!r} can't be added to a tensor of shape {list(output.shape)}, which does not "
                "hold one vector for each token of this pass: this family can't have it. Leave it out of deltas=(...)."
            )


class LayerInput(DeltaSite):
    """The site of the embedding's delta: what goes into the decoder layer above the gate's."""

    def act(self, args, kwargs):
        deltas, input_ids = self.deltas_of_pass(), self.passes.plan.input_ids
        if deltas is None:
            return None
        hidden_states, *others = args or (kwargs["hidden_states"],)
        if deltas.parts and input_ids is None:
            raise ValueError("The embedding's delta needs the pass of a whole model: call the model, not its layers.")
        hidden_states = self.add(deltas, hidden_states, input_ids)
        return ((hidden_states, *others), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_states})


def decoder_layers(decoder):
    """Decoder layer index -> module, of a decoder with MoE layers."""
    names = {module: name for name, module in decoder.named_modules()}
    path = next(names[layer.block] for layer in find_moe_layers(decoder).values())
    layers = decoder.get_submodule(re.match(r"(.*?)\.?\d+\.", f"{path}.").group(1))
    return {int(name): layer for name, layer in layers.named_children()}


def find_sites(config, decoder):
    """The shared layers that the deltas of an adapter with `config` act on: name -> `Site`.

    `ValueError`: there is no decoder layer above the lowest extended one, or the family has no such layer.
    """
    if not config.deltas or not config.extended_layers:
        return {}
    sites, hidden_size = {}, config.get_text_config().hidden_size
    above = {index: layer for index, layer in decoder_layers(decoder).items() if index > min(config.extended_layers)}
    if not above and set(config.deltas) != {"output"}:
        raise ValueError(
            f"deltas of embedding and attention act above the lowest extended layer, and {min(config.extended_layers)}"
            " is the last: extend a lower layer as well, or use deltas=('output',)."
        )
    if "embedding" in config.deltas:
        if any(name.startswith(HYPER_CONNECTIONS) for name, _ in decoder.named_children()):
            raise ValueError(
                f"The residual stream of {family_of(decoder)} is several vectors a token (hyper-connections), with no "
                "place for an embedding's delta: leave 'embedding' out of deltas."
            )
        embedding = decoder.get_input_embeddings()
        sites[f"layers.{min(above)}.embedding"] = Site(above[min(above)], hidden_size, embedding.weight.shape[0])
    if "attention" in config.deltas:
        projections = {
            f"layers.{index}.attention.{name}": Site(linear, linear.out_features, linear.in_features)
            for index, layer in above.items()
            for name, linear in attention_projections(layer).items()
        }
        if not projections:
            raise ValueError(
                f"{family_of(decoder)} has no attention projections above layer {min(config.extended_layers)}: leave "
                "'attention' out of deltas."
            )
        sites |= projections
    if "output" in config.deltas:
        sites["output"] = Site(final_norm(decoder, hidden_size), hidden_size, hidden_size)
    return sites


def attention_projections(layer):
    """Name -> linear layer of a decoder layer's attention, by the family's own names; `{}`: it has no attention.

    Those of parts inside it (indexers, forget gates) are left alone, and so are classes of the family's own and what
    is applied to the cache. Of one that carries a LoRA of PEFT's it is the base's own layer inside.
    """
    mixers = [m for name, m in layer.named_children() if name in TOKEN_MIXERS or "Attention" in type(m).__name__]
    return {
        name: linear
        for mixer in mixers
        for name, child in mixer.named_children()
        for linear in (getattr(child, "base_layer", child),)
        if isinstance(linear, nn.Linear) and name not in OF_CACHED
        if not type(linear).__module__.startswith("transformers.models.")
    }


def final_norm(decoder, hidden_size):
    """The norm whose output is the last hidden state. `ValueError`: there is not just one that can be."""
    norms = [
        module
        for module in decoder.children()
        if type(module).__name__.endswith("Norm") and list(module.parameters())[0].shape == (hidden_size,)
    ]
    if len(norms) != 1:
        raise ValueError(f"{family_of(decoder)} has {len(norms)} norms at its end, not one: leave out 'output'.")
    return norms[0]


def delta_shapes(config, sites):
    """Name -> shape of the tensors of all deltas of an adapter with `config` at these `Site`s."""
    shapes = {}
    for name, site in sites.items():
        kind = next(kind for kind in DELTAS if kind in name.split("."))
        rank, size = config.deltas[kind], (site.out_features, site.in_features)
        if rank:
            shapes |= {f"{name}.lora_A": (rank, size[1]), f"{name}.lora_B": (size[0], rank)}
        else:
            shapes[f"{name}.weight"] = size[::-1] if kind == "embedding" else size
    return shapes


def add_delta(name, site, adapter_name, tensors, passes):
    """Adds the delta of one adapter at one `Site`, from its tensors there ("weight", or "lora_A" and "lora_B"):
    -> `Delta`."""
    if "moextend" not in site.module._modules:
        at_input = name.endswith(".embedding")
        site.module.moextend = (LayerInput if at_input else DeltaSite)(name, passes)
        if at_input:
            site.module.register_forward_pre_hook(site.module.moextend, with_kwargs=True)
        else:
            site.module.register_forward_hook(site.module.moextend)
    delta = (EmbeddingDelta if name.endswith(".embedding") else LinearDelta)(tensors)
    site.module.moextend.adapters[adapter_name] = delta
    return delta


def remove_deltas(decoder, adapter_name=None):
    """Takes out the deltas of one adapter; of all, with their hooks, where no name is given."""
    for module in [one for one in decoder.modules() if isinstance(one._modules.get("moextend"), DeltaSite)]:
        site = module.moextend
        if adapter_name is not None:
            site.adapters.pop(adapter_name) if adapter_name in site.adapters else None
            continue
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook is site]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        del module._modules["moextend"]
