"""The command `moextend`; also `python -m moextend_cli`.

It stands beside the library, whose import takes seconds: --help and shell completion need nothing of it.
"""

from .main import main

__all__ = ["main"]
