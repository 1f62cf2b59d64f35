"""MoExtendModel and MoExtendForCausalLM: an unchanged base, new experts in some of its layers, and eyes if it has any.

One batch: image features take the place of image tokens (vision), the tokens that may use new experts are marked
(scope), and the base's own forward runs; its extended layers find the mark in the shared `RoutingState` (layers,
routing). Attention, norms, head, caches and generation are the base's own code.
"""

import copy

from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple

from .generation_moextend import ImageGenerationMixin
from .pretrained_moextend import MoExtendPreTrainedModel


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
        adapter_names=None,
        **kwargs,
    ):
        """See `MoExtendForCausalLM.forward`.

        Raises:
            ValueError: a trainer other than `MoExtendSFTTrainer` wants to compute the load-balancing loss.
        """
        if output_router_logits and self.config.extended_layers and self.config.get_text_config().router_aux_loss_coef:
            raise ValueError(
                "TRL's own load-balancing loss needs layers with equally many experts, and new experts make them "
                "uneven: leave router_aux_loss_coef out, or train with MoExtendSFTTrainer, which has one that fits."
            )
        kwargs |= {"attention_mask": attention_mask, "use_cache": use_cache}
        with self.record_routing(bool(output_router_logits)) as records:
            outputs = self.run_base(
                input_ids, position_ids, past_key_values, inputs_embeds, pixel_values, adapter_names, **kwargs
            )
        return MoeModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=tuple(record.logits for record in records.values()) or None,
        )


class MoExtendForCausalLM(MoExtendPreTrainedModel, ImageGenerationMixin):
    """A pretrained MoE causal LM with new experts in some layers and, with an encoder, eyes. See `from_base`."""

    auto_base_class = AutoModelForCausalLM

    def __init__(self, config, base=None, encoder=None, **kwargs):
        super().__init__(config, base, encoder, **kwargs)
        self.generation_config = copy.deepcopy(self.base.generation_config)

    @property
    def model(self):
        """The body as a `MoExtendModel` over the same modules (trainers run it with a fused head)."""
        body = self.__dict__.get("_body")
        if body is None:
            body = MoExtendModel.__new__(MoExtendModel)
            PreTrainedModel.__init__(body, self.config)
            body.base, body.adapters, body.routing = self.get_decoder(), self.adapters, self.routing
            body.training = self.training
            self.__dict__["_body"] = body  # not a child: its tensors are already this model's
        body.config = self.config  # which changes with the active adapters
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
        adapter_names=None,
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
            adapter_names: [B], for each row of the batch an adapter, whatever is active, or a list of them that take
                part together; "__base__": none.

        Returns:
            `MoeCausalLMOutputWithPast`.

        Raises:
            ValueError: numbers of image tokens and features differ; images while the adapter is off or no encoder;
                `adapter_names` of another length, unknown ones, or ones that can't be used so.
        """
        kwargs |= {"attention_mask": attention_mask, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
        if labels is not None:
            with self.serving(adapter_names, None):  # which may see with other eyes than the active ones
                kwargs["labels"] = labels.masked_fill(labels == self.image_token_id, -100)
        if output_router_logits is None:
            output_router_logits = getattr(self.config.get_text_config(), "output_router_logits", False)
        with self.record_routing(bool(output_router_logits)) as records:
            outputs = self.run_base(
                input_ids,
                position_ids,
                past_key_values,
                inputs_embeds,
                pixel_values,
                adapter_names,
                output_router_logits=False,  # the base's own loss expects layers of one width
                **kwargs,
            )
        loss, aux_loss = outputs.loss, None
        if records and self.router_aux_loss_coef:
            with self.serving(adapter_names, None):
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
