"""Vision: a frozen encoder and a projector put image features where the image tokens stand (LLaVA-1.5).

Letters: B rows, S tokens, I images in the batch, P features an image, H hidden size of the base, D of the encoder.
"""

import contextlib

import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.activations import ACT2FN

from .configuration_moextend import has_class_token
from .layers_moextend import zero_tie

VISION_MODEL_TYPES = ("clip_vision_model", "siglip_vision_model")


class Projector(nn.Module):
    """Two linear layers with an activation between them: [I, P, D] -> [I, P, H] (`mlp2x_gelu` of LLaVA-1.5)."""

    def __init__(self, encoder_size, hidden_size, activation="gelu", device=None):
        super().__init__()
        self.linear_1 = nn.Linear(encoder_size, hidden_size, device=device, dtype=torch.float32)
        self.act = ACT2FN[activation]
        self.linear_2 = nn.Linear(hidden_size, hidden_size, device=device, dtype=torch.float32)

    def forward(self, features):
        hidden = self.act(self.linear_1(features.to(self.linear_1.weight.dtype)))
        return self.linear_2(hidden)


@contextlib.contextmanager
def projector_tied(embedding, projector):
    """Inside the block, token embeddings [B, S, H] are tied to a projector that trains, with gradient zero.

    A batch without images so gives the projector gradients, through every layer, as one with images does on another
    process: sharded layers are gathered again for backward by all processes or by none.
    """
    trained = [] if projector is None or not torch.is_grad_enabled() else list(projector.parameters())
    if not any(parameter.requires_grad for parameter in trained):
        yield
        return
    hook = embedding.register_forward_hook(lambda module, args, output: zero_tie(output, trained))
    try:
        yield
    finally:
        hook.remove()


def load_encoder(name_or_path, **kwargs):
    """The vision tower of a CLIP or SigLIP checkpoint (vision-only or whole), from safetensors, frozen.

    Raises:
        ValueError: the checkpoint is of another kind, or lacks tensors.
    """
    config_kwargs = {
        key: kwargs[key]
        for key in ("revision", "token", "cache_dir", "local_files_only", "subfolder")
        if key in kwargs
    }
    config = AutoConfig.from_pretrained(name_or_path, **config_kwargs)
    config = getattr(config, "vision_config", config)
    check_encoder(name_or_path, config)
    kwargs["use_safetensors"] = kwargs.get("use_safetensors", True) or None  # None: pickled if there is nothing else
    encoder, loading = AutoModel.from_pretrained(name_or_path, config=config, output_loading_info=True, **kwargs)
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would go on with random values in their place
        raise ValueError(f"encoder={str(name_or_path)!r} is incomplete: it lacks {', '.join(missing[:8])}.")
    return encoder.requires_grad_(False).eval()


def vision_tower(model):
    """The vision tower of a loaded CLIP or SigLIP model (vision-only or whole).

    Raises:
        ValueError: the model is of another kind.
    """
    tower = model.vision_model if hasattr(model.config, "vision_config") and hasattr(model, "vision_model") else model
    check_encoder(type(model).__name__, tower.config)
    if tower is not model:
        tower.config.name_or_path = model.config.name_or_path  # a part does not know where the whole lies
    return tower


def check_encoder(given, config):
    """Refuses what is no CLIP or SigLIP vision model."""
    if config.model_type not in VISION_MODEL_TYPES:
        raise ValueError(
            f"encoder={given!r} is a {config.model_type!r} model; an encoder must be a CLIP or SigLIP vision model "
            f"({', '.join(VISION_MODEL_TYPES)}, or a whole model that has one)."
        )


def encode_images(encoder, projector, pixel_values, select_layer, select_feature):
    """[I, 3, size, size] pixels -> [I, P, H] features: one hidden state of the frozen encoder, projected.

    Raises:
        ValueError: pixels of another shape.
    """
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
    """Token embeddings [B, S, H] with image features [I, P, H] in place of the image tokens, in reading order.

    The image token never reaches the embedding: its id may lie past it. `features` is `None` without images.

    Raises:
        ValueError: the numbers of image tokens and image features differ; both are named.
    """
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


def images_per_row(input_ids, image_token_id, num_image_tokens):
    """[B]: how many images' tokens each row of `input_ids` [B, S] holds."""
    return (input_ids == image_token_id).sum(dim=1) // max(num_image_tokens, 1)


def select_images(pixel_values, input_ids, past_length, image_token_id, num_image_tokens):
    """The images of `pixel_values` [I, 3, h, w] whose tokens come after the cached `past_length` tokens.

    `input_ids` [B, S] is the whole conversation. A user who hands on a cache gives either the images of the whole
    conversation or only the new ones; which of the two is told by their number.
    """
    total = images_per_row(input_ids, image_token_id, num_image_tokens)
    new = images_per_row(input_ids[:, past_length:], image_token_id, num_image_tokens)
    if past_length == 0 or len(pixel_values) == int(new.sum()):
        return pixel_values
    if len(pixel_values) != int(total.sum()):
        raise ValueError(
            f"{len(pixel_values)} images were given; the conversation has {int(total.sum())}, of which "
            f"{int(new.sum())} are not in the cache yet. Give all of them, or just the new ones."
        )
    rows = pixel_values.split(total.tolist())
    kept = [images[len(images) - count :] for images, count in zip(rows, new.tolist(), strict=True)]
    return torch.cat(kept) if int(new.sum()) else None


def expand_images(pixel_values, input_ids, expand_size, image_token_id, num_image_tokens):
    """Repeats each row's images `expand_size` times (beams, several returned sequences), row by row.

    [I, 3, h, w] -> [I * expand_size, 3, h, w]. Repeating image by image would hand beams their neighbour's images.
    """
    rows = pixel_values.split(images_per_row(input_ids, image_token_id, num_image_tokens).tolist())
    return torch.cat([row for row in rows for _ in range(expand_size)])
