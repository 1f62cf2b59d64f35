"""MoExtendModel and MoExtendForCausalLM: an unchanged base, new experts in some of its layers, and eyes if it has any.

One batch: image features take the place of image tokens (vision), the tokens that may use new experts are marked
(scope), and the base's own forward runs; its extended layers find the mark in the shared `RoutingState` (layers,
routing). Attention, norms, head, caches and generation are the base's own code.
"""

import contextlib
import copy
import importlib
import tempfile
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import HfApi
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple, logging

from .adapter_moextend import (
    check_tensors,
    copy_file,
    fingerprint,
    read_adapter,
    same_fingerprint,
    write_adapter,
    write_text,
)
from .configuration_moextend import MoExtendConfig, UnknownConfig, normalise_plan
from .layers_moextend import RoutingState, add_experts, attach, detach, find_moe_layers, find_rule
from .routing_moextend import Rule, balance_loss
from .scope_moextend import remember, token_scope
from .vision_moextend import (
    Projector,
    encode_images,
    expand_images,
    load_encoder,
    merge_images,
    select_images,
    vision_tower,
)

logger = logging.get_logger(__name__)

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
SHARED_HUB_KWARGS = ("cache_dir", "local_files_only", "token")
ENCODER_KWARGS = ("dtype", "use_safetensors", *SHARED_HUB_KWARGS)
PUBLISHED = [  # patterns of the files that make a published adapter
    "config.json",
    "moextend_adapter*.safetensors",
    "moextend_adapter*.safetensors.index.json",
    "*_moextend.py",
    "README.md",
    "*processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
]
PAPER = {"scope": "all", "selection": "compete", "calibration": "all"}


class MoExtendPreTrainedModel(PreTrainedModel):
    """What both models share: the base and its extensions, the encoder and projector, loading and saving."""

    config_class = MoExtendConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    auto_base_class = None  # AutoModelForCausalLM or AutoModel: what a stored base is loaded with

    def __init__(self, config, base=None, encoder=None):
        """`base` and `encoder` are loaded models; without them, random ones are made from the config."""
        super().__init__(config)
        self.base = base if base is not None else self.auto_base_class.from_config(config.text_config)
        if encoder is None and config.encoder_config is not None:
            encoder = AutoModel.from_config(config.encoder_config)
        self.encoder, self.projector = encoder, None
        self.routing = RoutingState()
        self.base.requires_grad_(False)
        layers = find_moe_layers(self.get_decoder())
        attach(self.get_decoder(), config, self.routing, self.find_rule(layers))
        for layer, sources in config.extended_layers.items():
            add_experts(layers[layer], sources, config)
        if encoder is not None:
            encoder.requires_grad_(False)
            self.projector = Projector(
                config.encoder_config.hidden_size,
                config.get_text_config().hidden_size,
                config.projector_hidden_act,
                device=self.get_input_embeddings().weight.device,
            )
        self.post_init()
        self.train(self.base.training)

    def init_weights(self):
        """Nothing: base and encoder come with their weights, new tensors with theirs (`start_values`)."""

    def find_rule(self, layers):
        """The base's routing rule, as kept in the config or found on its first MoE layer."""
        if self.config.routing_rule is None:
            rule = find_rule(self.base.config.model_type, next(iter(layers.values())))
            self.config.routing_rule = rule._asdict()
        return Rule(**self.config.routing_rule)

    # ------------------------------------------------------------ the pass

    def run_base(self, input_ids, position_ids, past_key_values, inputs_embeds, pixel_values, **kwargs):
        """Embeds images, marks the tokens in scope, runs the base. Arguments and outputs are the base's."""
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        scope = state = None
        if self.routing.enabled and self.config.extended_layers:
            scope, state = token_scope(self.config, input_ids, position_ids, past_key_values, past_length)
        if pixel_values is not None or self.has_image_tokens(input_ids):
            inputs_embeds, input_ids = self.embed_images(input_ids, inputs_embeds, pixel_values), None
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        with self.routing.using(scope=None if scope is None else scope.reshape(-1)):
            outputs = self.base(
                input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values, **kwargs
            )
        remember(getattr(outputs, "past_key_values", None), state)
        return outputs

    def has_image_tokens(self, input_ids):
        if self.encoder is None or input_ids is None:
            return False
        return bool((input_ids == self.config.image_token_id).any())

    def embed_images(self, input_ids, inputs_embeds, pixel_values):
        """[B, S, H]: token embeddings with image features in place of image tokens."""
        if self.encoder is None:
            raise ValueError("pixel_values was given, but this model has no encoder. Extend the base with encoder=...")
        if not self.routing.enabled:
            raise ValueError(
                "Images were given while the adapter is off: the base alone can't see. Leave out pixel_values and the "
                "image tokens, or switch the adapter on."
            )
        if inputs_embeds is not None or input_ids is None:
            raise ValueError(
                "Give images with input_ids, not with inputs_embeds: features go where image tokens stand."
            )
        features = None
        if pixel_values is not None:
            config = self.config
            features = encode_images(
                self.encoder, self.projector, pixel_values, config.encoder_select_layer, config.encoder_select_feature
            )
        return merge_images(input_ids, self.get_input_embeddings(), self.config.image_token_id, features)

    @contextlib.contextmanager
    def record_routing(self, wanted=True):
        """Yields a `dict` that every forward pass inside fills: decoder layer -> `RoutingRecord`, all MoE layers.

        Unless `wanted`, it stays empty, and whoever listened before goes on listening.
        """
        records = {}
        with self.routing.using(records=records if wanted else self.routing.records):
            yield records

    def balance_loss(self, records, attention_mask=None):
        """Load-balancing loss (scalar) of recorded routing; see `routing_moextend.balance_loss`."""
        if attention_mask is not None and attention_mask.dim() != 2:
            attention_mask = None
        if attention_mask is not None and records:
            width = len(next(iter(records.values())).logits) // len(attention_mask)
            attention_mask = attention_mask[:, -width:]  # a cache's part of the mask has no tokens in this pass
        return balance_loss(records, Rule(**self.config.routing_rule), self.config.selection, attention_mask)

    @property
    def router_aux_loss_coef(self):
        """The base's own coefficient of the load-balancing loss; 0 where the base has none."""
        return float(getattr(self.config.text_config, "router_aux_loss_coef", 0.0) or 0.0)

    # ------------------------------------------------------------ attach and switch

    @classmethod
    def from_base(
        cls,
        base,
        extended_layers=None,
        *,
        scope="all",
        selection="compete",
        calibration="all",
        paper=False,
        encoder=None,
        image_token_id=None,
        encoder_select_layer=-2,
        encoder_select_feature="patch",
        projector_hidden_act="gelu",
        calibration_hidden_size=16,
        **kwargs,
    ):
        """Attaches new experts, and eyes, to a pretrained MoE causal LM.

        Args:
            base: Hub id, folder, or a loaded model (which is extended in place; its own tensors never change).
            extended_layers: decoder layer index -> source experts; one new expert for each.
            scope, selection, calibration: see DESIGN; `paper=True` sets all three to the paper's.
            encoder: CLIP or SigLIP vision checkpoint or model; `None` for text only.
            image_token_id: stands for image features in `input_ids`; default: the first id past the embedding.
            **kwargs: to the base's `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, ...).

        Raises:
            ValueError: no MoE layers; a family without the interface; a layer that is no MoE layer; a source out of
                range; nothing to add; no causal LM; routing choices without meaning.
        """
        plan = normalise_plan(extended_layers)
        if not plan and encoder is None:
            raise ValueError(
                "Nothing to add: extended_layers is empty and there is no encoder. Name layers and source experts, "
                "like extended_layers={2: [1]}, or pass encoder=... to begin with a projector."
            )
        base = load_base(base, cls.auto_base_class, **kwargs) if not isinstance(base, PreTrainedModel) else base
        check_base(base, cls.auto_base_class)
        check_plan(find_moe_layers(base.get_decoder()), plan)
        if encoder is not None and not isinstance(encoder, PreTrainedModel):
            encoder = load_encoder(encoder, **{key: kwargs[key] for key in ENCODER_KWARGS if key in kwargs})
        if encoder is not None:
            encoder = vision_tower(encoder).to(base.get_input_embeddings().weight.device)
        choices = PAPER if paper else {"scope": scope, "selection": selection, "calibration": calibration}
        config = cls.config_class(
            base_model_name_or_path=base.config._name_or_path or None,
            base_model_revision=getattr(base.config, "_commit_hash", None),
            base_fingerprint=fingerprint(base.get_decoder()),
            text_config=copy.deepcopy(base.config),
            encoder_name_or_path=None if encoder is None else encoder.config._name_or_path or None,
            encoder_config=None if encoder is None else copy.deepcopy(encoder.config),
            encoder_fingerprint=None if encoder is None else fingerprint(encoder),
            encoder_select_layer=encoder_select_layer,
            encoder_select_feature=encoder_select_feature,
            projector_hidden_act=projector_hidden_act,
            image_token_id=base.get_input_embeddings().weight.shape[0] if image_token_id is None else image_token_id,
            extended_layers=plan,
            calibration_hidden_size=calibration_hidden_size,
            dtype=base.dtype,
            **choices,
        )
        return cls(config, base=base, encoder=encoder)

    def extend(self, plan):
        """Adds new experts in place, {decoder layer: [source experts]}, and keeps the projector: stage finetune.

        Raises:
            ValueError: a layer that is no MoE layer or has new experts already, a source out of range, an empty plan.
        """
        plan = normalise_plan(plan)
        if not plan:
            raise ValueError("The plan is empty: name layers and source experts, like {2: [1]}.")
        layers = find_moe_layers(self.get_decoder())
        check_plan(layers, plan)
        again = sorted(plan.keys() & self.config.extended_layers.keys())
        if again:
            raise ValueError(f"Layers {again} have new experts already; a layer is extended once.")
        for layer, sources in plan.items():
            add_experts(layers[layer], sources, self.config)
        self.config.extended_layers = normalise_plan({**self.config.extended_layers, **plan})

    def detach(self):
        """Takes the adapter off and returns the base, bit for bit what it was."""
        detach(self.get_decoder())
        return self.base

    @contextlib.contextmanager
    def disable_adapter(self):
        """Inside the block the model is the base, bit for bit; images are refused."""
        with self.routing.using(enabled=False):
            yield

    def disable_adapters(self):
        """Switches the adapter off until `enable_adapters`."""
        self.routing.enabled = False

    def enable_adapters(self):
        self.routing.enabled = True

    def active_adapters(self):
        """Names of the adapters that take part: `["default"]`, or `[]` while switched off."""
        return ["default"] if self.routing.enabled else []

    def load_adapter(self, *args, **kwargs):
        raise NotImplementedError(
            "A MoExtend model holds one adapter for now. To replace its tensors use load_adapter_tensors(folder)."
        )

    set_adapter = delete_adapter = add_adapter = load_adapter

    # ------------------------------------------------------------ the new tensors

    def adapter_tensors(self):
        """Every new tensor by role, in file order: what is saved, counted, frozen and trained is chosen from these."""
        tensors = {}
        for layer in self.config.extended_layers:
            router, experts, _ = find_moe_layers(self.get_decoder())[layer]
            for part, module in (("experts", experts.moextend), ("router", router.moextend)):
                own = {**module._parameters, **module._buffers}
                tensors |= {f"layers.{layer}.{part}.{name}": own[name] for name in own if own[name] is not None}
            if router.moextend.calibration is not None:
                calibration = router.moextend.calibration.named_parameters()
                tensors |= {f"layers.{layer}.calibration.{name}": tensor for name, tensor in calibration}
        if self.projector is not None:
            tensors |= {f"projector.{name}": tensor for name, tensor in self.projector.named_parameters()}
        return tensors

    def set_trainable(self, stage="finetune", train_projector=None):
        """Freezes and unfreezes for a stage, and returns what trains (name -> parameter), in float32.

        One bf16 AdamW step at 2e-5 would leave most weights as they were. With exclusive selection a layer's only new
        expert has a fixed weight, so its row has no gradient and stays frozen.

        Raises:
            ValueError: a stage with nothing to train.
        """
        if stage not in ("align", "finetune"):
            raise ValueError(f"stage={stage!r} is not known; allowed: 'align', 'finetune'.")
        with_projector = stage == "align" or (True if train_projector is None else train_projector)
        trained = {}
        for name, tensor in self.adapter_tensors().items():
            chosen = with_projector if name.startswith("projector.") else stage == "finetune" and self.learns(name)
            tensor.requires_grad_(chosen)
            if chosen:
                tensor.data = tensor.data.float()
                trained[name] = tensor
        if not trained:
            raise ValueError(
                f"stage={stage!r} has nothing to train: align needs an encoder (from_base(..., encoder=...)), "
                "finetune needs new experts (extended_layers, or model.extend(plan))."
            )
        return trained

    def learns(self, name):
        """Whether a gradient can reach this tensor of an extended layer."""
        if name.endswith("correction_bias"):
            return False
        only_one = name.startswith("layers.") and len(self.config.extended_layers[int(name.split(".")[1])]) == 1
        return not (".router." in name and only_one and self.config.selection == "exclusive")

    def adapter_bytes(self, dtype=None):
        """Bytes of the adapter's tensors in `dtype` (default: the base's)."""
        dtype = dtype or self.base.dtype
        return sum(tensor.numel() for tensor in self.adapter_tensors().values()) * dtype.itemsize

    def print_trainable_parameters(self):
        """Trainable and all parameters, in PEFT's words."""
        trainable, total = self.num_parameters(only_trainable=True), self.num_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    # ------------------------------------------------------------ saving and loading

    def save_pretrained(
        self, save_directory, *, adapter_dtype=None, max_shard_size="50GB", push_to_hub=False, **kwargs
    ):
        """Writes the adapter: config.json, moextend_adapter.safetensors, the shipped code. Never a base tensor.

        Args:
            adapter_dtype: dtype or its name for the new tensors in the file; default: the base's.
            max_shard_size: above it the file is split, with the usual index.
            push_to_hub, **kwargs: as in transformers (`repo_id`, `token`, `private`, `commit_message`, ...).

        Raises:
            ValueError: the folder is the base's or the encoder's, which would lose its config.json.
        """
        if not kwargs.pop("is_main_process", True):
            return
        folder = Path(save_directory)
        check_folder(folder, self.config)
        folder.mkdir(parents=True, exist_ok=True)
        dtype = getattr(torch, adapter_dtype) if isinstance(adapter_dtype, str) else adapter_dtype or self.base.dtype
        for source in Path(__file__).parent.glob("*_moextend.py"):
            if not (folder / source.name).exists() or not source.samefile(folder / source.name):
                copy_file(source, folder / source.name)
        config = self.published_config()
        write_adapter(folder, {k: v.to(dtype) for k, v in self.adapter_tensors().items()}, config, max_shard_size)
        write_text(folder / "config.json", config.to_json_string(use_diff=False))
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", folder.name)
            self._upload(folder, repo_id, **kwargs)

    def published_config(self):
        """The config as it is saved: with the auto classes that load it, and without the place it was loaded from."""
        config = copy.deepcopy(self.config)
        config.name_or_path = ""
        config.architectures = ["MoExtendForCausalLM"]
        config.auto_map = {
            "AutoConfig": "configuration_moextend.MoExtendConfig",
            "AutoModel": "modeling_moextend.MoExtendModel",
            "AutoModelForCausalLM": "modeling_moextend.MoExtendForCausalLM",
            "AutoModelForImageTextToText": "modeling_moextend.MoExtendForCausalLM",
        }
        return config

    def push_to_hub(self, repo_id, *, adapter_dtype=None, max_shard_size="50GB", **kwargs):
        """Saves the adapter to a temporary folder and uploads it as one commit, with a model card if none is there."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, adapter_dtype=adapter_dtype, max_shard_size=max_shard_size)
            return self._upload(Path(folder), repo_id, with_card=True, **kwargs)

    def _upload(
        self,
        folder,
        repo_id,
        *,
        token=None,
        private=None,
        revision=None,
        create_pr=False,
        commit_message="Upload MoExtend adapter",
        commit_description=None,
        with_card=False,
    ):
        """One commit of the adapter's files, and of nothing else that lies in the folder."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if with_card and not api.file_exists(repo_id, "README.md", revision=revision):
            self._write_card(folder, repo_id)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            allow_patterns=PUBLISHED,
            ignore_patterns="*/*",
            delete_patterns="moextend_adapter*",
        )

    def _write_card(self, folder, repo_id):
        """README.md, where `card.py` and its template language are at hand: neither comes with the shipped code."""
        try:
            card = importlib.import_module(".card", __package__).create_card(
                self.config,
                repo_id=repo_id,
                adapter_bytes=sum(file.stat().st_size for file in folder.glob("moextend_adapter*.safetensors")),
                num_parameters=sum(tensor.numel() for tensor in self.adapter_tensors().values()),
            )
        except ImportError:
            return
        card.save(folder / "README.md")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        config=None,
        base=None,
        encoder=None,
        check_base=True,
        **kwargs,
    ):
        """Loads base and encoder (from safetensors) and puts the adapter on top.

        Args:
            pretrained_model_name_or_path: the adapter's folder or Hub id.
            base, encoder: where they lie, if elsewhere than the config says; or loaded models.
            check_base: `False` loads onto another base than the adapter was made on (its fingerprint differs).
            **kwargs: to the base's `from_pretrained`.

        Raises:
            OSError: no adapter there, or the base or encoder can't be found.
            ValueError: a damaged file, missing, unexpected or misshapen tensors (all named), or another base.
        """
        kwargs = {key: value for key, value in kwargs.items() if key not in ("_from_auto", "adapter_kwargs")}
        hub = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        hub = {key: value for key, value in hub.items() if value is not None}
        values, tensors, metadata = read_adapter(pretrained_model_name_or_path, **hub)
        stored = cls.config_class.from_dict(values)  # the header's config wins over config.json
        shared = {key: hub[key] for key in SHARED_HUB_KWARGS if key in hub}
        chosen = (
            config if isinstance(config, MoExtendConfig) or getattr(config, "model_type", "") == "moextend" else None
        )
        for name in ("attn_implementation", "experts_implementation"):  # AutoModel has moved these into the config
            value = getattr(chosen, f"_{name}", None)
            if value is not None and name not in kwargs:
                kwargs[name] = value
        if stored.encoder_config is not None and not isinstance(encoder, PreTrainedModel):
            options = {key: kwargs[key] for key in ENCODER_KWARGS if key in kwargs}
            encoder = load_stored("encoder", encoder, stored, load_encoder, **options, **shared)
        if not isinstance(base, PreTrainedModel):
            revision = {"revision": stored.base_model_revision} if base is None and stored.base_model_revision else {}
            loader = lambda path, **options: load_base(path, cls.auto_base_class, **options)  # noqa: E731
            base = load_stored("base", base, stored, loader, **revision, **shared, **kwargs)
        check_not_extended(base)
        if isinstance(stored.text_config, UnknownConfig):
            stored.text_config = copy.deepcopy(base.config)
        if encoder is not None:
            encoder = vision_tower(encoder).to(base.get_input_embeddings().weight.device)
        for role, module in (("base", base.get_decoder()), ("encoder", encoder)):
            if module is not None and check_base:
                check_fingerprint(role, getattr(stored, f"{role}_fingerprint"), module)
        check_plan(find_moe_layers(base.get_decoder()), stored.extended_layers)
        stored.name_or_path = str(pretrained_model_name_or_path)
        trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
        try:
            model = cls(stored, base=base, encoder=encoder)
            model.put_tensors(tensors, metadata, dtype=None)
        except Exception:  # a base that the caller passed in stays as it was
            detach(base.get_decoder())
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        for tensor in model.adapter_tensors().values():
            tensor.requires_grad_(tensor.is_floating_point() and isinstance(tensor, torch.nn.Parameter))
        return model.eval()

    def load_adapter_tensors(self, name_or_path, **hub_kwargs):
        """Replaces the new tensors by a saved adapter's; nothing changes unless all of them fit."""
        values, tensors, metadata = read_adapter(name_or_path, **hub_kwargs)
        if normalise_plan(values["extended_layers"]) != self.config.extended_layers:
            logger.warning(
                f"{name_or_path} extends {values['extended_layers']}, the model {self.config.extended_layers}."
            )
        self.put_tensors(tensors, metadata, dtype="keep")

    @torch.no_grad()
    def put_tensors(self, tensors, metadata, dtype):
        """Checks names and shapes, then copies.

        `dtype=None` takes the file's dtype or the base's, whichever is wider; `"keep"` the model's own.
        """
        live = self.adapter_tensors()
        check_tensors(live, tensors, metadata)
        for name, tensor in tensors.items():
            if dtype is None:
                wide = torch.promote_types(tensor.dtype, self.base.dtype)
                live[name].data = tensor.to(live[name].device, wide, copy=True)  # out of the file's map, and aligned
            else:
                live[name].copy_(tensor)

    # ------------------------------------------------------------ what transformers asks of a model

    def get_decoder(self):
        return self.base.get_decoder()

    def get_input_embeddings(self):
        return self.base.get_input_embeddings()

    def get_output_embeddings(self):
        return self.base.get_output_embeddings()

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError("The base's vocabulary stays as it is; the image token's id may lie past the embedding.")

    def train(self, mode=True):
        """The frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

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


class MoExtendModel(MoExtendPreTrainedModel):
    """The body: `last_hidden_state`, and with `output_router_logits=True` each MoE layer's logits [B * S, E + N]."""

    auto_base_class = AutoModel

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        pixel_values=None,
        output_router_logits=None,
        **kwargs,
    ):
        """See `MoExtendForCausalLM.forward`."""
        kwargs |= {"attention_mask": attention_mask, "use_cache": use_cache}
        with self.record_routing(bool(output_router_logits)) as records:
            outputs = self.run_base(input_ids, position_ids, past_key_values, inputs_embeds, pixel_values, **kwargs)
        return MoeModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=tuple(record.logits for record in records.values()) or None,
        )


class MoExtendForCausalLM(MoExtendPreTrainedModel, GenerationMixin):
    """A pretrained MoE causal LM with new experts in some layers and, with an encoder, eyes. See `from_base`."""

    auto_base_class = AutoModelForCausalLM

    def __init__(self, config, base=None, encoder=None):
        super().__init__(config, base, encoder)
        self.generation_config = copy.deepcopy(self.base.generation_config)

    @property
    def model(self):
        """The body as a `MoExtendModel` over the same modules (trainers run it with a fused head)."""
        body = self.__dict__.get("_body")
        if body is None:
            body = MoExtendModel.__new__(MoExtendModel)
            PreTrainedModel.__init__(body, self.config)
            body.base, body.encoder, body.projector, body.routing = (
                self.get_decoder(),
                self.encoder,
                self.projector,
                self.routing,
            )
            body.training = self.training
            self.__dict__["_body"] = body  # not a child: its tensors are already this model's
        return body

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        pixel_values=None,
        output_router_logits=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Runs the base with its new experts.

        Args:
            input_ids: [B, S]; image tokens stand for image features.
            attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, logits_to_keep, **kwargs: the
                base's own.
            labels: [B, S], -100 where there is no loss; image tokens never count.
            pixel_values: [images in the batch, 3, h, w], in reading order.
            output_router_logits: also return every MoE layer's logits [B * S, E + N] and the load-balancing loss,
                added to the loss with `router_aux_loss_coef`.

        Returns:
            `MoeCausalLMOutputWithPast`.

        Raises:
            ValueError: numbers of image tokens and features differ; images while the adapter is off or no encoder.
        """
        kwargs |= {"attention_mask": attention_mask, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
        if labels is not None:
            kwargs["labels"] = labels.masked_fill(labels == self.config.image_token_id, -100)
        if output_router_logits is None:
            output_router_logits = getattr(self.config.get_text_config(), "output_router_logits", False)
        with self.record_routing(bool(output_router_logits)) as records:
            outputs = self.run_base(
                input_ids,
                position_ids,
                past_key_values,
                inputs_embeds,
                pixel_values,
                output_router_logits=False,  # the base's own loss expects layers of one width
                **kwargs,
            )
        loss, aux_loss = outputs.loss, None
        if records and self.router_aux_loss_coef:
            aux_loss = self.balance_loss(records, attention_mask)
            loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device) if loss is not None else None
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=tuple(record.logits for record in records.values()) or None,
        )

    # ------------------------------------------------------------ generation

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, pixel_values=None, **kwargs):
        """The base's own preparation; images go with the pass that has their tokens, and with no other."""
        inputs = self.base.prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, pixel_values=pixel_values, **kwargs
        )
        if inputs.get("input_ids") is None or self.encoder is None:
            return inputs
        if inputs.get("pixel_values") is not None:
            cut = input_ids.shape[1] - inputs["input_ids"].shape[1]
            inputs["pixel_values"] = select_images(
                pixel_values, input_ids, cut, self.config.image_token_id, self.config.num_image_tokens
            )
        elif not kwargs.get("is_first_iteration"):
            # An assistant gets the image tokens of the prompt, but generate hands it no images: it drafts without.
            is_image = inputs["input_ids"] == self.config.image_token_id
            inputs["input_ids"] = inputs["input_ids"].masked_fill(is_image, 0)
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeats rows for beams; images are per image, not per row, and are repeated with their row."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None and expand_size > 1:
            pixel_values = expand_images(
                pixel_values, input_ids, expand_size, self.config.image_token_id, self.config.num_image_tokens
            )
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs

    def _get_logits_processor(self, *args, **kwargs):
        """The usual processors, which index scores by ids: image tokens may lie past the head."""
        processors = super()._get_logits_processor(*args, **kwargs)
        return processors if self.encoder is None else WithImageColumn(self.config.image_token_id, processors)

    def _get_candidate_generator(self, *args, **kwargs):
        """The usual one, which never proposes an image token."""
        generator = super()._get_candidate_generator(*args, **kwargs)
        if self.encoder is None:
            return generator
        if isinstance(generator, PromptLookupCandidateGenerator):
            generator.logits_processor = None  # it would look up the score of an image token; proposals are verified
        generator.get_candidates = partial(text_candidates, generator.get_candidates, self.config.image_token_id)
        return generator


class WithImageColumn(LogitsProcessorList):
    """Logits processors that see one more column of scores, the image token's: processors index scores by ids."""

    def __init__(self, image_token_id, processors):
        super().__init__(processors)
        self.image_token_id = image_token_id

    def __call__(self, input_ids, scores, **kwargs):
        is_image, vocab_size = input_ids == self.image_token_id, scores.shape[-1]
        if 0 <= self.image_token_id < vocab_size or not is_image.any():
            return super().__call__(input_ids, scores, **kwargs)
        scores = F.pad(scores, (0, 1), value=-torch.inf)
        return super().__call__(input_ids.masked_fill(is_image, vocab_size), scores, **kwargs)[:, :vocab_size]


def text_candidates(get_candidates, image_token_id, input_ids, **kwargs):
    """Candidates of assisted generation up to the first image token among them."""
    candidates, logits = get_candidates(input_ids, **kwargs)
    length = input_ids.shape[1]
    is_image = (candidates[0, length:] == image_token_id).nonzero()
    kept = int(is_image[0]) if len(is_image) else candidates.shape[1] - length
    return candidates[:, : length + kept], None if logits is None else logits[:, :kept]


# ---------------------------------------------------------------- loading and checking


def load_base(name_or_path, auto_class, **kwargs):
    """A base from its checkpoint; from safetensors only, unless `use_safetensors=False` allows pickled weights."""
    kwargs["use_safetensors"] = kwargs.get("use_safetensors", True) or None  # False would refuse safetensors
    try:
        base, loading = auto_class.from_pretrained(name_or_path, **{**kwargs, "output_loading_info": True})
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise ValueError(
                f"base={name_or_path!r} is no causal LM: transformers has no causal head for it."
            ) from error
        raise
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would go on with random values in their place
        raise ValueError(f"base={name_or_path!r} is incomplete or no causal LM: it lacks {', '.join(missing[:8])}.")
    return base


def load_stored(role, given, config, loader, **kwargs):
    """Base or encoder, from where the call or else the adapter's config says."""
    path = given or getattr(config, "base_model_name_or_path" if role == "base" else "encoder_name_or_path")
    if path is None:
        raise ValueError(f"The adapter does not say where its {role} lies: pass {role}=<folder or Hub id>.")
    try:
        return loader(path, **kwargs)
    except OSError as error:
        raise OSError(
            f"The adapter's {role} {path!r} can't be loaded: pass {role}=<folder or Hub id> if it lies elsewhere, or "
            f"use_safetensors=False if it has only pickled weights and you trust them. ({error})"
        ) from error


def check_base(base, auto_class):
    """Refuses what is no causal LM, or extended already."""
    name = type(base).__name__
    check_not_extended(base)
    if auto_class is AutoModelForCausalLM and (
        base.config.is_encoder_decoder or base.get_output_embeddings() is None or not base.can_generate()
    ):
        raise ValueError(
            f"{name} is no causal LM (it has no language-model head of its own): pass the ...ForCausalLM."
        )


def check_not_extended(base):
    """Refuses a base that carries an adapter: one attached twice would answer for both."""
    if base.config.model_type == "moextend" or any(hasattr(module, "moextend") for module in base.modules()):
        raise ValueError(
            f"{type(base).__name__} is extended already: use model.extend(plan), or pass what model.detach() returns."
        )


def check_plan(layers, plan):
    """Refuses layers that are no MoE layers and source experts out of range.

    Raises:
        ValueError: says which layers and experts there are.
    """
    wrong = sorted(plan.keys() - layers.keys())
    if wrong:
        raise ValueError(f"Layers {wrong} are not MoE layers of this base; its MoE layers are {sorted(layers)}.")
    for layer, sources in plan.items():
        bad = [source for source in sources if not 0 <= source < layers[layer].num_experts]
        if bad:
            raise ValueError(
                f"Source experts {bad} of layer {layer} are out of range: "
                f"it has experts 0 to {layers[layer].num_experts - 1}."
            )


def check_folder(folder, config):
    """Refuses to write over the config.json of a base or encoder."""
    for role in ("base_model", "encoder"):
        place = getattr(config, f"{role}_name_or_path")
        if place is not None and Path(place).is_dir() and folder.resolve() == Path(place).resolve():
            raise ValueError(
                f"{folder} is the folder of the adapter's {role.split('_')[0]}: save the adapter elsewhere."
            )


def check_fingerprint(role, stored, module):
    """Refuses a base or encoder that is not the one the adapter was made on."""
    found = fingerprint(module) if stored else None
    if found is not None and not same_fingerprint(stored, found):
        raise ValueError(
            f"This is a different {role} than the adapter was made on: its weights do not match the adapter's "
            f"{role} fingerprint. Pass {role}=<the right one>; check_base=False loads it all the same."
        )
