"""Generation with images: the base's own code, told which images belong to which pass, row and score column."""

from functools import partial

import torch
from torch.nn import functional as F
from transformers import GenerationMixin, LogitsProcessorList
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from .vision_moextend import expand_images, select_images


class ImageGenerationMixin(GenerationMixin):
    """transformers' `generate` for prompts that hold image tokens, and for prompts of several adapters."""

    def generate(self, inputs=None, *args, adapter_names=None, **kwargs):
        """As in transformers. `adapter_names`: for each prompt an adapter or a list of them, see `forward`.

        Raises:
            ValueError: an unknown name, another number of them than of prompts, adapters that are off.
        """
        prompts = next(
            (x for x in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), [0]
        )
        with self.serving(adapter_names, len(prompts)):
            return super().generate(inputs, *args, **kwargs)

    def _supports_default_dynamic_cache(self):
        return self.base._supports_default_dynamic_cache()

    def _prepare_cache_for_generation(self, *args, **kwargs):
        """The base's own cache: some families bring a class of theirs."""
        return self.base._prepare_cache_for_generation(*args, **kwargs)

    def _prepare_position_ids_for_generation(self, *args, **kwargs):
        """The base's own: multimodal ones have positions of several dimensions."""
        return self.base._prepare_position_ids_for_generation(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs):
        """Without an encoder here, the base's own: what a multimodal one takes is its affair."""
        validate = super() if self.encoder is not None else self.base
        validate._validate_model_kwargs(model_kwargs)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, pixel_values=None, **kwargs):
        """The base's own preparation; images go with the pass that has their tokens, and with no other."""
        inputs = self.base.prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, pixel_values=pixel_values, **kwargs
        )
        if inputs.get("input_ids") is None or self.eyes is None:
            return inputs
        config = self.eyes.config
        if inputs.get("pixel_values") is not None:
            cut = input_ids.shape[1] - inputs["input_ids"].shape[1]
            inputs["pixel_values"] = select_images(
                pixel_values, input_ids, cut, config.image_token_id, config.num_image_tokens
            )
        elif not kwargs.get("is_first_iteration"):
            # An assistant gets the image tokens of the prompt, but generate hands it no images: it drafts without.
            is_image = inputs["input_ids"] == config.image_token_id
            inputs["input_ids"] = inputs["input_ids"].masked_fill(is_image, 0)
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeats rows for beams; images are per image, not per row, and are repeated with their row."""
        if self.encoder is None:  # a multimodal base knows its own images
            return self.base._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None and expand_size > 1 and self.eyes is not None:
            config = self.eyes.config
            pixel_values = expand_images(
                pixel_values, input_ids, expand_size, config.image_token_id, config.num_image_tokens
            )
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs

    def _get_logits_processor(self, generation_config, *args, **kwargs):
        """The usual processors, which index scores by ids: image tokens may lie past the head.

        Raises:
            ValueError: a processor that cannot work with images, by name.
        """
        if self.has_image_tokens(kwargs.get("encoder_input_ids")):
            head = self.get_output_embeddings().weight.shape[0]
            past_head = not 0 <= self.eyes.config.image_token_id < head
            check_processors(generation_config, kwargs.get("negative_prompt_ids"), past_head)
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        return processors if self.eyes is None else WithImageColumn(self.eyes.config.image_token_id, processors)

    def _get_candidate_generator(self, *args, **kwargs):
        """The usual one, which never proposes an image token."""
        generator = super()._get_candidate_generator(*args, **kwargs)
        if self.eyes is None:
            return generator
        if isinstance(generator, PromptLookupCandidateGenerator):
            generator.logits_processor = None  # it would look up the score of an image token; proposals are verified
        generator.get_candidates = partial(text_candidates, generator.get_candidates, self.eyes.config.image_token_id)
        return generator


def check_processors(generation_config, negative_prompt_ids, past_head):
    """Refuses, by name, what generates without the prompt's images, or looks image tokens up past the head."""
    scale, penalty = generation_config.guidance_scale, generation_config.encoder_repetition_penalty
    blind = {"guidance_scale": scale not in (None, 1), "negative_prompt_ids": negative_prompt_ids is not None}
    out_of_range = {
        "encoder_repetition_penalty": penalty not in (None, 1),
        "encoder_no_repeat_ngram_size": bool(generation_config.encoder_no_repeat_ngram_size),
    }
    used = [name for name, given in (blind | (out_of_range if past_head else {})).items() if given]
    if used:
        raise ValueError(
            f"{' and '.join(used)} cannot be used in generate with images: guidance runs the model without the "
            "prompt's images, and encoder_... looks up the scores of the prompt's tokens, where an image token past "
            "the vocabulary has none. Leave it out."
        )


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
