"""Running adapters for many requests."""

from .fused import fuse, unfuse

__all__ = ["fuse", "unfuse"]
