"""The metrics, each an `evaluate.Metric` in a file of its own, and how to load them without a hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import evaluate

METRICS = Path(__file__).parent


def load_metric(name: str) -> evaluate.Metric:
    """An `evaluate.Metric` of this package: "base_retention", "exact_match" or "vqa_accuracy". Needs no hub.

    Raises:
        ValueError: another name.
        ImportError: the evaluate library is missing, or hidden by another module of that name.
    """
    known = sorted(path.stem for path in METRICS.glob("[!_]*.py"))
    if name not in known:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(known)}.")
    try:
        import evaluate
    except ImportError as error:
        raise ImportError("The metrics need the evaluate library: pip install 'moextend[train]'") from error
    if not hasattr(evaluate, "Metric"):
        raise ImportError(
            f"The metrics need the evaluate library, but {evaluate.__file__} has its name and comes first on the "
            "path: rename that file."
        )
    return evaluate.load(str(METRICS / f"{name}.py"), keep_in_memory=True)
