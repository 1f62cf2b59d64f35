"""MoExtendPreTrainedModel: what body and causal LM share, from attaching to saving and loading."""

import contextlib
import copy
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel

from .adapter_moextend import gather, put_tensors, read_adapter, write_folder
from .configuration_moextend import MoExtendConfig, normalise_plan, routing_choices
from .families_moextend import find_moe_layers
from .hub_moextend import PUSH_KWARGS, check_published, check_save_kwargs, push, upload
from .layers_moextend import add_experts, add_gate, detach, zero_tie
from .layouts_moextend import check_pass
from .loading_moextend import (
    HUB_KWARGS,
    SHARED_HUB_KWARGS,
    UNLOADED,
    base_rule,
    check_folder,
    check_plan,
    check_rule,
    check_same_kind,
    identity,
    is_multimodal,
    load_new_parts,
    load_parts,
    random_base,
    stored_config,
    undone_on_error,
)
from .routing_moextend import Rule, balance_loss
from .scope_moextend import Pass, remember, seen_tokens, token_scopes
from .selfcheck_moextend import self_checked
from .state_moextend import RoutingState
from .switch_moextend import DEFAULT, AdapterSwitch
from .together_moextend import (
    check_below,
    check_image_rows,
    check_new_name,
    check_nothing_above,
    check_one_selection,
    check_together,
)
from .vision_moextend import encode_images, merge_images, projector_tied

# What generate and set_attn_implementation ask; not _can_compile_fullgraph: new experts run on gathered tokens.
BASE_FLAGS = ("_is_stateful", "_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn")


class MoExtendPreTrainedModel(AdapterSwitch, PreTrainedModel):
    """What both models share: the base and its extensions, the encoder and projector, loading and saving."""

    config_class = MoExtendConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    auto_base_class = None  # AutoModelForCausalLM or AutoModel: what a stored base is loaded with

    def __init__(self, config, base=None, encoder=None, adapter_name=DEFAULT):
        """`base` and `encoder` are loaded models; without them, random ones are made from the config."""
        super().__init__(config)
        self.base = base if base is not None else random_base(config.text_config, self.auto_base_class)
        if encoder is None and config.encoder_config is not None:
            encoder = AutoModel.from_config(config.encoder_config)
        self.adapters, self.routing = nn.ModuleDict(), RoutingState()
        # Names, not parameters: held here, each process would keep the whole of what FSDP2 shards.
        self.base_trainable = [name for name, parameter in self.base.named_parameters() if parameter.requires_grad]
        rule = base_rule(find_moe_layers(self.get_decoder()), config)
        self.base.requires_grad_(False)
        check_new_name(adapter_name, self)
        self.put_on(adapter_name, config, encoder, rule)
        self.switch_to([adapter_name])
        self.post_init()
        # Not the encoder's: FSDP would gather its layers where the batch has images, and wait for the other processes.
        self._no_split_modules = set(self.base._no_split_modules or [])
        for flag in BASE_FLAGS:
            setattr(self, flag, getattr(self.base, flag))
        self.train(self.base.training)

    def init_weights(self):
        """Nothing: base and encoder come with their weights, new tensors with theirs (`start_values`)."""

    # ------------------------------------------------------------ the pass

    def run_base(
        self, input_ids, position_ids, past_key_values, inputs_embeds, pixel_values, adapter_names=None, **kwargs
    ):
        """Embeds images, marks the tokens in scope, runs the base. Arguments and outputs are the base's.

        `adapter_names`: adapters a row, see `MoExtendForCausalLM.forward`.
        """
        check_pass(self)
        tokens = inputs_embeds if input_ids is None else input_ids
        with self.serving(adapter_names, None if tokens is None else len(tokens)):
            past_length = seen_tokens(past_key_values)
            place = position_ids, kwargs.get("attention_mask"), past_key_values, past_length
            scopes, gated, state = self.token_scopes(input_ids, inputs_embeds, *place)
            projector = self.projector
            if self.eyes is None and is_multimodal(self.base.config):
                kwargs["pixel_values"], pixel_values = pixel_values, None  # seen by the base's own eyes
            if pixel_values is not None or self.has_image_tokens(input_ids):
                inputs_embeds, input_ids = self.embed_images(input_ids, inputs_embeds, pixel_values), None
            elif inputs_embeds is not None and projector is not None:
                inputs_embeds = zero_tie(inputs_embeds, projector.parameters())
            if inputs_embeds is not None:
                kwargs["inputs_embeds"] = inputs_embeds
            passing = self.routing.using(scopes=scopes, gated=gated)
            with passing, projector_tied(self.get_input_embeddings(), projector):
                outputs = self.base(
                    input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values, **kwargs
                )
        remember(getattr(outputs, "past_key_values", None), state)
        return outputs

    def token_scopes(self, input_ids, inputs_embeds, *place):
        """`scope_moextend.token_scopes` of the adapters that take part in this pass."""
        configs = {name: adapter.config for name, adapter in self.adapters.items()}
        extending = {name: config.scope for name, config in configs.items() if config.extended_layers}
        if not self.routing.enabled or not extending:
            return {}, {}, {}
        rows = self.routing.rows_of(self.routing.names, input_ids if inputs_embeds is None else inputs_embeds)
        image_token_id = None if self.eyes is None else self.eyes.config.image_token_id
        scopes = {name: scope for name, scope in extending.items() if name in self.routing.names}
        now = Pass(input_ids, inputs_embeds, image_token_id, *place, rows)
        return token_scopes(scopes, "modality" in extending.values(), now)

    def has_image_tokens(self, input_ids):
        if self.eyes is None or input_ids is None:
            return False
        return bool((input_ids == self.eyes.config.image_token_id).any())

    def embed_images(self, input_ids, inputs_embeds, pixel_values):
        """[B, S, H]: token embeddings with image features in place of image tokens."""
        eyes = self.eyes
        if eyes is None:
            raise ValueError(
                "pixel_values was given, but this model has no encoder, or its active adapters have none. Extend the "
                "base with encoder=..., or set_adapter(<one that has an encoder>)."
            )
        if not self.routing.enabled:
            raise ValueError(
                "Images were given while the adapter is off: the base alone can't see. Leave out pixel_values and the "
                "image tokens, or switch the adapter on."
            )
        if inputs_embeds is not None or input_ids is None:
            raise ValueError(
                "Give images with input_ids, not with inputs_embeds: features go where image tokens stand."
            )
        check_image_rows(self, input_ids)
        features, config = None, eyes.config
        if pixel_values is not None:
            selected = config.encoder_select_layer, config.encoder_select_feature
            features = encode_images(eyes.encoder, eyes.projector, pixel_values, *selected)
        return merge_images(input_ids, self.get_input_embeddings(), config.image_token_id, features)

    @contextlib.contextmanager
    def record_routing(self, wanted=True):
        """Yields a `dict` that every forward pass inside fills: decoder layer -> `RoutingRecord`, all MoE layers.

        Unless `wanted`, it stays empty, and whoever listened before goes on listening.
        """
        records = {}
        with self.routing.using(records=records if wanted else self.routing.records):
            yield records

    def balance_loss(self, records, attention_mask=None):
        """Load-balancing loss (scalar) of recorded routing; see `routing_moextend.balance_loss`.

        The new experts of all adapters of the pass count together.

        Raises:
            ValueError: adapters of different selection were recorded (`adapter_names`).
        """
        selection = check_one_selection(self)
        if attention_mask is not None and attention_mask.dim() != 2:
            attention_mask = None
        if attention_mask is not None and records:
            width = len(next(iter(records.values())).logits) // len(attention_mask)
            attention_mask = attention_mask[:, -width:]  # a cache's part of the mask has no tokens in this pass
        return balance_loss(records, Rule(**self.config.routing_rule), selection, attention_mask)

    @property
    def router_aux_loss_coef(self):
        """The base's own coefficient of the load-balancing loss; 0 where the base has none.

        f_i here is a share of all selections, so the loss is 1/K of transformers' own, which counts K a token.
        """
        return float(getattr(self.config.text_config.get_text_config(), "router_aux_loss_coef", 0.0) or 0.0)

    # ------------------------------------------------------------ attach and switch

    @classmethod
    def from_base(
        cls,
        base,
        extended_layers=None,
        *,
        scope=None,
        selection=None,
        calibration=None,
        paper=False,
        encoder=None,
        image_token_id=None,
        encoder_select_layer=-2,
        encoder_select_feature="patch",
        projector_hidden_act="gelu",
        calibration_hidden_size=16,
        gate_hidden_size=64,
        gate_threshold=0.0,
        adapter_name=DEFAULT,
        **kwargs,
    ):
        """Attaches new experts, and eyes, to a pretrained MoE causal LM.

        Args:
            base: Hub id, folder, or a loaded model (which is extended in place; its own tensors never change).
            extended_layers: decoder layer index -> source experts; one new expert for each.
            scope: which tokens may use new experts: `"all"`, `"modality"` (default with an encoder) or `"gate"`
                (default without one; the gate lets no token through until it is trained).
            selection: `"compete"` (base experts and new ones share one top-k) or `"exclusive"` (default).
            calibration: whose weights are calibrated: `"all"`, `"routed"` (default with `"compete"`) or `"none"`
                (default with `"exclusive"`, which takes no other).
            paper: sets the paper's three (`"all"`, `"compete"`, `"all"`) and refuses others.
            encoder: CLIP or SigLIP vision checkpoint or model; `None` for text only.
            image_token_id: stands for image features in `input_ids`; default: the first id past the embedding. With a
                processor: `processor.image_token_id`.
            adapter_name: what the adapter is called in this model, where more are to come.
            **kwargs: to the base's `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, ...).

        Raises:
            ValueError: no MoE layers; a family without the interface; a layer that is no MoE layer; a source out of
                range; nothing to add; no causal LM; choices without meaning. A base given as a model stays as it was.
        """
        plan = normalise_plan(extended_layers)
        choices = routing_choices(scope, selection, calibration, paper, has_encoder=encoder is not None)
        if not plan and encoder is None:
            raise ValueError(
                "Nothing to add: extended_layers is empty and there is no encoder. Name layers and source experts, "
                "like extended_layers={2: [1]}, or pass encoder=... to begin with a projector."
            )
        base, encoder = load_new_parts(base, encoder, plan, cls.auto_base_class, kwargs)
        config = cls.config_class(
            **identity(base, encoder),
            encoder_select_layer=encoder_select_layer,
            encoder_select_feature=encoder_select_feature,
            projector_hidden_act=projector_hidden_act,
            image_token_id=base.get_input_embeddings().weight.shape[0] if image_token_id is None else image_token_id,
            extended_layers=plan,
            calibration_hidden_size=calibration_hidden_size,
            gate_hidden_size=gate_hidden_size,
            gate_threshold=gate_threshold,
            dtype=base.dtype,
            **choices,
        )
        with undone_on_error(base, encoder):
            return cls(config, base=base, encoder=encoder, adapter_name=adapter_name)

    def extend(self, plan):
        """Adds new experts in place, {decoder layer: [source experts]}, and keeps the projector: stage finetune.

        With several adapters, to the one that trains.

        Raises:
            ValueError: a layer that is no MoE layer or has new experts already, a source out of range, an empty plan;
                several adapters of which none is on top; new experts that can't share tokens with active ones.
        """
        plan, name = normalise_plan(plan), self.named()
        if not plan:
            raise ValueError("The plan is empty: name layers and source experts, like {2: [1]}.")
        layers = find_moe_layers(self.get_decoder())
        check_plan(layers, plan)
        again = sorted(plan.keys() & self.config.extended_layers.keys())
        if again:
            raise ValueError(f"Layers {again} have new experts already; a layer is extended once.")
        if self.gate is not None and min(plan) < min(self.config.extended_layers):
            raise ValueError(
                f"The gate reads the input of layer {min(self.config.extended_layers)}, so layer {min(plan)} below it "
                "can't be added. Name all layers at once, or begin anew with from_base(...)."
            )
        check_nothing_above(self, name)
        check_rule(layers, plan, rule := Rule(**self.config.routing_rule))
        extended = copy.copy(self.config)
        extended.extended_layers = normalise_plan({**self.config.extended_layers, **plan})
        active = {one: self.adapters[one].config for one in self.routing.active}
        check_together({**active, name: extended}, self)
        with self_checked(layers, plan, rule, self.routing, name):
            for layer, sources in plan.items():
                add_experts(layers[layer], name, sources, self.config)
        self.config.extended_layers = extended.extended_layers
        if self.config.scope == "gate":
            add_gate(layers, name, self.config)

    def detach(self):
        """Takes all adapters off and returns the base, bit for bit what it was."""
        detach(self.get_decoder())
        for name in self.base_trainable:
            self.base.get_parameter(name).requires_grad_(True)
        return self.base

    # ------------------------------------------------------------ saving and loading

    def save_pretrained(
        self,
        save_directory,
        *,
        adapter_name=None,
        adapter_dtype=None,
        max_shard_size="50GB",
        push_to_hub=False,
        **kwargs,
    ):
        """Writes one adapter: config.json, moextend_adapter.safetensors, the shipped code. Never a base tensor.

        Where parameters are sharded (FSDP2), every process calls this, with `is_main_process` true on one of them.

        Args:
            adapter_name: which one; default: the one that trains, or the only active one.
            adapter_dtype: dtype or its name for the new tensors in the file; default: the base's.
            max_shard_size: above it the file is split, with the usual index.
            push_to_hub, **kwargs: as in transformers (`repo_id`, `token`, `private`, `commit_message`, ...); its
                `state_dict`, `safe_serialization` and the like change nothing: see `hub_moextend.IGNORED_KWARGS`.

        Raises:
            ValueError: the folder is the base's or the encoder's, which would lose its config.json; no name where
                several adapters are active.
            TypeError: an unknown argument.
        """
        folder, writes = Path(save_directory), kwargs.pop("is_main_process", True)
        check_save_kwargs(kwargs)
        adapter_name = self.named(adapter_name)
        config = self.adapters[adapter_name].config
        check_folder(folder, config)
        if push_to_hub:
            check_published(config)
        dtype = getattr(torch, adapter_dtype) if isinstance(adapter_dtype, str) else adapter_dtype or self.base.dtype
        tensors = gather(self.adapter_tensors(adapter_name), dtype, keep=writes)
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_folder(folder, tensors, config := config.published(), max_shard_size)
        if push_to_hub:
            options = {name: kwargs[name] for name in PUSH_KWARGS if name in kwargs}
            upload(folder, options.pop("repo_id", folder.name), config, **options)

    def push_to_hub(self, repo_id, **kwargs):
        """Uploads the adapter as one commit: see `hub_moextend.push`."""
        return push(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        config=None,
        base=None,
        encoder=None,
        check_base=True,
        check_trained_on=True,
        adapter_name=DEFAULT,
        **kwargs,
    ):
        """Loads base and encoder (from safetensors) and puts the adapter on top.

        Args:
            pretrained_model_name_or_path: the adapter's folder or Hub id.
            base, encoder: where they lie, if elsewhere than the config says; or loaded models.
            check_base: `False` loads onto another base than the adapter was made on (its fingerprint differs).
            check_trained_on: `False` loads an adapter without those that it was trained on top of.
            adapter_name: what the adapter is called in this model, where more are to come.
            **kwargs: to the base's `from_pretrained`.

        Raises:
            OSError: no adapter there, or the base or encoder can't be found.
            ValueError: a damaged file, missing, unexpected or misshapen tensors (all named), another base, or an
                adapter that was trained on top of others.
        """
        hub = {key: value for key in HUB_KWARGS if (value := kwargs.pop(key, None)) is not None}
        values, tensors, metadata = read_adapter(pretrained_model_name_or_path, **hub)
        stored = stored_config(cls.config_class, values, tensors)  # the header's config wins over config.json
        if check_trained_on:
            check_below(stored, {}, pretrained_model_name_or_path)
        options = {key: value for key, value in kwargs.items() if key not in UNLOADED}
        options |= {key: hub[key] for key in SHARED_HUB_KWARGS if key in hub}
        for name in ("attn_implementation", "experts_implementation"):  # AutoModel has moved these into the config
            value = getattr(config, f"_{name}", None)
            if value is not None:
                options.setdefault(name, value)
        home = (pretrained_model_name_or_path, hub)
        base, encoder = load_parts(stored, base, encoder, cls.auto_base_class, check_base, options, home)
        stored.name_or_path = str(pretrained_model_name_or_path)
        with undone_on_error(base, encoder):
            model = cls(stored, base=base, encoder=encoder, adapter_name=adapter_name)
            put_tensors(model.adapter_tensors(), tensors, metadata, base_dtype=base.dtype)
        model.ask_gradients(adapter_name)
        if kwargs.get("output_loading_info"):  # what is missing, unexpected or misshapen was refused
            return model.eval(), {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        return model.eval()

    def load_adapter_tensors(self, name_or_path, *, check_base=True, **hub_kwargs):
        """Replaces the new tensors by a saved adapter's; nothing changes unless all of them fit.

        Raises:
            ValueError: a damaged file, or an adapter of another plan, other choices or (unless `check_base=False`)
                another base or encoder.
        """
        values, tensors, metadata = read_adapter(name_or_path, **hub_kwargs)
        check_nothing_above(self, self.named())
        config, other = self.adapters[self.named()].config, stored_config(self.config_class, values, tensors)
        check_same_kind(config, other, name_or_path, check_base)
        put_tensors(self.adapter_tensors(), tensors, metadata)
        config.gate_threshold = other.gate_threshold

    # ------------------------------------------------------------ what transformers asks of a model

    def get_decoder(self):
        return self.base.get_decoder()

    def get_input_embeddings(self):
        return self.base.get_input_embeddings()

    def get_output_embeddings(self):
        return self.base.get_output_embeddings()

    def set_attn_implementation(self, attn_implementation, **kwargs):
        """The base's; the encoder's is its own."""
        self.base.set_attn_implementation(attn_implementation, **kwargs)

    def set_experts_implementation(self, experts_implementation):
        """The base's, which its new experts follow."""
        self.base.set_experts_implementation(experts_implementation)

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError("The base's vocabulary stays as it is; the image token's id may lie past the embedding.")

    def enable_input_require_grads(self):
        """Nothing: transformers calls this for reentrant checkpointing; it would bring back backward work below the
        lowest extended layer."""

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        """As in transformers, but the recomputation sees the routing state of its own forward pass.

        Every public way to switch checkpointing on comes through here, in all supported versions.

        Raises:
            ValueError: `use_reentrant=True`, which can't restore that state and needs input gradients.
        """
        options = {"use_reentrant": False, **getattr(gradient_checkpointing_func, "keywords", {})}
        if enable and options["use_reentrant"]:
            raise ValueError("use_reentrant=True is not supported: use {'use_reentrant': False}, the default.")
        options["context_fn"] = partial(self.routing.checkpoint_contexts, options.get("context_fn"))
        super()._set_gradient_checkpointing(enable, partial(gradient_checkpointing_func, **options), **kwargs)
