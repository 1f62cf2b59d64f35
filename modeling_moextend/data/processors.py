"""What a trainer reads text and images with: the processor for a base, with or without an encoder."""

import os
import re
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import logging

from ..configuration_moextend import MoExtendConfig, as_config
from ..processing_moextend import IMAGE_TOKEN, MoExtendProcessor
from .processor_files import check_merges, checked_files, readable

logger = logging.get_logger(__name__)
MoExtendProcessor.reading = staticmethod(checked_files)  # where the package is there, a stranger's files are checked

GENERATION = re.compile(r"{%[-+]?\s*(?:end)?generation\s*[-+]?%}")

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

# Rewrites `messages` before the template that follows sees them. It ends in an expression, because Jinja would drop a
# newline after a block, and with it the first newline of that template.
JOIN_PARTS = (
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


def default_chat_template(image_token: str = IMAGE_TOKEN) -> str:
    """LLaVA's format, "USER: ... ASSISTANT: ...", with generation markers around the assistant's text and its EOS."""
    return CHAT_TEMPLATE.replace("'<image>'", repr(image_token))


def with_image_parts(chat_template: str, image_token: str = IMAGE_TOKEN) -> str:
    """A base's own chat template, which knows text only, made to take content parts.

    Each message's parts are joined to one string, with `image_token` where an image stands, before `chat_template` is
    rendered: plain text gives exactly what it gave before. Generation markers are not added.
    """
    return JOIN_PARTS.replace("'<image>'", repr(image_token)) + chat_template


def load_processor(
    name_or_path: str | os.PathLike,
    encoder: str | os.PathLike | None = None,
    assistant_only_loss: bool = False,
    trust_remote_code: bool = False,
) -> MoExtendProcessor | PreTrainedTokenizerBase:
    """What a trainer needs for a base, with or without an encoder; or what an adapter's folder holds.

    Args:
        name_or_path: the base, or an adapter saved with its processor.
        encoder: CLIP or SigLIP vision checkpoint; `None`: the tokenizer alone.
        assistant_only_loss: whether the chat template must mark the assistant's text. A base's own that does not gives
            way to LLaVA's format, with a warning, unless TRL knows how to mark it (text only); else the base's own
            stays. A base without one gets LLaVA's, with an encoder in any case.
        trust_remote_code: whether code that comes with the tokenizer may run; nothing asks for it at a prompt.

    Returns:
        `MoExtendProcessor`, or the base's tokenizer.

    Raises:
        OSError: no such files there.
        ValueError: damaged ones; or a tokenizer with code of its own.
    """
    if os.path.exists(os.path.join(name_or_path, "processor_config.json")):
        return MoExtendProcessor.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    with readable(f"The tokenizer of {name_or_path}"):
        check_merges(name_or_path, {})
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=bool(trust_remote_code))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    marked = template and re.search(r"{%-?\s*generation\s*-?%}", template)
    if assistant_only_loss and not marked and not (encoder is None and trl_marks(template)):
        if template:
            problem = "The base's chat template does not mark the assistant's text"
            logger.warning(f"{problem}: using LLaVA's, USER: ASSISTANT:.")
        template = default_chat_template()
        if encoder is None:
            tokenizer.chat_template = template
    if encoder is None:
        return tokenizer
    if template and "image" not in template:
        template = with_image_parts(template)
    with readable(f"The image processor of {encoder}"):  # CLIP's or SigLIP's, which have no code of their own
        image_processor = AutoImageProcessor.from_pretrained(encoder, backend="pil", trust_remote_code=False)
        encoder_config, _ = PreTrainedConfig.get_config_dict(encoder)
    return MoExtendProcessor.from_encoder(tokenizer, image_processor, encoder_config, chat_template=template)


def trl_marks(chat_template: object) -> bool:
    """Whether TRL has this chat template with the assistant's text marked, which it then trains with. It is looked up
    as text: TRL's own function runs a template that it does not know, and a stranger's need not come to an end."""
    from trl import chat_template_utils as known

    trained = [name for name in vars(known) if name.endswith("_training_chat_template")]
    return chat_template in [getattr(known, name.replace("_training", ""), None) for name in trained if chat_template]


def text_tokenizer(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer, of a processor as well."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def processor_for(
    cls: type[MoExtendProcessor],
    tokenizer: PreTrainedTokenizerBase,
    image_processor: BaseImageProcessor,
    encoder_config: PreTrainedConfig | dict[str, Any],
    select_feature: str = "patch",
    image_token: str = IMAGE_TOKEN,
    chat_template: str | None = None,
) -> MoExtendProcessor:
    """The processor for an encoder, an instance of `cls`.

    Args:
        encoder_config: CLIP's or SigLIP's config, or the vision config in it.
        select_feature: "patch", or "full": with the class token.
        chat_template: default: the tokenizer's, or `default_chat_template()` where it has none.

    Raises:
        ValueError: the image processor makes images of another size than the encoder takes, or the chat template
            cannot render a message with an image.
    """
    encoder_config = as_config(encoder_config)
    encoder_config = getattr(encoder_config, "vision_config", encoder_config)
    encoder_size = encoder_config.image_size
    processor_size = pixel_size(image_processor)
    if processor_size is not None and processor_size != (encoder_size, encoder_size):
        raise ValueError(
            f"The image processor makes images of {processor_size[0]}x{processor_size[1]} pixels, the encoder takes "
            f"{encoder_size}x{encoder_size}. Load the image processor from the encoder's own checkpoint."
        )
    processor = cls(
        image_processor,
        tokenizer,
        image_token=image_token,
        num_image_tokens=MoExtendConfig(
            encoder_config=encoder_config, encoder_select_feature=select_feature
        ).num_image_tokens,
        chat_template=chat_template,
    )
    check_chat_template(processor.chat_template, tokenizer, image_token)
    return processor


def check_chat_template(
    chat_template: str | dict[str, str] | None, tokenizer: PreTrainedTokenizerBase, image_token: str
) -> None:
    """Refuses a chat template that never writes the image token. It is not run: a stranger's need not come to an end.

    Raises:
        ValueError: says what else to pass.
    """
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default")
    if chat_template is None:
        return
    try:
        texts = written_texts(chat_template, tokenizer.special_tokens_map)
        fits, problem = any(image_token in text for text in texts), "it never writes it"
    except ImportError:  # no jinja2: everything but chat templates works
        return
    except Exception as error:  # whatever a template from elsewhere makes the parser stumble over
        fits, problem = False, f"{type(error).__name__}: {error}"
    if not fits:
        raise ValueError(
            f"The chat template cannot render a message with an image as {image_token!r}: {problem}. Pass "
            "chat_template=with_image_parts(tokenizer.chat_template) to keep the base's format, "
            "chat_template=default_chat_template() for LLaVA's (it also marks the assistant's text for "
            "assistant_only_loss), or a template of your own; a base that has an image token: image_token=."
        )


def written_texts(chat_template: str, special_tokens: dict[str, str]) -> list[str]:
    """Texts that stand in a chat template, and special tokens that it names: it is parsed, and nothing of it runs.

    Args:
        special_tokens: name of a variable -> token.

    Raises:
        Exception: jinja2 can't parse it.
    """
    from jinja2 import Environment, nodes

    plain = GENERATION.sub("", chat_template)  # a tag of transformers' own
    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return texts + [special_tokens.get(node.name, "") for node in tree.find_all(nodes.Name)]


def pixel_size(image_processor: BaseImageProcessor) -> tuple[int, int] | None:
    """(height, width) of what an image processor makes, or `None` where its settings do not fix it."""
    size = getattr(image_processor, "crop_size" if getattr(image_processor, "do_center_crop", False) else "size", None)
    if size is None or not {"height", "width"} <= set(dict(size)):
        return None
    return size["height"], size["width"]
