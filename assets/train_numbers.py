"""Trains the ready adapter of this folder, `numbers`: a number in digits -> in English words, for the base `tiny-moe`.

    make adapter

Numbers are those of the benchmark's task `numbers`: 0 to 9,999, four ways to write one, a tenth held out. What the
gate leaves to the base is text that the base wrote itself. Writes the adapter, its tokenizer and its card, and
measures it: held-out numbers, and the base's own held-out text.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from modeling_moextend import MoExtendForCausalLM, MoExtendSFTConfig, MoExtendSFTTrainer
from modeling_moextend.data.files import read_documents
from modeling_moextend.evaluation.report import evaluate_adapter, write_report
from modeling_moextend.publishing.facts import folder_card, read_facts, write_facts

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from tasks import TASKS, messages, number_records, training_records  # noqa: E402

BASE = "assets/tiny-moe"  # from the root of the repository, where the adapter is loaded as well
STEPS, BATCH, SEED = 1000, 16, 0
DELTAS = {"embedding": 16, "attention": 16, "output": 0}
SETTINGS = {
    "learning_rate": 6e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "per_device_train_batch_size": BATCH,
    "max_steps": STEPS,
    "seed": SEED,
    "assistant_only_loss": True,
    "max_length": None,
    "retention": "self",
    "retention_tokens": 100_000,
    "adapter_dtype": "bfloat16",
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 25,
    "use_cpu": True,
    "bf16": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="assets/numbers", help="folder of the adapter")
    parser.add_argument("--report", default="outputs/numbers/report", help="folder of its report")
    args = parser.parse_args()
    for path in Path(args.output).glob("*"):
        if path.is_symlink():  # of the last time: what is saved is not to go through it
            path.unlink()
    records = number_records()
    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")
    model = MoExtendForCausalLM.from_base(base, {layer: [layer] for layer in range(4)}, deltas=DELTAS)
    data = [{"messages": messages(record)} for record in training_records(records["train"], STEPS * BATCH, SEED)]
    trainer = MoExtendSFTTrainer(
        model=model,
        args=MoExtendSFTConfig(args.output, **SETTINGS),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    measure(args.output, args.report, records["test"])


def measure(folder: str, report: str, records: list) -> None:
    """The adapter as it was saved: its report, and the card in its folder."""
    model = MoExtendForCausalLM.from_pretrained(folder, dtype="float32").eval()
    questions = [{"prompt": messages(record, answer=False), "answer": record["answer"]} for record in records]
    random.Random(SEED).shuffle(questions)
    results = evaluate_adapter(
        model,
        AutoTokenizer.from_pretrained(folder),
        read_documents(Path(BASE, "held_out.jsonl")),
        questions,
        max_new_tokens=TASKS["numbers"].max_new_tokens,
    )
    card = write_report(report, results, title="numbers", task="numbers 0 to 9,999", text="held_out.jsonl of tiny-moe")
    print(json.dumps({name: results[name] for name in ("accuracy", "base_accuracy", "bit_equal")}))
    card = {name: card[name] for name in ("results", "forgetting", "metrics", "token_lines")} | {
        "datasets": ["the numbers 0 to 9,999 in digits and in words, a tenth held out"]
    }
    write_facts(folder, **read_facts(folder) | card | {"license": "apache-2.0", "language": "en"})
    folder_card(folder, model.config).save(Path(folder, "README.md"))
    link(Path(folder))


def link(folder: Path) -> None:
    """The repository has the code and the tokenizer already: in place of copies, links to them."""
    originals = [*(ROOT / "modeling_moextend").glob("*_moextend.py"), ROOT / BASE / "tokenizer.json"]
    for original in originals:
        copy = folder / original.name
        if copy.read_bytes() != original.read_bytes():
            raise ValueError(f"{copy} is not {original}.")
        copy.unlink()
        copy.symlink_to(os.path.relpath(original, folder.resolve()))


if __name__ == "__main__":
    main()
