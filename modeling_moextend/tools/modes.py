"""What kind a model is; its evaluation mode, and back."""

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
