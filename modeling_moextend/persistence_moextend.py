"""How a model begins and ends: from a base, from a saved adapter, to a folder, to the Hub, back to the base."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self

import torch
from huggingface_hub import CommitInfo
from torch.nn.modules.module import _IncompatibleKeys
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .adapter_file_moextend import StoredAdapter, check_keywords, check_tensors, read_adapter, write_folder
from .adapters_moextend import DEFAULT
from .base_checks_moextend import check_in_memory
from .compatibility_moextend import check_dependencies
from .configuration_moextend import CALLERS
from .deltas_moextend import remove_deltas
from .layers_moextend import detach
from .loading_moextend import HUB_KWARGS, SHARED_HUB_KWARGS, check_folder, load_parts, undone_on_error
from .package_moextend import from_package
from .tensors_moextend import check_finite, gather
from .validation_moextend import GENERATION, is_generation, short

UNLOADED = ("_from_auto", "adapter_kwargs", "output_loading_info")  # keywords that are not for the base
PUSH_KWARGS = ("repo_id", "token", "private", "revision", "create_pr", "commit_message", "commit_description")
PUSH_KWARGS += ("card", "report", "shift", "tags")
IGNORED_KWARGS = ("state_dict", "save_function", "safe_serialization", "variant")  # of transformers' save_pretrained
IGNORED_KWARGS += ("save_peft_format", "save_original_format")
Parts = str | os.PathLike | PreTrainedModel  # where a base or encoder lies, or the loaded model
PUBLISHING = "Publishing (save_pretrained to a folder works without)"


class Persistence:
    """Attaching, saving, loading and detaching: mixed into `MoExtendPreTrainedModel`."""

    auto_base_class = AutoModelForCausalLM  # what a stored base is loaded with

    @classmethod
    def from_base(cls, base: Parts, extended_layers: dict[int, list[int]] | None = None, **options) -> Self:
        """Extends a new base by {decoder layer: [source experts]}: `attaching.from_base`, of the package, says all."""
        return from_package("attaching", "Extending a new base").from_base(cls, base, extended_layers, **options)

    def detach(self) -> PreTrainedModel:
        """Takes all adapters off and returns the base, bit for bit what it was."""
        remove_deltas(self.get_decoder())
        detach(self.get_decoder())
        for name in self.base_trainable:
            self.base.get_parameter(name).requires_grad_(True)
        return self.base

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: PreTrainedConfig | None = None,
        base: Parts | None = None,
        encoder: Parts | list[Parts] | None = None,
        check_base: bool = True,
        check_trained_on: bool = True,
        adapter_name: str = DEFAULT,
        **kwargs,
    ) -> Self:
        """Loads base and encoder (from safetensors) and puts the adapter on top, a folder or Hub id.

        Args:
            base, encoder: where they lie, if elsewhere than the config says; or loaded models; of several encoders a
                list, in any order.
            check_base: `False` loads onto another base than the adapter was made on (its fingerprint differs).
            check_trained_on: `False` loads an adapter without those that it was trained on top of.
            adapter_name: what the adapter is called in this model, where more are to come.
            **kwargs: to the base's `from_pretrained`.

        `OSError`: adapter, base or encoder can't be found; `ValueError`: a damaged file, tensors that do not fit (all
        named), another base, adapters missing that it was trained on top of.
        """
        name_or_path = pretrained_model_name_or_path
        hub = {key: value for key in HUB_KWARGS if (value := kwargs.pop(key, None)) is not None}
        stored = read_adapter(name_or_path, **hub)
        own_config = stored.config_for_loading()  # the header's wins over config.json
        if check_trained_on:
            check_dependencies(own_config, {}, name_or_path)
        called = {name: getattr(config, f"_{name}", None) for name in CALLERS}  # where AutoModel has put these
        options = {key: value for key, value in called.items() if value is not None}
        options |= {key: value for key, value in kwargs.items() if key not in UNLOADED}
        options |= {key: hub[key] for key in SHARED_HUB_KWARGS if key in hub}
        location = name_or_path, hub
        parts = load_parts(own_config, base, encoder, cls.auto_base_class, check_base, options, location)
        own_config.name_or_path = str(name_or_path)
        with undone_on_error(*parts):
            model = cls(own_config, *parts, adapter_name=adapter_name, stored=stored)
        model.require_gradients_of(adapter_name)
        if kwargs.get("generation_config") is not None:  # the base's has it; the call's wins over the adapter's
            model.generation_config = kwargs["generation_config"]
        if kwargs.get("output_loading_info"):  # what is missing, unexpected or misshapen was refused
            return model.eval(), {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        adapter_name: str | None = None,
        adapter_dtype: str | torch.dtype | None = None,
        max_shard_size: int | str = "50GB",
        with_code: bool = True,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Writes one adapter: config.json, moextend_adapter.safetensors, the shipped code. Never a base tensor. Where
        parameters are sharded (FSDP2), every process calls this, with `is_main_process` true on one of them.

        Args:
            adapter_name: which one; default: the one that trains, or the only active one.
            adapter_dtype: dtype or its name for the new tensors in the file; default: the base's; in a checkpoint of
                transformers' `Trainer` or a trainer of TRL's, float32, so that the run can go on from it.
            with_code: `False` leaves the code out, as in the checkpoints of a run: the package loads the folder then.
            max_shard_size, push_to_hub, **kwargs: as in transformers; an unknown one is a `TypeError`.

        Raises:
            ValueError: the folder is the base's or the encoder's; no name where several adapters are active; NaN or
                infinity in a tensor, as stored; a base or encoder that has changed since it was loaded.
        """
        folder, writes = Path(save_directory), kwargs.pop("is_main_process", True)
        check_keywords("save_pretrained", kwargs, (*PUSH_KWARGS, *IGNORED_KWARGS))
        adapter_name = self.resolve_name(adapter_name)
        config = self.adapters[adapter_name].config
        check_folder(folder, config)
        hub = from_package("publishing.hub", PUBLISHING) if push_to_hub else None
        if hub is not None:
            hub.check_published(config)
        for_trainer = "state_dict" in kwargs and folder.name.startswith(PREFIX_CHECKPOINT_DIR)  # `Trainer` gives both
        default = torch.float32 if for_trainer else self.base.dtype
        dtype = getattr(torch, adapter_dtype) if isinstance(adapter_dtype, str) else adapter_dtype or default
        tensors = gather(self.adapter_tensors(adapter_name), dtype, keep=writes)
        check_in_memory(self, adapter_name)
        if not writes:
            return
        check_finite(tensors, "saved")
        config = config.published(with_code)
        config.generation_config = self.changed_generation(config.generation_config)
        folder.mkdir(parents=True, exist_ok=True)
        names = self.names_of_adapter(adapter_name) if for_trainer else ()
        write_folder(folder, tensors, config, max_shard_size, with_code, names)
        if hub is not None:
            options = {name: kwargs[name] for name in PUSH_KWARGS if name in kwargs}
            hub.upload(folder, options.pop("repo_id", folder.name), config, **options)

    def names_of_adapter(self, adapter_name: str | None = None) -> list[str]:
        """What the tensors of an adapter are called in `state_dict()`."""
        own = {id(tensor) for tensor in self.adapter_tensors(adapter_name).values()}
        return [name for name, tensor in self.state_dict(keep_vars=True).items() if id(tensor) in own]

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], *args, **kwargs) -> NamedTuple:
        """As in PyTorch; tensors by role, as in an adapter's file, replace those of the adapter that trains: all of
        them, or `ValueError`. `Trainer` reads its checkpoints so."""
        if not any(
            name.startswith(("layers.", "gate.", "projector.", "audio_projector.", "output.")) for name in state_dict
        ):
            return super().load_state_dict(state_dict, *args, **kwargs)
        live = self.adapter_tensors()
        check_tensors({name: tensor.shape for name, tensor in live.items()}, StoredAdapter({}, dict(state_dict), {}))
        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(state_dict[name])
        self._keys_to_ignore_on_save = {*self.state_dict()} - {*self.names_of_adapter()}  # `Trainer` misses no others
        return _IncompatibleKeys([], [])

    def changed_generation(self, values: dict | None) -> dict | None:
        """`values` of an adapter's config, and what of `generation_config` has changed since the model was made."""
        if getattr(self, "generation_config", None) is None:  # a body
            return values
        now, before = self.generation_config.to_dict(), self.initial_generation
        for name, value in now.items():  # as JSON has it
            now[name] = list(value) if isinstance(value, (set, tuple)) else value
            now[name] = value.tolist() if hasattr(value, "tolist") else now[name]
        changed = {name: now[name] for name in now if name[0] != "_" and now[name] != before.get(name)}
        if not is_generation(changed):
            raise ValueError(
                f"generation_config has changed in {short(changed)}, and an adapter's config holds only "
                f"{GENERATION[1]}. Nothing was saved: take the others out, and give them to generate(...) instead."
            )
        return {**(values or {}), **changed} or None

    def push_to_hub(self, repo_id: str, **kwargs) -> CommitInfo:
        """Uploads the adapter as one commit: `modeling_moextend.publishing.hub.push`, of the package."""
        return from_package("publishing.hub", PUBLISHING).push(self, repo_id, **kwargs)
