"""Adapters of a model, by name, as in transformers and PEFT. How they share a token: docs/adapters.md."""

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .adapter_file_moextend import StoredAdapter, check_keywords, check_tensors, read_adapter
from .base_checks_moextend import base_rule
from .compatibility_moextend import (
    check_complete,
    check_dependencies,
    check_new_name,
    check_together,
    dependency_names,
    listed_names,
    select_per_item,
)
from .configuration_moextend import MODALITIES, MoExtendConfig, Sense, check_threshold
from .deltas_moextend import add_delta, find_sites, remove_deltas
from .gate_moextend import TokenGate
from .layers_moextend import add_experts, attach, input_device, remove_experts
from .loading_moextend import HUB_KWARGS, fit_encoders, fit_to_base, load_encoders_of
from .package_moextend import from_package
from .routing_moextend import Rule
from .scope_moextend import Selection
from .senses_moextend import Projector
from .tensors_moextend import moved_to_layers, not_finite, snapshot, split_by_part, tensor_shapes

logger = logging.get_logger(__name__)
DEFAULT = "default"  # the adapter that a model is made or loaded with
ADDING, FUSING = "Adding experts to a model", "The inference form"
IMPLEMENTATIONS = ("_attn_implementation_internal", "_experts_implementation_internal")


class Adapter(nn.Module):
    """One adapter of a model: config, and of each sense a projector and a frozen encoder, which adapters may share:
    `encoder`, `projector` of images, `audio_encoder`, `audio_projector`. `layers`: decoder layer -> `NewExperts`, and
    `deltas`: name of a site -> `Delta`, modules of the base's; `depends_on`: adapters below it when it was trained."""

    def __init__(self, config: MoExtendConfig, encoders: dict | None = None, projectors: dict | None = None):
        """encoders, projectors: by modality."""
        super().__init__()
        self.config, self.layers, self.deltas, self.depends_on = config, {}, {}, set()
        for modality, prefix in MODALITIES.items():
            setattr(self, f"{prefix}encoder", (encoders or {}).get(modality))
            setattr(self, f"{prefix}projector", (projectors or {}).get(modality))
        self.encoder_values = {modality: snapshot(encoder) for modality, encoder in self.encoders.items()}
        for encoder in self.encoders.values():
            encoder.requires_grad_(False)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """Modality -> frozen encoder, of those it has."""
        found = {modality: getattr(self, f"{prefix}encoder") for modality, prefix in MODALITIES.items()}
        return {modality: encoder for modality, encoder in found.items() if encoder is not None}

    @property
    def projectors(self) -> dict[str, Projector]:
        """Modality -> projector."""
        return {modality: getattr(self, f"{MODALITIES[modality]}projector") for modality in self.encoders}

    @property
    def gate(self) -> TokenGate | None:
        """Its `TokenGate`; `None`: another scope, or no extended layer yet."""
        return self.layers[min(self.layers)].rows.gate if self.layers else None

    def train(self, mode=True):
        """Frozen encoders stay in evaluation mode."""
        super().train(mode)
        for encoder in self.encoders.values():
            encoder.eval()
        return self


class AdapterSwitch:
    """What a user does with the adapters of a model. `self.config` is the config of `self.leading`."""

    def attach_adapter(self, name: str, config: MoExtendConfig, tensors: dict, encoders: dict[str, nn.Module]) -> None:
        """Attaches an adapter whose new tensors (by role, as in its file) fit; nobody uses it yet."""
        attach(self.moe_layers, self.passes, Rule(**config.routing_rule))
        sites, projectors = find_sites(config, self.get_decoder()), {}
        parts = split_by_part(tensors, sites)
        for modality in encoders:
            projector = Projector(config.senses[modality], config.get_text_config().hidden_size, device="meta")
            projector.load_state_dict(parts[f"{MODALITIES[modality]}projector"], assign=True)
            projectors[modality] = projector
        adapter = Adapter(config, encoders, projectors)
        self.attach_layers(name, adapter, config.extended_layers, sites, parts)
        self.adapters[name] = adapter.train(self.training)
        self.passes.change(adapters={**self.passes.current.adapters, name: adapter})

    def attach_layers(self, name: str, adapter: Adapter, plan: dict, sites: dict, parts: dict) -> None:
        """Attaches new experts to the layers of `plan`, deltas to `sites`, and the gate where it is among the `parts`
        of the tensors."""
        config, layers = adapter.config, self.moe_layers
        new = {n: add_experts(layers[n], name, parts[n], config, sources) for n, sources in plan.items()}
        adapter.layers = dict(sorted({**adapter.layers, **new}.items()))
        added = {site: add_delta(site, sites[site], name, parts[site], self.passes) for site in sites}
        adapter.deltas = {**adapter.deltas, **added}
        if "gate" in parts and adapter.layers:
            rows = adapter.layers[min(adapter.layers)].rows
            rows.gate = TokenGate(rows.weight.shape[-1], adapter.config.gate_hidden_size, device="meta")
            rows.gate.load_state_dict(parts["gate"], assign=True)

    def remove_adapter(self, name: str) -> None:
        """Removes whatever `attach_adapter` has attached under this name; a pass under way still has it."""
        remaining = {other: adapter for other, adapter in self.passes.current.adapters.items() if other != name}
        self.passes.change(adapters=remaining)
        for layer in self.moe_layers.values():
            remove_experts(layer, name)
        remove_deltas(self.get_decoder(), name)
        if name in self.adapters:
            del self.adapters[name]

    def load_adapter(
        self,
        name_or_path: str | os.PathLike,
        adapter_name: str = DEFAULT,
        *,
        encoder: str | os.PathLike | PreTrainedModel | list | None = None,
        is_trainable: bool = False,
        check_base: bool = True,
        check_trained_on: bool = True,
        **hub_kwargs,
    ) -> None:
        """Loads one more adapter, under a name that no other has. It takes part once `set_adapter` says so. Arguments
        and errors are those of `from_pretrained`; after an error the model is as it was. An encoder that another
        adapter sees with is shared. `is_trainable`: whether its tensors ask for gradients at once."""
        named = ("adapter_name", "encoder", "is_trainable", "check_base", "check_trained_on")
        check_keywords("load_adapter", hub_kwargs, (*HUB_KWARGS, *named))
        with self.passes.lock:
            check_new_name(adapter_name, self)
            stored = read_adapter(name_or_path, **hub_kwargs)
            config = stored.config_for_loading()
            config.name_or_path = str(name_or_path)
            fit_to_base(config, self.base, self.moe_layers, check_base, f"Load {name_or_path} on its own base")
            base_rule(config, self.moe_layers)
            if check_trained_on:
                check_dependencies(config, self.fingerprints(), name_or_path)
            location, options = (name_or_path, hub_kwargs), {"dtype": self.base.dtype, **hub_kwargs}
            encoders = load_encoders_of(config, encoder, location, options, self.adapters.values())
            encoders = fit_encoders(config, encoders, self.base, check_base)
            self.attach_adapter(adapter_name, config, self.fitting_tensors(config, stored), encoders)
            self.find_dependencies()
            self.require_gradients_of(adapter_name, is_trainable)

    def fitting_tensors(self, config: MoExtendConfig, stored: StoredAdapter) -> dict[str, torch.Tensor]:
        """The tensors of a `StoredAdapter`, once all of them fit, where and in the dtype they belong."""
        sites = find_sites(config, self.get_decoder())
        check_tensors(tensor_shapes(config, self.moe_layers, sites), stored)
        if names := not_finite(stored.tensors):
            logger.warning(f"The adapter holds NaN or infinity, and so may its answers: {', '.join(names[:8])}.")
        return moved_to_layers(stored.tensors, self.moe_layers, sites, input_device(self.base), self.base.dtype)

    def add_adapter(self, adapter_name: str = DEFAULT, *args: object, **options: object) -> None:
        """Adds a new adapter on top of the active ones: `modeling_moextend.attaching.add_adapter`, of the package."""
        from_package("attaching", ADDING).add_adapter(self, adapter_name, *args, **options)

    def extend(self, plan: dict[int, list[int]]) -> None:
        """Adds new experts to the adapter that trains: `modeling_moextend.attaching.extend`, of the package."""
        from_package("attaching", ADDING).extend(self, plan)

    def delete_adapter(self, adapter_names: str | list[str]) -> None:
        """Deletes adapters. Where no active one stays, the next is set, as PEFT has it: the first that was not trained
        on top of others. `ValueError`: an unknown name, all adapters, or one that another was trained on top of."""
        with self.passes.lock:
            names = listed_names(adapter_names, self.adapters)
            staying = [name for name in self.adapters if name not in names]
            if not staying:
                raise ValueError(f"{names} are all adapters of this model. To get the base back, use model.detach().")
            check_complete(self.adapters, staying, deleting=True)
            active = [name for name in self.passes.current.active if name in staying]
            following = [] if active else [name for name in staying if not self.adapters[name].depends_on][:1]
            self.activate(active or following)
            for name in names:
                self.remove_adapter(name)
            if following:
                self.set_adapter(following)
                warnings.warn(f"No active adapter was left, so {following[0]!r} is set.", stacklevel=2)

    def set_adapter(
        self, adapter_name: str | list[str], inference_mode: bool = False, *, check_trained_on: bool = True
    ) -> None:
        """Makes an adapter, or a list of adapters, the active ones. Unless `inference_mode`, their tensors ask for
        gradients, as PEFT has it; those that another was trained on top of stay frozen. `ValueError`: an unknown name,
        one twice, none; adapters that can't share tokens; one without loaded ones that it was trained on top of."""
        with self.passes.lock:
            names = listed_names(adapter_name, self.adapters)
            if not names:
                raise ValueError("set_adapter needs at least one adapter; to use the base: disable_adapters().")
            if check_trained_on:
                check_complete(self.adapters, names)
            check_together({name: self.adapters[name].config for name in names}, self)
            self.activate(names)
            on_top = self.on_top(self.adapters)
            self.require_gradients([] if inference_mode else [name for name in names if name in on_top])

    def on_top(self, names: Iterable[str]) -> list[str]:
        """Those of the adapters `names` on top of which no other of them was trained."""
        below = {one for name in names for one in self.adapters[name].depends_on}
        return [name for name in names if name not in below]

    def find_dependencies(self) -> None:
        """Notes which adapters of this model each one was trained on top of, in whichever order they were loaded."""
        lacking = {n: one for n, one in self.adapters.items() if len(one.depends_on) < len(one.config.trained_on)}
        fingerprints = self.fingerprints() if lacking else {}
        for name, adapter in lacking.items():
            others = {other: known for other, known in fingerprints.items() if other != name}
            adapter.depends_on |= set(dependency_names(adapter.config, others).values()) - {None}

    def activate(self, names: list[str]) -> None:
        """Makes `names` the active adapters; what trains and is saved is the one on top, if there is just one."""
        top = self.on_top(names)
        self.passes.change(active=tuple(sorted(names)), trained=top[0] if len(top) == 1 else None)
        self.config = self.adapters[self.leading].config
        self.follow_base()

    def follow_base(self) -> None:
        """Has the config, and its `text_config`, say which implementations the base runs."""
        text, base = self.config.text_config, self.base.config
        pairs = [(one.get_text_config(), base.get_text_config()) for one in (text, self.config)]
        for config, running in ((self.config, base), (text, base), *pairs):
            for name in IMPLEMENTATIONS:
                setattr(config, name, getattr(running, name))

    def active_adapters(self) -> list[str]:
        """Names of the adapters that take part, in ascending order; `[]` while switched off."""
        return list(self.passes.current.active) if self.passes.selection().enabled else []

    @property
    def active_adapter(self) -> str | list[str]:
        """The adapter that takes part, as PEFT has it; a list where there are several, or none."""
        names = self.active_adapters()
        return names[0] if len(names) == 1 else names

    def get_adapter_state_dict(self, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
        """The tensors of one adapter by role, as in its file; default: of the one that trains, or is active alone."""
        return {name: tensor.detach() for name, tensor in self.adapter_tensors(adapter_name).items()}

    def fuse(self) -> None:
        """Inference form of the new experts of all adapters: `modeling_moextend.serving.fuse`, of the package."""
        from_package("serving", FUSING).fuse(self)

    def unfuse(self) -> None:
        """Gives every parameter memory of its own again: `modeling_moextend.serving.unfuse`, of the package."""
        from_package("serving", FUSING).unfuse(self)

    def enable_peft_hotswap(self, *args: object, **kwargs: object) -> None:
        """`ValueError`: new experts are not hot-swapped."""
        raise ValueError("enable_peft_hotswap is for LoRA: load_adapter(path, name), then set_adapter(name).")

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block the model is the base, bit for bit; images are refused."""
        with self.passes.using(enabled=False):
            yield

    def disable_adapters(self) -> None:
        """Switches all adapters off until `enable_adapters`."""
        self.passes.change(switched_on=False)

    def enable_adapters(self) -> None:
        self.passes.change(switched_on=True)

    def reference(self, adapter_names: str | list[str] | None = None) -> nn.Module:
        """For `ref_model=` of TRL's trainers: `modeling_moextend.training.reference.Reference`, of the package."""
        return from_package("training.reference", "A reference model").Reference(self, adapter_names)

    def select_adapters(self, adapter_names: list | None = None, *batches: torch.Tensor | None) -> Selection:
        """The `Selection` for a pass that begins now: the active adapters, or what `adapter_names` says of each item
        of the batch (see `forward`), the first of `batches` that is not `None`."""
        chosen, num_items = self.passes.selection(), next((len(one) for one in batches if one is not None), None)
        return chosen if adapter_names is None else select_per_item(self, chosen, adapter_names, num_items)

    @property
    def leading(self) -> str:
        """The adapter whose config is the model's: what trains; else the first active one; else the first one."""
        current = self.passes.current
        return current.trained or next(iter((*current.active, *current.adapters)))

    def resolve_name(self, adapter_name: str | None = None) -> str:
        """`adapter_name`; for `None` that of the adapter that trains, or is active alone. `ValueError`: an unknown
        name; none given where several are active."""
        current = self.passes.current
        if adapter_name is None and current.trained is None:
            meant = f"which one is meant: adapter_name=<one of {list(self.adapters)}>"
            raise ValueError(f"Active adapters are {list(current.active)}, so it takes a name to say {meant}.")
        return listed_names([current.trained if adapter_name is None else adapter_name], self.adapters)[0]

    @property
    def senses(self) -> dict[str, Sense]:
        """Modality -> what the config says of the sense with which a pass that begins now takes it."""
        return {modality: one.config.senses[modality] for modality, one in self.passes.selection().sensing.items()}

    @property
    def placeholder_ids(self) -> list[int]:
        """What stands for features in `input_ids`, of all senses."""
        return [sense.token_id for sense in self.senses.values()]

    def of_sense(self, kind: str, modality: str = "image") -> nn.Module | None:
        """The "encoders" or "projectors" of a pass that begins now, the one of this modality, or `None`."""
        adapter = self.passes.selection().sensing.get(modality)
        return None if adapter is None else getattr(adapter, kind)[modality]

    @property
    def encoder(self) -> PreTrainedModel | None:
        return self.of_sense("encoders")

    @property
    def projector(self) -> Projector | None:
        return self.of_sense("projectors")

    @property
    def audio_encoder(self) -> PreTrainedModel | None:
        return self.of_sense("encoders", "audio")

    @property
    def audio_projector(self) -> Projector | None:
        return self.of_sense("projectors", "audio")

    @property
    def image_token_id(self) -> int | None:
        """What stands for image features: of the adapter that sees, or else of the leading one."""
        senses = self.senses
        return senses["image"].token_id if "image" in senses else self.config.image_token_id

    @property
    def gate(self) -> TokenGate | None:
        """The `TokenGate` of the leading adapter, or `None`: see `Adapter.gate`."""
        return self.adapters[self.leading].gate

    @property
    def gate_threshold(self) -> float:
        """With `scope="gate"`: a token may use new experts when its routing margin is above this. Saved with it."""
        return self.config.gate_threshold

    @gate_threshold.setter
    def gate_threshold(self, value: float) -> None:
        if self.config.scope != "gate":
            raise ValueError(f"gate_threshold belongs to scope='gate', this adapter has scope={self.config.scope!r}.")
        self.config.gate_threshold = check_threshold(value)
