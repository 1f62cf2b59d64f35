"""A folder that changes as a whole: what else than the adapter itself a save has to get right."""

import fcntl
import os

import pytest

from modeling_moextend.folder_moextend import all_or_nothing, locked
from modeling_moextend.tools.files import write_text


def save(folder, *names):
    with all_or_nothing(folder) as put:
        for name in names:
            put(name, lambda path: path.write_text("new"))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_can_be_read_by_whom_the_user_lets_read_others(umask, tmp_path):
    def secret(path):  # as safetensors leaves it
        path.write_text("new")
        path.chmod(0o600)

    before = os.umask(umask)
    try:
        with all_or_nothing(tmp_path) as put:
            put("moextend_adapter.safetensors", secret)
        assert (tmp_path / "moextend_adapter.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    finally:
        os.umask(before)


def test_files_are_on_the_disk_before_they_take_their_places(tmp_path, monkeypatch):
    """A machine that loses its power may otherwise keep the new names and not what was in the files."""
    steps, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("replace"), replace(*paths)))
    save(tmp_path, "config.json", "moextend_adapter.safetensors")
    write_text(tmp_path / "README.md", "text")
    assert steps == ["fsync", "fsync", "replace", "replace", "fsync", "replace"]


def test_readers_share_a_folder_and_a_writer_waits(tmp_path):
    other = os.open(tmp_path, os.O_RDONLY)
    with locked(tmp_path, alone=False):
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_UN)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with locked(tmp_path), pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_what_an_earlier_save_left_goes_and_nothing_else(tmp_path):
    for name in ("moextend_adapter-00001-of-00002.safetensors", "config.json.12ab34cd.tmp", "notes.txt", "other.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "moextend_adapter-00002-of-00002.safetensors").symlink_to("cleaned cache")
    save(tmp_path, "config.json", "moextend_adapter.safetensors")
    assert names_in(tmp_path) == ["config.json", "moextend_adapter.safetensors", "notes.txt", "other.tmp"]


def test_a_write_that_fails_leaves_all_as_it_was(tmp_path):
    save(tmp_path, "moextend_adapter.safetensors")

    def full(path):
        path.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="can't be saved to .*No space left.* before is untouched"):
        with all_or_nothing(tmp_path) as put:
            put("config.json", lambda path: path.write_text("new"))
            put("moextend_adapter.safetensors", full)
    assert names_in(tmp_path) == ["moextend_adapter.safetensors"]
    assert (tmp_path / "moextend_adapter.safetensors").read_text() == "new"


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def fail(file):
        raise OSError("No space left on device")

    write_text(tmp_path / "README.md", "old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "README.md", "new")
    assert names_in(tmp_path) == ["README.md"] and (tmp_path / "README.md").read_text() == "old"
