"""The main job end to end, on data that pip brings: what `make quickstart` and `moextend quickstart` run."""

from .run import quickstart

__all__ = ["quickstart"]
