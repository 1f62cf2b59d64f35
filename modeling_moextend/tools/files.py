"""Single files, written whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from ..folder_moextend import write_whole


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside `path` and renames over it, so that `path` is never half a file."""
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_whole(unfinished, write)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def copy_file(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies a file."""
    replace_file(Path(target), lambda unfinished: shutil.copyfile(source, unfinished))


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text in UTF-8."""
    replace_file(Path(path), lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
