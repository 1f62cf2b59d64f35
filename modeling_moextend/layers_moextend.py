"""Extended layers: a base's routers and experts, with new experts beside them.

Letters: T tokens, E base experts, N new experts of a layer, K experts a token selects, H hidden size.

A base's router and experts keep their parameters and names; only their class is swapped for a subclass that asks one
child module, `moextend`, what the new tensors add. Wrapping them instead would change every state-dict key and hide
the router from transformers' output recorder. Detaching swaps the classes back.
"""

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from .families_moextend import bias_path, in_order, plain_class, sibling, tensor_at
from .gate_moextend import warn_if_closed
from .low_rank_moextend import LowRankExperts
from .routing_moextend import (
    INPUTS,
    SCORES,
    Calibration,
    RouterOutput,
    RoutingRecord,
    route,
    rule_with_shared_experts,
    scale_logits,
    shared_expert_weights,
)
from .scope_moextend import NewExperts, empty_instance


class RouterRows(nn.Module):
    """New router rows [N, H] of one adapter in one layer, with bias, correction bias, scale [N] and calibration where
    there are any. With `scope="gate"` the adapter's lowest layer also holds the `TokenGate` that decides for them all.
    """

    def __init__(self, num_new, config):
        super().__init__()
        self.num_new, self.config = num_new, config
        self.weight = self.bias = self.calibration = self.gate = None
        self.register_buffer("correction_bias", None)
        self.register_buffer("scale", None)

    def forward(self, inputs, rule):
        """What rows are multiplied with, [T, H] -> logits [T, N] in float32."""
        return scale_logits(F.linear(inputs.to(self.weight.dtype), self.weight, self.bias).float(), rule)


class Extension(nn.Module):
    """What adapters add to a router or to experts: their modules by name, and the way to the pass under way.

    layer: decoder layer index; num_base: E; passes: the model's `Passes`; fused: experts in their inference form.
    """

    fused = None

    def __init__(self, layer, num_base, passes):
        super().__init__()
        self.layer, self.num_base, self.passes = layer, num_base, passes
        self.adapters = nn.ModuleDict()

    def _apply(self, fn, *args, **kwargs):
        if self.fused is not None and self.fused.moved_by(fn):
            self.fused = None
        return super()._apply(fn, *args, **kwargs)

    def __getstate__(self):  # a copy's parameters are no views
        return {**self.__dict__, "fused": None}


class RouterExtension(Extension):
    """What adapters add to one router: `RouterRows`. Without any it only records what the base's router decides."""

    def __init__(self, layer, num_base, passes, rule):
        super().__init__(layer, num_base, passes)
        self.rule = rule

    def is_idle(self):
        """Whether this pass asks nothing of it, as with all adapters off."""
        plan = self.passes.plan
        return plan.records is None and self.layer not in plan.layers

    def forward(self, router, hidden_states, answer, correction_bias=None):
        """`answer`, the base router's (see `RouterOutput`), extended by the new rows of this pass's adapters.

        `correction_bias`: what the router got beside hidden states; in some families the correction bias [E].
        """
        plan = self.passes.plan
        layer_plan, logits = plan.layers.get(self.layer), None
        parts = {} if layer_plan is None else layer_plan.parts
        margins = {
            name: plan.gates[name].apply_gate(part.rows.gate, hidden_states)
            for name, part in parts.items()
            if part.rows.gate is not None and name in plan.gates
        }
        for name in margins:
            warn_if_closed(name, parts[name], plan.gates[name].threshold)
        names = [name for name in parts if plan.takes_part(name)]
        if names:
            base = hidden_states.flatten(0, -2), RouterOutput(*answer)
            output, logits = self.extend(router, *base, plan, layer_plan, names, correction_bias)
            answer = output[: len(answer)]
        if plan.records is not None:
            plan.records[self.layer] = self.record(plan, parts, RouterOutput(*answer), logits, margins)
        return answer

    def record(self, plan, parts, output, logits, margins):
        """The `RoutingRecord` of this layer; `logits` [T, E + N] where new rows have made some."""
        if logits is None:  # the logarithm of a softmax has the same softmax
            logits = output.router_logits if self.rule.answers == "logits" else output.router_logits.log()
        scope = plan.scope(list(parts) or [name for group in plan.groups for name in group], logits)
        num_new = logits.shape[-1] - self.num_base
        return RoutingRecord(logits, output.top_k_index, scope, self.num_base, num_new, margins, plan.selections)

    def logits(self, router, hidden_states, answered, rows):
        """The base's logits [T, E] of [T, H], and those of `rows` (name -> `RouterRows`), name -> [T, N]; `answered`:
        what the router answers first."""
        inputs = INPUTS[self.rule.inputs](router, hidden_states)
        new = {name: part(inputs, self.rule) for name, part in rows.items()}
        if self.rule.answers == "logits":
            return answered, new
        child = self.rule.rows.rpartition(".")[0]  # scores do not say how far apart logits are
        if child:
            return scale_logits(router.get_submodule(child)(inputs), self.rule), new
        own = (tensor_at(router, path) for path in (self.rule.rows, bias_path(self.rule)))
        return scale_logits(F.linear(inputs, *own), self.rule), new

    def extend(self, router, hidden_states, output, plan, layer_plan, names, correction_bias):
        """`output`, extended by the rows of this pass's adapters, of which only `names` are chosen from, and logits
        [T, E + N] of all of them."""
        rows = {name: part.rows for name, part in layer_plan.parts.items()}
        base_logits, new = self.logits(router, hidden_states, output.router_logits, rows)
        rule = rule_with_shared_experts(self.rule, base_logits, output) if self.rule.shared else self.rule
        base = RouterOutput(base_logits, output.top_k_weights, output.top_k_index)
        per_expert = {"correction_bias": None, "scale": None}  # what there is one of for every expert of the base
        if rule.correction:
            own = correction_bias if ":" in rule.correction else tensor_at(router, rule.correction)
            per_expert["correction_bias"] = own
        if rule.expert_scale:
            per_expert["scale"] = tensor_at(router, rule.expert_scale)
        weights, index, logits = base.top_k_weights, base.top_k_index, None
        for group in plan.groups:
            in_group = [name for name in layer_plan.parts if name in group and name in names]
            if not in_group:
                continue
            logits, *result = self.route_group(base, new, in_group, rule, per_expert, plan, layer_plan)
            own_tokens = plan.scope(in_group, weights) if len(plan.groups) > 1 else None
            if own_tokens is not None:  # other tokens are another group's
                pairs = zip(result, (weights, index), strict=True)
                result = [torch.where(own_tokens.unsqueeze(-1), *pair) for pair in pairs]
            weights, index = result
        if logits is None or logits.shape[-1] < self.num_base + sum(part.num_new for part in rows.values()):
            logits = torch.cat([base_logits.float(), *new.values()], dim=-1)  # of those that were left out, too
        answered = logits if rule.answers == "logits" else SCORES[rule.score](logits)
        shared = shared_expert_weights(output, weights) if rule.shared else output.shared
        return RouterOutput(answered, weights, index, shared), logits

    def route_group(self, base, new, names, rule, per_expert, plan, layer_plan):
        """Logits [T, E + N], weights and index [T, K] where the adapters `names` share tokens.

        Adapters of which no token selects an expert are left out and the others asked again, so that a batch which
        does not use an adapter is computed as if that were not loaded, to the last bit.
        """
        logits, weights, index = self.choose(base, new, names, rule, per_expert, plan, layer_plan)
        while len(names) > 1:
            spans = [[self.num_base + end for end in layer_plan.spans[name]] for name in names]
            hits = torch.stack([((index >= first) & (index < stop)).any() for first, stop in spans])
            left_out = [name for name, hit in zip(names, hits.tolist(), strict=True) if not hit]
            names = [name for name in names if name not in left_out]
            if not left_out or not names:
                break
            logits, weights, index = self.choose(base, new, names, rule, per_expert, plan, layer_plan)
            weights = keep_in_graph(weights, own_parameters(layer_plan.parts[name].rows for name in left_out))
        return logits, weights, index

    def choose(self, base, new, names, rule, per_expert, plan, layer_plan):
        """Logits [T, E + N], weights and index [T, K] by the routing rule over base rows and those of `names`."""
        rows = [layer_plan.parts[name].rows for name in names]
        of_all = {
            part: None if own is None else torch.cat([own.detach().reshape(-1), *(getattr(r, part) for r in rows)])
            for part, own in per_expert.items()
        }
        scopes, first = [plan.scope([name], base.router_logits) for name in names], rows[0]
        result = route(
            base,
            torch.cat([new[name] for name in names], dim=-1) if len(names) > 1 else new[names[0]],
            rule,
            selection=first.config.selection,  # adapters that share tokens select alike; only one alone calibrates
            calibrate=first.config.calibration,
            calibration=first.calibration,
            correction_bias=of_all["correction_bias"],
            scope=scopes[0] if len(names) == 1 else scopes,
            expert_scale=of_all["scale"],
            sizes=[part.num_new for part in rows],
        )
        index = self.to_pass_index(result.top_k_index, names, layer_plan.spans)
        return result.router_logits, result.top_k_weights, index

    def to_pass_index(self, index, names, spans):
        """`index`, whose new experts are counted over `names` alone, counted over all adapters of this pass."""
        if list(spans) == names:
            return index
        in_pass = torch.cat([torch.arange(*spans[name]) for name in names]).to(index.device) + self.num_base
        is_new = index >= self.num_base
        return torch.where(is_new, in_pass[(index - self.num_base).clamp(min=0)], index)


class ExtendedRouter:
    """Mixed in before a base router's class."""

    def forward(self, hidden_states, *args, **kwargs):
        answer, extension = super().forward(hidden_states, *args, **kwargs), self.moextend
        if extension.is_idle():
            return answer
        base = in_order(answer)
        extended = extension(self, hidden_states, base, next(iter((*args, *kwargs.values())), None))
        return extended if base is answer else extended[::-1]


class ExtendedExperts:
    """Mixed in before a base experts' class; an adapter's N new experts are a module of the base's own class."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """[T, H], [T, K], [T, K] -> [T, H]. Where no token selects a new expert, this is the base's own call."""
        index, weights, extension = top_k_index, top_k_weights, self.moextend
        layer_plan, num_base = extension.passes.plan.layers.get(extension.layer), extension.num_base
        if layer_plan is None:  # no adapter extends this layer, or all are off
            return super().forward(hidden_states, index, weights)
        if extension.fused is not None and extension.fused.serves(layer_plan.parts):
            return extension.fused.run(hidden_states, index, weights, layer_plan.parts)
        new = {name: part.experts for name, part in layer_plan.parts.items()}
        if not new or not bool((index >= num_base).any()):
            unused = own_parameters([*new.values(), *layer_plan.idle])
            return keep_in_graph(super().forward(hidden_states, index, weights), unused)
        pairs = hidden_states.new_zeros(index.numel(), hidden_states.shape[-1])
        spans = {name: [num_base + end for end in layer_plan.spans[name]] for name in new}
        parts = [(super().forward, (0, num_base)), *((new[name], spans[name]) for name in new)]
        for experts, (first, stop) in parts:
            chosen = ((index >= first) & (index < stop)).reshape(-1).nonzero().squeeze(-1)
            if len(chosen):
                experts = experts.whole(self) if isinstance(experts, LowRankExperts) else experts
                output = run_pairs(experts, hidden_states, index, chosen, first)
                pairs = pairs.index_copy(0, chosen, output.to(pairs.dtype))
            elif isinstance(experts, nn.Module):
                pairs = keep_in_graph(pairs, own_parameters([experts]))
        pairs = keep_in_graph(pairs, own_parameters(layer_plan.idle)).view(*index.shape, -1)
        return (pairs * weights.unsqueeze(-1)).sum(dim=1).to(pairs.dtype)  # rounded once, as in transformers' own sum


def own_parameters(modules):
    """Parameters of the modules themselves, to keep in a graph: what they share with the base's is left out; none
    where there is no graph."""
    asked = modules if torch.is_grad_enabled() else ()
    return [p for module in asked for p in module.parameters(recurse=isinstance(module, LowRankExperts))]


def run_pairs(experts, hidden_states, index, chosen, first):
    """Runs only the chosen (token, slot) pairs, each as a token with one expert of weight 1, which any experts
    implementation takes: -> [len(chosen), H]."""
    tokens = hidden_states[chosen // index.shape[1]]
    if isinstance(experts, nn.Module):
        experts, tokens = in_one_dtype(experts, tokens)
    expert = index.reshape(-1)[chosen].unsqueeze(-1) - first
    return experts(tokens, expert, tokens.new_ones(len(chosen), 1))


def in_one_dtype(experts, tokens):
    """`experts` and what they get, in the dtype in which they are computed: bfloat16 where that is the base's, though
    they are kept, and so trained, in float32; otherwise their own."""
    if tokens.dtype != torch.bfloat16 or experts.down_proj.dtype != torch.float32:
        return experts, tokens.to(experts.down_proj.dtype)
    wide = {**experts._parameters, **vars(experts)}  # those of a merged low rank are no parameters
    own = {
        name: t.to(tokens.dtype) for name, t in wide.items() if isinstance(t, torch.Tensor) and t.is_floating_point()
    }
    return sibling(experts, {}, **own), tokens


def keep_in_graph(output, parameters):
    """`output`, tied to those of `parameters` that train, with gradient zero: a step without them would leave their
    gradient `None` on this process and not on another, where distributed training hangs or steps differently."""
    trained = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    if not trained:
        return output
    nothing = sum(p.reshape(-1)[:0].sum() for p in trained)  # of no element: 0 * inf would be NaN
    return output + nothing.to(output.device, output.dtype)


@cache
def extended_class(mixin, base_class):
    """`base_class` with `mixin` before it, one class for all. No import finds it, so pickling makes it anew."""

    def reduce(module, protocol):
        return empty_instance, (extended_class, mixin, base_class), module.__dict__

    name = f"{mixin.__name__}{base_class.__name__}"
    own = {"__module__": base_class.__module__, "__reduce_ex__": reduce, "moextend_base": base_class}
    return type(name, (mixin, base_class), own)


def swap_class(module, new_class):
    """Gives `module` another class in place. accelerate's hooks keep the old bound forward, so that is renewed too."""
    module.__class__ = new_class
    if hasattr(module, "_old_forward"):
        module._old_forward = new_class.forward.__get__(module)


def input_device(base):
    """Where a base takes its token ids."""
    return execution_device(base.get_input_embeddings())


def execution_device(module):
    """Where a module computes: offloaded weights lie elsewhere (on meta) between passes."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device(next(module.parameters()).device if device is None else device)


def is_extended(module):
    return "moextend" in module._modules


def attach(layers, passes, rule):
    """Swaps the classes of the routers of `layers` (index -> `MoELayer`), so that each can be recorded."""
    for index, layer in layers.items():
        if not is_extended(layer.router):
            swap_class(layer.router, extended_class(ExtendedRouter, type(layer.router)))
            layer.router.moextend = RouterExtension(index, layer.num_experts, passes, rule)


def add_experts(layer, name, tensors, config, sources=()):
    """Adds new experts of the adapter `name` to one attached layer, from its tensors there by role
    ("experts.down_proj"): -> `NewExperts`; `sources`: those that deltas are to. The experts' class stays swapped until
    `detach`, for a pass of another thread may be on its way to them."""
    part = {role: {} for role in ("experts", "router", "calibration")}
    for path, tensor in tensors.items():
        role, key = path.split(".", 1)
        part[role][key] = tensor
    num_new, extension = len(part["router"]["weight"]), layer.router.moextend
    fixed = config.selection == "exclusive" and num_new == 1  # then without gradient
    rows = RouterRows(num_new, config)
    for key, tensor in part["router"].items():
        setattr(rows, key, tensor if key in rows._buffers else nn.Parameter(tensor, requires_grad=not fixed))
    if part["calibration"]:
        rows.calibration = Calibration(layer.num_experts + num_new, config.calibration_hidden_size, device="meta")
        rows.calibration.load_state_dict(part["calibration"], assign=True)
    if config.expert_rank is None:
        experts = sibling(layer.experts, part["experts"], num_experts=num_new, num_new=num_new)
    else:
        experts = LowRankExperts(part["experts"], sources)
    if not is_extended(layer.experts):
        layer.experts.moextend = Extension(extension.layer, layer.num_experts, extension.passes)
        swap_class(layer.experts, extended_class(ExtendedExperts, type(layer.experts)))  # last: it asks `moextend`
    extension.adapters[name], layer.experts.moextend.adapters[name] = rows, experts
    return NewExperts(rows, experts)


def remove_experts(layer, name):
    """Takes the new experts of the adapter `name` out of one layer again, if it has any there."""
    for module in (layer.router, layer.experts):
        if is_extended(module) and name in module.moextend.adapters:
            del module.moextend.adapters[name]


def detach(decoder):
    """Takes every extension off again; the base is what it was, bit for bit."""
    for module in decoder.modules():
        if is_extended(module):
            if module.moextend.fused is not None:
                module.moextend.fused.release()
            del module._modules["moextend"]
            swap_class(module, plain_class(module))
