"""Base and adapter side by side in a browser: `moextend demo ADAPTER`.

This file is a Hugging Face Space too: as `app.py`, with `moextend[demo,vision,audio]` in its requirements.txt and the
adapter's Hub id in the Space's variable MOEXTEND_ADAPTER.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from modeling_moextend.chat.session import Chat
from modeling_moextend.evaluation.folder import load_adapter
from modeling_moextend.evaluation.token_view import summary, tokens_fragment
from modeling_moextend.modeling_moextend import MoExtendForCausalLM

if TYPE_CHECKING:
    import gradio

BLIND = "(The base alone can't see or hear.)"


class SideBySide:
    """One question, two answers: with the adapter, and of the base alone."""

    def __init__(
        self, model: MoExtendForCausalLM, processor: PreTrainedTokenizerBase | ProcessorMixin, **options: Any
    ):
        self.model, self.processor, self.options = model, processor, options

    def answer(self, question: str, image: Any = None, audio: Any = None) -> tuple[str, str, str]:
        """(the base's answer, the adapter's, which of its tokens used new experts as HTML).

        Args:
            image: a path or PIL image; `None`: none.
            audio: a path, or what else the processor takes as a clip; `None`: none.

        Raises:
            gradio.Error: no question, or one that the model can't take; shown in the browser.
        """
        import gradio

        if not question.strip():
            raise gradio.Error("Ask something first.")
        chat = Chat(self.model, self.processor, **self.options)
        try:
            images, clips = ([] if one is None else [one] for one in (image, audio))
            answer = chat.ask(question, images, clips)
            if images or clips:
                return BLIND, answer, view_of(chat)
            with self.model.disable_adapter():
                base = Chat(self.model, self.processor, **self.options).ask(question)
        except (ValueError, OSError) as error:
            raise gradio.Error(str(error)) from error
        return base, answer, view_of(chat)


def view_of(chat: Chat) -> str:
    return f"{tokens_fragment(chat.tokens)}<p>{summary(chat.tokens)}; point at one for its layers.</p>"


def build_demo(
    model: MoExtendForCausalLM,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    title: str = "MoExtend",
    **options: Any,
) -> gradio.Blocks:
    """The page.

    Args:
        title: heading.
        **options: to `Chat`: `max_new_tokens`, `temperature`.

    Raises:
        ImportError: gradio is missing.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"The demo needs gradio: pip install 'moextend[demo]' ({error}).") from error
    both = SideBySide(model, processor, **options)

    def ask(question, *inputs):  # gradio hands them over by their order
        return both.answer(question, **dict(zip(given, inputs, strict=True)))

    with gradio.Blocks(title=title) as page:
        gradio.Markdown(f"# {title}\nOne question, two answers: of the base, and with the adapter's new experts.")
        with gradio.Row():
            question = gradio.Textbox(label="question", scale=3, autofocus=True)
            given = {}
            if "image" in model.senses:
                given["image"] = gradio.Image(label="image", type="pil", scale=1, height=200)
            if "audio" in model.senses:
                given["audio"] = gradio.Audio(label="audio", type="filepath", scale=1)
            button = gradio.Button("ask", variant="primary", scale=1)
        with gradio.Row():
            outputs = [gradio.Textbox(label=name, lines=4, interactive=False) for name in ("base", "with the adapter")]
        outputs.append(gradio.HTML(label="which tokens used new experts"))
        for event in (button.click, question.submit):
            event(ask, [question, *given.values()], outputs, concurrency_limit=1)
    return page


def launch(
    adapter: str,
    *,
    base: str | None = None,
    encoder: str | list[str] | None = None,
    dtype: str = "auto",
    port: int | None = None,
    share: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
) -> None:
    """Loads an adapter and serves its page until Ctrl-C; `share` puts it behind a public link of gradio's."""
    model, processor = load_adapter(adapter, base, encoder, dtype)
    title = os.path.basename(os.path.normpath(adapter))
    page = build_demo(model, processor, title, max_new_tokens=max_new_tokens, temperature=temperature)
    page.launch(server_port=port, share=share)


if __name__ == "__main__":
    launch(os.environ["MOEXTEND_ADAPTER"])
