"""Vision: a frozen encoder and a projector put image features where the image tokens stand (LLaVA-1.5).

Letters: B items, S tokens, I images in the batch, P features an image, H hidden size of the base, D of the encoder.
"""

import contextlib
import os
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, Cache, GenerationMixin, LogitsProcessorList, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from .configuration_moextend import as_config, has_class_token
from .layers_moextend import keep_in_graph
from .package_moextend import from_package

VISION_MODEL_TYPES = ("clip_vision_model", "siglip_vision_model")
CONFIG_KWARGS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")


class Projector(nn.Module):
    """Two linear layers with an activation between them: [I, P, D] -> [I, P, H] (`mlp2x_gelu` of LLaVA-1.5)."""

    def __init__(self, encoder_size: int, hidden_size: int, activation: str = "gelu", device=None):
        super().__init__()
        self.linear_1 = nn.Linear(encoder_size, hidden_size, device=device, dtype=torch.float32)
        self.act = ACT2FN[activation]
        self.linear_2 = nn.Linear(hidden_size, hidden_size, device=device, dtype=torch.float32)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.act(self.linear_1(features.to(self.linear_1.weight.dtype)))
        return self.linear_2(hidden)


@contextlib.contextmanager
def projector_tied(model, projector):
    """Inside the block, token embeddings of `model` are tied to a projector that trains, with gradient zero: sharded
    layers are gathered for backward by all processes or by none, whether their batch has images or not."""
    trained = [] if projector is None or not torch.is_grad_enabled() else list(projector.parameters())
    if not any(parameter.requires_grad for parameter in trained):
        yield
        return
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, args, output: keep_in_graph(output, trained))
    try:
        yield
    finally:
        hook.remove()


def load_encoder(name_or_path: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """The vision tower of a CLIP or SigLIP checkpoint (vision-only or whole), from safetensors, frozen."""
    hub = {key: kwargs[key] for key in CONFIG_KWARGS if key in kwargs}
    values, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub)  # AutoConfig might run code
    config = as_config(values)
    config = getattr(config, "vision_config", config)
    check_encoder(name_or_path, config.model_type or values["model_type"])  # an unknown config has none
    kwargs |= {"config": config, "trust_remote_code": False}
    return load_whole("encoder", AutoModel, name_or_path, **kwargs).requires_grad_(False).eval()


def load_whole(role, auto_class, name_or_path, **kwargs):
    """A model from safetensors only, unless `use_safetensors=False` allows pickled weights, with none missing."""
    kwargs["use_safetensors"] = kwargs.get("use_safetensors", True) or None  # False would refuse safetensors
    model, loading = auto_class.from_pretrained(name_or_path, **{**kwargs, "output_loading_info": True})
    missing = ", ".join(sorted(loading["missing_keys"])[:8])
    if missing:  # transformers would go on with random values in their place
        raise ValueError(f"{role}={str(name_or_path)!r} is incomplete, or no model of the kind: it lacks {missing}.")
    return model


def vision_tower(model: PreTrainedModel) -> PreTrainedModel:
    """The vision tower of a loaded CLIP or SigLIP model (vision-only or whole)."""
    tower = model.vision_model if hasattr(model.config, "vision_config") and hasattr(model, "vision_model") else model
    check_encoder(type(model).__name__, tower.config.model_type)
    if tower is not model:
        tower.config.name_or_path = model.config.name_or_path  # a part does not know where the whole lies
    return tower


def check_encoder(given, model_type):
    if model_type not in VISION_MODEL_TYPES:
        raise ValueError(
            f"encoder={given!r} is a {model_type!r} model; an encoder must be a CLIP or SigLIP vision model "
            f"({', '.join(VISION_MODEL_TYPES)}, or a whole model that has one)."
        )


def encode_images(encoder, projector, pixel_values, select_layer, select_feature) -> torch.Tensor:
    """[I, 3, size, size] pixels -> [I, P, H] features: one hidden state of the frozen encoder, projected."""
    size = encoder.config.image_size
    if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (encoder.config.num_channels, size, size):
        raise ValueError(
            f"pixel_values must be [I, {encoder.config.num_channels}, {size}, {size}] (I images of the batch, in "
            f"reading order, as the encoder's image processor makes them), not {list(pixel_values.shape)}."
        )
    with torch.no_grad():
        pixel_values = pixel_values.to(encoder.device, encoder.dtype)
        hidden = encoder(pixel_values=pixel_values, output_hidden_states=True).hidden_states[select_layer]
    if select_feature == "patch" and has_class_token(encoder.config):
        hidden = hidden[:, 1:]
    return projector(hidden)


def merge_images(input_ids, embedding, image_token_id, features):
    """Token embeddings [B, S, H] with image features [I, P, H] (`None`: no images) in place of the image tokens, in
    reading order. The image token never reaches the embedding: its id may lie past it."""
    is_image = input_ids == image_token_id
    num_tokens = int(is_image.sum())
    num_features = 0 if features is None else features.shape[0] * features.shape[1]
    if num_tokens != num_features:
        raise ValueError(
            f"Image features and image tokens do not match: {num_features} features"
            f"{'' if features is None else f' ({features.shape[0]} images of {features.shape[1]})'}, {num_tokens} "
            f"image tokens (id {image_token_id}) in input_ids. Were tokens cut off by max_length, or images left out? "
            "Or has the processor another image token: from_base(..., image_token_id=processor.image_token_id)?"
        )
    embeds = embedding(input_ids.masked_fill(is_image, 0))
    if features is None:
        return embeds
    features = features.to(embeds.device, embeds.dtype).flatten(0, 1)
    return embeds.masked_scatter(is_image.unsqueeze(-1).to(embeds.device), features)


def images_per_item(input_ids, config):
    """[B]: how many images' tokens each item of `input_ids` [B, S] holds; `config`: of the adapter that sees."""
    return (input_ids == config.image_token_id).sum(dim=1) // max(config.num_image_tokens, 1)


def select_images(pixel_values, input_ids, past_length, config):
    """The images of `pixel_values` [I, 3, h, w] whose tokens come after the cached `past_length` tokens. A user who
    hands on a cache gives either the images of the whole conversation `input_ids` [B, S] or only the new ones."""
    total, new = images_per_item(input_ids, config), images_per_item(input_ids[:, past_length:], config)
    if past_length == 0 or len(pixel_values) == int(new.sum()):
        return pixel_values
    if len(pixel_values) != int(total.sum()):
        raise ValueError(
            f"{len(pixel_values)} images were given; the conversation has {int(total.sum())}, of which "
            f"{int(new.sum())} are not in the cache yet. Give all of them, or just the new ones."
        )
    items = pixel_values.split(total.tolist())
    unseen = [images[len(images) - count :] for images, count in zip(items, new.tolist(), strict=True)]
    return torch.cat(unseen) if int(new.sum()) else None


def expand_images(pixel_values, input_ids, expand_size, config):
    """[I, 3, h, w] -> [I * expand_size, 3, h, w]: repeated item by item, or beams would get their neighbours'."""
    items = pixel_values.split(images_per_item(input_ids, config).tolist())
    return torch.cat([images for images in items for _ in range(expand_size)])


def of_base(name):
    return lambda self, *args, **kwargs: getattr(self.base, name)(*args, **kwargs)


class ImageGenerationMixin(GenerationMixin):
    """transformers' `generate` for prompts that hold image tokens, and for prompts of several adapters."""

    def generate(self, inputs: torch.Tensor | None = None, *args, adapter_names: list | None = None, **kwargs) -> Any:
        """As in transformers, by the adapters that are active when it begins; `adapter_names`: see `forward`."""
        prompts = inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"), [None]  # no prompt: one is begun
        with self.passes.using(selection=self.select_adapters(adapter_names, *prompts)):
            return super().generate(inputs, *args, **kwargs)

    def generate_batch(self, inputs: list[list[int]], *args, **kwargs) -> Any:
        """As in transformers, by the adapters that are active now. `ValueError`: see `init_continuous_batching`."""
        self.check_prompts(inputs)
        return super().generate_batch(inputs, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs) -> Any:
        """As in transformers (`generate_batch`, `transformers serve --continuous-batching`). `ValueError`: with
        `disable_adapter` or `adapter_names`, of which its thread is not told; what serving/batching.py is without."""
        selection, init = self.select_adapters(), super().init_continuous_batching
        if self.passes.thread.enabled is False or selection.per_item is not None:
            raise ValueError(
                "disable_adapter and adapter_names are one thread's; batches run in another: call disable_adapters() "
                "or set_adapter(...) before."
            )
        serving = [selection.adapters[name] for name in selection.taking_part]
        if all(one.gate is None and one.encoder is None for one in serving):
            return init(*args, **kwargs)
        batching = from_package("serving.batching", "Continuous batching with a gate or an encoder")
        return batching.manager_with_gates(init, selection, *args, **kwargs)

    def check_prompts(self, prompts):
        """`ValueError`: one of the `prompts` (lists of ids) of continuous batching holds image tokens."""
        vision = self.vision_adapter
        if vision is not None and any(vision.config.image_token_id in prompt for prompt in prompts):
            raise ValueError("Continuous batching takes no images: use generate for prompts that hold image tokens.")

    # Some families bring a cache of their own, take no `inputs_embeds`, or have positions of several dimensions.
    _supports_default_dynamic_cache = of_base("_supports_default_dynamic_cache")
    _prepare_cache_for_generation = of_base("_prepare_cache_for_generation")
    _prepare_model_inputs = of_base("_prepare_model_inputs")
    _prepare_position_ids_for_generation = of_base("_prepare_position_ids_for_generation")

    def _validate_model_kwargs(self, model_kwargs):
        """Without an encoder here, the base's own: what a multimodal one takes is its affair."""
        (super() if self.encoder is not None else self.base)._validate_model_kwargs(model_kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, past_key_values: Cache | None = None, pixel_values: Any = None, **kwargs
    ) -> dict:
        """The base's own preparation; images go with the pass that has their tokens, and with no other."""
        given = {"past_key_values": past_key_values, "pixel_values": pixel_values, **kwargs}
        inputs = self.base.prepare_inputs_for_generation(input_ids, **given)
        if inputs.get("input_ids") is None or self.vision_adapter is None:
            return inputs
        config = self.vision_adapter.config
        if inputs.get("pixel_values") is not None:
            cut = input_ids.shape[1] - inputs["input_ids"].shape[1]
            inputs["pixel_values"] = select_images(pixel_values, input_ids, cut, config)
        elif not kwargs.get("is_first_iteration"):
            # An assistant gets the image tokens of the prompt, but generate hands it no images: it drafts without.
            is_image = inputs["input_ids"] == config.image_token_id
            inputs["input_ids"] = inputs["input_ids"].masked_fill(is_image, 0)
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeats items for beams; images are per image, not per item, and are repeated with their item."""
        given = expand_size, is_encoder_decoder, input_ids
        if self.encoder is None:  # a multimodal base knows its own images
            return self.base._expand_inputs_for_generation(*given, **model_kwargs)
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None and expand_size > 1 and self.vision_adapter is not None:
            pixel_values = expand_images(pixel_values, input_ids, expand_size, self.vision_adapter.config)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(*given, **model_kwargs)
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs

    def _get_logits_processor(self, generation_config, *args, **kwargs):
        """The usual processors, which index scores by ids: image tokens may lie past the head."""
        vision = self.vision_adapter
        if vision is not None and vision.finds_images(kwargs.get("encoder_input_ids")):
            past_head = not 0 <= vision.config.image_token_id < self.get_output_embeddings().weight.shape[0]
            check_processors(generation_config, kwargs.get("negative_prompt_ids"), past_head)
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        return processors if vision is None else WithImageColumn(vision.config.image_token_id, processors)

    def _get_candidate_generator(self, *args, **kwargs):
        """The usual one, which never proposes an image token."""
        generator = super()._get_candidate_generator(*args, **kwargs)
        if self.vision_adapter is None:
            return generator
        if isinstance(generator, PromptLookupCandidateGenerator):
            generator.logits_processor = None  # it would look up the score of an image token; proposals are verified
        image_token_id = self.vision_adapter.config.image_token_id
        generator.get_candidates = partial(text_candidates, generator.get_candidates, image_token_id)
        return generator


def batched_passes(selection, inputs):
    """In a pass of continuous batching, whose requests share one paged cache: what makes each gate's `GatedPass`.
    `ValueError`: the cache holds tokens of other adapters, or has no place for what these gates remember."""
    cache, names = inputs["cache"], selection.taking_part
    serving = [(name, selection.adapters[name], selection.thresholds.get(name)) for name in names]
    gates = getattr(cache, "moextend_gates", None)
    gated = {name for name, adapter, _ in serving if adapter.gate is not None}
    begun = cache.__dict__.setdefault("moextend_adapters", serving)
    if begun != serving or gated - (set() if gates is None else gates.pages.keys()):
        raise ValueError(
            f"Continuous batching was begun by other adapters, or other thresholds of a gate, than {list(names)} now: "
            "call destroy_cached_continuous_batching_manager(), or begin with a new manager."
        )
    return None if gates is None else gates.passes(inputs)


def check_processors(generation_config, negative_prompt_ids, past_head):
    """Refuses, by name, what generates without the prompt's images, or looks image tokens up past the head."""
    scale, penalty = generation_config.guidance_scale, generation_config.encoder_repetition_penalty
    size = generation_config.encoder_no_repeat_ngram_size
    given = {"guidance_scale": scale not in (None, 1), "negative_prompt_ids": negative_prompt_ids is not None}
    given |= {"encoder_repetition_penalty": past_head and penalty not in (None, 1)}
    given |= {"encoder_no_repeat_ngram_size": past_head and bool(size)}
    given |= {"prefill_chunk_size": generation_config.prefill_chunk_size is not None}
    used = [name for name in given if given[name]]
    if used:
        raise ValueError(
            f"{' and '.join(used)} cannot be used in generate with images: guidance runs the model without them, "
            "chunks may cut one in two, and encoder_... looks up scores of the prompt's tokens, of which "
            "an image token past the vocabulary has none."
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
    number = int(is_image[0]) if len(is_image) else candidates.shape[1] - length
    return candidates[:, : length + number], None if logits is None else logits[:, :number]
