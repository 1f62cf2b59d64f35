"""Tools for adapters and bases as they lie on disk: inspect, compare, verify, merge."""
