"""`moextend chat`: a conversation in a terminal."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .terminal import escaped

if TYPE_CHECKING:
    from modeling_moextend.chat import Chat

HELP = """\
  /image FILE     show an image with the next message
  /audio FILE     let it hear a clip with the next message
  /adapter NAME   switch to an adapter: one that is loaded, a folder, or a Hub id
  /off, /on       the base alone, and back
  /tokens FILE    write which tokens of the last answer used new experts, layer by layer, as HTML
  /new            forget what was said
  /help, /quit"""
NEEDS = {"/image": "a file", "/audio": "a file", "/adapter": "a name", "/tokens": "a file to write"}
ALONE = ("/off", "/on", "/new", "/help", "/quit", "/exit")


class Conversation:
    """Reads lines, and does what they say. Words that begin with / are for this program, all others for the model."""

    def __init__(self, chat: "Chat"):
        self.chat, self.given = chat, {"image": [], "audio": []}
        self.colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def run(self) -> None:
        """Until /quit or the end of the input."""
        try:
            import readline  # noqa: F401  # arrows and history for input(), where the system has it
        except ImportError:
            pass
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # bytes that are no text end no conversation
        self.say(f"Adapter {', '.join(self.chat.on)} is on. /help says what else there is.")
        while True:
            try:
                line = input("you> ").strip()
            except EOFError:
                print()
                return
            if line in ("/quit", "/exit"):
                return
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """One line; what goes wrong is said, and the conversation goes on."""
        try:
            if line.startswith("/"):
                self.command(*line.split(maxsplit=1))
            else:
                self.ask(line)
        except (ValueError, OSError, ImportError) as error:
            self.say(f"! {error}")

    def command(self, word: str, argument: str = "") -> None:
        if word not in (*NEEDS, *ALONE):
            raise ValueError(f"{word} is no command; /help names them.")
        if word in NEEDS and not argument:
            raise ValueError(f"{word} needs {NEEDS[word]}.")
        if word in ALONE and argument:
            raise ValueError(f"{word} stands alone, without {argument!r}.")
        if word in NEEDS:
            argument = os.path.expanduser(argument.strip("'\""))  # as a shell reads a path
        if word in ("/image", "/audio"):
            self.give(word[1:], argument)
        elif word == "/adapter":
            self.say(f"{self.chat.switch(argument)} is on")
        elif word in ("/on", "/off"):
            self.chat.turn(word == "/on")
            self.say(f"{', '.join(self.chat.on)} is on" if self.chat.on else "The base answers alone.")
        elif word == "/tokens":
            self.write_tokens(argument)
        elif word == "/new":
            self.chat.clear()
            self.forget()
            self.say("Forgotten.")
        else:
            self.say(HELP)

    def give(self, modality: str, file: str) -> None:
        """An image or a clip for the next message."""
        self.chat.check_sense(modality)
        if not Path(file).is_file():
            raise ValueError(f"{file}: no such file.")
        self.given[modality].append(file)
        self.say(f"{sum(map(len, self.given.values()))} with the next message")

    def forget(self) -> bool:
        """Images and clips for the next message go; whether there were any."""
        before, self.given = self.given, {"image": [], "audio": []}
        return any(before.values())

    def ask(self, text: str) -> None:
        """The answer as it comes, then which of its tokens used new experts. Ctrl-C ends the answer, not the chat."""
        from modeling_moextend.evaluation.token_view import summary, tokens_line

        who = self.chat.on[0] if len(self.chat.on) == 1 else "+".join(self.chat.on) or "base"
        print(escaped(f"{who}> "), end="", flush=True)
        try:
            self.chat.ask(text, self.given["image"], self.given["audio"], self.write)
        except (ValueError, OSError):
            if self.forget():
                self.say("\n(what came with it is forgotten)")
            raise
        except KeyboardInterrupt:
            self.say("\n(stopped; this question and its answer are forgotten)")
            return
        self.forget()
        print()
        if self.chat.on:
            line = f": {tokens_line(self.chat.tokens, self.colour)}" if self.chat.used else ""
            print(f"   {summary(self.chat.tokens)}{line}", flush=True)

    def write(self, piece: str) -> None:
        print(escaped(piece, "\n\t", sys.stdout.encoding), end="", flush=True)

    def write_tokens(self, file: str) -> None:
        from modeling_moextend.evaluation.token_view import tokens_page

        if not self.chat.tokens:
            raise ValueError("There is no answer yet.")
        question = self.chat.messages[-2]["content"]
        Path(file).write_text(tokens_page([(question, self.chat.tokens)]), encoding="utf-8")
        self.say(f"Written to {file}")

    def say(self, text: str) -> None:
        print(escaped(text, "\n", sys.stdout.encoding), flush=True)
