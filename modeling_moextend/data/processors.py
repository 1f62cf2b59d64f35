"""What a trainer reads text, images and audio with: the processor for a base, with or without encoders."""

import os
import re
from typing import Any

import numpy
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SequenceFeatureExtractor,
)
from transformers.utils import logging

from ..configuration_moextend import MODALITIES, MoExtendConfig, as_config
from ..loading_moextend import by_modality
from ..processing_moextend import AUDIO_TOKEN, IMAGE_TOKEN, MoExtendProcessor
from .processor_files import check_merges, checked_files, readable

logger = logging.get_logger(__name__)
MoExtendProcessor.reading = staticmethod(checked_files)  # where the package is there, a stranger's files are checked

TOKENS = {"image": IMAGE_TOKEN, "audio": AUDIO_TOKEN}
COUNTED = (  # entries of a config that say how many placeholders an input takes
    "encoder_select_feature",
    "projector_downsample",
    "audio_encoder_select_feature",
    "audio_projector_downsample",
)
GENERATION = re.compile(r"{%[-+]?\s*(?:end)?generation\s*[-+]?%}")

# The assistant's text begins with a space inside the generation markers: the prompt then ends in "ASSISTANT:" in
# training and in generation alike, whichever way the tokenizer merges a space with the word after it.
CHAT_TEMPLATE = (
    "{%- macro content(message) -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
    "<parts>"
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
    "{%- if part['type'] == 'text' -%}{%- set parts.text = parts.text ~ part['text'] -%}"
    "<parts>"
    "{%- else -%}{{- raise_exception('Unknown content type: ' ~ part['type']) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set joined.messages = joined.messages + [dict(message, content=parts.text)] -%}"
    "{%- else -%}{%- set joined.messages = joined.messages + [message] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = joined.messages -%}"
    "{{- '' }}"
)


def default_chat_template(image_token: str | None = IMAGE_TOKEN, audio_token: str | None = None) -> str:
    """LLaVA's format, "USER: ... ASSISTANT: ...", with generation markers around the assistant's text and its EOS.

    Args:
        image_token, audio_token: what stands for such parts; `None`: there are none.
    """
    return with_parts(CHAT_TEMPLATE, "{{- %r -}}", image_token, audio_token)


def with_image_parts(chat_template: str, image_token: str | None = IMAGE_TOKEN, audio_token: str | None = None) -> str:
    """A base's own chat template, which knows text only, made to take content parts.

    Each message's parts are joined to one string, with `image_token` where an image stands and `audio_token` where
    audio does (`None`: there is none), before `chat_template` is rendered: plain text gives exactly what it gave
    before. Generation markers are not added.
    """
    return (
        with_parts(JOIN_PARTS, "{%%- set parts.text = parts.text ~ %r -%%}", image_token, audio_token) + chat_template
    )


def with_parts(template: str, branch: str, image_token: str | None, audio_token: str | None) -> str:
    """`template` with a `branch` for each kind of part that has a token."""
    tokens = {"image": image_token, "audio": audio_token}
    branches = [f"{{%- elif part['type'] == '{m}' -%}}{branch % one}" for m, one in tokens.items() if one is not None]
    return template.replace("<parts>", "".join(branches))


def load_processor(
    name_or_path: str | os.PathLike,
    encoder: str | os.PathLike | list[str | os.PathLike] | None = None,
    assistant_only_loss: bool = False,
    trust_remote_code: bool = False,
    **senses: Any,
) -> MoExtendProcessor | PreTrainedTokenizerBase:
    """What a trainer needs for a base, with or without an encoder; or what an adapter's folder holds.

    Args:
        name_or_path: the base, or an adapter saved with its processor.
        encoder: checkpoint of an encoder, or a list of them; `None`: the tokenizer alone.
        assistant_only_loss: whether the chat template must mark the assistant's text. A base's own that does not gives
            way to LLaVA's format, with a warning, unless TRL knows how to mark it (text only); else the base's own
            stays. A base without one gets LLaVA's, with an encoder in any case.
        trust_remote_code: whether code that comes with the tokenizer may run; nothing asks for it at a prompt.
        **senses: entries of the model's config that say how many placeholders an input takes, where they are not the
            defaults: those of `COUNTED`.

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
        template = None if encoder else default_chat_template()
        if encoder is None:
            tokenizer.chat_template = template
    if encoder is None:
        return tokenizer
    with readable(f"The image processor of {encoder}"):  # what is there tells what it is
        found = by_modality(encoder, list(MODALITIES))
    parts, configs = {}, {m: PreTrainedConfig.get_config_dict(where)[0] for m, where in found.items()}
    tokens = [token if modality in found else None for modality, token in TOKENS.items()]
    if template is None:
        template = default_chat_template(*tokens)
    elif not all(modality in template for modality in found):
        template = with_image_parts(template, *tokens)
    if "image" in found:
        with readable(f"The image processor of {found['image']}"):  # CLIP's, say, which has no code of its own
            parts["image_processor"] = AutoImageProcessor.from_pretrained(
                found["image"], backend="pil", trust_remote_code=False
            )
    if "audio" in found:
        with readable(f"The feature extractor of {found['audio']}"):
            parts["feature_extractor"] = AutoFeatureExtractor.from_pretrained(found["audio"], trust_remote_code=False)
    return MoExtendProcessor.from_encoder(
        tokenizer,
        parts.get("image_processor"),
        configs.get("image"),
        chat_template=template,
        feature_extractor=parts.get("feature_extractor"),
        audio_encoder_config=configs.get("audio"),
        select_feature=senses.pop("encoder_select_feature", "patch"),
        **senses,
    )


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
    image_processor: BaseImageProcessor | None = None,
    encoder_config: PreTrainedConfig | dict[str, Any] | None = None,
    select_feature: str = "patch",
    image_token: str = IMAGE_TOKEN,
    chat_template: str | None = None,
    *,
    feature_extractor: SequenceFeatureExtractor | None = None,
    audio_encoder_config: PreTrainedConfig | dict[str, Any] | None = None,
    audio_token: str = AUDIO_TOKEN,
    max_audio_seconds: float | None = None,
    **senses: Any,
) -> MoExtendProcessor:
    """The processor for an encoder, or for one of images and one of audio, an instance of `cls`.

    Args:
        encoder_config: of images, or the config of a whole model that has it.
        select_feature: "patch", or "full": with class tokens.
        chat_template: default: the tokenizer's, or `default_chat_template()` where it has none.
        feature_extractor, audio_encoder_config: of audio.
        max_audio_seconds: see `MoExtendProcessor`.
        **senses: entries of the config that change how many placeholders an input takes, where they are not the
            defaults: `projector_downsample`, `audio_projector_downsample`, `audio_encoder_select_feature`.

    Raises:
        ValueError: the image processor or feature extractor makes inputs of another shape than the encoder takes, or
            the chat template cannot render a message with an image or audio.
    """
    encoder_config, audio_encoder_config = as_config(encoder_config), as_config(audio_encoder_config)
    encoder_config = getattr(encoder_config, "vision_config", encoder_config)
    config = MoExtendConfig(
        encoder_config=encoder_config,
        audio_encoder_config=audio_encoder_config,
        encoder_select_feature=select_feature,
        **senses,
    )
    entries = {}
    for modality, sense in config.senses.items():
        if sense.convolutions is not None:
            size = sense.projector_downsample
            whole = [[size, size, size - 1]] if size > 1 else []
            entries[f"{modality}_convolutions"] = [*sense.convolutions, *whole]
        else:
            size = image_size(image_processor, sense) if modality == "image" else None
            entries[f"num_{modality}_tokens"] = sense.num_placeholders(size)
        if modality == "audio" and feature_extractor is not None:
            check_extractor(feature_extractor, sense)
    processor = cls(
        image_processor,
        tokenizer,
        feature_extractor,
        image_token=image_token,
        audio_token=audio_token,
        max_audio_seconds=max_audio_seconds,
        chat_template=chat_template,
        **entries,
    )
    for kind, token in (("an image", processor.image_token), ("audio", processor.audio_token)):
        if token is not None:
            check_chat_template(processor.chat_template, tokenizer, token, kind)
    return processor


def image_size(image_processor: BaseImageProcessor, sense: Any) -> tuple[int, int]:
    """(height, width) of the images that the processor makes for an encoder.

    Raises:
        ValueError: another size than the encoder takes.
    """
    size, made = tuple(sense.input_shape[-2:]), pixel_size(image_processor)
    if made is None:
        return size
    if "dino" in sense.encoder_config.model_type:  # takes any size in whole patches
        return made
    if made != size:
        raise ValueError(
            f"The image processor makes images of {made[0]}x{made[1]} pixels, the encoder takes "
            f"{size[0]}x{size[1]}. Load the image processor from the encoder's own checkpoint."
        )
    return size


def check_extractor(feature_extractor: SequenceFeatureExtractor, sense: Any) -> None:
    """Refuses a feature extractor that makes of a clip, by a try of it on silence, what the encoder does not take.

    Raises:
        ValueError: names both shapes.
    """
    rate, shape = feature_extractor.sampling_rate, sense.input_shape
    features = feature_extractor([numpy.zeros(rate, dtype=numpy.float32)], sampling_rate=rate, return_tensors="np")
    made = list(features[feature_extractor.model_input_names[0]].shape[1:])
    if made != (shape or [rate]):
        raise ValueError(
            f"The feature extractor makes {made} of a second of audio, the encoder takes {shape or '[samples]'}. Load "
            "the feature extractor from the encoder's own checkpoint."
        )


def check_chat_template(
    chat_template: str | dict[str, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    image_token: str,
    kind: str = "an image",
) -> None:
    """Refuses a chat template that never writes the image token, or that of another `kind` of part. It is
    not run: a stranger's need not come to an end.

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
        key = "audio_token" if kind == "audio" else "image_token"
        given = f", {key}={image_token!r}" if kind == "audio" else ""
        raise ValueError(
            f"The chat template cannot render a message with {kind} as {image_token!r}: {problem}. Pass "
            f"chat_template=with_image_parts(tokenizer.chat_template{given}) to keep the base's format, "
            f"chat_template=default_chat_template({given.removeprefix(', ')}) for LLaVA's (it also marks the "
            "assistant's text for assistant_only_loss), or a template of your own; a base that has such a token: "
            f"{key}=."
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
