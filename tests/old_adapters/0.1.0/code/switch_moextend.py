"""Adapters of a model, by name: loading, adding, switching and deleting them, without touching a base tensor.

A model holds any number of adapters over one base; the one it was made or loaded with is called "default". Each has
its own config and its own tensors; the active ones take part in a pass. Names and meaning of the methods are those of
transformers' and PEFT's. How adapters share a token is told in docs/adapters.md, and done in routing_moextend.py.
"""

import contextlib

from torch import nn

from .adapter_moextend import put_tensors, read_adapter, reshard, stored_dtype, tensors_fingerprint
from .configuration_moextend import check_threshold, normalise_plan, routing_choices
from .families_moextend import find_moe_layers
from .hub_moextend import hub_id
from .layers_moextend import add_experts, add_gate, attach, input_device, remove_experts
from .loading_moextend import (
    check_plan,
    check_rule,
    identity,
    load_new_encoder,
    load_stored_encoder,
    stored_config,
)
from .routing_moextend import Rule
from .selfcheck_moextend import self_checked
from .together_moextend import (
    check_belongs,
    check_below,
    check_complete,
    check_may_train,
    check_new_name,
    check_still_below,
    check_together,
    checked_rows,
    found_below,
    names_in,
)
from .vision_moextend import Projector

DEFAULT = "default"  # the adapter that a model is made or loaded with
IMPLEMENTATIONS = ("_attn_implementation_internal", "_experts_implementation_internal")


class Adapter(nn.Module):
    """One adapter of a model: its config and its eyes. Its rows and experts lie in the base's layers, by its name.

    An encoder is frozen, and shared by adapters that see with the same one; the projector is the adapter's own.
    `below`: names of the adapters of this model on top of which it was trained.
    """

    def __init__(self, config, encoder=None, device=None):
        super().__init__()
        self.config, self.encoder, self.projector, self.below = config, encoder, None, set()
        if encoder is not None:
            encoder.requires_grad_(False)
            sizes = config.encoder_config.hidden_size, config.get_text_config().hidden_size
            self.projector = Projector(*sizes, config.projector_hidden_act, device=device)

    def train(self, mode=True):
        """The frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self


class AdapterSwitch:
    """What a user does with the adapters of a model. `self.config` is the config of `self.lead`."""

    # ------------------------------------------------------------ adding, loading and deleting

    def put_on(self, name, config, encoder, rule):
        """Attaches an adapter's new experts, gate and projector at their start values; nobody uses them yet."""
        layers = find_moe_layers(self.get_decoder())
        with self_checked(layers, config.extended_layers, rule, self.routing, name):
            attach(self.get_decoder(), self.routing, rule)
            for layer, sources in config.extended_layers.items():
                add_experts(layers[layer], name, sources, config)
        if config.scope == "gate" and config.extended_layers:
            add_gate(layers, name, config)
        self.adapters[name] = Adapter(config, encoder, input_device(self.base)).train(self.training)

    def take_off(self, name):
        """Removes whatever `put_on` has attached under this name."""
        for layer in find_moe_layers(self.get_decoder()).values():
            remove_experts(layer, name)
        self.adapters.pop(name) if name in self.adapters else None

    @contextlib.contextmanager
    def put_back_on_error(self, name):
        """Takes the adapter off again where the block, which puts it on, fails."""
        try:
            yield
        except BaseException:
            self.take_off(name)
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
        check_new_name(adapter_name, self)
        values, tensors, metadata = read_adapter(name_or_path, **hub_kwargs)
        stored = stored_config(self.config_class, values, tensors)
        stored.name_or_path = str(name_or_path)
        check_belongs(self, stored, name_or_path, check_base)
        if check_trained_on:
            check_below(stored, self.fingerprints(), name_or_path)
        encoder = load_stored_encoder(self, stored, encoder, check_base, (name_or_path, hub_kwargs))
        with self.put_back_on_error(adapter_name):
            self.put_on(adapter_name, stored, encoder, Rule(**stored.routing_rule))
            put_tensors(self.adapter_tensors(adapter_name), tensors, metadata, base_dtype=self.base.dtype)
        self.find_below()
        self.ask_gradients(adapter_name, is_trainable)

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
        check_new_name(adapter_name, self)
        plan, below = normalise_plan(extended_layers), list(self.routing.active)
        if not self.routing.enabled:
            raise ValueError("The adapters are off, and a new one goes on top of the active ones: enable_adapters().")
        if not plan and encoder is None:
            raise ValueError("Nothing to add: give extended_layers, like {2: [1]}, or encoder=... for a projector.")
        layers, rule = find_moe_layers(self.get_decoder()), Rule(**self.config.routing_rule)
        check_plan(layers, plan)
        check_rule(layers, plan, rule)
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
        with self.put_back_on_error(adapter_name):
            self.put_on(adapter_name, config, encoder, rule)
        self.adapters[adapter_name].below = set(below)
        self.switch_to([*below, adapter_name])
        self.ask_gradients_of([adapter_name])

    def delete_adapter(self, adapter_names):
        """Deletes an adapter, or a list of them; those that stay are what they were.

        Raises:
            ValueError: an unknown name; the only adapter of the model, or one that another was trained on.
        """
        names = names_in(adapter_names)
        self.check_known(names)
        staying = [name for name in self.adapters if name not in names]
        if not staying:
            raise ValueError(f"{names} are all adapters of this model. To get the base back, use model.detach().")
        check_still_below(self, staying)
        for name in names:
            self.take_off(name)
        self.switch_to([name for name in self.routing.active if name in staying])

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
        names = names_in(adapter_name)
        if not names:
            raise ValueError(
                "set_adapter needs at least one adapter; to leave the base alone, use disable_adapters()."
            )
        self.check_known(names)
        if check_trained_on:
            check_complete(self, names)
        check_together({name: self.adapters[name].config for name in names}, self)
        self.switch_to(names)
        self.ask_gradients_of([] if inference_mode else [name for name in names if name in self.on_top(self.adapters)])

    def on_top(self, names):
        """Those of the adapters `names` on top of which no other of them was trained."""
        below = {one for name in names for one in self.adapters[name].below}
        return [name for name in names if name not in below]

    def find_below(self):
        """Notes which adapters of this model each one was trained on top of, in whichever order they were loaded; a
        second copy of one that is known already adds nothing."""
        lacking = {name: one for name, one in self.adapters.items() if len(one.below) < len(one.config.trained_on)}
        fingerprints = self.fingerprints() if lacking else {}
        for name, adapter in lacking.items():
            others = {other: known for other, known in fingerprints.items() if other != name}
            adapter.below |= set(found_below(adapter.config, others).values()) - {None}

    def switch_to(self, names):
        """Makes `names` the active adapters; what trains and is saved is the one on top, if there is just one."""
        self.routing.active = tuple(sorted(names))
        top = self.on_top(names)
        self.routing.target = top[0] if len(top) == 1 else None
        before, self.config = self.config, self.adapters[self.lead].config
        for name in IMPLEMENTATIONS:  # the base's, whoever leads
            setattr(self.config, name, getattr(before, name))

    def active_adapters(self):
        """Names of the adapters that take part, in ascending order; `[]` while switched off."""
        return list(self.routing.active) if self.routing.enabled else []

    @contextlib.contextmanager
    def disable_adapter(self):
        """Inside the block the model is the base, bit for bit; images are refused."""
        with self.routing.using(enabled=False):
            yield

    def disable_adapters(self):
        """Switches all adapters off until `enable_adapters`."""
        self.routing.switched_on = False

    def enable_adapters(self):
        self.routing.switched_on = True

    @contextlib.contextmanager
    def serving(self, adapter_names, num_rows):
        """Inside, adapters a row: `adapter_names` has `num_rows` entries, each a name, a list of names that take part
        together, or "__base__" for a row of the base alone. `None` changes nothing.

        Raises:
            ValueError: as `checked_rows`.
        """
        if adapter_names is None:
            yield
            return
        rows, groups = checked_rows(self, adapter_names, num_rows)
        with self.routing.using(rows=rows, groups=groups):
            yield

    # ------------------------------------------------------------ asking

    @property
    def lead(self):
        """The adapter whose config is the model's: what trains; else the first active one; else the first one."""
        return self.routing.target or next(iter((*self.routing.active, *self.adapters)))

    def named(self, adapter_name=None):
        """`adapter_name`, if there is such an adapter; for `None` the one that trains, or the only active one.

        Raises:
            ValueError: an unknown name; none given where several are active, or none is.
        """
        if adapter_name is None and self.routing.target is None:
            raise ValueError(
                f"Active adapters are {list(self.routing.active)}, so it takes a name to say which one is meant: "
                f"adapter_name=<one of {list(self.adapters)}>."
            )
        name = self.routing.target if adapter_name is None else adapter_name
        self.check_known([name])
        return name

    def check_known(self, names):
        unknown = sorted(set(names) - set(self.adapters))
        if unknown:
            raise ValueError(f"Adapters {unknown} are not loaded; this model has {list(self.adapters)}.")

    @property
    def eyes(self):
        """The `Adapter` with which this pass sees, or `None`: of adapters that take part together, one has eyes."""
        seeing = (self.adapters[name] for name in self.routing.wanted)
        return next((adapter for adapter in seeing if adapter.encoder is not None), None)

    @property
    def encoder(self):
        return None if self.eyes is None else self.eyes.encoder

    @property
    def projector(self):
        return None if self.eyes is None else self.eyes.projector

    @property
    def image_token_id(self):
        """What stands for image features: of the adapter that sees, or else of `lead`."""
        return (self.config if self.eyes is None else self.eyes.config).image_token_id

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
        """The `TokenGate` of `lead`, or `None` where there is none (another scope, or no extended layer yet)."""
        layers = find_moe_layers(self.get_decoder())
        lowest = next(iter(self.config.extended_layers), None)
        return None if lowest is None else layers[lowest].router.moextend[self.lead].gate

    # ------------------------------------------------------------ its tensors

    def adapter_tensors(self, adapter_name=None):
        """Every new tensor of one adapter by role, in file order: what is saved, counted, frozen and trained is chosen
        from these. `adapter_name`: default: the one that trains, or the only active one."""
        reshard(self)
        adapter_name, tensors = self.named(adapter_name), {}
        adapter, layers = self.adapters[adapter_name], find_moe_layers(self.get_decoder())
        for layer in adapter.config.extended_layers:
            rows, experts = (module.moextend[adapter_name] for module in layers[layer][:2])
            for part, module in (("experts", experts), ("router", rows)):
                own = {**module._parameters, **module._buffers}
                tensors |= {f"layers.{layer}.{part}.{name}": own[name] for name in own if own[name] is not None}
            if rows.calibration is not None:
                calibration = rows.calibration.named_parameters()
                tensors |= {f"layers.{layer}.calibration.{name}": tensor for name, tensor in calibration}
        for layer in list(adapter.config.extended_layers)[:1]:
            gate = layers[layer].router.moextend[adapter_name].gate
            tensors |= {} if gate is None else {f"gate.{name}": tensor for name, tensor in gate.named_parameters()}
        if adapter.projector is not None:
            tensors |= {f"projector.{name}": tensor for name, tensor in adapter.projector.named_parameters()}
        return tensors

    def set_trainable(self, stage="finetune", train_projector=None, adapter_name=None):
        """Freezes and unfreezes for a stage, and returns what trains (name -> parameter), in float32.

        Everything but this adapter is frozen, and its config notes on top of which ones it trains. One bf16 AdamW step
        at 2e-5 would leave most weights as they were. With exclusive selection a layer's only new expert has a fixed
        weight, so its row has no gradient and stays frozen.

        Raises:
            ValueError: a stage with nothing to train; an adapter that is not active, or that another one stands on.
        """
        if stage not in ("align", "finetune"):
            raise ValueError(f"stage={stage!r} is not known; allowed: 'align', 'finetune'.")
        adapter_name = self.named(adapter_name)
        check_may_train(self, adapter_name)
        with_projector = stage == "align" or (True if train_projector is None else train_projector)
        trained = {}
        for name, tensor in self.adapter_tensors(adapter_name).items():
            train_it = stage == "finetune" and self.learns(name, adapter_name)
            if with_projector if name.startswith("projector.") else train_it:
                trained[name] = tensor
        if not trained:
            raise ValueError(
                f"stage={stage!r} has nothing to train: align needs an encoder (from_base(..., encoder=...)), "
                "finetune needs new experts (extended_layers, or model.extend(plan))."
            )
        self.ask_gradients_of([])
        for tensor in trained.values():
            tensor.requires_grad_(True)
            tensor.data = tensor.data.float()
        config, beside = self.adapters[adapter_name].config, [n for n in self.routing.active if n != adapter_name]
        earlier = [entry for entry in config.trained_on if entry["name"] not in beside]
        config.trained_on = earlier + self.described(beside)
        self.adapters[adapter_name].below.update(beside)
        self.switch_to(self.routing.active)  # which has it on top now
        return trained

    def ask_gradients_of(self, adapter_names):
        """The tensors of these adapters ask for gradients, and no others do."""
        for name in self.adapters:
            self.ask_gradients(name, name in adapter_names)

    def ask_gradients(self, adapter_name, wanted=True):
        """Whether the adapter's tensors ask for gradients: all that any stage trains, or none."""
        for name, tensor in self.adapter_tensors(adapter_name).items():
            tensor.requires_grad_(wanted and (name.startswith("projector.") or self.learns(name, adapter_name)))

    def learns(self, name, adapter_name=None):
        """Whether stage finetune moves this tensor: one that a gradient reaches. The gate is trained before it."""
        if name.endswith((".correction_bias", ".router.scale")) or name.startswith(("gate.", "projector.")):
            return False
        config = self.adapters[self.named(adapter_name)].config
        return not (".router." in name and config.selection == "exclusive" and self.rows_at(name, adapter_name) == 1)

    def rows_at(self, name, adapter_name=None):
        """How many new rows share the layer of the tensor `name`: the adapter's own and those of active ones."""
        layer, sharing = int(name.split(".")[1]), {self.named(adapter_name), *self.routing.active}
        return sum(len(self.adapters[one].config.extended_layers.get(layer, ())) for one in sharing)

    def fingerprints(self):
        """Adapter name -> fingerprint of its tensors, of every adapter."""
        return {name: self.fingerprint_of(name) for name in self.adapters}

    def fingerprint_of(self, adapter_name):
        """Without the gate, which is stored in float32 whatever the others are stored in."""
        tensors = self.adapter_tensors(adapter_name).items()
        return tensors_fingerprint({name: tensor for name, tensor in tensors if not name.startswith("gate.")})

    def described(self, adapter_names):
        """What `trained_on` keeps of adapters; where one lies only if it is on the Hub."""
        return [
            {
                "name": name,
                "fingerprint": self.fingerprint_of(name),
                "name_or_path": hub_id(self.adapters[name].config.name_or_path),
            }
            for name in adapter_names
        ]

    def adapter_bytes(self, dtype=None, adapter_name=None):
        """Bytes of the adapter's tensors in `dtype` (default: the base's)."""
        dtype = dtype or self.base.dtype
        tensors = self.adapter_tensors(adapter_name).items()
        return sum(tensor.numel() * stored_dtype(name, dtype).itemsize for name, tensor in tensors)

    def print_trainable_parameters(self):
        """Trainable and all parameters, in PEFT's words."""
        trainable, total = self.num_parameters(only_trainable=True), self.num_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")
