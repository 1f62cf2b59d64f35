"""What kind a model is; its evaluation mode and another dtype, and back."""

import contextlib
from collections.abc import Iterator

from torch import nn


def is_moextend(model: object) -> bool:
    """Whether `model` can say what its routers do; a model loaded as remote code is no instance of our class."""
    return getattr(getattr(model, "config", None), "model_type", None) == "moextend"


@contextlib.contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Inside, modules and their children are in evaluation mode; afterwards each is in the mode it was.

    Set by attribute, as `train()` does it: some models override that.
    """
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def dtypes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards every parameter, gradient and buffer is bit for bit what it was, where `model.to(dtype)` was called
    inside; its device is the one that the block left it on. What was cast is in memory twice meanwhile."""
    parameters = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
    values = [(tensor, tensor.data) for tensor in parameters]
    buffers = [(owner, dict(owner._buffers)) for owner in model.modules()]
    try:
        yield
    finally:
        for tensor, value in values:
            if tensor.dtype != value.dtype:
                tensor.data = value.to(tensor.device)
        for owner, known in buffers:
            for name, buffer in owner._buffers.items():
                if buffer is not None and buffer.dtype != (before := known.get(name, buffer)).dtype:
                    owner._buffers[name] = before.to(buffer.device)
