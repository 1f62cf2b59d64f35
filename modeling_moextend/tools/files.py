"""Single files, written whole or not at all; a folder that one process holds."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ..folder_moextend import write_whole

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None


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


@contextlib.contextmanager
def made_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """The folder, made if need be with those above it; what of them is empty when the block raises goes again."""
    folder = Path(folder).absolute()
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise type(error)(f"{folder} is a file, or lies below one: name another folder.") from error
    except OSError as error:
        raise type(error)(f"{folder} can't be made ({error.strerror}): name another folder.") from error
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):  # the first that holds something, and all above it, stay
            for one in new:
                one.rmdir()
        raise


@contextlib.contextmanager
def alone_in(folder: str | os.PathLike, name: str) -> Iterator[None]:
    """Inside, no other process is in such a block of the same folder and name; the folder is made if need be.

    A file `.{name}.lock` is held, which goes with the process. Where files can't be held (Windows, some network disks)
    one goes on without.

    Raises:
        ValueError: another process is there.
    """
    path = Path(folder, f".{name}.lock")
    with made_folder(folder), open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Another process is at work in {folder} ({name}): each would write over the other's checkpoints and "
                "adapter. Wait for it, end it, or give another output_dir."
            ) from None
        except (OSError, AttributeError):
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
