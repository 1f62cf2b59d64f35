"""A conversation with a base and its adapters, of which any may be on or off."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TextStreamer

from ..data.processors import text_tokenizer
from ..data.tokens import KnownTokens
from ..evaluation.compare import encode, generation_ends
from ..evaluation.token_view import TokenUse, token_view
from ..modeling_moextend import MoExtendForCausalLM
from ..tools.modes import evaluation_mode


class Chat:
    """Messages with images and audio, answers as they come, and which tokens of the last one used new experts.

    Attributes:
        messages: what was said, [{"role", "content"}].
        images, audio: of all of them, in reading order: paths, PIL images, or what a processor takes as a clip.
        tokens: of the last answer, `TokenUse` each; `[]` before the first.
    """

    def __init__(
        self,
        model: MoExtendForCausalLM,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ):
        if getattr(processor, "chat_template", None) is None:
            raise ValueError("This adapter's tokenizer has no chat template, so there is no way to talk to it.")
        self.model, self.processor = model, processor
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.known = KnownTokens(model, processor)
        self.clear()

    def clear(self) -> None:
        """Forgets what was said."""
        self.messages, self.images, self.audio, self.tokens = [], [], [], []

    def ask(
        self,
        text: str,
        images: Sequence[Any] = (),
        audio: Sequence[Any] = (),
        write: Callable[[str], None] | None = None,
    ) -> str:
        """The answer to `text`, which becomes part of the conversation.

        Args:
            images: paths or PIL images that `text` is about.
            audio: clips that it is about: paths, or what else the processor takes.
            write: called with each new piece of the answer as it comes.

        Raises:
            ValueError: images or audio that no adapter takes that is on, or a clip that can't be read.
            OSError: an image can't be read. Either way the conversation stays as it was.
        """
        marks = ""
        for modality, given in (("image", images), ("audio", audio)):
            if given:
                self.check_sense(modality)
                marks += getattr(self.processor, f"{modality}_token") * len(given)
        content = f"{marks}\n" * bool(marks) + text
        messages = [*self.messages, {"role": "user", "content": content}]
        all_images, all_audio = [*self.images, *images], [*self.audio, *audio]
        prompt = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = encode(self.processor, [prompt], [all_images], [all_audio])
        self.known.check(inputs["input_ids"][0].tolist(), "The conversation")
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        output = self.generate(inputs, write)
        start = inputs["input_ids"].shape[1]
        answer = text_tokenizer(self.processor).decode(output[0, start:], skip_special_tokens=True).strip()
        others = {name: inputs[name] for name in inputs if name not in ("input_ids", "attention_mask")}
        tokens = token_view(self.model, self.processor, output, **others)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.images, self.audio = all_images, all_audio
        self.tokens = tokens[-(output.shape[1] - start) :] if output.shape[1] > start else []
        return answer

    def check_sense(self, modality: str) -> None:
        """Refuses an "image" or "audio" where no adapter that is on takes it.

        Raises:
            ValueError: says what is missing.
        """
        if modality not in self.model.senses or getattr(self.processor, f"{modality}_token", None) is None:
            reason = {"image": "an image: it can't see", "audio": "audio: it can't hear"}[modality]
            raise ValueError(f"The adapter that is on has no encoder for {reason}.")

    @torch.inference_mode()
    def generate(self, inputs: dict[str, torch.Tensor], write: Callable[[str], None] | None) -> torch.Tensor:
        """[1, S] of prompt and answer."""
        options = {"do_sample": self.temperature > 0, **generation_ends(self.model, self.processor)}
        if self.temperature > 0:
            options["temperature"] = self.temperature
        if write is not None:
            options["streamer"] = Pieces(text_tokenizer(self.processor), write)
        with evaluation_mode(self.model):
            return self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, num_beams=1, **options)

    def switch(self, name: str) -> str:
        """Makes one adapter the active one, loaded from its folder or Hub id where it has not been; -> its name.

        Raises:
            ValueError, OSError: there is no such adapter, or it does not fit the base.
        """
        adapters = self.model.adapters
        if name not in adapters:
            location, name = name, Path(name).name.replace(".", "_") or name
            if name not in adapters or adapters[name].config.name_or_path != location:  # else it is here
                self.model.load_adapter(location, adapter_name=name)
        self.model.enable_adapters()
        self.model.set_adapter(name)
        return name

    def turn(self, on: bool) -> None:
        """All adapters on or off; off, the base answers."""
        (self.model.enable_adapters if on else self.model.disable_adapters)()

    @property
    def on(self) -> list[str]:
        """Names of the adapters that take part."""
        return list(self.model.active_adapters())

    @property
    def used(self) -> list[TokenUse]:
        """Of the last answer, the tokens that used new experts."""
        return [token for token in self.tokens if token.share > 0]


class Pieces(TextStreamer):
    """Hands on the text of an answer, whole words at a time, in place of printing it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)
