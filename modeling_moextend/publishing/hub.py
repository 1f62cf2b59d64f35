"""Publishing: which files of a folder make an adapter, and one commit of exactly these."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import is_jinja_available
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from ..adapter_file_moextend import check_link, write_folder
from ..configuration_moextend import MODALITIES, MoExtendConfig
from ..loading_moextend import by_modality
from ..tensor_files_moextend import parse_json
from ..tensors_moextend import check_finite
from ..tools.base_weights import TOKENIZER, unusable
from ..tools.files import write_text
from ..tools.inspection import read_whole
from ..tools.locations import hub_id, local_paths
from .facts import folder_card

if TYPE_CHECKING:
    from ..modeling_moextend import MoExtendPreTrainedModel

logger = logging.get_logger(__name__)

PUBLISHED = [  # patterns of the files that make a published adapter; the card's own pictures come beside them
    "config.json",
    "moextend_adapter*.safetensors",
    "moextend_adapter*.safetensors.index.json",
    "*_moextend.py",
    "README.md",
    "*processor_config.json",
    *TOKENIZER,
    "additional_chat_templates/*.jinja",
]
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")  # any text may be a token
PICTURE = re.compile(r"!\[[^\]]*\]\(([^()/\\\s]+\.png)\)")  # in Markdown, one that lies beside the card

FILLED = "<!-- Filled by moextend:"  # in a card that nobody has made their own


def check_published(config: MoExtendConfig, api: HfApi | None = None) -> None:
    """Refuses to publish an adapter whose base or encoder nobody else could find.

    Args:
        config: the adapter's `MoExtendConfig`.
        api: an `HfApi` that is asked whether they are there; `None`: only their names are looked at.

    Raises:
        ValueError: one of them is a path on this machine, has no known location, or is not on the Hub.
    """
    encoders = [f"{prefix}encoder" for prefix in MODALITIES.values()]
    given = [one for one in encoders if getattr(config, f"{one}_name_or_path") or getattr(config, f"{one}_config")]
    entries = ["base_model", *given]
    for entry in entries:
        location, role = getattr(config, f"{entry}_name_or_path"), entry.removesuffix("_model")
        if not location:
            problem = "was given as a model, and the adapter does not say where it lies"
        elif hub_id(location) is None:
            problem = f"is {location!r}, a path on this machine"
        elif api is not None and not api.repo_exists(location):
            problem = f"is {location!r}, which is not on the Hub (or not to be seen with this token)"
        else:
            continue
        raise ValueError(
            f"The adapter can't be published yet: its {role} {problem}, so nobody else could load it. Publish the "
            f"{role} first, then say where: model.config.{entry}_name_or_path = 'owner/name' (moextend push: "
            f"--{'base' if role == 'base' else 'encoder'} owner/name). Saving to a folder works as it is."
        )


def published_files(folder: Path) -> list[str]:
    """Names, relative to `folder` (a `Path`), of the files in it that make a published adapter: nothing pickled, no
    checkpoint, no picture that the card does not show. `ValueError`: one of them is a link out of the folder."""
    paths = {path for pattern in PUBLISHED for path in folder.glob(pattern) if path.is_file()}
    names = {path.relative_to(folder).as_posix() for path in paths}
    if "README.md" in names:
        pictures = PICTURE.findall((folder / "README.md").read_text(encoding="utf-8"))
        names |= {name for name in pictures if (folder / name).is_file()}
    for name in names:
        check_link(folder / name, folder)
    return sorted(names)


def check_private(folder: Path, names: Iterable[str]) -> None:
    """Refuses to publish files that name a path of this machine.

    Args:
        names: of the files, relative to `folder`; of those that hold tokens nothing is asked.

    Raises:
        ValueError: names the file, the entry and the path.
    """
    for name in sorted(names):
        if name.endswith(".json") and name not in VOCABULARIES and not name.endswith(".index.json"):
            with unusable():
                values = parse_json((folder / name).read_text(encoding="utf-8"), str(folder / name))
            for entry, value in local_paths(values):
                raise ValueError(
                    f"The adapter can't be published yet: {name} names a path of this machine, {entry} = {value!r}. "
                    "Take that entry out of the file, or save the file anew."
                )


MODELING = "modeling_moextend.py"  # is there where the shipped code is


def publish_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    base: str | None = None,
    encoder: str | Sequence[str] | None = None,
    dry_run: bool = False,
    **push: Any,
) -> CommitInfo | list[str]:
    """Publishes a folder that `save_pretrained` or the trainer wrote, once it is read and found whole.

    Args:
        base, encoder: Hub ids, where the adapter names others (a path on this machine): written into its header and
            config.json before it is published. Of several encoders a list, in any order: their configs, read from the
            Hub, say which is which.
        dry_run: whether to stop before anything is written or sent.
        **push: to `upload` (`private`, `revision`, `token`, `report`, `card`, ...).

    Returns:
        The `CommitInfo`; with `dry_run`, the names of the files that would go up.

    Raises:
        OSError, ValueError: no adapter there, or a damaged one; base or encoder are not on the Hub; NaN or infinity in
            a tensor; a file that is a link out of the folder, or names a path of this machine.
    """
    folder = Path(folder)
    if not folder.is_dir():  # else the name would be looked for on the Hub
        raise ValueError(f"{folder}: no such folder.")
    stored = read_whole(str(folder))
    config = MoExtendConfig.from_dict(stored.values)
    if config.base_subfolder is not None:
        raise ValueError(
            f"{folder} is a standalone checkpoint, of which only the adapter would go up. Push the adapter's own "
            f"folder, or all of this one: hf upload {repo_id} {folder}"
        )
    if base is not None and base != config.base_model_name_or_path:
        config.base_model_name_or_path, config.base_model_revision = base, None
    for modality, location in by_modality(encoder, list(config.senses)).items():
        setattr(config, f"{MODALITIES[modality]}encoder_name_or_path", location)
    check_published(config)
    check_finite(stored.tensors, "published")
    names, config = published_files(folder), config.published()
    changed = config.to_dict() != MoExtendConfig.from_dict(stored.values).to_dict()  # it named places, for one
    rewritten = changed or not (folder / MODELING).exists()  # a run's checkpoint has no code
    check_private(folder, {*names} - ({"config.json"} if rewritten else set()))
    if dry_run:
        return sorted({*names, "README.md"})
    if rewritten:
        write_folder(folder, stored.tensors, config)
    return upload(folder, repo_id, config, **push)


def push(
    model: MoExtendPreTrainedModel,
    repo_id: str,
    *,
    adapter_name: str | None = None,
    processor: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    adapter_dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "50GB",
    **kwargs: Any,
) -> CommitInfo:
    """What `push_to_hub` does: saves the adapter to a temporary folder and uploads it as one commit.

    Args:
        processor: tokenizer or `MoExtendProcessor` that goes along.
        adapter_name, adapter_dtype, max_shard_size: as in `save_pretrained`.
        **kwargs: see `upload`.

    Raises:
        ValueError: the base or the encoder is not on the Hub.
    """
    adapter_name = model.resolve_name(adapter_name)
    config = model.adapters[adapter_name].config
    check_published(config)
    with tempfile.TemporaryDirectory() as folder:
        options = {"adapter_dtype": adapter_dtype, "max_shard_size": max_shard_size}
        model.save_pretrained(folder, adapter_name=adapter_name, **options)
        if processor is not None:
            processor.save_pretrained(folder)
        return upload(Path(folder), repo_id, config, **kwargs)


def upload(
    folder: Path,
    repo_id: str,
    config: MoExtendConfig,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload MoExtend adapter",
    commit_description: str | None = None,
    card: dict[str, Any] | None = None,
    report: str | os.PathLike | None = None,
    shift: str | os.PathLike | None = None,
    tags: list[str] | None = None,
) -> CommitInfo:
    """One commit of the adapter's files, and of nothing else that lies in `folder` (a `Path`).

    Not huggingface_hub's `upload_folder`: where Xet is installed, that commits in parts, and a push that stops between
    two of them would leave new code beside an old adapter. A push that fails here leaves the repository as it was.

    Args:
        config: the adapter's `MoExtendConfig`.
        token, private, revision, create_pr, commit_message, commit_description: as in `HfApi.create_commit`; a branch
            named by `revision` is made where there is none.
        card: what `create_card` takes beside what the folder tells.
        report, shift, tags: see `folder_card`. README.md is filled if one of these four is given, and else
            unless `written_by_hand`.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        ValueError: base or encoder are not on the Hub; `private`, and the repository is there and public.
        ImportError: something was given for the card, and it can't be written.
        HfHubHTTPError: the Hub refused; nothing was committed.
        ValueError: a file is a link out of the folder, or names a path of this machine.
    """
    card_options = {name: value for name, value in (("report", report), ("shift", shift), ("tags", tags)) if value}
    card_options |= card or {}
    can_write_card = is_jinja_available()
    if card_options and not can_write_card:
        raise ImportError(f"{', '.join(card_options)}: a model card needs jinja2: pip install 'moextend[train]'.")
    api = HfApi(token=token)
    check_published(config, api)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise ValueError(
            f"{repo_id} is there already, and public: make it private in its settings, or leave out private=True."
        )
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    repo_files = set(api.list_repo_files(repo_id, revision=revision))
    if can_write_card and (card_options or not written_by_hand(folder, repo_files)):
        license = {} if "license" in card_options else base_license(config, api)
        write_text(folder / "README.md", str(folder_card(folder, config, repo_id, **license, **card_options)))
    names = published_files(folder)
    check_private(folder, names)
    if config.senses and "processor_config.json" not in repo_files.union(names):
        logger.warning(
            "No processor goes along, so AutoProcessor can't load it from there: push_to_hub(processor=...)."
        )
    stale = [name for name in sorted(repo_files) if fnmatch(name, "moextend_adapter*") and name not in names]
    operations = [CommitOperationDelete(path_in_repo=name) for name in stale]
    operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def written_by_hand(folder: Path, repo_files: set[str]) -> bool:
    """Whether there is a card to leave alone: the folder's without the line `FILLED`, or else any in the repository
    (`repo_files`: its files), which may tell more than this folder can."""
    card = folder / "README.md"
    return FILLED not in card.read_text(encoding="utf-8") if card.exists() else "README.md" in repo_files


def base_license(config: MoExtendConfig, api: HfApi) -> dict[str, str]:
    """The licence in the base's card, {entry: value}: new experts begin as copies of its experts. {} where none is."""
    try:
        data = api.model_info(config.base_model_name_or_path).card_data or {}
    except HfHubHTTPError:  # gated, and not for this token
        return {}
    return {name: data.get(name) for name in ("license", "license_name", "license_link") if data.get(name)}
