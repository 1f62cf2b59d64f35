"""The one door from shipped code to the package, for what loading, running and training on never need."""

import importlib
from types import ModuleType


def from_package(module: str, purpose: str) -> ModuleType:
    """A module of the package, e.g. "publishing.hub". `ImportError`, with the `purpose`: it is not installed."""
    try:
        return importlib.import_module(f"modeling_moextend.{module}")
    except ImportError as error:
        raise ImportError(f"{purpose} needs the moextend package: pip install 'moextend[train]' ({error}).") from error
