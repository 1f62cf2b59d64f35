"""The one door from shipped code to the package, for what loading, running and training on never need."""

import importlib


def from_package(module, purpose):
    """A module of the package, e.g. "publishing.hub"; `purpose`: what needs it, for the error.

    Raises:
        ImportError: the package (or what that module needs) is not installed.
    """
    try:
        return importlib.import_module(f"modeling_moextend.{module}")
    except ImportError as error:
        raise ImportError(f"{purpose} needs the moextend package: pip install 'moextend[train]' ({error}).") from error
