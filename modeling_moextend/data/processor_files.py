"""A processor's files, as a stranger may have made them: checked before transformers reads them."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME, cached_file

from ..folder_moextend import check_link

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
AUDIO = "audio_tokenizer_config.json"


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Whatever transformers stumbles over in the block becomes one error, which says that `what` can't be loaded.

    Raises:
        OSError, ValueError: says what it was.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        kind, text = OSError if isinstance(error, OSError) else ValueError, f"{type(error).__name__}: {error}"
        text = "".join(filter(str.isprintable, text))
        raise kind(f"{what} can't be loaded: save or fetch its files again. ({text})") from error


@contextlib.contextmanager
def checked_files(name_or_path: str | os.PathLike, **options: Any) -> Iterator[None]:
    """Checks a processor's files before the block, which reads them; `options`: of its `from_pretrained`.

    Raises:
        OSError: no processor there; says so where a tokenizer is.
        ValueError: damaged files, links to elsewhere, or more than image processor, feature extractor and tokenizer.
    """
    hub_kwargs = {key: options[key] for key in HUB_KWARGS if options.get(key)}
    found = [is_there(name_or_path, name, hub_kwargs) for name in (PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME)]
    if not any(found) and is_there(name_or_path, TOKENIZER_CONFIG_FILE, hub_kwargs):
        raise OSError(
            f"{name_or_path} holds a tokenizer and no processor, as all that read text alone: AutoTokenizer loads it. "
            "For an encoder, load_processor(base, encoder) of modeling_moextend.data.processors makes a processor."
        )
    with readable(f"The processor of {name_or_path}"):
        check_files(name_or_path, hub_kwargs)
        check_merges(name_or_path, hub_kwargs)
        yield


def is_there(name_or_path: str | os.PathLike, name: str, hub_kwargs: dict[str, Any]) -> bool:
    """Whether a folder or repository holds a file; `False` as well where it can't be asked."""
    try:
        return cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs) is not None
    except OSError:
        return False


def check_files(name_or_path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> None:
    """Refuses a processor's files that are links to elsewhere, and those that would have another model loaded."""
    folder = Path(name_or_path, hub_kwargs.get("subfolder") or "")
    for path in [*folder.glob("*"), *folder.glob("*/*.jinja")] if folder.is_dir() else ():
        if path.suffix in (".json", ".jinja", ".model", ".txt"):
            check_link(path, name_or_path)
    for name in (PROCESSOR_NAME, AUDIO):
        path = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        if path is not None and (name == AUDIO or "audio_tokenizer" in json.loads(Path(path).read_text("utf-8"))):
            raise ValueError(f"{path} asks for an audio tokenizer, which no adapter has.")


def check_merges(name_or_path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> None:
    """Refuses a tokenizer.json that the tokenizers library ends the process over, with no error to catch: of merges
    that lack the prefix it names."""
    path = cached_file(name_or_path, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    text = Path(path).read_text("utf-8") if path is not None else ""
    if re.search(r'"continuing_subword_prefix"\s*:\s*"[^"]', text):
        model = json.loads(text)["model"]
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges") or ()]
        if not all(second.startswith(model["continuing_subword_prefix"]) for _, second in merges):
            raise ValueError(f"{path} has merges without its continuing_subword_prefix.")
