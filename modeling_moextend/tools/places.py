"""Names that mean something everywhere, and paths that do so on this machine alone."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def hub_id(name: str | None) -> str | None:
    """`name` if it can be a Hub id, None for nothing, a local folder or file, or anything the Hub would refuse."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def local_paths(value: Any, entry: str = "") -> Iterator[tuple[str, str]]:
    """(entry, path) of every absolute path in JSON's `value` that is there, or that an entry for a place holds."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from local_paths(inner, f"{entry}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from local_paths(inner, entry)
    elif isinstance(value, str) and len(Path(value).parts) > 2 and os.path.isabs(value):
        if entry.endswith(("path", "file", "dir")) or os.path.exists(value):
            yield entry, value
