"""What the proof of docs/senses.md is beside: all weights fine-tuned, and one sense beside two in one adapter.

    python benchmarks/senses.py full        # the model and data of examples/hear.py, every weight moves
    python benchmarks/senses.py both        # easy-VQA alone, spoken words alone, and both in one adapter

The options of a run are those of configuration/recipes/spoken_words.yaml. Of `both`, the adapter with two senses takes
the steps of the two others together, over the data of both, shuffled. Adds a line to outputs/senses/results.jsonl.
"""

import argparse
import itertools
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin, get_cosine_schedule_with_warmup, logging, set_seed

from modeling_moextend import MoExtendSFTConfig, MoExtendSFTTrainer
from modeling_moextend.data.processors import load_processor
from modeling_moextend.quickstart.answer import answer
from modeling_moextend.quickstart.measure import accuracy, blind_readers, read_questions
from modeling_moextend.quickstart.run import EASY_VQA, parse
from modeling_moextend.training.stages import StagesConfig, align, build_model, load_data, run_stages, split_held_out

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))
from hear import SPOKEN_WORDS  # noqa: E402

TASKS = {"image": EASY_VQA, "audio": SPOKEN_WORDS}
ENCODERS = {"image": "assets/tiny-clip", "audio": "assets/tiny-speech"}
OUTPUT = Path("outputs/senses")
BATCH = 64


def entries_of(kind: str, name: str) -> list[dict[str, Any]]:
    """The LLaVA entries of one file of a task, with whole paths; the file is written where it is not there."""
    folder = TASKS[kind].folder
    if not (folder / name).exists():
        TASKS[kind].write(folder)
    entries = json.loads((folder / name).read_text(encoding="utf-8"))
    return [{**entry, kind: str((folder / entry[kind]).absolute())} for entry in entries]


def measure(model: PreTrainedModel, processor: ProcessorMixin, kinds: tuple[str, ...], number: int) -> dict[str, Any]:
    """{kind: {"question-only reader", "trained": {"open", "yes/no"}}}: exact match on `number` held-out questions."""
    found = {}
    for kind in kinds:
        asked = read_questions(TASKS[kind].folder / "test.json", number=number)
        turns = [[{"value": one["question"]}] for one in asked]
        entries = [{kind: one[kind], "conversations": turn} for one, turn in zip(asked, turns, strict=True)]
        texts = [text for batch in chunks(entries) for text in answer(model.eval(), processor, batch, "", False)]
        known = read_questions(TASKS[kind].folder / "train.json")
        found[kind] = blind_readers(known, asked) | {"trained": accuracy(asked, texts)}
    return found


def full(args: argparse.Namespace) -> dict[str, Any]:
    """All weights of base and projector, after the same stage align; the encoder stays frozen."""
    entries_of("audio", "train.json")
    _, config, training = parse([], SPOKEN_WORDS)
    training.output_dir, training.max_steps = str(OUTPUT / "full"), args.steps or training.max_steps
    set_seed(args.seed)
    model, processor = start(config, training)
    align(model, processor, load_data(config.align_data, config), config, training, None)
    data, _ = split_held_out(load_data(config.data, config), config)
    reader = MoExtendSFTTrainer(
        model=model,
        args=replace(training, stage="align", output_dir=str(OUTPUT / "reader")),
        train_dataset=data,
        processing_class=processor,
    )
    trained = [*model.base.parameters(), *(p for p in model.parameters() if p.requires_grad)]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=args.rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, training.max_steps // 33, training.max_steps)
    batches = itertools.chain.from_iterable(itertools.repeat(reader.get_train_dataloader()))
    for batch in itertools.islice(batches, training.max_steps):
        model.train()(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    steps = {"steps": training.max_steps, "rate": args.rate}
    return {"run": "full", **steps, "accuracy": measure(model, processor, ("audio",), args.questions)}


def start(config: StagesConfig, training: MoExtendSFTConfig) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The base with an untrained projector, and its processor."""
    processor = load_processor(
        config.base, config.encoder, training.assistant_only_loss, audio_projector_downsample=config.downsample
    )
    return build_model(replace(config, deltas=None), processor), processor


def together(args: argparse.Namespace, kinds: tuple[str, ...]) -> dict[str, Any]:
    """One adapter with the senses `kinds`, trained on their tasks."""
    name, steps = "+".join(kinds), (args.steps or 200) * len(kinds)
    folder, generator = OUTPUT / name, random.Random(args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("captions.json", "train.json"):
        entries = [entry for kind in kinds for entry in entries_of(kind, part)]
        generator.shuffle(entries)
        (folder / part).write_text(json.dumps(entries), encoding="utf-8")
    options = {"data": folder / "train.json", "align_data": folder / "captions.json", "test": folder / "train.json"}
    options |= {"output_dir": folder / "adapter", "max_steps": steps, "align_max_steps": min(100 * len(kinds), steps)}
    options |= {"seed": args.seed}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    _, config, training = parse([*words, "--encoder", *(ENCODERS[kind] for kind in kinds)], SPOKEN_WORDS)
    model = run_stages(config, training)
    processor = load_processor(training.output_dir, config.encoder, True)
    return {"run": name, "steps": steps, "accuracy": measure(model, processor, kinds, args.questions)}


def chunks(entries: list) -> list[list]:
    """`entries`, `BATCH` at a time."""
    return [entries[first : first + BATCH] for first in range(0, len(entries), BATCH)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["full", "both"])
    parser.add_argument("--steps", type=int, help="a task, in stage finetune; default: the recipe's, or 200 of `both`")
    parser.add_argument("--rate", type=float, default=1e-3, help="of `full` (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=4000, help="held-out ones asked a task, half of them open")
    parser.add_argument("--seed", type=int, default=42, help="of start values and order (default: %(default)s)")
    args = parser.parse_args()
    logging.set_verbosity_error()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    runs = [("audio",), ("image",), ("image", "audio")] if args.what == "both" else [None]
    for kinds in runs:
        result = full(args) if kinds is None else together(args, kinds)
        print(json.dumps(result, indent=1), flush=True)
        with open(OUTPUT / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
