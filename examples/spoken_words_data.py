"""Makes spoken digits and questions about them with espeak-ng, as LLaVA JSON files with `audio`.

    python examples/spoken_words_data.py outputs/spoken-words

captions.json: what is said in each training clip. train.json: about each of them three open questions, what is said,
how many words and who speaks, and one to be answered with yes or no. test.json: the same about other clips, by voices
that nothing was trained on, neither the encoder (assets/pretrain_speech.py) nor the adapter. Clips are WAV files of
espeak-ng's own 22,050 Hz, with noise.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-us", "en-gb-scotland", "en-gb-x-rp")  # with en-gb, espeak-ng speaks all variants in one voice
# Variants of espeak-ng that sound like people, by sex. A held-out one shares its formants with no other.
VOICES = {
    "woman": "f1 f3 f4 f5 Andrea Annie anika aunty belinda grandma".split(),
    "man": "m1 m2 m3 m4 m5 m6 m8 Alex Andy Denis Diogo Gene Henrique Jacky Marco Mario Michael Storm antonio croak ed "
    "grandpa john max michel pablo pedro rob sandro victor".split(),
}
HELD_OUT = {"woman": ["f2", "Alicia", "steph"], "man": ["m7", "Mike", "gustave", "quincy", "travis"]}
RATE = 22050  # espeak-ng's, in samples a second
LONGEST = 1.9  # seconds: what is spoken slower is spoken faster, for the encoder takes 2


class Clip(NamedTuple):
    """How a clip is spoken, and what is heard in it."""

    words: tuple[str, ...]
    speaker: str  # "woman" or "man"
    voice: str  # espeak-ng's name: accent+variant
    speed: int  # words a minute
    pitch: int  # 0 to 99
    noise: float  # deviation of white noise, 1: of the speech


def check_espeak() -> None:
    """`SystemExit` that says how to get espeak-ng, where there is none."""
    if shutil.which("espeak-ng") is None:
        raise SystemExit(
            "espeak-ng makes the speech, and is not there: apt-get install espeak-ng (or brew, dnf, ...)."
        )


def draw(generator: random.Random, words: tuple[str, ...], voices: dict[str, list[str]]) -> Clip:
    """`words` in one of `voices`, women and men equally often, at some speed and pitch."""
    speaker = generator.choice(sorted(voices))
    voice = f"{generator.choice(ACCENTS)}+{generator.choice(voices[speaker])}"
    return Clip(words, speaker, voice, generator.randint(120, 200), generator.randint(30, 70), generator.random() / 10)


def speak(clip: Clip) -> np.ndarray:
    """The clip without its noise: float32 [samples] in -1 to 1, `RATE` a second, without the silence around it."""
    command = ["espeak-ng", "-v", clip.voice, "-s", str(clip.speed), "-p", str(clip.pitch), "--stdout"]
    spoken = subprocess.run([*command, " ".join(clip.words)], check=True, stdout=subprocess.PIPE).stdout
    samples = np.frombuffer(spoken[44:], dtype="<i2").astype(np.float32) / 2**15  # 44: the header of a WAV file
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    return samples[max(loud[0] - 800, 0) : loud[-1] + 800]


def write_clip(path: Path, clip: Clip, seed: int) -> None:
    """A WAV file of the clip, with its noise."""
    samples = speak(clip)
    while len(samples) > LONGEST * RATE:
        clip = clip._replace(speed=clip.speed + 20)
        samples = speak(clip)
    noise = np.random.default_rng(seed).standard_normal(len(samples)) * clip.noise * samples.std()
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((np.clip(samples + noise, -1, 1) * (2**15 - 1)).astype("<i2").tobytes())


def questions(clip: Clip, generator: random.Random) -> list[tuple[str, str]]:
    """Four (question, answer) about a clip, three of them open."""
    said = generator.random() < 0.5
    word = generator.choice(clip.words if said else [one for one in DIGITS if one not in clip.words])
    sex, number = generator.choice(["woman", "man"]), generator.randint(1, 3)
    closed = [
        (f"Is {word} said?", "yes" if said else "no"),
        (f"Does a {sex} speak?", "yes" if sex == clip.speaker else "no"),
        (f"Are there {number} words?", "yes" if number == len(clip.words) else "no"),
    ]
    return [
        ("What is said?", " ".join(clip.words)),
        ("How many words are said?", str(len(clip.words))),
        ("Who speaks, a woman or a man?", clip.speaker),
        generator.choice(closed),
    ]


def entry(number: int, audio: str, question: str, answer: str) -> dict[str, Any]:
    """One LLaVA entry."""
    turns = [{"from": "human", "value": f"<audio>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "audio": audio, "conversations": turns}


def write(folder: str | os.PathLike, train: int = 4000, test: int = 500, seed: int = 0) -> Path:
    """Writes the three files and as many clips as `train` and `test` say into `folder`, unless they are there.

    `SystemExit`: no espeak-ng.
    """
    folder, generator = Path(folder), random.Random(seed)
    if (folder / "test.json").exists():
        return folder
    check_espeak()
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    clips, asked = [], {"captions": [], "train": [], "test": []}
    for number in range(train + test):
        words = tuple(generator.choices(DIGITS, k=generator.randint(1, 3)))
        clip, name = draw(generator, words, VOICES if number < train else HELD_OUT), f"clips/{number}.wav"
        clips.append((folder / name, clip, number))
        asked["train" if number < train else "test"] += [(name, *pair) for pair in questions(clip, generator)]
        asked["captions"] += [(name, "What is said?", " ".join(words))] if number < train else []
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda arguments: write_clip(*arguments), clips))
    generator.shuffle(asked["train"])
    for name, items in asked.items():
        entries = [entry(number, *question) for number, question in enumerate(items)]
        (folder / f"{name}.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where to write captions.json, train.json, test.json and clips/")
    print(f"Wrote {write(parser.parse_args().folder)}")
