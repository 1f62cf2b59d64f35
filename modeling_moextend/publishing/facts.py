"""What an adapter's folder knows for its card: facts that a run left there, reports, pictures."""

import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from ..configuration_moextend import MoExtendConfig
from ..tensor_files_moextend import parse_json
from ..tools.base_weights import Unusable, unusable
from ..tools.files import copy_file, write_text
from ..tools.inspection import read_headers
from ..validation_moextend import short
from .card import create_card

FACTS = "card.json"  # what a run leaves beside the adapter for its card: arguments of `create_card`
SHIFT = "shift.png"


def folder_card(
    folder: str | os.PathLike,
    config: MoExtendConfig,
    repo_id: str | None = None,
    *,
    report: str | os.PathLike | None = None,
    shift: str | os.PathLike | None = None,
    **overrides: Any,
) -> ModelCard:
    """`create_card` with all that an adapter's folder tells; its pictures are copied beside it.

    Args:
        folder: of the adapter.
        config: its `MoExtendConfig`.
        repo_id: Hub id it is published under.
        report: folder of `write_report`; default: the last one that `ReportCallback` wrote, if any.
        shift: picture of `RouterShift.plot`; default: `shift.png` in the folder, or what stage extend wrote.
        **overrides: to `create_card`, in place of what the folder tells.

    Raises:
        ValueError: a report or picture that is not there.
        ImportError: jinja2 is missing.
    """
    folder = Path(folder)
    facts = ({} if "tensors" in overrides else {"tensors": read_shapes(folder)}) | read_facts(folder)
    facts |= read_report(report or last_report(folder), folder)
    shift = shift or next((path for path in (folder / SHIFT, folder / "extend" / SHIFT) if path.exists()), None)
    if shift is not None:
        facts["router_shift"] = copy_picture(Path(shift), folder / SHIFT)
    if not any((folder / name).exists() for name in ("tokenizer_config.json", "processor_config.json")):
        facts["tokenizer"] = None if config.senses else config.base_model_name_or_path
    return create_card(config, repo_id=repo_id, **{**facts, **overrides})


def read_shapes(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """name -> tensor without data, of every tensor in the adapter's files, {} where there are none."""
    try:
        return read_headers(folder, {}).tensors
    except OSError:  # no adapter there yet
        return {}


def read_facts(folder: str | os.PathLike) -> dict[str, Any]:
    """What `write_facts` left in the folder, {} where nothing did.

    Raises:
        Unusable: the file is damaged, or holds what no card takes.
    """
    path = Path(folder, FACTS)
    facts = read_mapping(path) if path.exists() else {}
    unknown = sorted(facts.keys() - inspect.signature(create_card).parameters.keys())
    if unknown:
        raise Unusable(f"{path} is damaged: a model card takes no {short(unknown)}.")
    return facts


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file of our own."""
    with unusable():
        return parse_json(path.read_text(encoding="utf-8"), str(path))


def write_facts(folder: str | os.PathLike, **facts: Any) -> None:
    """Leaves arguments of `create_card` in an adapter's folder, in place of those there: numbers, text and `None`."""
    write_text(Path(folder, FACTS), json.dumps(facts, indent=2))


def last_report(folder: Path) -> Path | None:
    """The report of the latest step in the folder's own `report/`, or `None`."""
    reports = [path.parent for path in folder.glob("report/step-*/report.json")]
    return max(reports, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def read_report(report: str | os.PathLike | None, folder: Path) -> dict[str, Any]:
    """What a report folder says for the card, with its pictures copied to `folder`; {} for `None`.

    Raises:
        ValueError: there is no report, or a damaged one (`Unusable`).
    """
    if report is None:
        return {}
    path = Path(report, "report.json")
    if not path.exists():
        raise ValueError(f"{report} is no report: report.json is not there. examples/evaluate_adapter.py writes one.")
    card = read_mapping(path).get("card")
    pictures = card.get("figures") if isinstance(card, dict) else None
    if not isinstance(pictures, dict) or any(Path(str(name)).name != name for name in pictures.values()):
        raise Unusable(f"{path} is damaged: it lacks a card, or the names of pictures that lie beside it.")
    for picture in pictures.values():
        copy_picture(path.parent / picture, folder / picture)
    return card


def copy_picture(source: Path, target: Path) -> str:
    """Copies a picture unless it is there already; returns its name."""
    if not source.is_file():
        raise ValueError(f"{source}: no such picture.")
    if not (target.exists() and source.samefile(target)):
        copy_file(source, target)
    return target.name
