"""Images in vLLM: the adapter's own encoder and projector make features, which stand where image tokens stand.

A prompt has one image token for each image, as the chat template writes it; vLLM makes of each as many as an image has
features. Letters: T tokens of a step, I images, P features an image, H hidden size.
"""

from functools import cache, wraps

from torch import nn
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import _merge_multimodal_embeddings
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)
from vllm.v1.engine.input_processor import InputProcessor

from ...processing_moextend import MoExtendProcessor
from ...senses_moextend import encode


@cache
def processor_at(name: str) -> MoExtendProcessor:
    return MoExtendProcessor.from_pretrained(name)


class ImageInfo(BaseProcessingInfo):
    def get_hf_processor(self, **kwargs):
        return processor_at(self.model_id)

    def get_supported_mm_limits(self):
        return {"image": None}


class ImageDummies(BaseDummyInputsBuilder):
    """What vLLM measures memory with."""

    def get_dummy_text(self, mm_counts):
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len, mm_counts, mm_options):
        count, options = mm_counts.get("image", 0), mm_options.get("image")
        return {"image": self._get_dummy_images(width=64, height=64, num_images=count, overrides=options)}


class ImageInputs(BaseMultiModalProcessor):
    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        processor = self.info.get_hf_processor()
        token = [processor.image_token_id]
        return [PromptReplacement("image", token, token * processor.num_image_tokens)]

    def _maybe_apply_prompt_updates(self, mm_items, mm_res):
        processor, given = self.info.get_hf_processor(), mm_res.prompt_ids.count
        count = mm_items.get_all_counts().get("image", 0)
        if given(processor.image_token_id) != count:
            raise ValueError(
                f"The prompt has {given(processor.image_token_id)} image tokens ({processor.image_token}), and "
                f"{count} images were given: one image token each."
            )
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)


def refuse_stray_image_tokens() -> None:
    """Has vLLM refuse prompts that hold image tokens and come without images, as the model itself does elsewhere."""
    validate = InputProcessor._validate_model_input
    if hasattr(validate, "__wrapped__"):
        return

    @wraps(validate)
    def checked(self, prompt_input, prompt_type):
        token = getattr(self.model_config.hf_config, "moextend_adapter", {}).get("image_token_id")
        if token is not None and prompt_input["type"] == "token" and token in prompt_input["prompt_token_ids"]:
            raise ValueError(f"The prompt has image tokens (id {token}), and no images were given.")
        return validate(self, prompt_input, prompt_type)

    InputProcessor._validate_model_input = checked


def with_images(extended: type[nn.Module], name: str) -> type[nn.Module]:
    """An extended class that takes images."""

    @MULTIMODAL_REGISTRY.register_processor(ImageInputs, info=ImageInfo, dummy_inputs=ImageDummies)
    class Seeing(extended, SupportsMultiModal):
        requires_raw_input_tokens = True  # beside embeddings: scope and deltas go by token ids

        @classmethod
        def get_placeholder_str(cls, modality, i):
            return "<image>" if modality.startswith("image") else None

        def get_language_model(self):
            return self

        def embed_multimodal(self, pixel_values=None, **kwargs):
            """[I, 3, size, size] -> [I, P, H]"""
            if pixel_values is None:
                return []
            (adapter,) = self.moextend[0].adapters
            features = encode(
                adapter.config.senses["image"], adapter.encoder, adapter.projector, {"pixel_values": pixel_values}
            )
            return features.unflatten(0, (len(pixel_values), -1))

        def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
            """[T] -> [T, H]; the image token never reaches the embedding: its id may lie past it."""
            (adapter,) = self.moextend[0].adapters
            embeds = super().embed_input_ids(input_ids.masked_fill(input_ids == adapter.config.image_token_id, 0))
            if multimodal_embeddings is None or not len(multimodal_embeddings):
                return embeds
            features = [one.to(embeds.dtype) for one in multimodal_embeddings]
            return _merge_multimodal_embeddings(embeds, features, is_multimodal)

    Seeing.__name__ = Seeing.__qualname__ = name
    Seeing.__module__ = extended.__module__
    return Seeing
