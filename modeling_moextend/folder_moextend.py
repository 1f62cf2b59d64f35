"""An adapter's folder, changed by one process at a time and as a whole: it is the old one or the new one."""

import contextlib
import os
import secrets
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None


@contextlib.contextmanager
def all_or_nothing(folder, stale=()):
    """Yields `put(name, write)`: `write(path)` makes a file, beside its place. Nothing else changes inside the block.

    At its end files take their places, in the order in which they were put: the last one (the adapter, or the index of
    its shards) makes the folder the new one. Then adapter files that were not put go, and those named `stale`. Where
    something fails, as on a full disk, all is left as it was: an `OSError` says what failed.
    """
    folder, unfinished = Path(folder), {}
    with locked(folder):
        patterns = ("moextend_adapter*", "config.json.*.tmp", "*_moextend.py.*.tmp")  # .tmp: a killed process left it
        found = (path for pattern in (*patterns, *stale) for path in folder.glob(pattern))
        old = {path.name for path in found if path.is_file() or path.is_symlink()}

        def put(name, write):
            unfinished[name] = folder / f"{name}.{secrets.token_hex(4)}.tmp"
            write_whole(unfinished[name], write)

        try:
            yield put
            for name, path in unfinished.items():
                os.replace(path, folder / name)
        except (SafetensorError, OSError) as error:
            reason = f"The adapter can't be saved to {folder} ({error})"
            raise OSError(f"{reason}. What was there before is untouched.") from error
        finally:
            for path in unfinished.values():
                path.unlink(missing_ok=True)
        for name in sorted(old - unfinished.keys(), key=lambda name: not name.endswith(".index.json")):  # which wins
            (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder, alone=True):
    """Waits until no other process changes `folder`, and keeps those that want to waiting inside the block; readers,
    `alone=False`, may be several. The folder itself is locked, so that nothing is left behind, and the lock ends with
    the process. Where there is none (Windows, some network disks) one goes on without."""
    lock = None
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no folder, no name of one, no such lock
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError, AttributeError):
                fcntl.flock(lock, fcntl.LOCK_UN)  # closing alone would not do where a forked process has it open too
            os.close(lock)


def write_whole(path, write):
    """`write(path)`, down to the disk, readable as the user's other files are: safetensors would let nobody else."""
    path.touch()
    mode = path.stat().st_mode
    write(path)
    path.chmod(mode)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def check_link(path, folder):
    """Refuses links that lead out of the adapter's folder; in a Hub cache, to elsewhere than the blobs beside it."""
    own, target = Path(folder).resolve(), Path(path).resolve()
    blobs = [parent.parent / "blobs" for parent in own.parents if parent.name == "snapshots"]
    if os.path.isdir(folder) and not any(target.is_relative_to(allowed) for allowed in (own, *blobs)):
        raise ValueError(f"{path} is a link to {target}, outside the adapter's folder: put a copy there instead.")
