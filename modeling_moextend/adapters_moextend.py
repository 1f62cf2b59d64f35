"""Adapters of a model, by name: loading, adding, switching and deleting them, without touching a base tensor.

A model holds any number of adapters over one base; the one it was made or loaded with is called "default". Each has
its own config and its own tensors; the active ones take part in a pass. Names and meaning of the methods are those of
transformers' and PEFT's. How adapters share a token is told in docs/adapters.md, and done in routing_moextend.py.
"""

import contextlib
import copy
import os

from torch import nn

from .adapter_file_moextend import put_tensors, read_adapter
from .base_checks_moextend import base_rule, check_plan
from .compatibility_moextend import (
    check_belongs,
    check_below,
    check_complete,
    check_known,
    check_new_name,
    check_nothing_above,
    check_still_below,
    check_together,
    found_below,
    listed_names,
    select_per_item,
)
from .configuration_moextend import check_threshold, normalise_plan, routing_choices
from .layers_moextend import add_experts, add_gate, attach, input_device, remove_experts
from .loading_moextend import identity, load_new_encoder, load_stored_encoder
from .package_moextend import from_package
from .vision_moextend import Projector

DEFAULT = "default"  # the adapter that a model is made or loaded with
IMPLEMENTATIONS = ("_attn_implementation_internal", "_experts_implementation_internal")


class Adapter(nn.Module):
    """One adapter of a model: its config, its encoder and projector. Its rows and experts are modules of the base's
    layers; `layers` says which: decoder layer -> `NewExperts`.

    An encoder is frozen, and shared by adapters that see with the same one; the projector is the adapter's own.
    `depends_on`: names of the adapters of this model on top of which it was trained.
    """

    def __init__(self, config, encoder=None, device=None):
        super().__init__()
        self.config, self.encoder, self.projector = config, encoder, None
        self.layers, self.depends_on = {}, set()
        if encoder is not None:
            encoder.requires_grad_(False)
            sizes = config.encoder_config.hidden_size, config.get_text_config().hidden_size
            self.projector = Projector(*sizes, config.projector_hidden_act, device=device)

    @property
    def gate(self):
        """Its `TokenGate`, or `None` where there is none (another scope, or no extended layer yet)."""
        return self.layers[min(self.layers)].rows.gate if self.layers else None

    def train(self, mode=True):
        """The frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self


class AdapterSwitch:
    """What a user does with the adapters of a model. `self.config` is the config of `self.leading`."""

    # ------------------------------------------------------------ adding, loading and deleting

    def attach_adapter(self, name, config, encoder=None, depends_on=()):
        """Attaches an adapter's new experts, gate and projector at their start values; nobody uses them yet."""
        rule = base_rule(config, self.moe_layers)
        with self.tried(config.extended_layers, rule, name):
            attach(self.moe_layers, self.passes, rule)
            layers = {
                layer: add_experts(self.moe_layers[layer], name, sources, config)
                for layer, sources in config.extended_layers.items()
            }
        if config.scope == "gate" and layers:
            add_gate(layers, config)
        adapter = Adapter(config, encoder, input_device(self.base)).train(self.training)
        adapter.layers, adapter.depends_on = layers, set(depends_on)
        self.adapters[name] = adapter
        self.passes.change(adapters={**self.passes.current.adapters, name: adapter})

    def tried(self, plan, rule, name):
        """Context for attaching new experts. In the package each layer of the plan is tried, before and after: see
        attaching/selfcheck.py. The code that came with an adapter does without: there its base was tried before."""
        if not __name__.startswith("modeling_moextend."):
            return contextlib.nullcontext()
        return from_package("attaching", "A self-check").self_checked(self.moe_layers, plan, rule, self.passes, name)

    def remove_adapter(self, name):
        """Removes whatever `attach_adapter` has attached under this name; a pass under way still has it."""
        remaining = {other: adapter for other, adapter in self.passes.current.adapters.items() if other != name}
        self.passes.change(adapters=remaining)
        for layer in self.moe_layers.values():
            remove_experts(layer, name)
        if name in self.adapters:
            del self.adapters[name]

    @contextlib.contextmanager
    def removed_on_error(self, name):
        """Removes the adapter again where the block, which attaches it, fails."""
        try:
            yield
        except BaseException:
            self.remove_adapter(name)
            raise

    def load_adapter(
        self,
        name_or_path,
        adapter_name=DEFAULT,
        *,
        encoder=None,
        is_trainable=False,
        check_base=True,
        check_trained_on=True,
        **hub_kwargs,
    ):
        """Loads one more adapter beside those that are there. It takes part once `set_adapter` says so.

        Args:
            name_or_path: the adapter's folder or Hub id.
            adapter_name: what it is called here: a name that no other adapter has.
            encoder: where its encoder lies, if elsewhere than its config says; or a loaded model. One that another
                adapter sees with already is shared.
            is_trainable: whether its tensors ask for gradients at once, as those that `from_pretrained` loads do.
            check_base: `False` loads an adapter that was made on another base (its fingerprint differs).
            check_trained_on: `False` loads an adapter without those that it was trained on top of.
            **hub_kwargs: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            OSError: no adapter there, or its encoder can't be found.
            ValueError: a name that is taken or can't be one; a damaged file; another base; adapters missing that it
                was trained on; tensors that don't fit. The model is as it was.
        """
        with self.passes.lock:
            check_new_name(adapter_name, self)
            stored = read_adapter(name_or_path, **hub_kwargs)
            config = stored.config_for_loading()
            config.name_or_path = str(name_or_path)
            check_belongs(self, config, name_or_path, check_base)
            if check_trained_on:
                check_below(config, self.fingerprints(), name_or_path)
            encoder = load_stored_encoder(self, config, encoder, check_base, (name_or_path, hub_kwargs))
            with self.removed_on_error(adapter_name):
                self.attach_adapter(adapter_name, config, encoder)
                put_tensors(self.adapter_tensors(adapter_name), stored, base_dtype=self.base.dtype)
            self.find_dependencies()
            self.require_gradients_of(adapter_name, is_trainable)

    def add_adapter(
        self,
        adapter_name,
        extended_layers=None,
        *,
        scope=None,
        selection=None,
        calibration=None,
        encoder=None,
        image_token_id=None,
        **entries,
    ):
        """Adds a new adapter on top of the active ones: continual extension.

        Those that are there are frozen; the new one is active with those that were, and is what trains, and what
        `save_pretrained` saves. Its config's `trained_on` tells on top of which adapters it was made.

        Args:
            adapter_name: a name that no other adapter has.
            extended_layers, scope, selection, calibration, encoder, image_token_id: as in `from_base`; of several
                active adapters all select alike, `calibration` is "none" for each, and at most one has an encoder.
            **entries: more of the config: `gate_hidden_size`, `gate_threshold`, `encoder_select_layer`, ...

        Raises:
            ValueError: a name that is taken; a plan that does not fit; choices that can't be active together with
                those of the adapters below. The model is as it was.
        """
        with self.passes.lock:
            check_new_name(adapter_name, self)
            plan, below = normalise_plan(extended_layers), list(self.passes.current.active)
            if not self.passes.selection().enabled:
                raise ValueError(
                    "The adapters are off, and a new one goes on top of the active ones: enable_adapters()."
                )
            if not plan and encoder is None:
                raise ValueError("Nothing to add: give extended_layers, like {2: [1]}, or encoder=... for a projector")
            check_plan(self.moe_layers, plan)
            encoder = load_new_encoder(encoder, self.base)
            vocab_size = self.get_input_embeddings().weight.shape[0]
            config = self.config_class(
                **identity(self.base, encoder),
                image_token_id=vocab_size if image_token_id is None else image_token_id,
                extended_layers=plan,
                routing_rule=self.config.routing_rule,
                trained_on=self.described(below),
                dtype=self.base.dtype,
                **routing_choices(scope, selection, calibration, has_encoder=encoder is not None),
                **entries,
            )
            check_together({**{name: self.adapters[name].config for name in below}, adapter_name: config}, self)
            with self.removed_on_error(adapter_name):
                self.attach_adapter(adapter_name, config, encoder, depends_on=below)
            self.activate([*below, adapter_name])
            self.require_gradients([adapter_name])

    def extend(self, plan):
        """Adds new experts in place, {decoder layer: [source experts]}, and keeps the projector: stage finetune.

        With several adapters, to the one that trains.

        Raises:
            ValueError: a layer that is no MoE layer or has new experts already, a source out of range, an empty plan;
                several adapters of which none is on top; new experts that can't share tokens with active ones.
        """
        with self.passes.lock:
            plan, name = normalise_plan(plan), self.resolve_name()
            adapter = self.adapters[name]
            config = adapter.config
            if not plan:
                raise ValueError("The plan is empty: name layers and source experts, like {2: [1]}.")
            check_plan(self.moe_layers, plan)
            again = sorted(plan.keys() & config.extended_layers.keys())
            if again:
                raise ValueError(f"Layers {again} have new experts already; a layer is extended once.")
            if adapter.gate is not None and min(plan) < min(config.extended_layers):
                raise ValueError(
                    f"The gate reads the input of layer {min(config.extended_layers)}, so layer {min(plan)} below it "
                    "can't be added. Name all layers at once, or begin anew with from_base(...)."
                )
            check_nothing_above(self.adapters, name)
            extended = copy.copy(config)
            extended.extended_layers = normalise_plan({**config.extended_layers, **plan})
            rule = base_rule(extended, self.moe_layers)
            active = {one: self.adapters[one].config for one in self.passes.current.active}
            check_together({**active, name: extended}, self)
            with self.tried(plan, rule, name):
                new = {layer: add_experts(self.moe_layers[layer], name, plan[layer], config) for layer in plan}
            config.extended_layers = extended.extended_layers
            adapter.layers = dict(sorted({**adapter.layers, **new}.items()))
            if config.scope == "gate":
                add_gate(adapter.layers, config)
            self.passes.change()

    def delete_adapter(self, adapter_names):
        """Deletes an adapter, or a list of them; those that stay are what they were.

        Raises:
            ValueError: an unknown name; the only adapter of the model, or one that another was trained on.
        """
        with self.passes.lock:
            names = listed_names(adapter_names)
            check_known(names, self.adapters)
            staying = [name for name in self.adapters if name not in names]
            if not staying:
                raise ValueError(f"{names} are all adapters of this model. To get the base back, use model.detach().")
            check_still_below(self.adapters, staying)
            self.activate([name for name in self.passes.current.active if name in staying], among=staying)
            for name in names:
                self.remove_adapter(name)

    # ------------------------------------------------------------ switching

    def set_adapter(self, adapter_name, inference_mode=False, *, check_trained_on=True):
        """Makes an adapter, or a list of adapters, the active ones, and no other. Of the base no tensor is touched.

        Args:
            adapter_name: a name, or a list of names.
            inference_mode: whether the active adapters are frozen; if not, their tensors ask for gradients, as PEFT
                has it. Those that another one was trained on top of stay frozen, and so do inactive ones.
            check_trained_on: `False` uses an adapter without those that it was trained on top of.

        Raises:
            ValueError: an unknown name; a name twice; none; adapters that can't share tokens, with the reason; one
                without loaded ones that it was trained on top of.
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

    def on_top(self, names):
        """Those of the adapters `names` on top of which no other of them was trained."""
        below = {one for name in names for one in self.adapters[name].depends_on}
        return [name for name in names if name not in below]

    def find_dependencies(self):
        """Notes which adapters of this model each one was trained on top of, in whichever order they were loaded; a
        second copy of one that is known already adds nothing."""
        lacking = {
            name: one for name, one in self.adapters.items() if len(one.depends_on) < len(one.config.trained_on)
        }
        fingerprints = self.fingerprints() if lacking else {}
        for name, adapter in lacking.items():
            others = {other: known for other, known in fingerprints.items() if other != name}
            adapter.depends_on |= set(found_below(adapter.config, others).values()) - {None}

    def activate(self, names, among=None):
        """Makes `names` the active adapters; what trains and is saved is the one on top, if there is just one.

        `among`: the adapters that the model has after this; default: all of them.
        """
        top = self.on_top(names)
        self.passes.change(active=tuple(sorted(names)), trained=top[0] if len(top) == 1 else None)
        before = self.config
        leading = self.passes.current.trained or next(iter((*self.passes.current.active, *(among or self.adapters))))
        config = self.adapters[leading].config
        for name in IMPLEMENTATIONS:  # the base's, whoever leads
            setattr(config, name, getattr(before, name))
        self.config = config

    def active_adapters(self):
        """Names of the adapters that take part, in ascending order; `[]` while switched off."""
        chosen = self.passes.selection()
        return list(self.passes.current.active) if chosen.enabled else []

    @contextlib.contextmanager
    def disable_adapter(self):
        """Inside the block the model is the base, bit for bit; images are refused."""
        with self.passes.using(enabled=False):
            yield

    def disable_adapters(self):
        """Switches all adapters off until `enable_adapters`."""
        self.passes.change(switched_on=False)

    def enable_adapters(self):
        self.passes.change(switched_on=True)

    def select_adapters(self, adapter_names=None, num_items=None):
        """The `Selection` for a pass that begins now.

        Args:
            adapter_names: for each of the `num_items` items of the batch a name, a list of names that take part
                together, or "__base__" for the base alone; `None`: the active adapters, for all of them.

        Raises:
            ValueError: as `select_per_item`.
        """
        chosen = self.passes.selection()
        return chosen if adapter_names is None else select_per_item(self, chosen, adapter_names, num_items)

    # ------------------------------------------------------------ training

    def begin_training(self, adapter_name):
        """Refuses to train an adapter that is not active, or that another was trained on top of."""
        if adapter_name not in self.passes.current.active:
            raise ValueError(f"Adapter {adapter_name!r} is not active, so it can't train: set_adapter first.")
        check_nothing_above(self.adapters, adapter_name)

    def stand_on_active(self, adapter_name):
        """Notes that an adapter trains on top of the other active ones."""
        adapter = self.adapters[adapter_name]
        beside = [name for name in self.passes.current.active if name != adapter_name]
        earlier = [entry for entry in adapter.config.trained_on if entry["name"] not in beside]
        adapter.config.trained_on = earlier + self.described(beside)
        adapter.depends_on.update(beside)
        self.activate(self.passes.current.active)  # which has it on top now

    def described(self, adapter_names):
        """What `trained_on` keeps of adapters; where one lies only if it is no folder of this machine."""
        sources = {name: self.adapters[name].config.name_or_path for name in adapter_names}
        return [
            {
                "name": name,
                "fingerprint": self.fingerprint_of(name),
                "name_or_path": source if source and not os.path.exists(source) else None,
            }
            for name, source in sources.items()
        ]

    # ------------------------------------------------------------ asking

    @property
    def leading(self):
        """The adapter whose config is the model's: what trains; else the first active one; else the first one."""
        current = self.passes.current
        return current.trained or next(iter((*current.active, *current.adapters)))

    def resolve_name(self, adapter_name=None):
        """`adapter_name`, if there is such an adapter; for `None` the one that trains, or the only active one.

        Raises:
            ValueError: an unknown name; none given where several are active, or none is.
        """
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
    def vision_adapter(self):
        """The `Adapter` with which a pass that begins now sees, or `None`."""
        return self.passes.selection().vision_adapter

    @property
    def encoder(self):
        return None if self.vision_adapter is None else self.vision_adapter.encoder

    @property
    def projector(self):
        return None if self.vision_adapter is None else self.vision_adapter.projector

    @property
    def image_token_id(self):
        """What stands for image features: of the adapter that sees, or else of the leading one."""
        return (self.config if self.vision_adapter is None else self.vision_adapter.config).image_token_id

    @property
    def gate_threshold(self):
        """With `scope="gate"`: a token may use new experts when its routing margin is above this (default 0).

        Kept in the config and saved with the adapter. Higher: less of the new task, less forgetting; see
        `evaluation.threshold_curve`. Setting it raises `ValueError` for another scope or what is no finite number.
        """
        return self.config.gate_threshold

    @gate_threshold.setter
    def gate_threshold(self, value):
        if self.config.scope != "gate":
            raise ValueError(f"gate_threshold belongs to scope='gate', this adapter has scope={self.config.scope!r}.")
        self.config.gate_threshold = check_threshold(value)

    @property
    def gate(self):
        """The `TokenGate` of the leading adapter, or `None`: see `Adapter.gate`."""
        return self.adapters[self.leading].gate
