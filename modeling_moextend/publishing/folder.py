"""Publishing an adapter's folder: what its card can say, gathered from the folder, and the way to the Hub."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from ..adapter_moextend import write_adapter
from ..folder_moextend import write_text
from ..hub_moextend import check_published, published_files, upload
from ..tools.inspection import read_whole
from .card import create_card

FACTS = "card.json"  # what a run leaves beside the adapter for its card: arguments of `create_card`
SHIFT = "shift.png"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def publish_folder(folder, repo_id, *, base=None, encoder=None, dry_run=False, **push):
    """Publishes a folder that `save_pretrained` or the trainer wrote, once it is read and found whole.

    Args:
        base, encoder: Hub ids, where the adapter names others (a path on this machine): written into its header and
            config.json before it is published.
        dry_run: whether to stop before anything is written or sent.
        **push: to `hub_moextend.upload` (`private`, `revision`, `token`, `report`, `card`, ...).

    Returns:
        The `CommitInfo`; with `dry_run`, the names of the files that would go up.

    Raises:
        OSError, ValueError: no adapter there, or a damaged one; base or encoder are not on the Hub.
    """
    folder = Path(folder)
    if not folder.is_dir():  # else the name would be looked for on the Hub
        raise ValueError(f"{folder}: no such folder.")
    config, tensors, _ = read_whole(str(folder))
    if config.base_subfolder is not None:
        raise ValueError(
            f"{folder} is a standalone checkpoint, of which only the adapter would go up. Push the adapter's own "
            f"folder, or all of this one: hf upload {repo_id} {folder}"
        )
    if base is not None and base != config.base_model_name_or_path:
        config.base_model_name_or_path, config.base_model_revision = base, None
    if encoder is not None:
        config.encoder_name_or_path = encoder
    check_published(config)
    if dry_run:
        return sorted({*published_files(folder), "README.md"})
    if base is not None or encoder is not None:
        config = config.published()
        write_adapter(folder, tensors, config)
        write_text(folder / "config.json", config.to_json_string(use_diff=False))
    return upload(folder, repo_id, config, **push)


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
    tensors = {}
    for path in sorted(folder.glob("moextend_adapter*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                tensors[name] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
    return tensors


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
