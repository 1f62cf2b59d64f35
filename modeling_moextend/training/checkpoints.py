"""Checkpoints of a run: which of them are whole, and from which one a run goes on.

A checkpoint is written file by file. `run.json` comes last but one, once every process has written its part: it names
the other files with their sizes, and tells what the run is (see `run_record.py`). Trainer's `trainer_state.json` comes
last. A process killed, or a disk full, at any moment before leaves a checkpoint that shows it.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerState

from ..adapter_file_moextend import FILE, check_tensors, read_adapter
from ..tools.files import write_text

TRAINER_STATE = "trainer_state.json"
RECORD = "run.json"
ARCHIVES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")  # by torch.save, with checksums
NAME = re.compile(r"checkpoint-(\d+)")


class Unfinished(NamedTuple):
    """A folder that is no whole checkpoint, and why."""

    folder: Path
    problem: str

    def __str__(self) -> str:
        return f"{self.folder} is not a complete checkpoint: {self.problem}"


def begin_checkpoint(folder: Path) -> None:
    """Marks a checkpoint that is about to be written over as unfinished: half old and half new, it looked whole."""
    for name in (TRAINER_STATE, RECORD):
        (folder / name).unlink(missing_ok=True)


def write_record(folder: Path, run: dict[str, Any]) -> None:
    """Brings the checkpoint's files down to the disk, and writes their names and sizes beside `run`."""
    sizes = file_sizes(folder)
    for name in sizes:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    write_text(folder / RECORD, json.dumps({"files": sizes, "run": run}, indent=1))


def file_sizes(folder: Path) -> dict[str, int]:
    """Name -> bytes of every file in `folder` and below."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (TRAINER_STATE, RECORD))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `write_record` wrote; `None` in checkpoints of 0.1.0."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def problem_of(folder: Path) -> str | None:
    """Why a run can't go on from this checkpoint; `None` where it is whole."""
    if not folder.is_dir():
        return "there is no such folder."
    for name, check in ((TRAINER_STATE, check_state), (RECORD, check_record)):
        try:
            if name != RECORD or (folder / name).exists():
                check(folder)
        except FileNotFoundError:
            return f"it has no {name}, which is written last."
        except (OSError, ValueError, TypeError) as error:
            return f"its {name} can't be read ({error})."
    if not list(folder.glob("rng_state*.pth")):
        return "it has no rng_state.pth, as save_only_model=True leaves it: only a new run can begin there."
    record = read_record(folder)
    if record is None:
        return problem_without_record(folder)
    sizes = file_sizes(folder)
    wrong = [
        f"{name} ({sizes[name]:,} of {size:,} bytes)" if name in sizes else f"{name} (missing)"
        for name, size in record["files"].items()
        if sizes.get(name) != size
    ]
    wrong = wrong or damaged_files(folder)
    return f"not as they were written: {', '.join(wrong)}." if wrong else None


def check_state(folder: Path) -> None:
    """Refuses a state of Trainer's that is not one, with whatever error that makes."""
    state = TrainerState.load_from_json(str(folder / TRAINER_STATE))
    if type(state.global_step) is not int or state.max_steps < 1 or not isinstance(state.log_history, list):
        raise ValueError("it does not say how far the run came")


def check_record(folder: Path) -> None:
    """Refuses a record that `write_record` did not write, with whatever error that makes."""
    record = read_record(folder)
    if not isinstance(record, dict) or not all(isinstance(record.get(part), dict) for part in ("files", "run")):
        raise ValueError("it is no record of a run")
    if not all(isinstance(part, dict) for part in record["run"].values()):
        raise ValueError("it is no record of a run")


def damaged_files(folder: Path) -> list[str]:
    """Those files that a run goes on from whose content is not what was written: a disk that lost its power may leave
    zeros where a file was."""
    wrong = []
    for path in sorted(path for pattern in ARCHIVES for path in folder.glob(pattern)):
        try:
            with zipfile.ZipFile(path) as archive:
                wrong += [f"{path.name} ({name})" for name in (archive.testzip(),) if name is not None]
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            wrong.append(f"{path.name} ({error})")
    try:
        stored = read_adapter(folder)
        check_tensors({name: tensor.shape for name, tensor in stored.tensors.items()}, stored)
    except (OSError, ValueError) as error:
        wrong.append(f"{FILE} ({error})")
    return wrong


def problem_without_record(folder: Path) -> str | None:
    """The same of a checkpoint of 0.1.0, which does not say what it holds."""
    try:
        read_adapter(folder)
    except (OSError, ValueError) as error:
        return str(error)
    found = list(folder.glob("optimizer*")) + list(folder.glob("global_step*"))  # the latter: DeepSpeed's
    return None if found else "it has no optimiser state."


def last_checkpoint(folder: str | os.PathLike) -> tuple[Path | None, list[Unfinished]]:
    """The last whole checkpoint in a run's folder, or `None`, and later ones that are not whole."""
    folder, unfinished = Path(folder), []
    steps = {int(m[1]): path for path in folder.glob("checkpoint-*") if (m := NAME.fullmatch(path.name))}
    for _, path in sorted(steps.items(), reverse=True):
        problem = problem_of(path)
        if problem is None:
            return path, unfinished
        unfinished.append(Unfinished(path, problem))
    return None, unfinished


def checkpoint_to_resume(resume: str | bool, *folders: str | os.PathLike) -> tuple[str, list[str]]:
    """(checkpoint, what to say of those that are passed over) for Trainer's `resume_from_checkpoint`.

    Args:
        resume: a checkpoint, or `True`: the last whole one in the first of `folders` that has one.

    Raises:
        ValueError: there is none, or the one asked for is not whole.
    """
    if resume is not True:
        folder = Path(resume)
        problem = problem_of(folder)
        if problem is None:
            return str(resume), []
        last, _ = last_checkpoint(folder.parent)
        instead = "No checkpoint beside it is whole: begin anew" if last is None else f"Resume from {last}"
        raise ValueError(
            f"{Unfinished(folder, problem)} {instead}; for weights alone, load the folder with "
            "MoExtendForCausalLM.from_pretrained."
        )
    unfinished = []
    for folder in folders:
        checkpoint, later = last_checkpoint(folder)
        unfinished += later
        if checkpoint is not None:
            return str(checkpoint), [f"MoExtend: {one} The run goes on from {checkpoint}." for one in unfinished]
    found = "".join(f"\n  {one}" for one in unfinished)
    raise ValueError(
        f"resume_from_checkpoint: there is no whole checkpoint in {' or '.join(map(str, folders))}. Begin anew, "
        f"without resume_from_checkpoint.{found}"
    )
