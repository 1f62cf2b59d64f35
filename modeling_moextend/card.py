"""The model card of a published adapter: the facts are gathered here, the words are in `model_card_template.md`."""

from importlib.resources import files
from pathlib import Path, PurePosixPath

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, is_jinja_available, validate_repo_id

TAGS = ["moextend", "moe", "mixture-of-experts", "adapter"]


def create_card(
    config,
    *,
    repo_id=None,
    results=None,
    figures=None,
    training=None,
    adapter_bytes=None,
    num_parameters=None,
    license="apache-2.0",
    language=None,
    datasets=None,
):
    """
    Fill the model card of an adapter. What is not given is left out; nothing is guessed.

    Args:
        config (`MoExtendConfig`): the adapter's config.
        repo_id (`str`, *optional*): Hub id the adapter is published under, for the title and the code to load it.
        results (`list[dict]`, *optional*): rows of the results table; columns are the keys, in order of appearance.
        figures (`dict[str, str]`, *optional*): caption -> image file, relative to the repository.
        training (`dict`, *optional*): setting -> value, e.g. of the training arguments; `None` values are left out.
        adapter_bytes (`int`, *optional*): size of the adapter file in bytes.
        num_parameters (`int`, *optional*): how many parameters the adapter holds.
        license (`str`, *optional*): license of the adapter, as the Hub abbreviates it.
        language (`str` or `list[str]`, *optional*): ISO 639 codes.
        datasets (`str` or `list[str]`, *optional*): what it was trained on: Hub ids, or files (shown by name only).

    Returns:
        `huggingface_hub.ModelCard`: `str(card)` is the README.md, `card.save(path)` writes it.

    Raises:
        ImportError: jinja2 is missing.
        ValueError: a figure that does not lie in the repository.
    """
    if not is_jinja_available():
        raise ImportError("Filling the model card needs jinja2: `pip install 'moextend[train]'` brings it.")
    datasets = [datasets] if isinstance(datasets, str) else list(datasets or [])
    return ModelCard.from_template(
        _metadata(config, license=license, language=language, datasets=datasets),
        template_str=read_template(),
        title=repo_id.split("/")[-1] if repo_id else "MoExtend adapter",
        source=repo_id or "path/to/this/adapter",
        base=_link(config.base_model_name_or_path),
        encoder=_has_encoder(config),
        overview=_overview(config, adapter_bytes, num_parameters),
        layers=sorted((int(layer), experts) for layer, experts in config.extended_layers.items()),
        num_new_experts=_num_new_experts(config),
        scope=config.scope,
        selection=config.selection,
        calibration=config.calibration,
        datasets=[_link(name, "datasets/") for name in datasets],
        training=[(_cell(name), _cell(value)) for name, value in (training or {}).items() if value is not None],
        results=_table(results or []),
        figures=[(_cell(caption), _repo_file(file)) for caption, file in (figures or {}).items()],
    )


def read_template():
    """The text of `model_card_template.md`, from a checkout or an installed wheel alike."""
    return files(__package__).joinpath("model_card_template.md").read_text(encoding="utf-8")


def _metadata(config, *, license, language, datasets):
    """The YAML header. Only what is on the Hub is named there: local paths say nothing to other people."""
    base = _hub_id(config.base_model_name_or_path)
    return ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if _has_encoder(config) else "text-generation",
        tags=TAGS + (["multimodal", "vision-language"] if _has_encoder(config) else []),
        license=license,
        language=language,
        datasets=[name for name in datasets if _hub_id(name)] or None,
    )


def _overview(config, adapter_bytes, num_parameters):
    """Rows (name, value) of the first table, without those that have no value."""
    base = _link(config.base_model_name_or_path)
    if base and config.base_model_revision:
        base += f", revision `{config.base_model_revision}`"
    encoder = _link(config.encoder_name_or_path) or ("of the adapter's config" if _has_encoder(config) else None)
    rows = {
        "base": base,
        "encoder": encoder and f"{encoder} (frozen)",
        "new experts": _num_new_experts(config) or None,
        "parameters in the adapter": None if num_parameters is None else f"{num_parameters:,}",
        "size of the adapter": None if adapter_bytes is None else _size(adapter_bytes),
    }
    return [(name, value) for name, value in rows.items() if value is not None]


def _has_encoder(config):
    return bool(config.encoder_name_or_path or config.encoder_config)


def _num_new_experts(config):
    return sum(len(experts) for experts in config.extended_layers.values())


def _hub_id(name):
    """`name` if it can be a Hub id, None for nothing, a local folder or file, or anything the Hub would refuse."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _link(name, kind=""):
    """Markdown for a model or, with kind "datasets/", a dataset; of a local path only the last part is shown."""
    if not name:
        return None
    if _hub_id(name):
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return f"`{Path(name).name}` (local)"


def _size(num_bytes):
    """Bytes in decimal units, e.g. 5_912_000 -> "5.9 MB (5,912,000 bytes)"."""
    value, units = float(num_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{num_bytes:,} bytes" if units[0] == "bytes" else f"{value:.1f} {units[0]} ({num_bytes:,} bytes)"


def _table(rows):
    """Columns (keys in order of appearance) and rows of cells; a key that a row lacks is an empty cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key)) for key in columns] for row in rows]
    return {"columns": [_cell(key) for key in columns], "rows": cells} if columns else None


def _cell(value):
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
