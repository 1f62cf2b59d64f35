"""What a trainer reads text and images with: the processor for a base, with or without an encoder."""

import os
import re

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.utils import logging

from ..processing_moextend import IMAGE_TOKEN, MoExtendProcessor, default_chat_template

logger = logging.get_logger(__name__)

# Rewrites `messages` before the template that follows sees them. It ends in an expression, because Jinja would drop a
# newline after a block, and with it the first newline of that template.
_JOIN_PARTS = (
    "{%- set joined = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is defined and message['content'] is not string and message['content'] is iterable -%}"
    "{%- set parts = namespace(text='') -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set parts.text = parts.text ~ '<image>' -%}"
    "{%- elif part['type'] == 'text' -%}{%- set parts.text = parts.text ~ part['text'] -%}"
    "{%- else -%}{{- raise_exception('Unknown content type: ' ~ part['type']) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set joined.messages = joined.messages + [dict(message, content=parts.text)] -%}"
    "{%- else -%}{%- set joined.messages = joined.messages + [message] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = joined.messages -%}"
    "{{- '' }}"
)


def with_image_parts(chat_template, image_token=IMAGE_TOKEN):
    """A base's own chat template, which knows text only, made to take content parts.

    Each message's parts are joined to one string, with `image_token` where an image stands, before `chat_template` is
    rendered: plain text gives exactly what it gave before. Generation markers are not added.
    """
    return _JOIN_PARTS.replace("'<image>'", repr(image_token)) + chat_template


def load_processor(name_or_path, encoder=None, assistant_only_loss=False):
    """What a trainer needs for a base, with or without an encoder; or what an adapter's folder holds.

    Args:
        name_or_path: the base, or an adapter saved with its processor.
        encoder: CLIP or SigLIP vision checkpoint; `None`: the tokenizer alone.
        assistant_only_loss: whether the chat template must mark the assistant's text. A base's own that does not gives
            way to LLaVA's format, and this is said; else the base's own is kept.

    Returns:
        `MoExtendProcessor`, or the base's tokenizer.
    """
    if os.path.exists(os.path.join(name_or_path, "processor_config.json")):
        return MoExtendProcessor.from_pretrained(name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if encoder is None:
        return tokenizer
    template = tokenizer.chat_template
    if template and assistant_only_loss and not re.search(r"{%-?\s*generation\s*-?%}", template):
        logger.warning("The base's chat template does not mark the assistant's text: using LLaVA's, USER: ASSISTANT:.")
        template = default_chat_template()
    elif template and "image" not in template:
        template = with_image_parts(template)
    image_processor = AutoImageProcessor.from_pretrained(encoder, backend="pil")
    encoder_config = AutoConfig.from_pretrained(encoder)
    return MoExtendProcessor.from_encoder(tokenizer, image_processor, encoder_config, chat_template=template)
