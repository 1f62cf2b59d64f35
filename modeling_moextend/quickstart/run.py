"""Teaches a small pretrained MoE to see, or to hear: align, extend, finetune, save, answer in a fresh process."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, logging

from ..attaching.parts import listed
from ..modeling_moextend import MoExtendForCausalLM
from ..processing_moextend import AUDIO_TOKEN, IMAGE_TOKEN, MoExtendProcessor, to_rgb
from ..publishing.facts import folder_card, read_facts, write_facts
from ..tools.hashes import base_tensors_hash
from ..training.config import MoExtendSFTConfig
from ..training.recipes import RecipeParser
from ..training.stages import STAGES, StagesConfig, check_paths, run_stages
from .measure import accuracy, base_on_text, blind_readers, read_questions

HERE = Path(__file__).resolve().parent


class Task(NamedTuple):
    """What a quickstart is about: examples/hear.py has another."""

    recipe: str  # name of a recipe, or its path
    folder: Path  # where its data is written, which the recipe names
    write: Callable[[Path], object]  # writes captions.json, train.json and test.json there
    title: str
    zeroed: str  # the row of the table for answers without an input


def write_easy_vqa(folder: Path) -> None:
    from .easy_vqa_data import write  # needs a package that brings the images

    write(folder)


EASY_VQA = Task(
    "easy_vqa",
    Path("outputs/easy-vqa"),
    write_easy_vqa,
    "Held-out questions about held-out images (exact match)",
    "trained, images zeroed",
)


@dataclass
class QuickstartConfig:
    """What the quickstart itself needs."""

    test: str | None = field(default=None, metadata={"help": "Held-out questions; see --data."})
    held_out_text: str | None = field(
        default=None,
        metadata={"help": "JSON lines {domain, text} for base perplexity; default: <base>/held_out.jsonl."},
    )
    max_questions: int = field(default=4000, metadata={"help": "Held-out questions to answer, half of them open."})


def recipe_parser() -> RecipeParser:
    """Of `moextend quickstart`: every option, the trainer's too."""
    return RecipeParser((QuickstartConfig, StagesConfig, MoExtendSFTConfig), prog="moextend quickstart")


def parse(words: Sequence[str], task: Task = EASY_VQA) -> tuple[QuickstartConfig, StagesConfig, MoExtendSFTConfig]:
    """(quick, config, args) from recipe and command line, checked before anything is trained."""
    if not any(word.split("=")[0] == "--config" for word in words):
        words = ["--config", task.recipe, *words]
    quick, config, args = recipe_parser().parse(words)
    if config.encoder is None or config.stages != list(STAGES):
        raise ValueError("The quickstart runs all three stages with an encoder; for others use moextend train.")
    if config.paper:
        args.output_dir += "-paper"
    quick.test = quick.test or str(task.folder / "test.json")
    own_files = [Path(p) for p in (config.data, config.align_data, quick.test) if Path(p).parent != task.folder]
    if len(own_files) in (1, 2):
        raise ValueError("Replace --data, --align_data and --test together: they are the parts of one data set.")
    missing = [str(path) for path in own_files if path.suffix in (".json", ".jsonl") and not path.exists()]
    missing += [path for path in [quick.held_out_text] if path is not None and not Path(path).is_file()]
    if missing:
        raise ValueError(f"No such file: {', '.join(missing)}.")
    encoders = [repository_path(one) for one in listed(config.encoder)]
    return quick, replace(config, base=repository_path(config.base), encoder=encoders), args


def repository_path(name: str) -> str:
    """A folder of this repository, from wherever it is run; anything else as it is."""
    inside = HERE.parents[1] / name
    return str(inside) if name.startswith("assets/") and not Path(name).exists() and inside.exists() else name


def write_questions(questions: list[dict[str, Any]], folder: Path) -> Path:
    """Writes the LLaVA file that `answer.py` reads to `folder`, and images of datasets beside it; returns its path."""
    folder, entries = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for number, question in enumerate(questions):
        kind = "image" if "image" in question else "audio"
        path = question[kind]
        if not isinstance(path, str):
            path = folder / f"{number}.png"
            to_rgb(question["image"]).save(path)
        turns = [{"from": "human", "value": question["question"]}, {"from": "gpt", "value": question["answer"]}]
        entries.append({kind: str(Path(path).absolute()), "conversations": turns})
    (folder / "questions.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder / "questions.json"


def answers(folder: str, config: StagesConfig, questions: Path, *flags: str) -> list[str]:
    """Answers of a saved adapter, by `answer.py` in a process that has only these folders and transformers."""
    options = {"adapter": folder, "questions": questions, "base": config.base}
    command = [sys.executable, str(HERE / "answer.py"), *flags, *(f"--{name}={options[name]}" for name in options)]
    command += ["--encoder", *listed(config.encoder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def save_untrained(model: MoExtendForCausalLM, config: StagesConfig, args: MoExtendSFTConfig) -> str:
    """The adapter as it was before stage finetune: aligned, new experts still copies of their sources."""
    folder = f"{args.output_dir}/untrained"
    untrained = MoExtendForCausalLM.from_pretrained(
        f"{args.output_dir}/align", base=config.base, encoder=config.encoder, dtype=config.dtype
    )
    untrained.extend(model.config.extended_layers)
    untrained.save_pretrained(folder)
    MoExtendProcessor.from_pretrained(args.output_dir).save_pretrained(folder)
    return folder


def quickstart(words: Sequence[str] = (), task: Task = EASY_VQA) -> dict[str, Any]:
    """Runs it all with the options in `words`, prints the table, and returns what is in results.json.

    Writes the adapter, the picture of stage extend, results.json and a model card to `--output_dir`.
    """
    quick, config, args = parse(words, task)
    start = time.time()
    logging.set_verbosity_error()
    if Path(config.data).parent == task.folder:
        task.write(task.folder)
    check_paths(config)
    known = read_questions(config.data, config.image_folder, split="train")
    asked = read_questions(quick.test, config.image_folder, quick.max_questions)
    before = base_tensors_hash(MoExtendForCausalLM.from_base(config.base, encoder=config.encoder, dtype=config.dtype))
    model = run_stages(config, args).eval()
    results = {"training_seconds": time.time() - start, "tensors": len(model.adapter_tensors())}
    results["base_and_encoder_bit_equal"] = base_tensors_hash(model) == before
    results["adapter_bytes"] = Path(args.output_dir, "moextend_adapter.safetensors").stat().st_size
    questions = write_questions(asked, Path(args.output_dir, "questions"))
    answered = {
        "untrained extension": answers(save_untrained(model, config, args), config, questions),
        task.zeroed: answers(args.output_dir, config, questions, "--zero_inputs"),
        "trained": answers(args.output_dir, config, questions),
    }
    results["accuracy"] = blind_readers(known, asked)
    results["accuracy"] |= {name: accuracy(asked, texts) for name, texts in answered.items()}
    text = Path(quick.held_out_text or f"{config.base}/held_out.jsonl")
    if text.exists():
        tokenizer = AutoTokenizer.from_pretrained(config.base, trust_remote_code=False)
        results["base_text"] = base_on_text(model, tokenizer, text)
    results["seconds"] = time.time() - start
    Path(args.output_dir, "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    records = [{"": name, **{k: percent(v) for k, v in part.items()}} for name, part in results["accuracy"].items()]
    write_facts(args.output_dir, **read_facts(args.output_dir), results=records)
    folder_card(args.output_dir, model.config).save(f"{args.output_dir}/README.md")
    show(results, text, task.title)
    say_next(args.output_dir, asked, answered["trained"])
    return results


def say_next(folder: str, questions: list[dict[str, Any]], texts: list[str]) -> None:
    """Where everything lies, three answers to look at, and what to do next."""
    print("Three of the held-out questions:")  # as lines: a path is there to be copied
    for question, text in shown(questions, texts):
        given = question.get("image", question.get("audio"))
        asked = question["question"].replace(IMAGE_TOKEN, "").replace(AUDIO_TOKEN, "").strip()
        print(f"  {given if isinstance(given, str) else '(in the data set)'}")
        print(f"    {asked}  answer: {text}  truth: {question['answer']}")
    print(f"Adapter: {folder}\nPicture of stage extend: {folder}/shift.png\nModel card: {folder}/README.md")
    kind = "image" if "image" in questions[0] else "audio"
    print(f"Next: moextend inspect {folder}\n      moextend chat {folder}    (then: /{kind} FILE, and a question)")


def shown(questions: list[dict[str, Any]], texts: list[str]) -> list[tuple[dict[str, Any], str]]:
    """Three different questions about three different inputs with their answers."""
    found, seen = [], set()
    for question, text in zip(questions, texts, strict=True):
        marks = {question["question"], str(question.get("image", question.get("audio")))}
        if not marks & seen and len(found) < 3:
            found.append((question, text))
            seen |= marks
    return found


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def show(results: dict[str, Any], text: Path, title: str) -> None:
    """The table on the terminal."""
    table = Table(title=title)
    for heading in ("", "open questions", "yes/no"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, part in results["accuracy"].items():
        table.add_row(name, *map(percent, part.values()))
    console = Console(width=100)
    console.print(table)
    if "base_text" in results:
        before, after = (results["base_text"][name]["geometric mean"] for name in ("before", "after"))
        same = "every logit bit-equal" if results["base_text"]["bit_equal"] else "logits differ"
        console.print(f"Base perplexity on held-out text: {before:.2f} -> {after:.2f} ({same})")
    else:
        console.print(f"Base perplexity: not measured, there is no {text} (see --held_out_text)")
    same = "bit-equal, every one hashed" if results["base_and_encoder_bit_equal"] else "CHANGED"
    console.print(f"Base and encoder tensors before and after: {same}")
    console.print(f"Adapter: {results['adapter_bytes'] / 2**20:.2f} MiB, {results['tensors']} tensors")
    console.print(f"Time: {results['seconds']:.0f} s, of which the three stages {results['training_seconds']:.0f} s")
