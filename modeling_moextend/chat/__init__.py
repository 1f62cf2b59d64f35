"""Talking to an adapter: what `moextend chat` and `moextend demo` show."""

from .session import Chat

__all__ = ["Chat"]
