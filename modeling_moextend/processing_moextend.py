"""Text and images to model inputs: a tokenizer with an image token, the encoder's image processor, a chat template.

Letters: B samples, S tokens, I images in the batch, P image tokens an image.
"""

from transformers import ProcessorMixin
from transformers.image_utils import make_flat_list_of_images
from transformers.tokenization_utils_base import AddedToken
from transformers.utils.chat_template_utils import render_jinja_template

from .configuration_moextend import as_config, count_image_tokens

IMAGE_TOKEN = "<image>"

# The assistant's text begins with a space inside the generation markers: the prompt then ends in "ASSISTANT:" in
# training and in generation alike, whichever way the tokenizer merges a space with the word after it.
CHAT_TEMPLATE = (
    "{%- macro content(message) -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}"
    "{%- else -%}{{- raise_exception('Unknown content type: ' ~ part['type']) -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- content(message) ~ ' ' -}}"
    "{%- elif message['role'] == 'user' -%}{{- 'USER: ' ~ content(message) ~ ' ' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- 'ASSISTANT:' -}}{%- generation -%}{{- ' ' ~ content(message) ~ eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- raise_exception('Unknown role: ' ~ message['role']) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)


def default_chat_template(image_token=IMAGE_TOKEN):
    """LLaVA's format, "USER: ... ASSISTANT: ...", with generation markers around the assistant's text and its EOS."""
    return CHAT_TEMPLATE.replace("'<image>'", repr(image_token))


def to_rgb(image):
    """A PIL image of any 8- or 16-bit mode in RGB. Alpha is dropped, as LLaVA does. No PIL image: left as it is."""
    mode = getattr(image, "mode", None)  # a tensor has a method of that name
    if not isinstance(mode, str) or mode == "RGB":
        return image
    if mode in ("I", "F"):
        raise ValueError(f"An image of mode {mode!r} has no fixed range of values: scale it to 8 bits, as mode 'L'.")
    if mode.startswith("I;16"):
        # PIL's own conversion clips at 255, which turns nearly every 16-bit image white.
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    if "transparency" in image.info:  # PIL warns when it drops a palette's alpha by itself
        image = image.convert("RGBA")
    return image.convert("RGB")


class MoExtendProcessor(ProcessorMixin):
    """Image processor, tokenizer and chat template in one; each image token in the text becomes `num_image_tokens`.

    Args:
        image_processor: the encoder's.
        tokenizer: the base's. The image token is added to it in place as a special token where it is missing; its id
            may then lie past the base's embedding.
        image_token (`str`): stands for an image in the text.
        num_image_tokens (`int`): features an image gives; `from_encoder` works it out.
        chat_template (`str`, *optional*): default: the tokenizer's, or `default_chat_template()` where it has none.

    Raises:
        ValueError: `num_image_tokens` is missing, or the chat template cannot render a message with an image.
    """

    # Causal LMs do not take them, and `generate` refuses what the model does not take.
    unused_input_names = ["token_type_ids"]

    def __init__(
        self, image_processor=None, tokenizer=None, image_token=IMAGE_TOKEN, num_image_tokens=None, chat_template=None
    ):
        super().__init__(image_processor, tokenizer)
        if not isinstance(num_image_tokens, int) or num_image_tokens < 1:
            raise ValueError(
                f"num_image_tokens={num_image_tokens!r} must be the number of features the encoder makes of an image, "
                "at least 1. MoExtendProcessor.from_encoder reads it from the encoder's config."
            )
        self.image_token = image_token
        self.num_image_tokens = num_image_tokens
        self.image_token_id = _add_image_token(tokenizer, image_token)
        self.chat_template = chat_template or tokenizer.chat_template or default_chat_template(image_token)
        _check_chat_template(self.chat_template, tokenizer, image_token)

    @classmethod
    def from_encoder(
        cls,
        tokenizer,
        image_processor,
        encoder_config,
        select_feature="patch",
        image_token=IMAGE_TOKEN,
        chat_template=None,
    ):
        """The processor for an encoder: CLIP's or SigLIP's config, or the vision config in it.

        Raises:
            ValueError: the image processor makes images of another size than the encoder takes.
        """
        encoder_config = as_config(encoder_config)
        size = getattr(encoder_config, "vision_config", encoder_config).image_size
        given = _pixel_size(image_processor)
        if given is not None and given != (size, size):
            raise ValueError(
                f"The image processor makes images of {given[0]}x{given[1]} pixels, the encoder takes {size}x{size}. "
                "Load the image processor from the encoder's own checkpoint."
            )
        return cls(
            image_processor,
            tokenizer,
            image_token=image_token,
            num_image_tokens=count_image_tokens(encoder_config, select_feature),
            chat_template=chat_template,
        )

    def __call__(self, images=None, text=None, **kwargs):
        """Model inputs of B samples.

        Args:
            images: one image, a list in reading order of the whole batch, or a list of B lists (empty ones for samples
                without images). PIL images of any mode, arrays, tensors, paths or URLs.
            text (`str` or `list[str]`): with one image token for each image.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` [B, S]; `pixel_values` [I, 3, h, w] in reading order, only
            where there are images.

        Raises:
            ValueError: images and image tokens differ in number, in a sample or altogether; or truncation would cut
                image tokens off.
        """
        return super().__call__(images=images, text=text, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        images, text, videos, audio = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        if _is_nested(images):
            if text is not None and len(images) != len(text):
                raise ValueError(
                    f"images holds {len(images)} lists, but text has {len(text)} samples: give one list each."
                )
            images = [[to_rgb(image) for image in sample] for sample in images]
            images = images if any(images) else None
        elif images is not None:
            no_images = isinstance(images, (list, tuple)) and not images
            images = None if no_images else [to_rgb(image) for image in make_flat_list_of_images(images)]
        return images, text, videos, audio

    def validate_inputs(self, images=None, text=None, **kwargs):
        if text is not None and all(isinstance(sample, str) for sample in text):
            _check_image_count(images, [sample.count(self.image_token) for sample in text], self.image_token)
        super().validate_inputs(images=images, text=text, **kwargs)

    def _process_images(self, images, **kwargs):
        flat = [image for sample in images for image in sample] if _is_nested(images) else images
        return super()._process_images(flat, **kwargs)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        return self.image_token * self.num_image_tokens


def _add_image_token(tokenizer, image_token):
    """The image token's id; added where it is not yet a token that text is never split within."""
    if image_token not in tokenizer.get_added_vocab():
        tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(image_token)


def _check_chat_template(chat_template, tokenizer, image_token):
    """Renders one message with an image: the image token must come out exactly once, and the text beside it."""
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default")
    if chat_template is None:
        return
    probe = "What is this?"
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": probe}]}
    try:
        rendered, _ = render_jinja_template([[message]], chat_template=chat_template, **tokenizer.special_tokens_map)
        problem = f"it gives {rendered[0]!r}"
        fits = rendered[0].count(image_token) == 1 and probe in rendered[0]
    except ImportError:  # no jinja2: everything but chat templates works
        return
    except Exception as error:  # whatever a template from elsewhere stumbles over
        fits, problem = False, f"{type(error).__name__}: {error}"
    if not fits:
        raise ValueError(
            f"The chat template cannot render a message with an image as {image_token!r}: {problem}. Pass "
            "chat_template=with_image_parts(tokenizer.chat_template) to keep the base's format, "
            "chat_template=default_chat_template() for LLaVA's (it also marks the assistant's text for "
            "assistant_only_loss), or a template of your own; a base that has an image token: image_token=."
        )


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


def _is_nested(images):
    """Whether `images` is a list of lists, one for each sample."""
    return isinstance(images, (list, tuple)) and bool(images) and all(isinstance(s, (list, tuple)) for s in images)


def _pixel_size(image_processor):
    """(height, width) of what an image processor makes, or `None` where its settings do not fix it."""
    size = getattr(image_processor, "crop_size" if getattr(image_processor, "do_center_crop", False) else "size", None)
    if size is None or not {"height", "width"} <= set(dict(size)):
        return None
    return size["height"], size["width"]


MoExtendProcessor.register_for_auto_class()
