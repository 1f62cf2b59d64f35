"""The metrics, each an `evaluate.Metric` in a file of its own, and how to load them without a hub."""

import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path

METRICS = Path(__file__).parent


def load_metric(name):
    """An `evaluate.Metric` of this package: "base_retention", "exact_match" or "vqa_accuracy". Needs no hub.

    Raises:
        ValueError: another name.
        ImportError: the evaluate library is missing.
    """
    known = sorted(path.stem for path in METRICS.glob("[!_]*.py"))
    if name not in known:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(known)}.")
    return evaluate_library().load(str(METRICS / f"{name}.py"), keep_in_memory=True)


def evaluate_library():
    """The evaluate library, also where a script called evaluate.py lies before it on the path (as in examples/).

    Raises:
        ImportError: it is not installed.
    """
    loaded = sys.modules.get("evaluate")
    if hasattr(loaded, "Metric"):
        return loaded
    sys.modules.pop("evaluate", None)
    spec = find_spec("evaluate")
    if spec is None or spec.submodule_search_locations is None:  # a lone file is no library
        spec = PathFinder.find_spec("evaluate", [p for p in sys.path if not Path(p or ".", "evaluate.py").is_file()])
    if spec is None:
        raise ImportError("The metrics need the evaluate library: pip install 'moextend[train]'")
    module = sys.modules["evaluate"] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["evaluate"]
        raise
    return module
