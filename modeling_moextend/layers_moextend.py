"""Extended layers: a base's routers and experts, with new experts beside them.

Letters: T tokens, E base experts, N new experts of a layer, K experts a token selects, H hidden size.

A base's router and experts modules keep their parameters, their names and their place; only their class is swapped for
a subclass that asks one child module, `moextend`, what the new tensors add. Wrapping them instead would change every
state-dict key and hide the router from transformers' output recorder. Detaching swaps the classes back.
"""

import contextlib
import threading
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


class PassState(threading.local):
    """What the forward passes of one thread tell every MoE layer; each thread has values of its own.

    Attributes:
        enabled: whether new experts take part; `None`: as `RoutingState.switched_on` says.
        scope: [T] bool, tokens that may use new experts; `None` for every token.
        gated: with `scope="gate"`, the `GatedPass` from which the gate makes `scope`.
        records: filled with a `RoutingRecord` a layer while someone listens.
    """

    enabled = None
    scope = None
    gated = None
    records = None


class RoutingState:
    """One object a model, shared by its MoE layers: the switch for all threads, and the pass of each thread."""

    def __init__(self, switched_on=True):
        self.switched_on, self.now = switched_on, PassState()

    def __reduce__(self):
        return RoutingState, (self.switched_on,)  # a pass under way is not copied or pickled along

    @property
    def enabled(self):
        return self.switched_on if self.now.enabled is None else self.now.enabled

    @property
    def scope(self):
        return self.now.scope

    @property
    def gated(self):
        return self.now.gated

    @property
    def records(self):
        return self.now.records

    @contextlib.contextmanager
    def using(self, **values):
        """Sets attributes of this thread's `PassState` for the length of a `with` block."""
        before = [(name, getattr(self.now, name)) for name in values]
        for name, value in values.items():  # one by one: torch.compile can't trace `__dict__.update`
            setattr(self.now, name, value)
        try:
            yield
        finally:
            for name, value in before:
                setattr(self.now, name, value)

    def checkpoint_contexts(self, other=None):
        """`context_fn` of `torch.utils.checkpoint`: the recomputation in backward sees what its forward saw.

        Without it a layer recomputed after the forward pass would route every token as if in scope. `other` is a
        `context_fn` to run inside this one. The values are set in the thread that recomputes.
        """
        forward, recompute = other() if other else (contextlib.nullcontext(), contextlib.nullcontext())
        seen = {"enabled": self.enabled, "scope": self.scope, "gated": self.gated, "records": None}

        @contextlib.contextmanager
        def replay():
            with self.using(**seen), recompute:
                yield

        return forward, replay()


class RouterExtension(nn.Module):
    """New router rows [N, H] of one layer; bias, correction bias, scale [N] and calibration where there are any.

    With N = 0 it only records what the base's router decides, so that every MoE layer is heard. With `scope="gate"`
    the lowest extended layer also holds the `TokenGate` that decides for itself and every layer above.
    """

    def __init__(self, layer, num_base, rule, state, config):
        super().__init__()
        self.layer, self.num_base, self.rule, self.state = layer, num_base, rule, state
        self.num_new = 0
        self.config = config
        self.weight = self.bias = self.calibration = self.gate = None
        self.register_buffer("correction_bias", None)
        self.register_buffer("scale", None)

    def forward(self, router, hidden_states, answer, given=None):
        """The base router's answer (logits [T, E], weights [T, K], index [T, K]), extended by the new rows.

        `given`: what the router got beside hidden states; in some families the correction bias [E].
        """
        logits, margins = None, None
        if self.num_new and self.state.enabled:
            if self.gate is not None and self.state.gated is not None:
                margins = self.decide(hidden_states)
            if self.in_use():
                logits, weights, index, *rest = self.extend(router, hidden_states.flatten(0, -2), answer, given)
                told = logits if self.rule.answers == "logits" else SCORES[self.rule.score](logits)
                answer = told, weights, index, *rest
        if self.state.records is not None:
            if logits is None:  # the logarithm of a softmax has the same softmax
                logits = answer[0] if self.rule.answers == "logits" else answer[0].log()
            num_new = logits.shape[-1] - self.num_base
            record = RoutingRecord(logits, answer[2], self.scope(logits.device), self.num_base, num_new, margins)
            self.state.records[self.layer] = record
        return answer

    def decide(self, hidden_states):
        """Lets the gate set the scope of this pass; returns its margins [T]."""
        gated = self.state.gated
        margins = self.gate(hidden_states.reshape(*gated.is_real.shape, -1), gated)
        in_scope = (margins > self.config.gate_threshold) & gated.is_real.to(margins.device)
        self.state.now.scope = in_scope.detach().reshape(-1)
        return margins.reshape(-1)

    def in_use(self):
        """False where no token is in scope and nobody needs a gradient or the new logits: the base's answer stands."""
        if self.state.scope is None:
            return self.config.scope != "gate"  # a gate that was not asked lets no token through
        if self.state.records is not None or torch.is_grad_enabled():
            return True
        return bool(self.state.scope.any())

    def scope(self, device):
        """[T] bool on `device`, or `None`."""
        return None if self.state.scope is None else self.state.scope.to(device)

    def logits(self, router, hidden_states, told):
        """The base's logits [T, E] and new ones [T, N] of hidden states [T, H]; `told`: what the router answers."""
        rule, inputs = self.rule, INPUTS[self.rule.inputs](router, hidden_states)
        new_logits = cap(F.linear(inputs.to(self.weight.dtype), self.weight, self.bias).float(), rule)
        if rule.answers == "logits":
            return told, new_logits
        rows = router.get_submodule(rule.rows.rpartition(".")[0])  # scores do not say how far apart new logits are
        return rows(inputs), new_logits

    def extend(self, router, hidden_states, answer, given):
        """`route` for hidden states [T, H], with what this router keeps of every expert."""
        rule = self.rule
        base_logits, new_logits = self.logits(router, hidden_states, answer[0])
        correction = expert_scale = None
        if self.correction_bias is not None:
            own = given if ":" in rule.correction else tensor_at(router, rule.correction)
            correction = torch.cat([own.detach().reshape(-1), self.correction_bias])
        if self.scale is not None:
            expert_scale = torch.cat([tensor_at(router, rule.expert_scale), self.scale])
        if rule.shared:
            rule = sharing(rule, base_logits, answer)
        extended = route(
            (base_logits, *answer[1:3]),
            new_logits,
            rule,
            selection=self.config.selection,
            calibrate=self.config.calibration,
            calibration=self.calibration,
            correction=correction,
            scope=self.scope(answer[0].device),
            expert_scale=expert_scale,
        )
        return (*extended, left_to_shared(answer, extended[1])) if self.rule.shared else extended


class ExtendedRouter:
    """Mixed in before a base router's class."""

    def forward(self, hidden_states, *args, **kwargs):
        given = next(iter((*args, *kwargs.values())), None)
        return self.moextend(self, hidden_states, super().forward(hidden_states, *args, **kwargs), given)


class ExtendedExperts:
    """Mixed in before a base experts' class; `moextend` is the same class again, holding the N new experts."""

    def forward(self, hidden_states, index, weights):
        """[T, H], [T, K], [T, K] -> [T, H]. Where no token selects a new expert, this is the base's own call."""
        num_base = self.num_experts
        new_pairs = (index >= num_base).reshape(-1).nonzero().squeeze(-1)
        if len(new_pairs) == 0:
            return zero_tie(super().forward(hidden_states, index, weights), self.moextend.parameters(recurse=False))
        base_pairs = ((index >= 0) & (index < num_base)).reshape(-1).nonzero().squeeze(-1)
        pairs = hidden_states.new_zeros(index.numel(), hidden_states.shape[-1])
        for experts, chosen, first in ((super().forward, base_pairs, 0), (self.moextend, new_pairs, num_base)):
            if len(chosen):
                output = run_pairs(experts, hidden_states, index, weights, chosen, first)
                pairs = pairs.index_copy(0, chosen, output.to(pairs.dtype))
        return pairs.view(*index.shape, -1).sum(dim=1)


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


def attach(decoder, config, state, rule):
    """Swaps the classes of every MoE layer of `decoder`; layers without new experts are only listened to."""
    for index, layer in find_moe_layers(decoder).items():
        swap_class(layer.router, extended_class(ExtendedRouter, type(layer.router)))
        layer.router.moextend = RouterExtension(index, layer.num_experts, rule, state, config)


def add_experts(layer, sources, config):
    """Adds new experts to one attached layer: copies of `sources`, one each.

    Raises:
        ValueError: the layer has new experts already.
    """
    extension = layer.router.moextend
    if extension.num_new:
        raise ValueError(f"Layer {extension.layer} has new experts already; a layer is extended once.")
    for part, values in start_values(layer, sources, config, extension.rule).items():
        if part == "experts":
            experts = sibling(layer.experts, values, num_experts=len(sources))
        elif part == "calibration":
            extension.calibration = values
        else:
            fixed = config.selection == "exclusive" and len(sources) == 1  # its weight is the base's sum: no gradient
            for name, value in values.items():
                if name in ("correction_bias", "scale"):
                    setattr(extension, name, value)
                else:
                    setattr(extension, name, nn.Parameter(value, requires_grad=not fixed))
    extension.num_new = len(sources)
    swap_class(layer.experts, extended_class(ExtendedExperts, type(layer.experts)))
    layer.experts.moextend = experts


def add_gate(layers, config):
    """Puts a closed `TokenGate` into the lowest extended layer, unless it is there."""
    extension = layers[min(config.extended_layers)].router.moextend
    if extension.gate is None:
        hidden_size = extension.weight.shape[-1]
        extension.gate = TokenGate(hidden_size, config.gate_hidden_size, device=extension.weight.device)


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


def copy_rows(tensor, sources):
    """Rows `sources` of a base tensor, as float32 of their own."""
    return tensor.detach()[sources].to(torch.float32, copy=True)


def detach(decoder):
    """Takes every extension off again; the base is what it was, bit for bit."""
    for module in decoder.modules():
        if "moextend" in module._modules:
            del module._modules["moextend"]
            swap_class(module, plain_class(module))
