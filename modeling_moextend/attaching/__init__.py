"""Adding new experts: to a base that was never extended, on top of an adapter, or to one.

None of this is needed to load an adapter, run it or go on training it, so none of it ships with one.
"""

from .choices import routing_choices
from .extending import add_adapter, extend
from .fresh import from_base
from .rules import complete_rule, find_rule
from .selfcheck import self_checked
from .start_values import start_tensors

__all__ = [
    "add_adapter",
    "complete_rule",
    "extend",
    "find_rule",
    "from_base",
    "routing_choices",
    "self_checked",
    "start_tensors",
]
