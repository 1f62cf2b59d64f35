"""MoExtendModel and MoExtendForCausalLM: an unchanged base, new experts in some of its layers, and encoders or none.

The pass, from top to bottom: which adapters serve it (`select_adapters`), which tokens may use their new experts
(`plan_pass`), features of images and audio in the place of their tokens (`embed`), then the base's own forward, whose
extended layers read the plan (layers, routing). Attention, norms, head, caches and generation are the base's own code.
"""

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from typing import Unpack

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .adapter_file_moextend import StoredAdapter
from .adapters_moextend import ADDING, DEFAULT, AdapterSwitch
from .base_checks_moextend import base_rule, check_ids, check_pass
from .compatibility_moextend import check_items, check_new_name, recorded_selection
from .configuration_moextend import MoExtendConfig
from .families_moextend import find_moe_layers
from .layers_moextend import keep_in_graph
from .loading_moextend import auto_class_for
from .package_moextend import from_package
from .persistence_moextend import Persistence
from .routing_moextend import RoutingRecord, Rule, balance_loss
from .scope_moextend import Passes, PassInputs, Selection, gated_pass, plan_pass, remember
from .senses_moextend import (
    INPUTS,
    SenseGenerationMixin,
    batched_passes,
    class_of_encoder,
    count_placeholders,
    encode,
    is_multimodal,
    merge_features,
    projectors_tied,
    split_inputs,
)
from .tensors_moextend import AdapterTensors, snapshot

# What generate and set_attn_implementation ask.
BASE_FLAGS = ("_is_stateful", "_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn")


def as_base(name):
    """The method `name` of a module, once the base has run its own, which may refuse (quantised, `device_map`)."""

    def moved(self, *args: object, **kwargs: object) -> PreTrainedModel:
        getattr(self.base, name)(*args, **kwargs)
        return getattr(PreTrainedModel, name)(self, *args, **kwargs)

    return moved


class MoExtendPreTrainedModel(AdapterSwitch, AdapterTensors, Persistence, PreTrainedModel):
    """What both models share: the base and its adapters, and one pass through them."""

    config_class = MoExtendConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_set_experts_implementation = classmethod(lambda cls: True)  # transformers would look for it in this file

    def __init__(
        self,
        config: MoExtendConfig,
        base: PreTrainedModel | None = None,
        encoders: dict[str, PreTrainedModel] | None = None,
        adapter_name: str = DEFAULT,
        stored: StoredAdapter | None = None,
    ):
        """`base`, `encoders` (by modality): loaded models; without them, random ones are made from the config. The
        adapter's tensors are those of the `StoredAdapter` `stored`, or else at their start values."""
        super().__init__(config)
        if base is None:
            auto_class = auto_class_for(config.text_config, self.auto_base_class)
            base = auto_class.from_config(config.text_config, trust_remote_code=False)
        encoders = encoders or {
            modality: class_of_encoder(sense.encoder_config)._from_config(sense.encoder_config)
            for modality, sense in config.senses.items()
        }
        self.base, self.adapters, self.passes = base, nn.ModuleDict(), Passes()
        self.moe_layers = find_moe_layers(self.get_decoder())  # decoder layer -> MoELayer
        # Names, not parameters: held here, each process would keep the whole of what FSDP2 shards.
        self.base_trainable = [name for name, parameter in self.base.named_parameters() if parameter.requires_grad]
        self.base.requires_grad_(False)
        self.loaded_base = base, snapshot(base)
        check_new_name(adapter_name, self)
        base_rule(config, self.moe_layers)
        if stored is None:
            tensors = from_package("attaching", ADDING).start_tensors(config, self.moe_layers, self.base)
        else:
            tensors = self.fitting_tensors(config, stored)
        self.attach_adapter(adapter_name, config, tensors, encoders)
        self.activate([adapter_name])
        self.post_init()
        # Not the encoder's: FSDP would gather its layers where the batch has images, and wait for the other processes.
        self._no_split_modules = set(self.base._no_split_modules or [])
        for flag in BASE_FLAGS:
            setattr(self, flag, getattr(self.base, flag))
        if hasattr(base, "hf_device_map"):  # trainers leave a model alone that is spread over devices
            self.hf_device_map = {f"base.{name}".rstrip("."): device for name, device in base.hf_device_map.items()}
        self.train(self.base.training)

    @property
    def _can_compile_fullgraph(self) -> bool:
        """As the base in the inference form, where no scope keeps a state beside the cache's; else new experts run on
        gathered tokens, which breaks the graph."""
        adapters = [one for one in self.passes.current.adapters.values() if one.config.extended_layers]
        experts = [self.moe_layers[layer].experts for one in adapters for layer in one.layers]
        fused = experts and all(one.moextend.fused is not None for one in experts)
        return bool(self.base._can_compile_fullgraph and fused and all(one.config.scope == "all" for one in adapters))

    def init_weights(self) -> None:
        """Nothing: base and encoder come with their weights, new tensors with theirs (`start_values`)."""

    def run_base(self, selection: Selection, **inputs) -> ModelOutput:
        """One pass by the adapters of `selection`; inputs and outputs are the base's."""
        check_pass(self, selection)
        batched = inputs.get("cu_seq_lens_k") is not None and inputs.get("cache") is not None
        make_gated = batched_passes(selection, inputs) if batched else gated_pass
        given = PassInputs(*map(inputs.get, PassInputs._fields))
        plan, state = plan_pass(self.passes, selection, given, make_gated)
        given, sensing = split_inputs(inputs), selection.sensing
        if not sensing and is_multimodal(self.base.config):  # seen by the base's own encoder
            inputs, given = inputs | {name: tensor for own in given.values() for name, tensor in own.items()}, {}
        inputs = self.embed(selection, inputs, given)
        projectors = [adapter.projectors[modality] for modality, adapter in sensing.items()]
        with self.passes.using(plan=plan), projectors_tied(self, projectors):
            outputs = self.base(**inputs)
        remember(getattr(outputs, "past_key_values", None), state)
        return outputs

    def embed(self, selection: Selection, inputs: dict, given: dict[str, dict]) -> dict:
        """The base's `inputs`: with images or audio `given` (by modality), `inputs_embeds` [B, S, H] that hold their
        features, for `input_ids`."""
        sensing, input_ids, embeds = selection.sensing, inputs["input_ids"], inputs.pop("inputs_embeds")
        if given or (sensing and input_ids is not None and bool(selection.placeholders(input_ids).any())):
            features = self.embed_features(selection, input_ids, embeds, given)
            return {**inputs, "input_ids": None, "inputs_embeds": features}
        if embeds is None:
            if not is_multimodal(self.base.config):  # such a base may put its own images where there is no embedding
                check_ids(input_ids, self)
            return inputs
        trained = [one for modality, own in sensing.items() for one in own.projectors[modality].parameters()]
        return {**inputs, "inputs_embeds": keep_in_graph(embeds, trained)}

    def embed_features(
        self,
        selection: Selection,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        given: dict[str, dict],
    ) -> torch.Tensor:
        """[B, S, H]: token embeddings with features in place of their placeholders."""
        sensing, features = selection.sensing, []
        missing = [INPUTS[modality][0] for modality in given if modality not in sensing]
        if missing:
            raise ValueError(
                f"{missing[0]} was given, but this model has no encoder, or its active adapters have none for it. "
                "Extend the base with encoder=..., or set_adapter(<one that has an encoder>)."
            )
        if not selection.enabled:
            raise ValueError(
                "Images or audio were given while the adapter is off: the base alone can't see or hear. Leave out "
                "pixel_values, input_features and their tokens, or switch the adapter on."
            )
        if inputs_embeds is not None or input_ids is None:
            raise ValueError(
                "Give images and audio with input_ids, not with inputs_embeds: features go where their tokens stand."
            )
        check_items(selection, input_ids)
        check_ids(input_ids.masked_fill(selection.placeholders(input_ids), 0), self)
        for modality, adapter in sensing.items():
            sense, own, counts = adapter.config.senses[modality], None, []
            if modality in given:
                own = encode(sense, adapter.encoders[modality], adapter.projectors[modality], given[modality])
                counts = count_placeholders(sense, *map(given[modality].get, INPUTS[modality][:2]))
            features.append((sense, own, counts))
        return merge_features(input_ids, self.get_input_embeddings(), features)

    @contextlib.contextmanager
    def record_routing(self, enabled: bool = True) -> Iterator[dict[int, RoutingRecord]]:
        """Yields a `dict` that every forward pass inside fills: decoder layer -> `RoutingRecord`, all MoE layers; that
        of an enclosing recording, which goes on. Unless `enabled`, it stays empty."""
        enclosing = self.passes.thread.records
        records = {} if enclosing is None or not enabled else enclosing
        with self.passes.using(records=records if enabled else enclosing):
            yield records

    def wants_router_logits(self, given: bool | None) -> bool:
        """Whether a pass returns router logits: as its call says, or else the base's config."""
        return bool(getattr(self.config.get_text_config(), "output_router_logits", False) if given is None else given)

    def balance_loss(
        self, records: dict[int, RoutingRecord], attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Load-balancing loss (scalar) of recorded routing, see `routing_moextend.balance_loss`; new experts of all
        adapters of the pass count together. `ValueError`: adapters of different selection were recorded."""
        selection = recorded_selection(records, self.config.selection)
        if attention_mask is not None and attention_mask.dim() != 2:
            attention_mask = None
        if attention_mask is not None and records:
            width = len(next(iter(records.values())).logits) // len(attention_mask)
            attention_mask = attention_mask[:, -width:]  # a cache's part of the mask has no tokens in this pass
        return balance_loss(records, Rule(**self.config.routing_rule), selection, attention_mask)

    @property
    def router_aux_loss_coef(self) -> float:
        """The base's own coefficient of the load-balancing loss, 0 where it has none. The loss is 1/K of transformers'
        own, which counts K selections a token; f_i here is a share of all."""
        return float(getattr(self.config.text_config.get_text_config(), "router_aux_loss_coef", 0.0) or 0.0)

    # What transformers asks of a model is the base's.

    def get_decoder(self) -> PreTrainedModel:
        return self.base.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs) -> None:  # the encoder's is its own
        self.base.set_attn_implementation(attn_implementation, **kwargs)
        self.follow_base()

    def set_experts_implementation(self, experts_implementation: str | dict) -> None:  # new experts follow it
        self.base.set_experts_implementation(experts_implementation)
        self.follow_base()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args, **kwargs
    ) -> nn.Module:
        """The embedding, if this is its size. `ValueError`: another one."""
        size, step = self.get_input_embeddings().weight.shape[0], pad_to_multiple_of or 1
        if -(-(size if new_num_tokens is None else new_num_tokens) // step) * step != size:
            raise ValueError(
                f"The base's vocabulary of {size} tokens stays as it is: leave resize_token_embeddings out; the image "
                "token's id may lie past the embedding."
            )
        return self.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise ValueError(
            "The base's embedding and head can't be replaced in an adapter: change the base, then extend."
        )

    set_output_embeddings = set_input_embeddings

    def enable_input_require_grads(self) -> None:
        """Nothing: transformers calls this for reentrant checkpointing; it would bring back backward work below the
        lowest extended layer."""

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        """As in transformers, but the recomputation sees the plan of its own forward pass, which `use_reentrant=True`
        can't restore. Every public way to switch checkpointing on comes through here, in all supported versions."""
        options = {"use_reentrant": False, **getattr(gradient_checkpointing_func, "keywords", {})}
        if enable and options["use_reentrant"]:
            raise ValueError("use_reentrant=True is not supported: use {'use_reentrant': False}, the default.")
        options["context_fn"] = partial(self.passes.checkpoint_contexts, options.get("context_fn"))
        super()._set_gradient_checkpointing(enable, partial(gradient_checkpointing_func, **options), **kwargs)

    to, cuda, half, float = map(as_base, ("to", "cuda", "half", "float"))  # last: annotations above mean another float


class MoExtendModel(MoExtendPreTrainedModel):
    """The body: `last_hidden_state`, and with `output_router_logits=True` each MoE layer's logits [B * S, E + N]."""

    auto_base_class = AutoModel

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.FloatTensor | None = None,
        output_router_logits: bool | None = None,
        adapter_names: list[str | list[str]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """See `MoExtendForCausalLM.forward`. `ValueError`: another trainer wants to compute a load-balancing loss."""
        output_router_logits = self.wants_router_logits(output_router_logits)
        if output_router_logits and self.config.extended_layers and self.config.get_text_config().router_aux_loss_coef:
            raise ValueError(
                "TRL's own load-balancing loss needs layers with equally many experts, and new experts make them "
                "uneven: leave router_aux_loss_coef out, or train with MoExtendSFTTrainer, which has one that fits."
            )
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        kwargs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        selection = self.select_adapters(adapter_names, input_ids, inputs_embeds)
        with self.record_routing(output_router_logits) as records:
            outputs = self.run_base(selection, pixel_values=pixel_values, **kwargs)
        return MoeModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=tuple(record.logits for record in records.values()) or None,
        )


class MoExtendForCausalLM(MoExtendPreTrainedModel, SenseGenerationMixin):
    """A pretrained MoE causal LM with new experts in some layers; with encoders it sees and hears: `from_base`."""

    auto_base_class = AutoModelForCausalLM

    def __init__(self, config: MoExtendConfig, base=None, encoders=None, **kwargs):
        super().__init__(config, base, encoders, **kwargs)
        self.generation_config = copy.deepcopy(self.base.generation_config)
        vars(self.generation_config).update(config.generation_config or {})
        self.initial_generation = self.generation_config.to_dict()

    @property
    def model(self) -> MoExtendModel:
        """The body as a `MoExtendModel` over the same modules (trainers run it with a fused head)."""
        body = self.__dict__.get("_body")
        if body is None:
            body = MoExtendModel.__new__(MoExtendModel)
            PreTrainedModel.__init__(body, self.config)
            body.base, body.adapters, body.passes = self.get_decoder(), self.adapters, self.passes
            body.moe_layers, body.training, body.loaded_base = self.moe_layers, self.training, self.loaded_base
            self.__dict__["_body"] = body  # not a child: its tensors are already this model's
        body.config = self.config  # which changes with the active adapters
        return body

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.FloatTensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        adapter_names: list[str | list[str]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        """Runs the base with its new experts.

        Args:
            input_ids: [B, S]; image and audio tokens stand for features.
            attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, logits_to_keep, **kwargs: the
                base's own.
            labels: [B, S], -100 where there is no loss; image and audio tokens never count.
            pixel_values: [images in the batch, 3, h, w], in reading order; what else encoders take is among the
                keywords: `pixel_attention_mask`, `spatial_shapes` of SigLIP 2; of audio `input_features` [clips, ...]
                and `input_features_mask` [clips, frames or samples], as the processor makes them.
            output_router_logits: also return every MoE layer's logits [B * S, E + N] and the load-balancing loss,
                added to the loss with `router_aux_loss_coef`.
            adapter_names: [B], for each item of the batch an adapter, whatever is active, or a list of them that take
                part together; "__base__": none.

        Returns:
            `MoeCausalLMOutputWithPast`.

        Raises:
            ValueError: numbers of image tokens and features differ; images while the adapter is off or no encoder;
                `adapter_names` of another length, unknown ones, or ones that can't be used so.
        """
        selection = self.select_adapters(adapter_names, input_ids, inputs_embeds)
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        kwargs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        if labels is not None:
            no_label = selection.placeholders(labels) if selection.sensing else labels == self.config.image_token_id
            kwargs["labels"] = labels.masked_fill(no_label, -100)
        with self.record_routing(self.wants_router_logits(output_router_logits)) as records:
            # The base's own load-balancing loss expects layers of one width.
            kwargs |= {"logits_to_keep": logits_to_keep, "output_router_logits": False}
            outputs = self.run_base(selection, pixel_values=pixel_values, **kwargs)
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
