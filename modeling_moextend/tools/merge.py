"""`moextend merge`: base and adapter in one folder, written shard by shard.

A *standalone* checkpoint is the adapter's folder with the base (and encoder) in subfolders of it: it loads with
`trust_remote_code=True` and needs nothing from elsewhere. A *native* checkpoint (native.py) is of the base's own
architecture with more experts. Memory: the adapter and about one shard of the base, never the model.
"""

import contextlib
import copy
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from ..adapter_file_moextend import StoredAdapter, check_tensors, write_folder
from ..base_checks_moextend import base_rule, check_fingerprint, check_plan
from ..configuration_moextend import MODALITIES, MoExtendConfig
from ..deltas_moextend import find_sites
from ..families_moextend import find_moe_layers
from ..loading_moextend import by_modality
from ..low_rank_moextend import expert_shapes, whole_weights
from ..senses_moextend import load_encoder
from ..tensor_files_moextend import parse_json
from ..tensors_moextend import check_finite, fingerprint, tensor_shapes
from .base_weights import TOKENIZER, Checkpoint, checkpoint_fingerprint, location_of_part, skeleton, unusable
from .files import copy_file, made_folder, write_text
from .inspection import read_whole
from .native import check_native, write_native

BASE, ENCODER = "base", "encoder"  # subfolders of a standalone checkpoint
READER = (*TOKENIZER, "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
ABOUT_NATIVE = ("generation_config.json", *TOKENIZER)
ABOUT_MODEL = ("config.json", "generation_config.json", *READER, "LICENSE", "LICENSE.txt", "LICENSE.md")
ABOUT_ENCODER = ("config.json", "preprocessor_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md")
ABOUT_ADAPTER = (*READER, "README.md")


def merge(
    adapter: str | os.PathLike,
    output: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    encoder: str | os.PathLike | None = None,
    native: bool = False,
    check_base: bool = True,
    check_trained_on: bool = True,
    max_shard_size: int | str = "5GB",
    **hub_kwargs: Any,
) -> dict[str, str | int]:
    """Writes a folder that holds base and adapter, whole or not at all.

    Experts of a low rank are written whole, source and delta in one.

    Args:
        adapter: folder or Hub id.
        output: the new folder; may not exist.
        base, encoder: folder or Hub id, if they lie elsewhere than the adapter says.
        native: write the base's own architecture with E + n experts a layer instead of base beside adapter.
        check_base: `False` merges with another base than the adapter was made on.
        check_trained_on: `False` merges an adapter without those that it was trained on top of.
        max_shard_size: of the files that are written anew; the base's own are copied as they are.
        **hub_kwargs: `revision`, `token`, `cache_dir`, ... of the adapter.

    Returns:
        folder, kind ("standalone" or "native"), files, bytes.

    Raises:
        FileExistsError: something is at `output` already.
        OSError: adapter, base or encoder can't be found.
        Unusable: a damaged adapter, base or encoder, or something that is none; the file is named.
        ValueError: another base, an adapter that was trained on top of others, tensors that do not fit or hold NaN or
            infinity, or no native form: every condition that fails is named.
    """
    with new_folder(output) as folder:
        stored = read_whole(adapter, **hub_kwargs)
        config = MoExtendConfig.from_dict(stored.values)
        if check_trained_on:
            check_alone(config, adapter)
        config.trained_on = []  # what is merged stands alone
        with unusable():
            checkpoint = open_part("base", base, config, adapter, hub_kwargs)
            base_config = checkpoint.config()
        check_fit(config, base_config, checkpoint, stored, check_base)
        model = skeleton(base_config) if native or config.expert_rank else None
        tensors = whole_tensors(config, stored.tensors, model, checkpoint)
        config.expert_rank = None
        if native:
            check_native(config, base_config, model, checkpoint, tensors)
            write_native(folder, config, base_config, model, checkpoint, tensors, max_shard_size)
            copy_files(checkpoint.find, ABOUT_NATIVE, folder)
            add_generation(folder / "generation_config.json", config.generation_config)
        else:
            encoders, requested = {}, by_modality(encoder, list(config.senses))
            for modality in config.senses:
                with unusable():
                    role = f"{MODALITIES[modality]}encoder"
                    encoders[modality] = open_part(role, requested.get(modality), config, adapter, hub_kwargs)
            write_standalone(folder, config, checkpoint, encoders, tensors, max_shard_size, check_base)
        copy_files(finder(adapter, hub_kwargs), ABOUT_ADAPTER if not native else TOKENIZER, folder)
    files = [path for path in Path(output).rglob("*") if path.is_file()]
    return {
        "folder": str(output),
        "kind": "native" if native else "standalone",
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
    }


def add_generation(path: Path, values: dict[str, Any] | None) -> None:
    """Writes an adapter's own `generation_config` into that of its base (which may have none)."""
    if values:
        with unusable():
            base = parse_json(path.read_text(encoding="utf-8"), str(path)) if path.exists() else {}
        write_text(path, json.dumps(base | values, indent=2))


def check_alone(config: MoExtendConfig, name: str | os.PathLike) -> None:
    """Refuses an adapter that was trained on top of others: a merged folder holds one.

    Raises:
        ValueError: names them.
    """
    dependencies = ", ".join(repr(entry["name"]) for entry in config.trained_on)
    if dependencies:
        raise ValueError(
            f"{name} was trained on top of {dependencies}, and a merged folder holds one adapter: alone, it would "
            "give answers that nobody trained. Load them together instead, the lowest with from_pretrained and the "
            "others with load_adapter; check_trained_on=False merges it alone all the same."
        )


def open_part(
    role: str,
    requested: str | os.PathLike | None,
    config: MoExtendConfig,
    adapter: str | os.PathLike,
    hub_kwargs: dict[str, Any],
) -> Checkpoint:
    """The `Checkpoint` of an adapter's base or encoder; `requested`: where the user says that it lies."""
    path, options = location_of_part(role, requested, config, (adapter, hub_kwargs))
    try:
        return Checkpoint(path, **options)
    except OSError as error:
        raise OSError(f"{error} Pass {role}=<folder or Hub id> if the {role} lies elsewhere.") from error


@contextlib.contextmanager
def new_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Yields a hidden folder beside `target`, which takes that name once the block is through, or is removed."""
    target = Path(target).absolute()
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists already: name a folder that does not, or remove that one first.")
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with made_folder(target.parent):
        unfinished.mkdir()
        try:
            yield unfinished
            os.rename(unfinished, target)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def check_fit(
    config: MoExtendConfig,
    base_config: PreTrainedConfig,
    checkpoint: Checkpoint,
    stored: StoredAdapter,
    check_base: bool,
    change: str = "merged",
) -> None:
    """Refuses another base than the adapter's, and tensors that do not fit it, or hold NaN or infinity and so can't be
    `change`; no weight stays in memory.

    Without `check_base` the config is made to say which base it is.
    """
    base = base_skeleton(checkpoint, base_config)
    fingerprint_found = checkpoint_fingerprint(checkpoint, base)
    if check_base:
        check_fingerprint("base", config.base_fingerprint, fingerprint_found)
    else:
        config.text_config, config.routing_rule = copy.deepcopy(base_config), None
        config.base_model_name_or_path, config.base_model_revision = checkpoint.name, None
        config.base_fingerprint = fingerprint_found
    layers = find_moe_layers(base.get_decoder())
    check_plan(layers, config.extended_layers)
    base_rule(config, layers)
    check_tensors(tensor_shapes(config, layers, find_sites(config, base.get_decoder())), stored)
    check_finite(stored.tensors, change)


def source_experts(
    config: MoExtendConfig, model: PreTrainedModel, checkpoint: Checkpoint, rank: int
) -> Iterator[tuple[int, torch.nn.Module, str, torch.Tensor]]:
    """(layer, experts module, role, source experts [n, ...]) of every stack that has a delta in an adapter of `rank`.

    Args:
        config: the adapter's.
        model, checkpoint: of the base; `model` is its `skeleton`.
    """
    layers, names = find_moe_layers(model.get_decoder()), {module: name for name, module in model.named_modules()}
    for layer, sources in config.extended_layers.items():
        experts = layers[layer].experts
        for factor in expert_shapes(experts, len(sources), rank):
            role, _, kind = factor.partition(".")
            if kind == "lora_A":
                name, shape = f"{names[experts]}.{role}", experts._parameters[role].shape
                yield layer, experts, role, checkpoint.experts(model, name, shape, sources)


def whole_tensors(
    config: MoExtendConfig, tensors: dict[str, torch.Tensor], model: PreTrainedModel | None, checkpoint: Checkpoint
) -> dict[str, torch.Tensor]:
    """An adapter's tensors with whole experts in the place of those that have a rank; see `source_experts`."""
    if config.expert_rank is None:
        return tensors
    tensors = dict(tensors)
    for layer, experts, role, source in source_experts(config, model, checkpoint, config.expert_rank):
        name = f"layers.{layer}.experts.{role}"
        factors = (tensors.pop(f"{name}.{factor}") for factor in ("lora_A", "lora_B"))
        tensors[name] = whole_weights(source, *factors, experts.is_transposed)
    return tensors


def base_skeleton(checkpoint: Checkpoint, config: PreTrainedConfig) -> PreTrainedModel:
    """The `skeleton` of a base.

    Raises:
        Unusable: it is no causal LM.
    """
    with unusable():
        try:
            return skeleton(config)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):  # which names all that transformers knows
                raise
            text = (
                f"base={checkpoint.name!r} is no causal LM: transformers has no causal head for {config.model_type}."
            )
            raise ValueError(text) from error


def write_standalone(
    folder: Path,
    config: MoExtendConfig,
    checkpoint: Checkpoint,
    encoders: dict[str, Checkpoint],
    tensors: dict[str, torch.Tensor],
    max_shard_size: int | str,
    check_base: bool,
) -> None:
    """The adapter with the code of this version, the base in `base/`, encoders (by modality) in folders."""
    config = config.published()
    config.base_subfolder = BASE
    copy_checkpoint(checkpoint, ABOUT_MODEL, folder / BASE)
    for modality, encoder in encoders.items():
        role = f"{MODALITIES[modality]}{ENCODER}"
        setattr(config, f"{role}_subfolder", role)
        copy_checkpoint(encoder, ABOUT_ENCODER, folder / role)
        with unusable():  # no encoder
            tower = load_encoder(str(folder / role))
        if check_base:
            check_fingerprint("encoder", getattr(config, f"{role}_fingerprint"), fingerprint(tower))
        setattr(config, f"{role}_fingerprint", fingerprint(tower))
    write_folder(folder, tensors, config, max_shard_size)
    copy_files(checkpoint.find, READER, folder)


def copy_checkpoint(checkpoint: Checkpoint, names: Iterable[str], folder: Path) -> None:
    """Copies weights as they are, file by file, and those of the other files `names` that are there."""
    folder.mkdir()
    for name, path in checkpoint.files.items():
        copy_file(path, folder / name)
    copy_files(checkpoint.find, names, folder)


def copy_files(find: Callable[[str], str | None], names: Iterable[str], folder: Path) -> None:
    """Copies those of `names` for which `find` has a path."""
    for name in names:
        path = find(name)
        if path is not None:
            copy_file(path, folder / name)


def finder(name_or_path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> Callable[[str], str | None]:
    """name -> path of that file of a folder or repository, or `None`."""
    return partial(cached_file, name_or_path, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
