"""Names that mean something everywhere, paths that do so on this machine alone, and whether anything is there."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig

from ..adapter_file_moextend import check_source


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


def check_folder_or_id(what: str, given: str | os.PathLike) -> None:
    """Refuses what can be neither a folder nor a Hub id, as a place where `what` lies.

    Raises:
        ValueError: no name of either, or a file.
        OSError: there is no such folder, and it can't be a Hub id.
    """
    check_source(what, given)
    if not os.path.exists(given) and hub_id(str(given)) is None:
        raise OSError(f"{what} {str(given)!r} is no folder here, and no Hub id like owner/name.")


def check_location(role: str, name_or_path: str | os.PathLike, **hub_kwargs: Any) -> None:
    """Refuses a base, encoder or adapter that is not where the user says; reads nothing but its config.json.

    Args:
        role: what the argument is called, for the message.

    Raises:
        ValueError: no such folder, one without config.json, or a file.
        OSError: the Hub can't be read, or has no such model.
    """
    path, shown = Path(name_or_path), f"{role}={str(name_or_path)!r}"
    if path.is_dir():
        if not (path / (hub_kwargs.get("subfolder") or "") / "config.json").is_file():
            raise ValueError(f"{shown}: the folder holds no config.json, so no model that was saved there.")
    elif path.exists():
        raise ValueError(f"{shown} is a file: give a folder or a Hub id.")
    elif hub_id(str(name_or_path)) is None:
        raise ValueError(f"{shown}: there is no such folder, and it is no Hub id like me/my-model.")
    else:
        try:
            PreTrainedConfig.get_config_dict(name_or_path, **hub_kwargs)
        except (OSError, ValueError) as error:
            raise OSError(f"{shown} is no folder here, and can't be read from the Hub: {error}") from error
