"""Attaching an adapter to a base that was never extended: finding its routing rule, trying each layer."""

from .fresh import extend_base
from .rules import complete_rule, find_rule
from .selfcheck import self_checked

__all__ = ["complete_rule", "extend_base", "find_rule", "self_checked"]
