"""An adapter's folder or Hub id -> its report folder: what `moextend evaluate` and `moextend report` run."""

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from ..adapter_file_moextend import find_files
from ..configuration_moextend import MODALITIES, MoExtendConfig
from ..data.files import read_documents, read_questions
from ..data.processors import COUNTED, load_processor
from ..loading_moextend import by_modality
from ..modeling_moextend import MoExtendForCausalLM
from ..publishing.card import create_card
from ..tools.base_weights import Unusable
from ..tools.files import made_folder
from ..tools.inspection import read_headers, size_of
from ..tools.locations import check_location
from .figures import plot_frontier
from .report import evaluate_adapter, point, write_report

THRESHOLDS = [-1.0, -0.5, 0.0, 0.5, 1.0]


def load_adapter(
    adapter: str, base: str | None = None, encoder: str | list[str] | None = None, dtype: str = "auto"
) -> tuple[MoExtendForCausalLM, PreTrainedTokenizerBase | ProcessorMixin]:
    """The model, in evaluation mode, and the processor saved with it or, where none was, its base's.

    Raises:
        ValueError, OSError: adapter, base or encoder is not there, damaged, or does not fit the others.
    """
    locations = {name: value for name, value in (("base", base), ("encoder", encoder)) if value is not None}
    check_locations(adapter, base, encoder)
    device_map = "auto" if torch.accelerator.is_available() else None
    model = MoExtendForCausalLM.from_pretrained(adapter, dtype=dtype, device_map=device_map, **locations).eval()
    if not Path(adapter).is_dir() or Path(adapter, "tokenizer_config.json").exists():
        reader = AutoProcessor if model.senses else AutoTokenizer
        return model, reader.from_pretrained(adapter, trust_remote_code=False)
    known = [sense.encoder_name_or_path for sense in model.config.senses.values()]
    return model, load_processor(
        base or model.config.base_model_name_or_path,
        encoder or known or None,
        **{name: getattr(model.config, name) for name in COUNTED},
    )


def check_locations(adapter: str, base: str | None, encoder: str | list[str] | None) -> None:
    """Refuses an adapter, base or encoder that is not there."""
    encoders = encoder if isinstance(encoder, list) else [encoder]
    for role, location in (("base", base), *(("encoder", one) for one in encoders)):
        if location is not None:
            check_location(role, location)
    if Path(adapter).is_dir():
        find_files(adapter, {})
    check_location("adapter", adapter)


def report_adapter(
    adapter: str,
    text: str | os.PathLike,
    *,
    questions: str | os.PathLike | None = None,
    output: str | os.PathLike = "report",
    base: str | None = None,
    encoder: str | list[str] | None = None,
    image_folder: str | None = None,
    max_questions: int | None = None,
    thresholds: Sequence[float] | None = None,
    compare: Sequence[str | os.PathLike] = (),
    title: str | None = None,
    dtype: str = "auto",
    **options: Any,
) -> dict[str, Any]:
    """Measures an adapter and writes its report folder, with a model card.

    Args:
        text: JSON lines with what the base knew: {"domain", "text"}, or "messages" in place of "text".
        questions: the new task: JSON (lines) with "messages", the last one being the reference answer, or LLaVA JSON.
        thresholds: of the gate, with scope "gate"; default: `THRESHOLDS`.
        compare: report folders to show in the frontier as well.
        **options: to `evaluate_adapter`.

    Returns:
        {"folder", "files", "results": records of the table}.
    """
    check_locations(adapter, base, encoder)  # all of it before hours of measuring
    documents = read_documents(text)
    asked = read_questions(questions, image_folder, max_questions) if questions else []
    points = [read_result(path)["point"] for path in compare]
    if None in points:
        raise ValueError(f"{compare[points.index(None)]} has no accuracy: write it again with questions.")
    with made_folder(output) as folder:
        model, processor = load_adapter(adapter, base, encoder, dtype)
        if thresholds is None:
            thresholds = THRESHOLDS if model.config.scope == "gate" else []
        results = evaluate_adapter(model, processor, documents, asked, thresholds=thresholds, **options)
        names = {"text": Path(text).stem} | ({"task": Path(questions).stem} if questions else {})
        card = write_report(folder, results, title=title or Path(adapter).name, points=points, **names)
        stored = size_of(read_headers(adapter, {}).tensors)
        sizes = {"adapter_bytes": stored["num_bytes"], "num_parameters": stored["num_parameters"]}
        config = with_places(model.config, base, encoder)
        create_card(config, **sizes, **card).save(folder / "model_card.md")
    made = sorted(path.name for path in folder.iterdir())
    return {"folder": str(output), "files": made, "results": card["results"]}


def with_places(config: MoExtendConfig, base: str | None, encoder: str | list[str] | None) -> MoExtendConfig:
    """A copy that names the folders which base and encoder were loaded from, as given: what an adapter made of folders
    names may look like a Hub id, and be none. A base with a revision is from the Hub."""
    config = copy.deepcopy(config)
    if base is not None and config.base_model_revision is None:
        config.base_model_name_or_path = base
    for modality, location in by_modality(encoder, list(config.senses)).items():
        setattr(config, f"{MODALITIES[modality]}encoder_name_or_path", location)
    return config


def read_result(path: str | os.PathLike) -> dict[str, Any]:
    """What a report folder, or a report.json, says: {"title", "results": records, "point" of the frontier or `None`}.

    Raises:
        ValueError: there is no report, or a damaged one.
    """
    path = Path(path)
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise Unusable(f"{path} is no report: report.json is not there. `moextend evaluate` writes one.")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        return {
            "title": report["title"],
            "results": [{key: str(value) for key, value in record.items()} for record in report["card"]["results"]],
            "point": point(report["title"], report),
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        missing = " is missing" if isinstance(error, KeyError) else ""
        raise Unusable(f"{file} is damaged: {error}{missing}.") from error


def compare_reports(folders: Sequence[str | os.PathLike], picture: str | os.PathLike | None = None) -> dict[str, Any]:
    """What reports say, side by side; with `picture` their frontier is drawn.

    Returns:
        {"reports": of `read_result`, "picture": its path or `None`}.

    Raises:
        ValueError: a picture without an ending; reports without an accuracy.
    """
    if picture is not None and not Path(picture).suffix:
        raise ValueError(f"picture={str(picture)!r} has no ending, which says how to draw: .png, .svg or .pdf.")
    reports = [read_result(folder) for folder in folders]
    points = [report["point"] for report in reports if report["point"] is not None]
    if picture is not None:
        if not points:
            raise ValueError("None of these reports has an accuracy: there is nothing to draw.")
        plot_frontier(points, picture)
    return {"reports": reports, "picture": None if picture is None else str(picture)}
