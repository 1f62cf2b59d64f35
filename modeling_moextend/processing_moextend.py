"""Text, images and audio to model inputs: tokenizer with placeholders, the encoders' processors, chat template."""

import base64
import contextlib
import os
from typing import Any, Self

import torch
import transformers
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    BaseImageProcessor,
    BatchFeature,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SequenceFeatureExtractor,
    audio_utils,
    image_utils,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.tokenization_utils_base import AddedToken
from transformers.utils import import_utils, requires_backends

from .configuration_moextend import shortened
from .package_moextend import from_package

IMAGE_TOKEN, AUDIO_TOKEN = "<image>", "<audio>"
BUILDING, MAX_IMAGE_TOKENS = "Building a processor", 2**16
READS_AUDIO = "audio" if "audio" in import_utils.BACKENDS_MAPPING else "librosa"  # soundfile and soxr; 5.19: librosa
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


def name_of_clip(audio, index):
    """What an error calls clip number `index`: its file too, where it is of one."""
    source = audio.get("path") if isinstance(audio, dict) else audio
    return f"Audio {index}" + (f", {str(source)[:200]!r}," if isinstance(source, (str, os.PathLike)) else "")


def to_waveform(audio, rate, index, longest=None):
    """Clip number `index` as a float32 array [samples] at `rate` a second, of one channel: of a file, URL or base64
    text; of {"array", "sampling_rate"}, or {"bytes"} or {"path"}, as `datasets.Audio` gives it; of its decoder; of an
    array, one channel at `rate`. `ValueError` names the clip, and what is wrong; too much: over `longest` seconds."""
    name = name_of_clip(audio, index)
    try:
        if hasattr(audio, "get_all_samples"):  # torchcodec's decoder
            samples = audio.get_all_samples()
            audio = {"array": samples.data, "sampling_rate": samples.sample_rate}
        if isinstance(audio, dict) and audio.get("array") is None:
            audio = audio.get("path") if audio.get("bytes") is None else base64.b64encode(audio["bytes"]).decode()
        if isinstance(audio, dict):
            wave, given = torch.as_tensor(audio["array"]), int(audio["sampling_rate"])
            wave = wave.double() if wave.is_floating_point() else wave / 32768 if wave.dtype == torch.int16 else None
            if wave is None:
                raise ValueError("whole numbers other than of 16 bits have no fixed range")
            wave = wave.mean(dim=int(len(wave) >= wave.shape[1])) if wave.dim() == 2 else wave  # of its channels
            if given != rate:
                requires_backends(audio_utils.load_audio, [READS_AUDIO])
                wave = audio_utils.soxr.resample(wave.numpy(), given, rate)
            audio = wave
        elif isinstance(audio, (str, os.PathLike)):
            if "." in str(audio) and "://" not in str(audio) and not os.path.exists(audio):  # nor is it base64
                raise FileNotFoundError("there is no such file")
            audio = audio_utils.load_audio(os.fspath(audio), sampling_rate=rate)
        wave = torch.as_tensor(audio)
        if not wave.is_floating_point():
            raise ValueError("whole numbers have no fixed range: divide 16-bit samples by 32768")
        wave = wave.float()
    except Exception as error:  # libraries that decode raise what they like
        raise ValueError(f"{name} can't be read: {type(error).__name__}: {error}") from error
    if wave.dim() != 1 or not len(wave) or not wave.isfinite().all():
        reason = "NaN or infinity in it" if wave.dim() == 1 and len(wave) else f"its samples are {list(wave.shape)}"
        raise ValueError(f"{name} must be one channel of finite samples: {reason}.")
    if longest is not None and len(wave) > longest * rate:
        raise ValueError(
            f"{name} is {len(wave) / rate:.1f} seconds long, and the limit is {longest:g}: cut it, or let the "
            "processor do so (processor.cut_audio = True)."
        )
    return wave.numpy()


class SenseBatch(BatchFeature):
    """Model inputs in which placeholders are no labels: trainers make and count `labels` before a model sees them."""

    placeholder_ids = ()

    def __setitem__(self, key, value):
        for one in self.placeholder_ids if key == "labels" and torch.is_tensor(value) else ():
            value = value.masked_fill(value == one, -100)
        super().__setitem__(key, value)


class MoExtendProcessor(ProcessorMixin):
    """Image processor, feature extractor, tokenizer and chat template in one; each image token in the text becomes
    `num_image_tokens`, each audio token as many as its clip gives.

    Args:
        image_processor: the encoder's. One that works by torchvision is replaced by its like that works by PIL.
        tokenizer: the base's. Image and audio token are added to it in place as special tokens where they are missing;
            their ids may then lie past the base's embedding.
        feature_extractor: of audio, the encoder's; this or an image processor has to be there.
        image_token, audio_token: stand for an image and a clip in the text.
        num_image_tokens, num_audio_tokens: placeholders that an image or clip takes, where their number is fixed;
            `from_encoder` works it out.
        image_convolutions, audio_convolutions: [[kernel, stride, padding], ...], by which it follows from an input's
            length elsewhere: of patches, frames or samples.
        max_audio_seconds: longer clips are a `ValueError`; default: what the feature extractor takes, or 30.
        cut_audio: longer clips are cut instead.
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
        feature_extractor: SequenceFeatureExtractor | None = None,
        image_token: str = IMAGE_TOKEN,
        num_image_tokens: int | None = None,
        chat_template: str | None = None,
        audio_token: str = AUDIO_TOKEN,
        num_audio_tokens: int | None = None,
        image_convolutions: list | None = None,
        audio_convolutions: list | None = None,
        max_audio_seconds: float | None = None,
        cut_audio: bool = False,
    ):
        pil = getattr(transformers, f"{type(image_processor).__name__}Pil", None)  # torchvision makes other pixels
        image_processor = pil.from_dict(image_processor.to_dict()) if pil else image_processor
        super().__init__(image_processor, tokenizer, feature_extractor)
        self.image_processor, self.feature_extractor = image_processor, feature_extractor  # one may be none
        counts = {"image": (num_image_tokens, image_convolutions), "audio": (num_audio_tokens, audio_convolutions)}
        for modality, part in (("image", image_processor or not feature_extractor), ("audio", feature_extractor)):
            number, convolutions = counts[modality]
            if part and convolutions is None and (type(number) is not int or not 1 <= number <= MAX_IMAGE_TOKENS):
                raise ValueError(
                    f"num_{modality}_tokens={number!r} must be the number of features the encoder makes of an input, "
                    f"1 to {MAX_IMAGE_TOKENS}. MoExtendProcessor.from_encoder reads it from the encoder's config."
                )
            if not is_convolutions(convolutions):
                raise ValueError(
                    f"{modality}_convolutions={convolutions!r:.99} must be [[kernel, stride, padding], ...]."
                )
        if not isinstance(image_token, str) or not image_token or not isinstance(chat_template or "", (str, dict)):
            raise ValueError(f"image_token={image_token!r} and chat_template={chat_template!r:.99} must be texts.")
        longest = 1 if max_audio_seconds is None else max_audio_seconds
        if not isinstance(audio_token, str) or not audio_token or type(longest) not in (int, float):
            raise ValueError(f"audio_token={audio_token!r} must be a text, max_audio_seconds a number.")
        if not 0 < longest < 1e6:
            raise ValueError(f"max_audio_seconds={max_audio_seconds!r} must be a number of seconds above 0.")
        self.num_image_tokens, self.num_audio_tokens = num_image_tokens, num_audio_tokens
        self.image_convolutions, self.audio_convolutions = image_convolutions, audio_convolutions
        self.max_audio_seconds, self.cut_audio = max_audio_seconds, cut_audio
        self.image_token = image_token if image_processor else None
        self.audio_token = audio_token if feature_extractor else None
        for token in filter(None, (self.image_token, self.audio_token)):
            if token not in tokenizer.get_added_vocab():  # not yet a token that text is never split within
                tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
        self.image_token_id, self.audio_token_id = (
            None if token is None else tokenizer.convert_tokens_to_ids(token)
            for token in (self.image_token, self.audio_token)
        )
        self.chat_template = chat_template or tokenizer.chat_template
        if not self.chat_template:  # a saved processor has one
            processors = from_package("data.processors", BUILDING)
            self.chat_template = processors.default_chat_template(self.image_token, self.audio_token)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs) -> Self:
        """As in transformers; no code runs unless the call says `trust_remote_code=True`. `OSError`: no processor;
        `ValueError`: damaged files, links to elsewhere, or more parts than the three that `__init__` takes."""
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))  # of `None` transformers asks at a prompt
        with cls.reading(pretrained_model_name_or_path, **kwargs):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_encoder(cls, *args: object, **options: object) -> Self:
        """For an encoder, by its config: `modeling_moextend.data.processors.processor_for`, of the package."""
        return from_package("data.processors", BUILDING).processor_for(cls, *args, **options)

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> object:
        """As in transformers; image processor or feature extractor may be `None`."""
        return argument and super().check_argument_for_proper_class(argument_name, argument)

    @classmethod
    def _get_arguments_from_pretrained(cls, name_or_path, processor_dict=None, **kwargs):
        """Of image processor and feature extractor the one that is stored, or both, and the tokenizer."""
        stored, subfolder = (processor_dict or {}).keys(), {"subfolder": kwargs.pop("subfolder", "")}
        parts = [None, cls._load_tokenizer_from_pretrained("tokenizer", name_or_path, **subfolder, **kwargs), None]
        if "image_processor" in stored or "feature_extractor" not in stored:
            parts[0] = AutoImageProcessor.from_pretrained(name_or_path, **subfolder, **kwargs)
        if "feature_extractor" in stored:
            parts[2] = AutoFeatureExtractor.from_pretrained(name_or_path, **subfolder, **kwargs)
        return parts

    def to_dict(self) -> dict:
        """As in transformers, without what is not there: as in files of earlier versions, where there is no audio."""
        return {name: value for name, value in super().to_dict().items() if value is not None and value is not False}

    def save_pretrained(self, save_directory: str | os.PathLike, *args: object, **kwargs: object) -> list[str]:
        """As in transformers, which saves each part."""
        self.get_attributes = lambda: [name for name in type(self).get_attributes() if getattr(self, name) is not None]
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            del self.get_attributes

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, audio: Any = None, **kwargs
    ) -> BatchFeature:
        """Model inputs: `input_ids`, `attention_mask` [samples, tokens]; of images, `pixel_values` [images, 3, h, w];
        of audio, `input_features` [clips, ...] and `input_features_mask` [clips, frames or samples].

        Args:
            images: one image, a list in reading order of the whole batch, or a list for each sample, of PIL images of
                any mode, paths, URLs, base64 text (all turned upright by their EXIF), arrays or tensors.
            audio: one clip, a list in reading order of the whole batch, or a list for each sample: see `to_waveform`.
            text: with one image or audio token for each; another number, or one that is cut off, is a `ValueError`.
        """
        batch = SenseBatch(super().__call__(images=images, text=text, audio=audio, **kwargs))
        batch.placeholder_ids = [one for one in (self.image_token_id, self.audio_token_id) if one is not None]
        return batch

    def apply_chat_template(self, conversation: list, *args: object, **kwargs: object) -> Any:
        """As in transformers; parts {"type": "audio"} have "audio", "path" or "url", all that `to_waveform` takes."""
        rate, number = getattr(self.feature_extractor, "sampling_rate", None), 0
        longest = None if self.cut_audio or not rate else self.longest_audio

        def with_waveforms(value):
            nonlocal number
            if isinstance(value, (list, tuple)):
                return [with_waveforms(one) for one in value]
            if not isinstance(value, dict):
                return value
            if value.get("type") == "audio":
                given = next((value[key] for key in ("audio", "path", "url") if value.get(key) is not None), None)
                number += 1
                heard = {} if given is None else {"audio": to_waveform(given, rate, number - 1, longest)}
                return {"type": "audio", **heard}
            return {**value, "content": with_waveforms(value["content"])} if "content" in value else value

        return super().apply_chat_template(with_waveforms(conversation) if rate else conversation, *args, **kwargs)

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, audio: Any = None, **kwargs) -> tuple:
        """Images and clips in one list each, once each sample's own are as many as its text says."""
        for name, given, part in (("images", images, self.image_processor), ("audio", audio, self.feature_extractor)):
            if given is not None and part is None:
                raise ValueError(f"{name} was given, and this processor is of an adapter that has no encoder for it.")
        images, text, videos, _ = super().prepare_inputs_layout(images=to_rgb(images), text=text, **kwargs)
        images = one_list("images", images, self.image_token, text)
        if isinstance(audio, (list, tuple)) and not isinstance(audio[:1] and audio[0], float):
            audio = one_list("clips", audio, self.audio_token, text)
        elif audio is not None:
            audio = [audio]
        none = images is None or (isinstance(images, (list, tuple)) and not images)
        images = None if none else image_utils.make_flat_list_of_images(images)
        given, token = len(images or ()), self.image_token
        count = 0 if token is None else sum(str(sample).count(token) for sample in text or ())
        if text is not None and given != count:
            raise ValueError(f"{given} images were given, but text has {count} {self.image_token!r} in all.")
        return images, text, videos, audio or None

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        if self.image_convolutions is None:
            return self.image_token * self.num_image_tokens
        length = int(image_inputs["pixel_attention_mask"][image_idx].sum())
        return self.image_token * shortened(length, self.image_convolutions)

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs) -> str:
        if self.audio_convolutions is None:
            return self.audio_token * self.num_audio_tokens
        length = int(audio_inputs["input_features_mask"][audio_idx].sum())
        return self.audio_token * shortened(length, self.audio_convolutions)

    def _process_audio(self, audio, **kwargs):
        """Clips through the feature extractor, padded as it pads, and which of their frames or samples are real."""
        extractor, limit = self.feature_extractor, self.longest_audio
        if kwargs.get("sampling_rate") not in (None, extractor.sampling_rate):
            raise ValueError(
                f"sampling_rate={kwargs['sampling_rate']}: bare arrays must be at {extractor.sampling_rate} Hz. Give "
                '{"array": ..., "sampling_rate": ...}, which is resampled.'
            )
        rate, longest = extractor.sampling_rate, None if self.cut_audio else limit
        waves = [to_waveform(clip, rate, index, longest)[: int(limit * rate)] for index, clip in enumerate(audio)]
        options = {"sampling_rate": rate, "return_tensors": "pt", "return_attention_mask": True}
        fixed = hasattr(extractor, "chunk_length") or self.audio_convolutions is None  # pads to a length of its own
        inputs = extractor(waves, **options) if fixed else extractor(waves, padding=True, **options)
        mask = inputs.get("attention_mask")
        processed = {"input_features": inputs[extractor.model_input_names[0]]}
        if self.audio_convolutions is not None:
            processed["input_features_mask"] = mask
            for index, length in enumerate(mask.sum(dim=1).tolist()):
                if shortened(length, self.audio_convolutions) < 1:
                    name, seconds = name_of_clip(audio[index], index), len(waves[index]) / rate
                    raise ValueError(f"{name} is too short: {seconds:.3f} seconds give no feature.")
        return processed, [self.replace_audio_token(processed, index) for index in range(len(waves))]

    @property
    def longest_audio(self) -> float:
        """Seconds of the longest clip: as given; or what the feature extractor takes; or 30."""
        extractor = self.feature_extractor
        own = getattr(extractor, "chunk_length", None) or (getattr(extractor, "max_length", None) or 3000) / 100
        fixed = hasattr(extractor, "chunk_length") or self.audio_convolutions is None  # it would cut what is longer
        return min(self.max_audio_seconds or own, own) if fixed else self.max_audio_seconds or own


def is_convolutions(value):
    """Whether `value` is `None`, or [[kernel, stride, padding], ...] as no file can make it harmful."""
    triples = value if isinstance(value, list) and len(value) <= 64 else [None]
    return value is None or all(
        isinstance(one, list)
        and len(one) == 3
        and all(type(n) is int and 0 <= n < 2**16 for n in one)
        and one[1] > 0
        and one[2] < max(one[0], 1)  # else a step would make more than it got
        for one in triples
    )


def one_list(name, inputs, token, text):
    """`inputs` in one list: as they are, or a list for each sample of `text`, whose number must be that of `token`."""
    nested = isinstance(inputs, (list, tuple)) and inputs and all(isinstance(own, (list, tuple)) for own in inputs)
    if not nested:
        return inputs
    if text is not None and len(inputs) != len(text):
        raise ValueError(f"{name} holds {len(inputs)} lists, but text has {len(text)} samples: one list each.")
    for index, (own, sample) in enumerate(zip(inputs, text or (), strict=False)):
        count = str(sample).count(token)
        if len(own) != count:
            raise ValueError(f"Sample {index} has {len(own)} {name} but {count} {token!r} in its text.")
    return [one for own in inputs for one in own]


MoExtendProcessor.register_for_auto_class()
