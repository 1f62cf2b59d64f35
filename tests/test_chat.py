"""Talking to an adapter: `moextend chat` in a pseudo-terminal, and which tokens used new experts."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_audio import RATE, hearing, make_processor, tone, write_wav
from transformers import AutoTokenizer

from modeling_moextend import MoExtendForCausalLM
from modeling_moextend.chat import Chat
from modeling_moextend.evaluation.token_view import (
    MARK,
    TokenUse,
    summary,
    token_texts,
    token_view,
    tokens_line,
    tokens_page,
)
from moextend_cli.chat import Conversation

ROOT = Path(__file__).parents[1]
NUMBERS = ROOT / "assets" / "numbers"


@pytest.fixture(scope="module")
def loaded():
    base = str(ROOT / "assets" / "tiny-moe")
    model = MoExtendForCausalLM.from_pretrained(NUMBERS, base=base, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(NUMBERS)


@pytest.fixture
def chat(loaded):
    loaded[0].enable_adapters()
    yield Chat(*loaded, max_new_tokens=24)
    loaded[0].enable_adapters()


# ---------------------------------------------------------------- which tokens used new experts


def test_the_view_says_what_the_routers_chose(loaded):
    """Held against the records themselves, token by token and layer by layer."""
    model, tokenizer = loaded
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1984"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad(), model.record_routing() as records:
        model(input_ids=torch.tensor([ids]))
    view = token_view(model, tokenizer, ids)
    assert len(view) == len(ids) and {*view[0].layers} == {*model.config.extended_layers}
    for layer, record in records.items():
        expected = [float((chosen >= record.num_base).any()) for chosen in record.index]
        assert [token.layers[layer] for token in view] == expected
    assert 0 < sum(token.share > 0 for token in view) < len(view), "a prompt's first tokens are the base's"
    with model.disable_adapter():
        assert not any(token.share for token in token_view(model, tokenizer, ids))


@pytest.mark.parametrize("text", ["1984", "naïve façade ☃ 日本語", " two  spaces\nand a line", "e\u0301"])
def test_texts_of_tokens_make_the_text(loaded, text):
    ids = loaded[1](text, add_special_tokens=False).input_ids
    assert "".join(token_texts(loaded[1], ids)) == loaded[1].decode(ids)
    assert not any("\ufffd" in part for part in token_texts(loaded[1], ids))


USES = [TokenUse("a<b", {0: 0.0, 2: 0.0}), TokenUse(" c", {0: 1.0, 2: 0.0}), TokenUse("d\x1b[2J", {0: 1.0, 2: 1.0})]


def test_marks_in_a_terminal():
    assert tokens_line(USES, colour=False) == "a<b[ cd\\x1b[2J]"
    line = tokens_line(USES)
    assert line.count("\x1b") == 2 and line.startswith(f"a<b{MARK}"), "no control character of the text's own"
    assert summary(USES) == "2 of 3 tokens used new experts" and tokens_line([]) == ""


def test_the_page_names_layers_on_hover_and_stands_alone():
    found = []

    class Spans(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, dict(attrs)))

    page = tokens_page([("what <is> it?", USES)])
    Spans().feed(page)
    titles = [attrs["title"] for tag, attrs in found if tag == "span"]
    assert titles == ["layer 0: base, 2: base", "layer 0: new, 2: base", "layer 0: new, 2: new"]
    assert "what &lt;is&gt; it?" in page and "a&lt;b" in page
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in found} and "http" not in page


# ---------------------------------------------------------------- a conversation


def test_a_conversation_goes_on_and_switches(chat, tmp_path):
    pieces = []
    answer = chat.ask("1984", write=pieces.append)
    assert answer == "one thousand nine hundred eighty-four" == "".join(pieces).strip() and len(pieces) > 3
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] and len(chat.used) > 5
    chat.turn(on=False)
    assert chat.on == [] and chat.ask("1984") != answer and not chat.used
    chat.clear()
    assert chat.switch(str(NUMBERS)) == "numbers" and chat.on == ["numbers"]
    assert chat.ask("1984") == answer and chat.switch("default") == "default"


def test_what_goes_wrong_leaves_the_conversation(chat, tmp_path):
    for given, reason in ({"images": ["x.png"]}, "an image"), ({"audio": ["x.wav"]}, "audio"):
        with pytest.raises(ValueError, match=f"no encoder for {reason}"):
            chat.ask("what is this?", **given)
    with pytest.raises((ValueError, OSError)):
        chat.switch(str(tmp_path / "nothing"))
    assert chat.messages == [] and chat.on == ["default"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/quit now", "/quit stands alone, without 'now'"),
        ("/off now", "/off stands alone"),
        ("/fly", "/fly is no command; /help names them"),
        ("/image", "/image needs a file"),
        ("/image no.png", "no encoder for an image"),
        ("/audio no.wav", "no encoder for audio"),
        ("/adapter no/such/adapter", "!"),
    ],
)
def test_lines_that_mean_nothing_are_answered(line, said, chat, capsys):
    Conversation(chat).take(line)
    assert capsys.readouterr().out.startswith("! ") and chat.on == ["default"] and chat.messages == []
    Conversation(chat).take(line)
    assert said in capsys.readouterr().out


def test_images_and_clips_come_with_the_next_message(tmp_path, capsys, monkeypatch):
    """By path, in a conversation of one question each and one about both."""
    processor = make_processor(eyes=True)
    processor.tokenizer.chat_template = processor.chat_template
    model = hearing(processor=processor, eyes=True)
    talk = Conversation(Chat(model, processor, max_new_tokens=2))
    write_wav(tmp_path / "a clip.wav", tone(), RATE)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    image, clip = f"/image {tmp_path}/a.png", f"/audio '{tmp_path}/a clip.wav'"
    for line in (image, "What?", clip, image, "And?"):
        talk.take(line)
    said = capsys.readouterr().out
    assert "!" not in said and "2 with the next message" in said and not any(talk.given.values())
    asked = [message["content"] for message in talk.chat.messages if message["role"] == "user"]
    assert asked == ["<image>\nWhat?", "<image><audio>\nAnd?"]
    assert (len(talk.chat.images), len(talk.chat.audio)) == (2, 1)
    monkeypatch.setenv("HOME", str(tmp_path))
    talk.take("/tokens '~/a page.html'")
    assert "Written to" in capsys.readouterr().out and (tmp_path / "a page.html").is_file()
    for line in (f"/audio {tmp_path}/no.wav", "/image a.jpg"):
        talk.take(line)
        assert "no such file" in capsys.readouterr().out and not any(talk.given.values())


# ---------------------------------------------------------------- in a pseudo-terminal


class Terminal:
    """A process behind a pseudo-terminal: what it writes, and lines typed at it."""

    def __init__(self, *command):
        self.master, slave = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
        environment.pop("NO_COLOR", None)
        streams = {"stdin": slave, "stdout": slave, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, **streams, cwd=ROOT, env=environment, start_new_session=True)
        os.close(slave)
        self.seen = ""

    def until(self, text, seconds=240):
        """What was written up to `text`, from where the last call ended."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:
                    break
        before, found, self.seen = self.seen.partition(text)
        assert found, before
        return before

    def type(self, line):
        os.write(self.master, f"{line}\n".encode())


@pytest.mark.slow
def test_the_command_in_a_terminal(tmp_path):
    terminal = Terminal(sys.executable, "-m", "moextend_cli", "chat", "assets/numbers", "--dtype", "float32")
    try:
        assert "/help" in terminal.until("you> ")
        terminal.type("1984")
        said = terminal.until("you> ")
        assert "default> one thousand nine hundred eighty-four" in said and MARK in said
        assert re.search(r"\d+ of \d+ tokens used new experts", said)
        terminal.type(f"/tokens {tmp_path / 'page.html'}")
        terminal.until("you> ")
        assert "one" in (tmp_path / "page.html").read_text()
        terminal.type("/off")
        assert "base answers alone" in terminal.until("you> ")
        terminal.type("/new")
        terminal.until("you> ")
        terminal.type("1984")
        said = terminal.until("you> ")
        assert "base> " in said and "thousand" not in said and "new experts" not in said
        for line, answer in (
            ("/on", "default is on"),
            ("/quit now", "/quit stands alone"),
        ):
            terminal.type(line)
            assert answer in terminal.until("you> ")
        terminal.type(f"/image {ROOT / 'docs/images/idea.png'}")
        assert "! The adapter that is on has no encoder for an image" in terminal.until("you> ")
        terminal.type("/quit")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)


@pytest.mark.slow
def test_lines_from_a_pipe_are_marked_by_brackets():
    command = [sys.executable, "-m", "moextend_cli", "chat", "assets/numbers", "--dtype", "float32"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=b"\xff\xfe\n/new\n1984\n", capture_output=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(rb"used new experts: \[?one thousand", done.stdout) and b"\x1b" not in done.stdout
