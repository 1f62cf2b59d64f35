"""The command line `moextend`; also `python -m modeling_moextend.cli`."""

from .commands import main

__all__ = ["main"]
