"""Text and images to model inputs: a tokenizer with an image token, the encoder's image processor, a chat template.

Letters: B samples, S tokens, I images in the batch, P image tokens an image.
"""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from transformers import (
    BaseImageProcessor,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    image_utils,
)
from transformers.tokenization_utils_base import AddedToken
from transformers.utils import PROCESSOR_NAME, cached_file

from .folder_moextend import check_link
from .package_moextend import from_package

IMAGE_TOKEN = "<image>"
BUILDING = "Building a processor"
MAX_IMAGE_TOKENS = 2**16
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
AUDIO = "audio_tokenizer_config.json"


def to_rgb(image):
    """A PIL image of any 8- or 16-bit mode, or the file of one, in RGB and upright by its EXIF. Alpha is dropped, as
    LLaVA does. Anything else is left as it is: arrays, tensors, and URLs and base64 text, which transformers opens."""
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


def by_pil(image_processor):
    """The image processor of the same settings that works by PIL, where transformers has one: torchvision resizes to
    other pixels, and transformers would choose it wherever it is installed."""
    pil = getattr(transformers, f"{type(image_processor).__name__}Pil", None)
    return pil.from_dict(image_processor.to_dict()) if pil else image_processor


class ImageBatch(BatchFeature):
    """Model inputs in which image tokens are no labels: trainers make `labels` of `input_ids`, and count them for the
    mean of the loss, before a model sees them."""

    image_token_id = None

    def __setitem__(self, key, value):
        if key == "labels" and torch.is_tensor(value) and self.image_token_id is not None:
            value = value.masked_fill(value == self.image_token_id, -100)
        super().__setitem__(key, value)


@contextlib.contextmanager
def readable(what):
    """Whatever transformers stumbles over in the block becomes one error, which says that `what` can't be loaded."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        kind, text = OSError if isinstance(error, OSError) else ValueError, f"{type(error).__name__}: {error}"
        text = "".join(filter(str.isprintable, text))
        raise kind(f"{what} can't be loaded: save or fetch its files again. ({text})") from error


def check_files(name_or_path, hub_kwargs):
    """Refuses a processor's files that are links to elsewhere, and those that would have another model loaded."""
    folder = Path(name_or_path, hub_kwargs.get("subfolder") or "")
    for path in [*folder.glob("*"), *folder.glob("*/*.jinja")] if folder.is_dir() else ():
        if path.suffix in (".json", ".jinja", ".model", ".txt"):
            check_link(path, name_or_path)
    for name in (PROCESSOR_NAME, AUDIO):
        path = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        if path is not None and (name == AUDIO or "audio_tokenizer" in json.loads(Path(path).read_text("utf-8"))):
            raise ValueError(f"{path} asks for an audio tokenizer, and this is a processor of text and images.")


def check_merges(name_or_path, hub_kwargs):
    """Refuses a tokenizer.json that the tokenizers library ends the process over, with no error to catch: of merges
    that lack the prefix it names."""
    path = cached_file(name_or_path, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    text = Path(path).read_text("utf-8") if path is not None else ""
    if re.search(r'"continuing_subword_prefix"\s*:\s*"[^"]', text):
        model = json.loads(text)["model"]
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges") or ()]
        if not all(second.startswith(model["continuing_subword_prefix"]) for _, second in merges):
            raise ValueError(f"{path} has merges without its continuing_subword_prefix.")


class MoExtendProcessor(ProcessorMixin):
    """Image processor, tokenizer and chat template in one; each image token in the text becomes `num_image_tokens`.

    Args:
        image_processor: the encoder's. One that works by torchvision is replaced by its like that works by PIL.
        tokenizer: the base's. The image token is added to it in place as a special token where it is missing; its id
            may then lie past the base's embedding.
        image_token: stands for an image in the text.
        num_image_tokens: features an image gives; `from_encoder` works it out.
        chat_template: default: the tokenizer's, or LLaVA's format where it has none.

    Raises:
        ValueError: `num_image_tokens` is missing or no such number; `image_token` or `chat_template` is no text.
    """

    # Causal LMs do not take them, and `generate` refuses what the model does not take.
    unused_input_names = ["token_type_ids"]

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_token: str = IMAGE_TOKEN,
        num_image_tokens: int | None = None,
        chat_template: str | None = None,
    ):
        super().__init__(by_pil(image_processor), tokenizer)
        if not isinstance(num_image_tokens, int) or not 1 <= num_image_tokens <= MAX_IMAGE_TOKENS:
            raise ValueError(
                f"num_image_tokens={num_image_tokens!r} must be the number of features the encoder makes of an image, "
                f"1 to {MAX_IMAGE_TOKENS}. MoExtendProcessor.from_encoder reads it from the encoder's config."
            )
        if not isinstance(image_token, str) or not image_token or not isinstance(chat_template or "", (str, dict)):
            raise ValueError(f"image_token={image_token!r} and chat_template={chat_template!r:.99} must be texts.")
        self.image_token = image_token
        self.num_image_tokens = num_image_tokens
        self.image_token_id = _add_image_token(tokenizer, image_token)
        self.chat_template = chat_template or tokenizer.chat_template
        if not self.chat_template:  # a saved processor has one
            self.chat_template = from_package("data.processors", BUILDING).default_chat_template(image_token)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs) -> Self:
        """As in transformers; no code runs unless the call says `trust_remote_code=True`.

        Raises:
            OSError: no processor there.
            ValueError: damaged files, links to elsewhere, or more than an image processor and a tokenizer.
        """
        name = pretrained_model_name_or_path
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))  # of `None` transformers asks at a prompt
        with readable(f"The processor of {name}"):
            hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if kwargs.get(key)}
            check_files(name, hub_kwargs)
            check_merges(name, hub_kwargs)
            return super().from_pretrained(name, *args, **kwargs)

    @classmethod
    def from_encoder(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        encoder_config: PreTrainedConfig,
        **options,
    ) -> Self:
        """The processor for an encoder, by its config: `modeling_moextend.data.processors.processor_for`."""
        make = from_package("data.processors", BUILDING).processor_for
        return make(cls, tokenizer, image_processor, encoder_config, **options)

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs) -> BatchFeature:
        """Model inputs of B samples: `input_ids`, `attention_mask` [B, S]; with images, `pixel_values` [I, 3, h, w].
        `labels` [B, S] that are put into them leave image tokens out.

        Args:
            images: one image, a list in reading order of the whole batch, or a list of B lists (empty ones for samples
                without images). PIL images of any mode, paths, URLs and base64 text (all turned upright by their
                EXIF), arrays or tensors.
            text: with one image token for each image.

        Raises:
            ValueError: images and image tokens differ in number, in a sample or altogether; or truncation would cut
                image tokens off.
        """
        batch = ImageBatch(super().__call__(images=images, text=text, **kwargs))
        batch.image_token_id = self.image_token_id
        return batch

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs) -> tuple:
        images = _each_to_rgb(images)
        images, text, videos, audio = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        if _is_nested(images):
            if text is not None and len(images) != len(text):
                raise ValueError(f"images holds {len(images)} lists, but text has {len(text)} samples: one list each.")
            images = images if any(images) else None
        elif images is not None:
            no_images = isinstance(images, (list, tuple)) and not images
            images = None if no_images else image_utils.make_flat_list_of_images(images)
        return images, text, videos, audio

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs) -> None:
        if text is not None and all(isinstance(sample, str) for sample in text):
            _check_image_count(images, [sample.count(self.image_token) for sample in text], self.image_token)
        super().validate_inputs(images=images, text=text, **kwargs)

    def _process_images(self, images, **kwargs):
        flat = [image for sample in images for image in sample] if _is_nested(images) else images
        return super()._process_images(flat, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.num_image_tokens


def _add_image_token(tokenizer, image_token):
    """The image token's id; added where it is not yet a token that text is never split within."""
    if image_token not in tokenizer.get_added_vocab():
        tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(image_token)


def _check_image_count(images, placeholders, image_token):
    """`placeholders` [B]: image tokens a sample. `images`: B lists, a flat list, or `None`."""
    if _is_nested(images):
        for index, (sample, count) in enumerate(zip(images, placeholders, strict=True)):
            if len(sample) != count:
                raise ValueError(f"Sample {index} has {len(sample)} images but {count} {image_token!r} in its text.")
    elif images is None and any(placeholders):
        index = next(index for index, count in enumerate(placeholders) if count)
        raise ValueError(f"Sample {index} has 0 images but {placeholders[index]} {image_token!r} in its text.")
    elif images is not None and len(images) != sum(placeholders):
        raise ValueError(
            f"{len(images)} images were given but the text has {sum(placeholders)} {image_token!r} "
            f"(by sample: {placeholders})."
        )


def _each_to_rgb(images):
    return [_each_to_rgb(image) for image in images] if isinstance(images, (list, tuple)) else to_rgb(images)


def _is_nested(images):
    """Whether `images` is a list of lists, one for each sample."""
    return isinstance(images, (list, tuple)) and bool(images) and all(isinstance(s, (list, tuple)) for s in images)


MoExtendProcessor.register_for_auto_class()
