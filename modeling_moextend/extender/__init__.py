"""The Extender, stage 2 of the paper: a router probe finds which layers react, and which experts to copy."""

from .router_probe import measure_router_shift, probe_config
from .router_shift import RouterShift

__all__ = ["RouterShift", "measure_router_shift", "probe_config"]
