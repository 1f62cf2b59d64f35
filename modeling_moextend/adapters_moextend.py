"""Adapters of a model, by name: attaching, loading, switching and deleting them, without touching a base tensor.

Each has its own config and its own tensors; the active ones take part in a pass. Names and meaning of the methods are
those of transformers' and PEFT's. How adapters share a token: docs/adapters.md.
"""

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .adapter_file_moextend import StoredAdapter, check_keywords, check_tensors, read_adapter
from .compatibility_moextend import (
    check_belongs,
    check_complete,
    check_dependencies,
    check_known,
    check_new_name,
    check_not_needed,
    check_together,
    dependency_names,
    listed_names,
    select_per_item,
)
from .configuration_moextend import MoExtendConfig, check_threshold
from .gate_moextend import TokenGate
from .layers_moextend import add_experts, attach, input_device, remove_experts
from .loading_moextend import HUB_KWARGS, load_stored_encoder
from .package_moextend import from_package
from .routing_moextend import Rule
from .scope_moextend import Selection
from .tensors_moextend import moved_to_layers, not_finite, snapshot, split_by_part, tensor_shapes
from .vision_moextend import Projector

logger = logging.get_logger(__name__)
DEFAULT = "default"  # the adapter that a model is made or loaded with
ADDING = "Adding experts to a model"
IMPLEMENTATIONS = ("_attn_implementation_internal", "_experts_implementation_internal")


class Adapter(nn.Module):
    """One adapter of a model: its config, its projector, and its frozen encoder, which adapters may share.

    `layers`: decoder layer -> `NewExperts`, modules of the base's layers; `depends_on`: names of the adapters of this
    model on top of which it was trained.
    """

    def __init__(self, config: MoExtendConfig, encoder: nn.Module | None = None, projector: Projector | None = None):
        super().__init__()
        self.config, self.encoder, self.projector = config, encoder, projector
        self.layers, self.depends_on, self.encoder_values = {}, set(), snapshot(encoder)
        if encoder is not None:
            encoder.requires_grad_(False)

    @property
    def gate(self) -> TokenGate | None:
        """Its `TokenGate`, or `None` where there is none (another scope, or no extended layer yet)."""
        return self.layers[min(self.layers)].rows.gate if self.layers else None

    def finds_images(self, input_ids: torch.Tensor | None) -> bool:
        """Whether `input_ids` (or `None`) hold its image tokens."""
        return input_ids is not None and bool((input_ids == self.config.image_token_id).any())

    def train(self, mode=True):
        """The frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self


class AdapterSwitch:
    """What a user does with the adapters of a model. `self.config` is the config of `self.leading`."""

    def attach_adapter(self, name: str, config: MoExtendConfig, tensors: dict, encoder: nn.Module | None) -> None:
        """Attaches an adapter whose new tensors (by role, as in its file) fit; nobody uses it yet."""
        attach(self.moe_layers, self.passes, Rule(**config.routing_rule))
        parts, projector = split_by_part(tensors), None
        if encoder is not None:
            sizes = config.encoder_config.hidden_size, config.get_text_config().hidden_size
            projector = Projector(*sizes, config.projector_hidden_act, device="meta")
            projector.load_state_dict(parts["projector"], assign=True)
        adapter = Adapter(config, encoder, projector)
        self.attach_layers(name, adapter, config.extended_layers, parts)
        self.adapters[name] = adapter.train(self.training)
        self.passes.change(adapters={**self.passes.current.adapters, name: adapter})

    def attach_layers(self, name: str, adapter: Adapter, plan: dict, parts: dict) -> None:
        """Attaches new experts to the layers of `plan`, and the gate where it is among the `parts` of the tensors."""
        new = {layer: add_experts(self.moe_layers[layer], name, parts[layer], adapter.config) for layer in plan}
        adapter.layers = dict(sorted({**adapter.layers, **new}.items()))
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
        if name in self.adapters:
            del self.adapters[name]

    def load_adapter(
        self,
        name_or_path: str | os.PathLike,
        adapter_name: str = DEFAULT,
        *,
        encoder: str | os.PathLike | PreTrainedModel | None = None,
        is_trainable: bool = False,
        check_base: bool = True,
        check_trained_on: bool = True,
        **hub_kwargs,
    ) -> None:
        """Loads one more adapter beside those that are there. It takes part once `set_adapter` says so.

        Args:
            name_or_path, check_base, check_trained_on: as in `from_pretrained`.
            adapter_name: what it is called here: a name that no other adapter has.
            encoder: as in `from_pretrained`. One that another adapter sees with already is shared.
            is_trainable: whether its tensors ask for gradients at once, as those that `from_pretrained` loads do.
            **hub_kwargs: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            OSError: no adapter there, or its encoder can't be found.
            ValueError: a name that is taken or can't be one; a damaged file; another base; adapters missing that it
                was trained on; tensors that don't fit. The model is as it was.
            TypeError: an unknown argument.
        """
        named = ("adapter_name", "encoder", "is_trainable", "check_base", "check_trained_on")
        check_keywords("load_adapter", hub_kwargs, (*HUB_KWARGS, *named))
        with self.passes.lock:
            check_new_name(adapter_name, self)
            stored = read_adapter(name_or_path, **hub_kwargs)
            config = stored.config_for_loading()
            config.name_or_path = str(name_or_path)
            check_belongs(self, config, name_or_path, check_base)
            if check_trained_on:
                check_dependencies(config, self.fingerprints(), name_or_path)
            encoder = load_stored_encoder(self, config, encoder, check_base, (name_or_path, hub_kwargs))
            self.attach_adapter(adapter_name, config, self.fitting_tensors(config, stored), encoder)
            self.find_dependencies()
            self.require_gradients_of(adapter_name, is_trainable)

    def fitting_tensors(self, config: MoExtendConfig, stored: StoredAdapter) -> dict[str, torch.Tensor]:
        """The tensors of a `StoredAdapter`, once all of them fit, where and in the dtype they belong."""
        check_tensors(tensor_shapes(config, self.moe_layers), stored)
        if names := not_finite(stored.tensors):
            logger.warning(f"The adapter holds NaN or infinity, and so may its answers: {', '.join(names[:8])}.")
        return moved_to_layers(stored.tensors, self.moe_layers, input_device(self.base), self.base.dtype)

    def add_adapter(
        self, adapter_name: str = DEFAULT, extended_layers: dict[int, list[int]] | None = None, **options
    ) -> None:
        """Adds a new adapter on top of the active ones: `modeling_moextend.attaching.add_adapter`, of the package."""
        from_package("attaching", ADDING).add_adapter(self, adapter_name, extended_layers, **options)

    def extend(self, plan: dict[int, list[int]]) -> None:
        """Adds new experts, {decoder layer: [source experts]}, to the adapter that trains, and keeps its projector:
        `modeling_moextend.attaching.extend`, of the package."""
        from_package("attaching", ADDING).extend(self, plan)

    def delete_adapter(self, adapter_names: str | list[str]) -> None:
        """Deletes an adapter, or a list of them; those that stay are what they were. Where no active one stays, the
        next is set, as PEFT has it: the first that was not trained on top of others. `ValueError`: an unknown name,
        all adapters of the model, or one that another was trained on top of."""
        with self.passes.lock:
            names = listed_names(adapter_names)
            check_known(names, self.adapters)
            staying = [name for name in self.adapters if name not in names]
            if not staying:
                raise ValueError(f"{names} are all adapters of this model. To get the base back, use model.detach().")
            check_not_needed(self.adapters, staying)
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
        """Makes an adapter, or a list of adapters, the active ones, and no other. Of the base no tensor is touched.

        Unless `inference_mode`, their tensors ask for gradients, as PEFT has it; those that another was trained on top
        of stay frozen.

        Raises:
            ValueError: an unknown name; a name twice; none; adapters that can't share tokens, with the reason; one
                without loaded ones that it was trained on top of (unless `check_trained_on=False`).
        """
        with self.passes.lock:
            names = listed_names(adapter_name)
            if not names:
                raise ValueError(
                    "set_adapter needs at least one adapter; to leave the base alone, use disable_adapters()."
                )
            check_known(names, self.adapters)
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
        """Notes which adapters of this model each one was trained on top of, in whichever order they were loaded; a
        second copy of one that is known already adds nothing."""
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
        """The name of the adapter that takes part, as PEFT has it; a list where there are several, or none."""
        names = self.active_adapters()
        return names[0] if len(names) == 1 else names

    def get_adapter_state_dict(self, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
        """The tensors of one adapter by role, as in its file; default: of the one that trains, or is active alone."""
        return {name: tensor.detach() for name, tensor in self.adapter_tensors(adapter_name).items()}

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
        """This model without the adapter that trains, or by `adapter_names`, for `ref_model=` of TRL's trainers: the
        same tensors, no second base. See `modeling_moextend.training.reference`, of the package."""
        return from_package("training.reference", "A reference model").Reference(self, adapter_names)

    def select_adapters(self, adapter_names: list | None = None, *batches: torch.Tensor | None) -> Selection:
        """The `Selection` for a pass that begins now. `adapter_names`: for each item of the batch (the first of
        `batches` that is not `None`) a name, a list of names that take part together, or "__base__" for the base
        alone; `None`: the active adapters, for all of them."""
        chosen, num_items = self.passes.selection(), next((len(one) for one in batches if one is not None), None)
        return chosen if adapter_names is None else select_per_item(self, chosen, adapter_names, num_items)

    @property
    def leading(self) -> str:
        """The adapter whose config is the model's: what trains; else the first active one; else the first one."""
        current = self.passes.current
        return current.trained or next(iter((*current.active, *current.adapters)))

    def resolve_name(self, adapter_name: str | None = None) -> str:
        """`adapter_name`, if there is such an adapter; for `None` the one that trains, or the only active one.
        `ValueError`: an unknown name; none given where several are active, or none is."""
        current = self.passes.current
        if adapter_name is None and current.trained is None:
            raise ValueError(
                f"Active adapters are {list(current.active)}, so it takes a name to say which one is meant: "
                f"adapter_name=<one of {list(self.adapters)}>."
            )
        name = current.trained if adapter_name is None else adapter_name
        check_known([name], self.adapters)
        return name

    @property
    def vision_adapter(self) -> Adapter | None:
        """The `Adapter` with which a pass that begins now sees, or `None`."""
        return self.passes.selection().vision_adapter

    @property
    def encoder(self) -> PreTrainedModel | None:
        return None if self.vision_adapter is None else self.vision_adapter.encoder

    @property
    def projector(self) -> Projector | None:
        return None if self.vision_adapter is None else self.vision_adapter.projector

    @property
    def image_token_id(self) -> int | None:
        """What stands for image features: of the adapter that sees, or else of the leading one."""
        return (self.config if self.vision_adapter is None else self.vision_adapter.config).image_token_id

    @property
    def gate(self) -> TokenGate | None:
        """The `TokenGate` of the leading adapter, or `None`: see `Adapter.gate`."""
        return self.adapters[self.leading].gate

    @property
    def gate_threshold(self) -> float:
        """With `scope="gate"`: a token may use new experts when its routing margin is above this (default 0).

        Saved with the adapter. Higher: less of the new task, less forgetting; see `evaluation.threshold_curve`.
        Setting it raises `ValueError` for another scope or what is no finite number.
        """
        return self.config.gate_threshold

    @gate_threshold.setter
    def gate_threshold(self, value: float) -> None:
        if self.config.scope != "gate":
            raise ValueError(f"gate_threshold belongs to scope='gate', this adapter has scope={self.config.scope!r}.")
        self.config.gate_threshold = check_threshold(value)
