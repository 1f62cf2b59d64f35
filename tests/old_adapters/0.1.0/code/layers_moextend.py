"""Extended layers: a base's routers and experts, with new experts beside them.

Letters: T tokens, E base experts, N new experts of a layer, K experts a token selects, H hidden size.

A base's router and experts modules keep their parameters, their names and their place; only their class is swapped for
a subclass that asks one child module, `moextend`, what the new tensors add: it holds, by adapter name, the rows or the
experts of every adapter that extends the layer. Wrapping them instead would change every state-dict key and hide the
router from transformers' output recorder. Detaching swaps the classes back.
"""

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from .families_moextend import (
    bias_path,
    correction_of,
    find_moe_layers,
    materialised,
    plain_class,
    sibling,
    tensor_at,
)
from .gate_moextend import TokenGate
from .routing_moextend import INPUTS, SCORES, Calibration, RoutingRecord, cap, left_to_shared, route, sharing


class Additions(nn.ModuleDict):
    """What adapters add to one router or experts module: adapter name -> its new rows or its new experts."""

    def __init__(self, num_base, state):
        super().__init__()
        self.num_base, self.state = num_base, state

    def spans(self):
        """Adapter name -> (first, stop): the indices that its new experts have in this pass, from E on."""
        spans, first = {}, self.num_base
        for name in self.state.names:
            if name in self:
                spans[name] = first, first + self[name].num_new
                first += self[name].num_new
        return spans


class NewRows(nn.Module):
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
        return cap(F.linear(inputs.to(self.weight.dtype), self.weight, self.bias).float(), rule)


class RouterExtension(Additions):
    """What adapters add to one router. Without any it only records what the base's router decides, so that every MoE
    layer is heard."""

    def __init__(self, layer, num_base, rule, state):
        super().__init__(num_base, state)
        self.layer, self.rule = layer, rule

    def forward(self, router, hidden_states, answer, given=None):
        """The base router's answer (logits [T, E], weights [T, K], index [T, K]), extended by the new rows.

        `given`: what the router got beside hidden states; in some families the correction bias [E].
        """
        logits, names = None, list(self.spans())
        gates = [name for name in names if self[name].gate is not None and name in self.state.gated]
        margins = {name: self.decide(name, hidden_states) for name in gates}
        used = [name for name in names if self.in_use(name)]
        if used:
            logits, weights, index, *rest = self.extend(router, hidden_states.flatten(0, -2), answer, used, given)
            told = logits if self.rule.answers == "logits" else SCORES[self.rule.score](logits)
            answer = told, weights, index, *rest
        if self.state.records is not None:
            if logits is None:  # the logarithm of a softmax has the same softmax
                logits = answer[0] if self.rule.answers == "logits" else answer[0].log()
            num_new, scope = logits.shape[-1] - self.num_base, self.scope(names or self.state.names, logits)
            record = RoutingRecord(logits, answer[2], scope, self.num_base, num_new, margins)
            self.state.records[self.layer] = record
        return answer

    def decide(self, name, hidden_states):
        """Lets an adapter's gate set its scope of this pass; returns the gate's margins [T]."""
        gated = self.state.gated[name]
        margins = self[name].gate(hidden_states.reshape(*gated.is_real.shape, -1), gated)
        in_scope = (margins > self[name].config.gate_threshold) & gated.allowed.to(margins.device)
        self.state.now.scopes = {**self.state.scopes, name: in_scope.detach().reshape(-1)}
        return margins.reshape(-1)

    def in_use(self, name):
        """False where no token is in scope and nobody needs a gradient or the new logits: as if not loaded."""
        scope = self.state.scopes.get(name)
        if scope is None:
            return self[name].config.scope != "gate"  # a gate that was not asked lets no token through
        if self.state.records is not None or torch.is_grad_enabled():
            return True
        return bool(scope.any())

    def scope(self, names, like):
        """[T] bool: tokens in the scope of at least one of `names`; `None`: every token of `like` [T, ...]."""
        scopes = [self.state.scopes.get(name) for name in names]
        if not scopes or any(scope is None for scope in scopes):
            return None
        return torch.stack([scope.to(like.device) for scope in scopes]).any(dim=0)

    def logits(self, router, hidden_states, told, names):
        """The base's logits [T, E] of hidden states [T, H], and those of the adapters `names`, name -> [T, N]; `told`:
        what the router answers."""
        inputs = INPUTS[self.rule.inputs](router, hidden_states)
        new = {name: self[name](inputs, self.rule) for name in names}
        if self.rule.answers == "logits":
            return told, new
        child = self.rule.rows.rpartition(".")[0]  # scores do not say how far apart logits are
        if child:
            return cap(router.get_submodule(child)(inputs), self.rule), new
        own = (tensor_at(router, path) for path in (self.rule.rows, bias_path(self.rule)))
        return cap(F.linear(inputs, *own), self.rule), new

    def extend(self, router, hidden_states, answer, used, given):
        """`answer`, extended by the rows of this pass's adapters; only experts of the adapters `used` are chosen."""
        base_logits, new = self.logits(router, hidden_states, answer[0], self.spans())
        rule = sharing(self.rule, base_logits, answer) if self.rule.shared else self.rule
        weights, index = answer[1:3]
        kept = {"correction_bias": None, "scale": None}  # what there is one of for every expert of the base
        if self.rule.correction:
            kept["correction_bias"] = given if ":" in self.rule.correction else tensor_at(router, self.rule.correction)
        if self.rule.expert_scale:
            kept["scale"] = tensor_at(router, self.rule.expert_scale)
        for group in self.state.groups:
            names = [name for name in new if name in group and name in used]
            if not names:
                continue
            found = self.share((base_logits, *answer[1:3]), new, names, rule, kept)
            mine = self.scope(names, weights) if len(self.state.groups) > 1 else None
            if mine is not None:  # other tokens are another group's
                found = [torch.where(mine.unsqueeze(-1), *pair) for pair in zip(found, (weights, index), strict=True)]
            weights, index = found
        logits, rest = torch.cat([base_logits.float(), *new.values()], dim=-1), answer[3:]
        return logits, weights, index, *([left_to_shared(answer, weights)] if rule.shared else rest)

    def share(self, answer, new, names, rule, kept):
        """Weights and index [T, K] where the adapters `names` share tokens.

        Adapters of which no token selects an expert are left out and the others asked again, so that a batch which
        does not use an adapter is computed as if that were not loaded, to the last bit.
        """
        weights, index = self.choose(answer, new, names, rule, kept)
        while len(names) > 1:
            spans = self.spans()
            hits = torch.stack([((index >= spans[name][0]) & (index < spans[name][1])).any() for name in names])
            left_out = [name for name, hit in zip(names, hits.tolist(), strict=True) if not hit]
            names = [name for name in names if name not in left_out]
            if not left_out or not names:
                break
            weights, index = self.choose(answer, new, names, rule, kept)
            weights = zero_tie(weights, own_parameters(self[name] for name in left_out))
        return weights, index

    def choose(self, answer, new, names, rule, kept):
        """Weights and index [T, K] by the routing rule over base rows and those of `names`."""
        of_all = {
            part: None
            if own is None
            else torch.cat([own.detach().reshape(-1), *(getattr(self[n], part) for n in names)])
            for part, own in kept.items()
        }
        scopes, lead = [self.scope([name], answer[0]) for name in names], self[names[0]]
        _, weights, index = route(
            answer,
            torch.cat([new[name] for name in names], dim=-1),
            rule,
            selection=lead.config.selection,  # adapters that share tokens select alike; only one alone calibrates
            calibrate=lead.config.calibration,
            calibration=lead.calibration,
            correction=of_all["correction_bias"],
            scope=scopes[0] if len(names) == 1 else scopes,
            expert_scale=of_all["scale"],
            sizes=[self[name].num_new for name in names],
        )
        return weights, self.placed(index, names)

    def placed(self, index, names):
        """`index`, whose new experts are counted over `names` alone, counted over all adapters of this pass."""
        spans = self.spans()
        if list(spans) == names:
            return index
        places = torch.cat([torch.arange(*spans[name]) for name in names]).to(index.device)
        is_new = index >= self.num_base
        return torch.where(is_new, places[(index - self.num_base).clamp(min=0)], index)


class ExtendedRouter:
    """Mixed in before a base router's class."""

    def forward(self, hidden_states, *args, **kwargs):
        given = next(iter((*args, *kwargs.values())), None)
        return self.moextend(self, hidden_states, super().forward(hidden_states, *args, **kwargs), given)


class ExtendedExperts:
    """Mixed in before a base experts' class; `moextend` is the same class again, holding the N new experts."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """[T, H], [T, K], [T, K] -> [T, H]. Where no token selects a new expert, this is the base's own call."""
        index, weights = top_k_index, top_k_weights
        num_base, spans = self.moextend.num_base, self.moextend.spans()
        if not bool((index >= num_base).any()):
            return zero_tie(super().forward(hidden_states, index, weights), own_parameters(self.moextend.values()))
        pairs, idle = hidden_states.new_zeros(index.numel(), hidden_states.shape[-1]), set(self.moextend) - set(spans)
        parts = [(super().forward, (0, num_base)), *((self.moextend[name], span) for name, span in spans.items())]
        for experts, (first, stop) in parts:
            chosen = ((index >= first) & (index < stop)).reshape(-1).nonzero().squeeze(-1)
            if len(chosen):
                output = run_pairs(experts, hidden_states, index, weights, chosen, first)
                pairs = pairs.index_copy(0, chosen, output.to(pairs.dtype))
            elif isinstance(experts, nn.Module):
                pairs = zero_tie(pairs, own_parameters([experts]))
        pairs = zero_tie(pairs, own_parameters(self.moextend[name] for name in idle))
        return pairs.view(*index.shape, -1).sum(dim=1)


def own_parameters(modules):
    """Parameters of the modules themselves: what they share with the base's is left out."""
    return [parameter for module in modules for parameter in module.parameters(recurse=False)]


def run_pairs(experts, hidden_states, index, weights, chosen, first):
    """Runs only the chosen (token, slot) pairs, each as a row with one expert: -> [len(chosen), H].

    Any experts implementation takes such rows; none has to know of slots that it should skip.
    """
    rows = hidden_states[chosen // index.shape[1]]
    dtype = experts.down_proj.dtype if isinstance(experts, nn.Module) else rows.dtype
    expert = index.reshape(-1)[chosen].unsqueeze(-1) - first
    return experts(rows.to(dtype), expert, weights.reshape(-1)[chosen].unsqueeze(-1))


def zero_tie(output, parameters):
    """`output`, tied to those of `parameters` that train with gradient zero.

    A step that does not use them would leave their gradient `None` on this process and not on another: distributed
    training hangs or steps differently.
    """
    trained = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    if not trained:
        return output
    nothing = sum(p.reshape(-1)[:0].sum() for p in trained)  # of no element: 0 * inf would be NaN
    return output + nothing.to(output.device, output.dtype)


@cache
def extended_class(mixin, base_class):
    """`base_class` with `mixin` before it, one class for all. No import finds it, so pickling makes it anew."""

    def reduce(module, protocol):
        return extended_instance, (mixin, base_class), module.__dict__

    name = f"{mixin.__name__}{base_class.__name__}"
    own = {"__module__": base_class.__module__, "__reduce_ex__": reduce, "moextend_base": base_class}
    return type(name, (mixin, base_class), own)


def extended_instance(mixin, base_class):
    """An empty instance, which unpickling and `deepcopy` fill."""
    extended = extended_class(mixin, base_class)
    return extended.__new__(extended)


def swap_class(module, new_class):
    """Gives `module` another class in place. accelerate's hooks keep the old bound forward, so that is renewed too."""
    module.__class__ = new_class
    if hasattr(module, "_old_forward"):
        module._old_forward = new_class.forward.__get__(module)


def input_device(base):
    """Where a base takes its token ids: offloaded embeddings lie elsewhere (on meta) between passes."""
    embedding = base.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return torch.device(embedding.weight.device if device is None else device)


def attach(decoder, state, rule):
    """Swaps the classes of every MoE router of `decoder` that has its own yet; layers without new experts are only
    listened to."""
    for index, layer in find_moe_layers(decoder).items():
        if "moextend" not in layer.router._modules:
            swap_class(layer.router, extended_class(ExtendedRouter, type(layer.router)))
            layer.router.moextend = RouterExtension(index, layer.num_experts, rule, state)


def add_experts(layer, name, sources, config):
    """Adds new experts of the adapter `name` to one attached layer: copies of `sources`, one each.

    Raises:
        ValueError: the adapter has new experts in the layer already.
    """
    extension = layer.router.moextend
    if name in extension:
        raise ValueError(f"Layer {extension.layer} has new experts already; a layer is extended once.")
    values, rows = start_values(layer, sources, config, extension.rule), NewRows(len(sources), config)
    rows.calibration = values.get("calibration")
    fixed = config.selection == "exclusive" and len(sources) == 1  # its weight is the base's sum: no gradient
    for part, value in values["router"].items():
        is_buffer = part in rows._buffers
        setattr(rows, part, value if is_buffer else nn.Parameter(value, requires_grad=not fixed))
    experts = sibling(layer.experts, values["experts"], num_experts=len(sources), num_new=len(sources))
    if "moextend" not in layer.experts._modules:
        swap_class(layer.experts, extended_class(ExtendedExperts, type(layer.experts)))
        layer.experts.moextend = Additions(layer.num_experts, extension.state)
    extension[name], layer.experts.moextend[name] = rows, experts


def remove_experts(layer, name):
    """Takes the new experts of the adapter `name` out of one layer again, if it has any there."""
    if name in layer.router.moextend:
        del layer.router.moextend[name], layer.experts.moextend[name]
        if not len(layer.experts.moextend):
            del layer.experts._modules["moextend"]
            swap_class(layer.experts, plain_class(layer.experts))


def add_gate(layers, name, config):
    """Puts a closed `TokenGate` into the adapter's lowest extended layer, unless it is there."""
    rows = layers[min(config.extended_layers)].router.moextend[name]
    if rows.gate is None:
        rows.gate = TokenGate(rows.weight.shape[-1], config.gate_hidden_size, device=rows.weight.device)


def start_values(layer, sources, config, rule):
    """Where every new tensor of a layer starts, in float32: part -> name -> value; the calibration as a module.

    | tensor | start | why |
    |---|---|---|
    | expert | copy of its source expert | Eq. 8: knows what the base knows |
    | router row, bias, correction bias, scale | copy of its source's | Eq. 8: chosen and weighed where its source is |
    | calibration fc1 | uniform, 1/sqrt(E + N) (nn.Linear's) | something to learn from |
    | calibration fc2 | zero | identity at first |
    | gate | `TokenGate`: last layer zero, bias -1 | closed: an untrained adapter is the base, bit for bit |
    """
    with materialised(layer.experts), materialised(layer.router) as router:
        check_one_an_expert(layer)
        experts = {name: copy_rows(p, sources) for name, p in layer.experts._parameters.items() if p is not None}
        own = {
            "weight": tensor_at(router, rule.rows),
            "bias": tensor_at(router, bias_path(rule)),
            "scale": tensor_at(router, rule.expert_scale) if rule.expert_scale else None,
        }
        rows = {name: copy_rows(tensor, sources) for name, tensor in own.items() if tensor is not None}
    correction = correction_of(layer, rule)
    if correction is not None:
        rows["correction_bias"] = copy_rows(correction, sources)
    values = {"experts": experts, "router": rows}
    if config.calibration != "none":
        device = rows["weight"].device
        calibration = Calibration(layer.num_experts + len(sources), config.calibration_hidden_size, device=device)
        nn.init.zeros_(calibration.fc2.weight)
        values["calibration"] = calibration
    return values


def check_one_an_expert(layer):
    """Refuses experts with a parameter that does not hold one part for each expert.

    Raises:
        ValueError: names it.
    """
    for name, p in layer.experts.named_parameters(recurse=False):
        if p.dim() == 0 or len(p) != layer.num_experts:
            raise ValueError(
                f"{type(layer.experts).__name__}.{name} has the shape {list(p.shape)}, not one part for each of the "
                f"{layer.num_experts} experts, so new experts can't be copied from it: this family can't be extended."
            )


def copy_rows(tensor, sources):
    """Rows `sources` of a base tensor [E, ...], as float32 of their own."""
    return tensor.detach()[sources].to(torch.float32, copy=True)


def detach(decoder):
    """Takes every extension off again; the base is what it was, bit for bit."""
    for module in decoder.modules():
        if "moextend" in module._modules:
            del module._modules["moextend"]
            swap_class(module, plain_class(module))
