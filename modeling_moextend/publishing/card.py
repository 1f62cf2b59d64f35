"""The model card of a published adapter: the facts are gathered here, the words are in `model_card_template.md`."""

from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import is_jinja_available

from ..configuration_moextend import MoExtendConfig
from ..tools.inspection import dtype_name, part_of
from ..tools.locations import hub_id

TAGS = ["moextend", "moe", "mixture-of-experts", "adapter"]


def create_card(
    config: MoExtendConfig,
    *,
    repo_id: str | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    training: dict[str, Any] | None = None,
    datasets: str | list[str] | None = None,
    results: list[dict[str, Any]] | None = None,
    forgetting: list[dict[str, Any]] | None = None,
    metrics: list[dict[str, Any]] | None = None,
    figures: dict[str, str] | None = None,
    token_lines: list[str] | None = None,
    router_shift: str | None = None,
    tokenizer: str | None = None,
    adapter_bytes: int | None = None,
    num_parameters: int | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    language: str | list[str] | None = None,
    tags: list[str] | None = None,
) -> ModelCard:
    """
    Fill the model card of an adapter. What is not given is left out; nothing is guessed.

    Args:
        config: the adapter's config.
        repo_id: Hub id the adapter is published under, for the title and the code to load it.
        tensors: the adapter's tensors as they are stored; only their shapes and
            dtypes are read, so those on the meta device do.
        training: setting -> value, e.g. of the training arguments; `None` values are left out.
        datasets: what it was trained on: Hub ids, or files (shown by name only).
        results: entries of the results table; columns are the keys, in order of appearance.
        forgetting: entries of the forgetting table, what the base lost of what it knew.
        metrics: measured values for the metadata's model-index, each with `type` (the
            metric's id on the Hub), `value` and `dataset` (its name); if known, `name` and `dataset_type` (a Hub id).
        figures: caption -> image file, relative to the repository.
        token_lines: texts, those of their tokens in [brackets] that used new experts.
        router_shift: image file of the router shift, relative to the repository.
        tokenizer: where the tokenizer lies, if not in the repository.
        adapter_bytes: size of the adapter in bytes; default: that of `tensors`.
        num_parameters: how many parameters the adapter holds; default: those of `tensors`.
        license: license of the adapter, as the Hub abbreviates it; with "other", also
            `license_name` and `license_link`.
        language: ISO 639 codes.
        tags: further tags.

    Returns:
        `huggingface_hub.ModelCard`: `str(card)` is the README.md, `card.save(path)` writes it.

    Raises:
        ImportError: jinja2 is missing.
        ValueError: a figure that does not lie in the repository.
    """
    if not is_jinja_available():
        raise ImportError("Filling the model card needs jinja2: `pip install 'moextend[train]'` brings it.")
    datasets = [datasets] if isinstance(datasets, str) else list(datasets or [])
    title = repo_id.split("/")[-1] if repo_id else "MoExtend adapter"
    tensors = tensors or {}
    if tensors:
        adapter_bytes = sum(t.nbytes for t in tensors.values()) if adapter_bytes is None else adapter_bytes
        num_parameters = sum(t.numel() for t in tensors.values()) if num_parameters is None else num_parameters
    metadata = ModelCardData(
        **_metadata(config),
        tags=list(dict.fromkeys([*_tags(config), *(tags or [])])),
        license=license,
        license_name=license_name,
        license_link=license_link,
        language=language,
        datasets=[name for name in datasets if hub_id(name)] or None,
        **_model_index(config, title, metrics or []),
    )
    return ModelCard.from_template(
        metadata,
        template_str=read_template(),
        title=title,
        source=repo_id or "path/to/this/adapter",
        tokenizer=tokenizer or repo_id or "path/to/this/adapter",
        base=_link(config.base_model_name_or_path),
        encoder=_has_encoder(config),
        senses=_senses(config),
        sensed=["images" if sense == "image" else sense for sense in _senses(config)],
        overview=_overview(config, adapter_bytes, num_parameters, tensors),
        layers=sorted((int(layer), experts) for layer, experts in config.extended_layers.items()),
        parts=_parts(tensors),
        tensors=[
            (name, list(tensor.shape), dtype_name(tensor.dtype), f"{tensor.nbytes:,}")
            for name, tensor in tensors.items()
        ],
        num_new_experts=_num_new_experts(config),
        dependencies=[
            (adapter["name"], adapter.get("name_or_path") or f"path/to/{adapter['name']}")
            for adapter in config.trained_on
        ],
        scope=config.scope,
        selection=config.selection,
        calibration=config.calibration,
        deltas=config.deltas,
        license=license_link and f"[{license_name or license}]({license_link})" or license,
        datasets=[_link(name, "datasets/") for name in datasets],
        training=[(cell(name), cell(value)) for name, value in (training or {}).items() if value is not None],
        results=_table(results or []),
        forgetting=_table(forgetting or []),
        token_lines=[" ".join(str(line).split()) for line in token_lines or []],
        figures=[(cell(caption), _repo_file(file)) for caption, file in (figures or {}).items()],
        router_shift=router_shift and _repo_file(router_shift),
    )


def read_template() -> str:
    """The text of `model_card_template.md`, from a checkout or an installed wheel alike."""
    return files(__package__).joinpath("model_card_template.md").read_text(encoding="utf-8")


def _metadata(config):
    """What the header says of every adapter. Only what is on the Hub is named: local paths say nothing to others."""
    base = hub_id(config.base_model_name_or_path)
    return {
        "base_model": base,
        "base_model_relation": "adapter" if base else None,
        "library_name": "transformers",
        "pipeline_tag": _task(config),
    }


def _task(config):
    tasks = {("image",): "image-text-to-text", ("audio",): "audio-text-to-text", ("image", "audio"): "any-to-any"}
    return tasks[_senses(config)] if _has_encoder(config) else "text-generation"


def _tags(config):
    audio = "audio" in config.senses
    sees = ["vision-language"] if config.encoder_name_or_path or config.encoder_config else []
    return TAGS + (["multimodal", *sees, *(["audio"] if audio else [])] if sees or audio else [])


def _model_index(config, title, metrics):
    """The header's entries for measured values: `model-index` (huggingface_hub writes it) and the metrics' ids."""
    if not metrics:
        return {}
    results = [
        EvalResult(
            task_type=_task(config),
            dataset_type=metric.get("dataset_type") or metric["dataset"],
            dataset_name=metric["dataset"],
            metric_type=metric["type"],
            metric_value=metric["value"],
            metric_name=metric.get("name"),
        )
        for metric in metrics
    ]
    return {
        "metrics": list(dict.fromkeys(metric["type"] for metric in metrics)),
        "model_name": title,
        "eval_results": results,
    }


def _overview(config, adapter_bytes, num_parameters, tensors):
    """Entries (name, value) of the first table, without those that have no value."""
    base = _link(config.base_model_name_or_path)
    if base and config.base_model_revision:
        base += f", revision `{config.base_model_revision}`"
    places = [_link(sense.encoder_name_or_path) or "of the adapter's config" for sense in config.senses.values()]
    places = places or ([_link(config.encoder_name_or_path)] if _has_encoder(config) else [])
    encoder = " and ".join(places) or None
    entries = {
        "base": base,
        "encoder": encoder and f"{encoder} (frozen)",
        "on top of the adapters": ", ".join(f"`{cell(entry['name'])}`" for entry in config.trained_on) or None,
        "new experts": _num_new_experts(config) or None,
        "rank of a new expert's difference to its source": config.expert_rank,
        "tensors in the adapter": len(tensors) or None,
        "parameters in the adapter": None if num_parameters is None else f"{num_parameters:,}",
        "size of the adapter": None if adapter_bytes is None else _size(adapter_bytes),
    }
    return [(name, value) for name, value in entries.items() if value is not None]


def _has_encoder(config):
    return bool(config.encoder_name_or_path or config.senses)


def _senses(config):
    return tuple(config.senses) or ("image",)


def _num_new_experts(config):
    return sum(len(experts) for experts in config.extended_layers.values())


def _parts(tensors):
    """Part of the adapter (decoder layer as `str`, "gate", ...) -> (tensors, parameters, bytes), as text."""
    sums = {}
    for name, tensor in tensors.items():
        part = part_of(name)
        count, parameters, size = sums.get(part, (0, 0, 0))
        sums[part] = count + 1, parameters + tensor.numel(), size + tensor.nbytes
    return {part: [f"{number:,}" for number in numbers] for part, numbers in sums.items()}


def _link(name, kind=""):
    """Markdown for a model or, with kind "datasets/", a dataset; of a local path only the last part is shown."""
    if not name:
        return None
    if hub_id(name):
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return f"`{Path(name).name}` (local)"


def _size(num_bytes):
    """Bytes in decimal units, e.g. 5_912_000 -> "5.9 MB (5,912,000 bytes)"."""
    value, units = float(num_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{num_bytes:,} bytes" if units[0] == "bytes" else f"{value:.1f} {units[0]} ({num_bytes:,} bytes)"


def _table(records):
    """Columns (keys in order of appearance) and lines of cells; a key that a record lacks is an empty cell."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    cells = [[cell(record.get(key)) for key in columns] for record in records]
    return {"columns": [cell(key) for key in columns], "lines": cells} if columns else None


def cell(value: object) -> str:
    """One line of text that does not break a Markdown table; floats with six significant digits."""
    if value is None:
        return ""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _repo_file(file):
    """`file` as a POSIX path inside the repository."""
    path = PurePosixPath(str(file).replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"The figure {file!r} lies outside the repository, where readers of the card cannot see it. "
            "Give a path relative to the repository, such as 'shift.png'."
        )
    return str(path)
