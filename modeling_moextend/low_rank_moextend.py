"""Low-rank new experts (`expert_rank`): source experts plus a delta lora_B @ lora_A, of which only that is stored.

Letters: E base experts, N new experts of a layer, r their rank. A stack is a base's 3-D parameter: [E, out, in], or
[E, in, out] where the family transposes it.
"""

import contextlib

import torch
from torch import nn

from .families_moextend import sibling


def expert_shapes(experts, num_new, rank=None):
    """Role -> shape of the tensors of `num_new` new experts beside the module `experts`: whole, or of a stack lora_A
    [N, r, in] and lora_B [N, out, r]. `ValueError`: a rank above a stack's smaller side, or no stack."""
    own = {name: p.shape[1:] for name, p in experts._parameters.items() if p is not None}
    stacks = {name: size for name, size in own.items() if rank is not None and len(size) == 2}
    if rank is not None and not stacks:
        raise ValueError(f"{type(experts).__name__} has no 3-D weights, so expert_rank has no meaning: leave it out.")
    shapes = {name: (num_new, *size) for name, size in own.items() if name not in stacks}
    for name, size in stacks.items():
        if rank > min(size):
            raise ValueError(
                f"expert_rank={rank} is above {min(size)}, the smaller side of {type(experts).__name__}.{name} "
                f"({size[0]} x {size[1]} an expert), and a delta can't have a higher rank: give 1 to {min(size)}, or "
                "leave expert_rank out, which makes whole copies."
            )
        size_in, size_out = size if experts.is_transposed else size[::-1]
        shapes |= {f"{name}.lora_A": (num_new, rank, size_in), f"{name}.lora_B": (num_new, size_out, rank)}
    return shapes


def whole_weights(source, lora_A, lora_B, transposed):
    """`source` [N, out, in] (or transposed) plus lora_B @ lora_A: computed in float32 or wider, rounded once, to the
    wider dtype of both."""
    dtype = torch.promote_types(source.dtype, lora_A.dtype)
    source, lora_A, lora_B = (part.to(torch.promote_types(dtype, torch.float32)) for part in (source, lora_A, lora_B))
    factors = (lora_A.mT, lora_B.mT) if transposed else (lora_B, lora_A)
    kind = source.device.type
    autocast = torch.amp.is_autocast_available(kind)
    with torch.autocast(kind, enabled=False) if autocast else contextlib.nullcontext():
        return torch.baddbmm(source, *factors).to(dtype)


class LowRankExperts(nn.Module):
    """N new experts of one adapter in one layer: the factors of their deltas, a `ParameterDict` a stack, and whole
    biases where the family has them. `sources`: the source expert of each. What runs is `whole`."""

    def __init__(self, tensors, sources):
        super().__init__()
        self.sources, self.merged = list(sources), None
        for role, tensor in sorted(tensors.items()):  # however they come: optimiser states go by it
            name, _, factor = role.partition(".")
            if not factor:
                self.register_parameter(name, nn.Parameter(tensor))
                continue
            if name not in self._modules:
                self.add_module(name, nn.ParameterDict())
            self._modules[name][factor] = nn.Parameter(tensor)

    def whole(self, experts, keep=True):
        """A module of the class of `experts`, the base's module, with the N experts whole: any experts implementation
        runs it, and gradients reach the factors. Where none are asked for it is kept until something changes."""
        parameters = list(self.parameters())
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            self.merged = None
            return self.merge(experts)
        if torch.compiler.is_compiling():
            return self.merge(experts)
        stacks = [p for p in experts._parameters.values() if p is not None]  # offloaded ones lie elsewhere every time
        state = [self.training, *map(state_of, parameters), *(state_of(stack)[1:] for stack in stacks)]
        merged = self.merged
        if merged is None or merged[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                merged = state, self.merge(experts), [p.detach() for p in parameters]  # whose memory is not used anew
            sharded = getattr(self, "_is_fsdp_managed_module", False)  # there, each process would hold all of it
            self.merged = merged if keep and not sharded else None
        return merged[1]

    def merge(self, experts):
        weights = dict(self._parameters)
        for name, factors in self._modules.items():
            stack = experts._parameters[name].detach()
            source = torch.stack([stack[number] for number in self.sources])
            weights[name] = whole_weights(source, factors["lora_A"], factors["lora_B"], experts.is_transposed)
        num_new = len(self.sources)
        return sibling(experts, {}, num_experts=num_new, num_new=num_new, training=self.training, **weights)

    def train(self, mode=True):
        """Training needs the memory of what is kept."""
        self.merged = None if mode else self.merged
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self.merged = None  # dtype or device may change
        return super()._apply(*args, **kwargs)

    def __getstate__(self):
        return {**self.__dict__, "merged": None}


def state_of(tensor):
    """What is another where a tensor was written to, moved or cast."""
    return tensor.data_ptr(), tensor.dtype, tensor.device, None if tensor.is_inference() else tensor._version
