"""What an adapter's folder knows for its card: facts that a run left there, reports, pictures."""

import json
import shutil
from pathlib import Path

from ..adapter_file_moextend import read_file
from ..tools.files import write_text
from ..tools.inspection import without_data
from .card import create_card

FACTS = "card.json"  # what a run leaves beside the adapter for its card: arguments of `create_card`
SHIFT = "shift.png"


def folder_card(folder, config, repo_id=None, *, report=None, shift=None, **given):
    """`create_card` with all that an adapter's folder tells; its pictures are copied beside it.

    Args:
        folder: of the adapter.
        config: its `MoExtendConfig`.
        repo_id: Hub id it is published under.
        report: folder of `write_report`; default: the last one that `ReportCallback` wrote, if any.
        shift: picture of `RouterShift.plot`; default: `shift.png` in the folder, or what stage extend wrote.
        **given: to `create_card`, in place of what the folder tells.

    Raises:
        ValueError: a report or picture that is not there.
        ImportError: jinja2 is missing.
    """
    folder = Path(folder)
    known = {"tensors": read_shapes(folder), **read_facts(folder)}
    known |= read_report(report or last_report(folder), folder)
    shift = shift or next((path for path in (folder / SHIFT, folder / "extend" / SHIFT) if path.exists()), None)
    if shift is not None:
        known["router_shift"] = copy_picture(Path(shift), folder / SHIFT)
    if not any((folder / name).exists() for name in ("tokenizer_config.json", "processor_config.json")):
        known["tokenizer"] = None if config.encoder_config else config.base_model_name_or_path
    return create_card(config, repo_id=repo_id, **{**known, **given})


def read_shapes(folder):
    """name -> tensor without data, of every tensor in the adapter's files; only their headers are read."""
    files = sorted(folder.glob("moextend_adapter*.safetensors"))
    return {name: tensor for path in files for name, tensor in read_file(path, without_data)[0].items()}


def read_facts(folder):
    """What `write_facts` left in the folder, {} where nothing did."""
    path = Path(folder, FACTS)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_facts(folder, **facts):
    """Leaves arguments of `create_card` in an adapter's folder, in place of those there: numbers, text and `None`."""
    write_text(Path(folder, FACTS), json.dumps(facts, indent=2))


def last_report(folder):
    """The report of the latest step in the folder's own `report/`, or `None`."""
    reports = [path.parent for path in folder.glob("report/step-*/report.json")]
    return max(reports, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def read_report(report, folder):
    """What a report folder says for the card, with its pictures copied to `folder`; {} for `None`."""
    if report is None:
        return {}
    path = Path(report, "report.json")
    if not path.exists():
        raise ValueError(f"{report} is no report: report.json is not there. examples/evaluate_adapter.py writes one.")
    card = json.loads(path.read_text(encoding="utf-8"))["card"]
    for picture in card["figures"].values():
        copy_picture(path.parent / picture, folder / picture)
    return card


def copy_picture(source, target):
    """Copies a picture unless it is there already; returns its name."""
    if not source.is_file():
        raise ValueError(f"{source}: no such picture.")
    if not (target.exists() and source.samefile(target)):
        shutil.copyfile(source, target)
    return target.name
