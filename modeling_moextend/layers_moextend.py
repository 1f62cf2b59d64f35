"""Extended layers: a base's routers and experts, with new experts beside them.

Letters: T tokens, E base experts, N new experts of a layer, K experts a token selects, H hidden size.

A base's router and experts modules keep their parameters, their names and their place; only their class is swapped for
a subclass that asks one child module, `moextend`, what the new tensors add: it holds, by adapter name, the rows or the
experts of every adapter that extends the layer. Wrapping them instead would change every state-dict key and hide the
router from transformers' output recorder. Detaching swaps the classes back.
"""

import contextlib
import re
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .gate_moextend import TokenGate
from .routing_moextend import Calibration, RoutingRecord, explains, family_rule, probe_rule, route

EXPERTS_INTERFACE = ("_is_expert_parallel", "has_gate", "is_transposed", "down_proj")
ROUTER_NAMES = ("gate", "router")
CORRECTION = "e_score_correction_bias"
GROUPS = ("num_group", "n_group")


class MoELayer(NamedTuple):
    """The two modules of one MoE layer that matter here, and the number E of its base experts."""

    router: nn.Module
    experts: nn.Module
    num_experts: int


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
    """New router rows [N, H] of one adapter in one layer, with bias, correction bias [N] and calibration where there
    are any. With `scope="gate"` the adapter's lowest layer also holds the `TokenGate` that decides for all of them.
    """

    def __init__(self, num_new, config):
        super().__init__()
        self.num_new, self.config = num_new, config
        self.weight = self.bias = self.calibration = self.gate = None
        self.register_buffer("correction_bias", None)

    def forward(self, hidden_states):
        """[T, H] -> logits [T, N] in float32."""
        return F.linear(hidden_states.to(self.weight.dtype), self.weight, self.bias).float()


class RouterExtension(Additions):
    """What adapters add to one router. Without any it only records what the base's router decides, so that every MoE
    layer is heard."""

    def __init__(self, layer, num_base, rule, state):
        super().__init__(num_base, state)
        self.layer, self.rule = layer, rule

    def forward(self, router, hidden_states, answer):
        """The base router's answer (logits [T, E], weights [T, K], index [T, K]), extended by the new rows."""
        names = list(self.spans())
        gates = [name for name in names if self[name].gate is not None and name in self.state.gated]
        margins = {name: self.decide(name, hidden_states) for name in gates}
        used = [name for name in names if self.in_use(name)]
        if used:
            answer = self.extend(router, hidden_states.reshape(-1, hidden_states.shape[-1]), answer, used)
        if self.state.records is not None:
            num_new, scope = answer[0].shape[-1] - self.num_base, self.scope(names or self.state.names, answer[0])
            record = RoutingRecord(answer[0], answer[2], scope, self.num_base, num_new, margins)
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

    def extend(self, router, hidden_states, answer, used):
        """`answer`, extended by the rows of this pass's adapters; only experts of the adapters `used` are chosen."""
        new = {name: self[name](hidden_states) for name in self.spans()}
        _, weights, index = answer
        for group in self.state.groups:
            names = [name for name in new if name in group and name in used]
            if not names:
                continue
            found = self.share(router, answer, new, names)
            mine = self.scope(names, weights) if len(self.state.groups) > 1 else None
            if mine is not None:  # other tokens are another group's
                found = [torch.where(mine.unsqueeze(-1), *pair) for pair in zip(found, (weights, index), strict=True)]
            weights, index = found
        return torch.cat([answer[0].float(), *new.values()], dim=-1), weights, index

    def share(self, router, answer, new, names):
        """Weights and index [T, K] where the adapters `names` share tokens.

        Adapters of which no token selects an expert are left out and the others asked again, so that a batch which
        does not use an adapter is computed as if that were not loaded, to the last bit.
        """
        weights, index = self.choose(router, answer, new, names)
        while len(names) > 1:
            spans = self.spans()
            hits = torch.stack([((index >= spans[name][0]) & (index < spans[name][1])).any() for name in names])
            left_out = [name for name, hit in zip(names, hits.tolist(), strict=True) if not hit]
            names = [name for name in names if name not in left_out]
            if not left_out or not names:
                break
            weights, index = self.choose(router, answer, new, names)
            weights = zero_tie(weights, [p for name in left_out for p in self[name].parameters(recurse=False)])
        return weights, index

    def choose(self, router, answer, new, names):
        """Weights and index [T, K] by the routing rule over base rows and those of `names`."""
        correction = correction_of(router)
        if correction is not None:
            correction = torch.cat([correction, *(self[name].correction_bias for name in names)])
        scopes, lead = [self.scope([name], answer[0]) for name in names], self[names[0]]
        _, weights, index = route(
            answer,
            torch.cat([new[name] for name in names], dim=-1),
            self.rule,
            selection=lead.config.selection,  # adapters that share tokens select alike; only one alone calibrates
            calibrate=lead.config.calibration,
            calibration=lead.calibration,
            correction=correction,
            scope=scopes[0] if len(names) == 1 else scopes,
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
        return self.moextend(self, hidden_states, super().forward(hidden_states, *args, **kwargs))


class ExtendedExperts:
    """Mixed in before a base experts' class; `moextend` is the same class again, holding the N new experts."""

    def forward(self, hidden_states, index, weights):
        """[T, H], [T, K], [T, K] -> [T, H]. Where no token selects a new expert, this is the base's own call."""
        num_base, spans = self.num_experts, self.moextend.spans()
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
    return type(name, (mixin, base_class), {"__module__": base_class.__module__, "__reduce_ex__": reduce})


def base_class(extended):
    """The class that `extended_class` was given: after the extended class itself and its mixin."""
    return extended.__mro__[2]


def extended_instance(mixin, base_class):
    """An empty instance, which unpickling and `deepcopy` fill."""
    extended = extended_class(mixin, base_class)
    return extended.__new__(extended)


def swap_class(module, new_class):
    """Gives `module` another class in place. accelerate's hooks keep the old bound forward, so that is renewed too."""
    module.__class__ = new_class
    if hasattr(module, "_old_forward"):
        module._old_forward = new_class.forward.__get__(module)


def find_moe_layers(decoder):
    """The MoE layers of a base: decoder layer index -> `MoELayer`.

    Raises:
        ValueError: the model has no MoE layers, or has some without transformers' router/experts interface.
    """
    layers = {}
    for name, module in decoder.named_modules():
        experts = getattr(module, "experts", None)
        routers = [getattr(module, router, None) for router in ROUTER_NAMES]
        router = next((router for router in routers if isinstance(router, nn.Module)), None)
        place = re.search(r"(?:^|\.)(\d+)\.", f"{name}.")
        if place and router is not None and all(hasattr(experts, attribute) for attribute in EXPERTS_INTERFACE):
            layers[int(place.group(1))] = MoELayer(router, experts, experts.down_proj.shape[0])
    if layers:
        return layers
    name = type(decoder).__name__
    if any("experts" in type(module).__name__.lower() for module in decoder.modules()):
        raise ValueError(
            f"{name} has experts, but not through transformers' router/experts interface (a module with 3-D "
            "`down_proj` that is called with top_k_index and top_k_weights), so this family can't be extended."
        )
    raise ValueError(f"{name} has no MoE layers: MoExtend adds experts to a Mixture-of-Experts model.")


@contextlib.contextmanager
def materialised(module):
    """Makes offloaded weights of `module` readable inside the `with` block, by its own accelerate hook."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
    try:
        yield module
    finally:
        if hook is not None:
            hook.post_forward(module, torch.empty(0))


def input_device(base):
    """Where a base takes its token ids: offloaded embeddings lie elsewhere (on meta) between passes."""
    embedding = base.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return torch.device(embedding.weight.device if device is None else device)


def correction_of(router):
    """The correction bias [E] of a router (DeepSeek-V3, Eq. 16), or `None`.

    Families keep it in a buffer, in a parameter, or in a child module `moe_statics` (ernie4_5_moe).
    """
    owner = getattr(router, "moe_statics", router)
    if getattr(owner, CORRECTION, None) is None:
        return None
    with contextlib.nullcontext() if owner is router else materialised(owner):
        return getattr(owner, CORRECTION).detach().reshape(-1)


def sibling(module, parameters, buffers=(), **attributes):
    """A module of the same class and settings with tensors of its own; `module` and its tensors stay untouched."""
    kind = base_class(type(module)) if "moextend" in module._modules else type(module)
    twin = kind.__new__(kind)
    nn.Module.__init__(twin)
    own = set(twin.__dict__) | {"forward", "_old_forward", "_hf_hook"}
    twin.__dict__.update({name: value for name, value in module.__dict__.items() if name not in own})
    for name, child in module._modules.items():
        if name != "moextend":
            twin._modules[name] = child  # activations and the like: shared, they have no weights of their own
    for name, tensor in parameters.items():
        twin.register_parameter(name, nn.Parameter(tensor))
    for name, tensor in dict(buffers).items():
        twin.register_buffer(name, tensor)
    twin.__dict__.update(attributes)
    return twin


def find_rule(model_type, layer):
    """The routing rule of this router: its family's row, checked against what the router really does.

    The check runs a float32 sibling with random rows on random tokens, so it needs no weights (meta devices) and can't
    be fooled by a checkpoint's.

    Raises:
        ValueError: the router answers otherwise than any known rule.
    """
    router = layer.router
    generator = torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=generator)
    hidden_size = router.weight.shape[-1] if getattr(router, "weight", None) is not None else 0
    error = ValueError(
        f"{type(router).__name__} ({model_type}) does not follow the router interface: logits = weight @ hidden state "
        "(+ bias), the top k of their scores (+ correction bias), and weights by a known rule (see FAMILIES in "
        "routing_moextend.py). This family can't be extended without a rule of its own."
    )
    if hidden_size == 0:
        raise error
    with torch.device("cpu"), torch.no_grad():
        rows = {name: random(p.shape) / hidden_size**0.5 for name, p in router._parameters.items() if p is not None}
        buffers = {name: torch.zeros(b.shape) for name, b in router._buffers.items() if b is not None}
        tokens = random(64, hidden_size)
        twin = sibling(router, rows, buffers).eval()
        for name in twin._modules.keys() & {"moe_statics"}:
            parameters = {key: random(p.shape) for key, p in twin.moe_statics._parameters.items()}
            twin._modules[name] = sibling(twin.moe_statics, parameters)
        correction = correction_of(twin)
        if correction is not None:
            correction.copy_(random(correction.shape) / 4)  # of the size of scores, so that both decide
        choice = correction, next((getattr(router, name) for name in GROUPS if getattr(router, name, None)), 1)
        try:
            answer = twin(tokens)
            found = probe_rule(answer, *choice)
        except Exception as cause:
            raise error from cause
        expected = F.linear(tokens, rows["weight"], rows.get("bias"))
    if found is None or not torch.allclose(answer[0], expected, rtol=1e-4, atol=1e-5):
        raise error
    row = family_rule(model_type, router)
    if row is not None and not explains(row, answer, *choice):  # several rules may explain one answer, as with K = 1
        raise ValueError(f"FAMILIES says {row} of {model_type}, but the router does {found}. Please report this.")
    return row or found


def attach(decoder, state, rule):
    """Swaps the classes of every MoE router of `decoder`; layers without new experts are only listened to."""
    for index, layer in find_moe_layers(decoder).items():
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
    values, rows = start_values(layer, sources, config), NewRows(len(sources), config)
    rows.calibration, rows.correction_bias = values.get("calibration"), values["router"].pop("correction_bias", None)
    fixed = config.selection == "exclusive" and len(sources) == 1  # its weight is the base's sum: no gradient
    for part, value in values["router"].items():
        setattr(rows, part, nn.Parameter(value, requires_grad=not fixed))
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
            swap_class(layer.experts, base_class(type(layer.experts)))


def add_gate(layers, name, config):
    """Puts a closed `TokenGate` into the adapter's lowest extended layer, unless it is there."""
    rows = layers[min(config.extended_layers)].router.moextend[name]
    if rows.gate is None:
        rows.gate = TokenGate(rows.weight.shape[-1], config.gate_hidden_size, device=rows.weight.device)


def start_values(layer, sources, config):
    """Where every new tensor of a layer starts, in float32: part -> name -> value; the calibration as a module.

    | tensor | start | why |
    |---|---|---|
    | expert | copy of its source expert | Eq. 8: knows what the base knows |
    | router row, bias, correction bias | copy of its source's | Eq. 8: chosen where its source is |
    | calibration fc1 | uniform, 1/sqrt(E + N) (nn.Linear's) | something to learn from |
    | calibration fc2 | zero | identity at first |
    | gate | `TokenGate`: last layer zero, bias -1 | closed: an untrained adapter is the base, bit for bit |
    """
    with materialised(layer.experts), materialised(layer.router):
        values = {
            "experts": {name: copy_rows(p, sources) for name, p in layer.experts._parameters.items() if p is not None},
            "router": {
                name: copy_rows(p, sources)
                for name, p in layer.router._parameters.items()
                if p is not None and name != CORRECTION
            },
        }
        correction = correction_of(layer.router)
        if correction is not None:
            values["router"]["correction_bias"] = copy_rows(correction, sources)
    if config.calibration != "none":
        device = values["router"]["weight"].device
        calibration = Calibration(layer.num_experts + len(sources), config.calibration_hidden_size, device=device)
        nn.init.zeros_(calibration.fc2.weight)
        values["calibration"] = calibration
    return values


def copy_rows(tensor, sources):
    """Rows `sources` of a base tensor, as float32 of their own."""
    return tensor.detach()[sources].to(torch.float32, copy=True)


def detach(decoder):
    """Takes every extension off again; the base is what it was, bit for bit."""
    for module in decoder.modules():
        if "moextend" in module._modules:
            del module._modules["moextend"]
            swap_class(module, base_class(type(module)))
