"""Text and images to model inputs: a tokenizer with an image token, the encoder's image processor, a chat template."""

import contextlib
import os
from typing import Any, Self

import torch
import transformers
from transformers import BaseImageProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin, image_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.tokenization_utils_base import AddedToken

from .package_moextend import from_package

IMAGE_TOKEN = "<image>"
BUILDING = "Building a processor"
MAX_IMAGE_TOKENS = 2**16
# `transformers serve` asks this table, by the name of a model's class, whether what has a processor takes images.
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault("moextend_with_encoder", "MoExtendForCausalLM")


def to_rgb(image):
    """A PIL image of any 8- or 16-bit mode, or the file of one, or a list, in RGB and upright by its EXIF. Alpha is
    dropped, as LLaVA does. Anything else is left to transformers: arrays, tensors, URLs, base64 text."""
    if isinstance(image, (list, tuple)):
        return [to_rgb(one) for one in image]
    if isinstance(image, (str, os.PathLike)) and os.path.isfile(image):
        with open(image, "rb") as file:  # by name, PIL maps a TIFF and turns it wrongly; transformers clips 16 bits
            return to_rgb(image_utils.PIL.Image.open(file))
    mode = getattr(image, "mode", None)  # a tensor has a method of that name
    if not isinstance(mode, str):
        return image
    if mode in ("I", "F"):
        raise ValueError(f"An image of mode {mode!r} has no fixed range of values: scale it to 8 bits, as mode 'L'.")
    image = image.copy()
    with contextlib.suppress(Exception):  # EXIF that can't be read turns nothing; PIL's plugins raise what they like
        image_utils.PIL.ImageOps.exif_transpose(image, in_place=True)
    if mode.startswith("I;16"):
        # PIL's own conversion clips at 255, which turns nearly every 16-bit image white.
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    if "transparency" in image.info:  # PIL warns when it drops a palette's alpha by itself
        image = image.convert("RGBA")
    image = image.convert("RGB")
    image.info = {}  # or EXIF that can be read and not be written would turn it again
    return image


class ImageBatch(BatchFeature):
    """Model inputs in which image tokens are no labels: trainers make and count `labels` before a model sees them."""

    image_token_id = None

    def __setitem__(self, key, value):
        if key == "labels" and torch.is_tensor(value) and self.image_token_id is not None:
            value = value.masked_fill(value == self.image_token_id, -100)
        super().__setitem__(key, value)


class MoExtendProcessor(ProcessorMixin):
    """Image processor, tokenizer and chat template in one; each image token in the text becomes `num_image_tokens`.

    Args:
        image_processor: the encoder's. One that works by torchvision is replaced by its like that works by PIL.
        tokenizer: the base's. The image token is added to it in place as a special token where it is missing; its id
            may then lie past the base's embedding.
        image_token: stands for an image in the text.
        num_image_tokens: features an image gives; `from_encoder` works it out.
        chat_template: default: the tokenizer's, or LLaVA's format where it has none.
    """

    # Causal LMs do not take them, and `generate` refuses what the model does not take.
    unused_input_names = ["token_type_ids"]
    # The package checks a stranger's files here (data/processors.py); what ships comes from the stranger itself.
    reading = staticmethod(lambda name_or_path, **options: contextlib.nullcontext())

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_token: str = IMAGE_TOKEN,
        num_image_tokens: int | None = None,
        chat_template: str | None = None,
    ):
        pil = getattr(transformers, f"{type(image_processor).__name__}Pil", None)  # torchvision makes other pixels
        super().__init__(pil.from_dict(image_processor.to_dict()) if pil else image_processor, tokenizer)
        if not isinstance(num_image_tokens, int) or not 1 <= num_image_tokens <= MAX_IMAGE_TOKENS:
            raise ValueError(
                f"num_image_tokens={num_image_tokens!r} must be the number of features the encoder makes of an image, "
                f"1 to {MAX_IMAGE_TOKENS}. MoExtendProcessor.from_encoder reads it from the encoder's config."
            )
        if not isinstance(image_token, str) or not image_token or not isinstance(chat_template or "", (str, dict)):
            raise ValueError(f"image_token={image_token!r} and chat_template={chat_template!r:.99} must be texts.")
        self.image_token = image_token
        self.num_image_tokens = num_image_tokens
        if image_token not in tokenizer.get_added_vocab():  # not yet a token that text is never split within
            tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.chat_template = chat_template or tokenizer.chat_template
        if not self.chat_template:  # a saved processor has one
            self.chat_template = from_package("data.processors", BUILDING).default_chat_template(image_token)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs) -> Self:
        """As in transformers; no code runs unless the call says `trust_remote_code=True`. `OSError`: no processor;
        `ValueError`: damaged files, links to elsewhere, or more than an image processor and a tokenizer."""
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))  # of `None` transformers asks at a prompt
        with cls.reading(pretrained_model_name_or_path, **kwargs):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_encoder(cls, *args: object, **options: object) -> Self:
        """For an encoder, by its config: `modeling_moextend.data.processors.processor_for`, of the package."""
        return from_package("data.processors", BUILDING).processor_for(cls, *args, **options)

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs) -> BatchFeature:
        """Model inputs: `input_ids`, `attention_mask` [samples, tokens]; of images, `pixel_values` [images, 3, h, w].

        Args:
            images: one image, a list in reading order of the whole batch, or a list for each sample, of PIL images of
                any mode, paths, URLs, base64 text (all turned upright by their EXIF), arrays or tensors.
            text: with one image token for each image; another number, or one that is cut off, is a `ValueError`.
        """
        batch = ImageBatch(super().__call__(images=images, text=text, **kwargs))
        batch.image_token_id = self.image_token_id
        return batch

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs) -> tuple:
        """Images in one list, once each sample's own are as many as its text says."""
        images, text, videos, audio = super().prepare_inputs_layout(images=to_rgb(images), text=text, **kwargs)
        if isinstance(images, (list, tuple)) and images and all(isinstance(own, (list, tuple)) for own in images):
            if text is not None and len(images) != len(text):
                raise ValueError(f"images holds {len(images)} lists, but text has {len(text)} samples: one list each.")
            for index, (own, sample) in enumerate(zip(images, text or (), strict=False)):
                count = str(sample).count(self.image_token)
                if len(own) != count:
                    token = self.image_token
                    raise ValueError(f"Sample {index} has {len(own)} images but {count} {token!r} in its text.")
            images = [image for own in images for image in own]
        none = images is None or (isinstance(images, (list, tuple)) and not images)
        images = None if none else image_utils.make_flat_list_of_images(images)
        given, count = len(images or ()), sum(str(sample).count(self.image_token) for sample in text or ())
        if text is not None and given != count:
            raise ValueError(f"{given} images were given, but text has {count} {self.image_token!r} in all.")
        return images, text, videos, audio

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.num_image_tokens


MoExtendProcessor.register_for_auto_class()
