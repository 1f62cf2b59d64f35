"""What dpo.py and grpo.py share: questions, an adapter to begin with, and what is measured before and after.

    python examples/preference.py    # makes the adapter to begin with, as the other two do where it is missing

Questions ask for the module of a name of Python's standard library, under the system prompt "Answer in a full
sentence.". The adapter to begin with has learned from data as one finds it: three answers of four are bare names. Its
gate lets these conversations through and the base's own kinds of text not, half of `<base>/held_out.jsonl`. What is
measured: the share of held-out questions that are answered in a sentence, and the other half of that text.
"""

import argparse
import importlib
import json
import random
import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_moextend import (
    MoExtendForCausalLM,
    MoExtendSFTConfig,
    MoExtendSFTTrainer,
    base_retention,
    compare_with_base,
)
from modeling_moextend.data import files
from modeling_moextend.tools.hashes import base_tensors_hash
from modeling_moextend.tools.interrupts import run_script

BASE = Path(__file__).resolve().parents[1] / "assets/tiny-moe"
PLAN = {2: [0, 1, 2, 3], 3: [0, 1, 2, 3]}
INSTRUCTION = "Answer in a full sentence."
QUESTIONS = ("Where is `{}` defined?", "Which module has `{}`?", "From which module do I import `{}`?")
MODULES = """argparse ast asyncio calendar collections concurrent.futures configparser contextlib copy csv
dataclasses datetime decimal difflib email.message enum fractions functools glob gzip hashlib heapq http.client
inspect io itertools json logging math operator os.path pathlib pickle queue random re shutil sqlite3 statistics
string subprocess tempfile textwrap threading time types typing unittest urllib.parse uuid zipfile""".split()
HELD_OUT = 200
CPU = not torch.cuda.is_available()
SETTINGS = {"use_cpu": CPU, "bf16": not CPU, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


def questions() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """([{prompt, chosen, rejected}] to train on, the same held out): TRL's preference format."""
    modules = {name: module for module in reversed(MODULES) for name in dir(importlib.import_module(module))}
    names = sorted(name for name in modules if name[0] != "_" and len(name) > 3)
    random.Random(0).shuffle(names)
    pairs = []
    for number, name in enumerate(names):
        prompt = {"role": "user", "content": QUESTIONS[number % len(QUESTIONS)].format(name)}
        answers = {"chosen": f"In `{modules[name]}`.", "rejected": f"`{modules[name]}`"}
        pair = {key: [{"role": "assistant", "content": text}] for key, text in answers.items()}
        pairs.append({"prompt": [{"role": "system", "content": INSTRUCTION}, prompt], **pair})
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


def in_a_sentence(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """1.0 for each answer that is a sentence, 0.0 for others: a reward function of TRL's."""
    return [float(bool(re.fullmatch(r"[A-Z].*\.", completion[0]["content"].strip()))) for completion in completions]


def options(description: str, output_dir: str | None = None, max_steps: int | None = None) -> argparse.Namespace:
    """The command line, with these defaults; its last two options are of scripts that train by preference."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(BASE), help="folder with held_out.jsonl, {domain, text} a line, in it")
    parser.add_argument("--start", default="outputs/preference/start", help="the adapter to begin with")
    if output_dir is not None:
        parser.add_argument("--output_dir", default=output_dir, help="where the trained adapter and the results go")
        parser.add_argument("--max_steps", type=int, default=max_steps, help="of training by preference")
    chosen = parser.parse_args()
    if not Path(chosen.base, "held_out.jsonl").is_file():  # before anything is loaded
        parser.error(f"argument --base: {chosen.base} is no folder with a base and held_out.jsonl")
    if Path(chosen.start).is_file():
        parser.error(f"argument --start: {chosen.start} is a file, and an adapter is a folder")
    return chosen


def begin(base: str, folder: str) -> tuple[MoExtendForCausalLM, PreTrainedTokenizerBase]:
    """The adapter to begin with, ready to train, and the base's tokenizer; made and saved where `folder` has none."""
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left", trust_remote_code=False)
    if not Path(folder, "config.json").exists():
        make(base, folder, tokenizer)
    model = MoExtendForCausalLM.from_pretrained(folder, base=base, dtype="float32" if CPU else "bfloat16")
    model.set_trainable()  # in float32, whatever the base's dtype
    return model, tokenizer


def make(base: str, folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Trains the gate, and new experts on bare names and some sentences."""
    torch.manual_seed(0)
    model = MoExtendForCausalLM.from_base(base, PLAN, dtype="float32" if CPU else "bfloat16")
    train, _ = questions()
    found = [
        {"messages": pair["prompt"] + pair["rejected" if number % 4 else "chosen"]}
        for number, pair in enumerate(train)
    ]
    own_text = [{"text": document["text"]} for document in documents(base)[::2]]
    settings = {"max_steps": 40, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "assistant_only_loss": True}
    settings |= {"gate_steps": 200, "retention_tokens": 20_000, "retention_length": 256}
    trainer = MoExtendSFTTrainer(
        model,
        MoExtendSFTConfig(folder, **SETTINGS, **settings),
        train_dataset=Dataset.from_list(found),
        retention_dataset=Dataset.from_list(own_text),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()


def documents(base: str) -> list[dict[str, str]]:
    return files.read_documents(Path(base, "held_out.jsonl"))


@torch.no_grad()
def answers(model: MoExtendForCausalLM, tokenizer: PreTrainedTokenizerBase, batch_size: int = 50) -> list[str]:
    """What the model answers to the held-out questions."""
    prompts, texts = [pair["prompt"] for pair in questions()[1]], []
    for first in range(0, len(prompts), batch_size):
        chats = {"add_generation_prompt": True, "padding": True, "return_dict": True, "return_tensors": "pt"}
        inputs = tokenizer.apply_chat_template(prompts[first : first + batch_size], **chats).to(model.device)
        outputs = model.eval().generate(**inputs, max_new_tokens=16, do_sample=False)
        texts += tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def measure(model: MoExtendForCausalLM, tokenizer: PreTrainedTokenizerBase, base: str) -> dict[str, Any]:
    """`sentences`: share of held-out questions answered in one, 0 to 1; some answers; the base's tensors as hashes;
    and what became of its own text: perplexity with the adapter off and on, and whether every logit is the same."""
    texts = answers(model, tokenizer)
    rewards = in_a_sentence([[{"content": text}] for text in texts])
    compared = compare_with_base(model, tokenizer, documents(base)[1::2], batch_size=1, progress=False)
    retention = base_retention(compared)
    text = {name: retention[f"perplexity_{name}"] for name in ("before", "after")}
    text["bit_equal"] = all(document["bit_equal"] for document in compared)
    hashes = base_tensors_hash(model)
    return {"sentences": sum(rewards) / len(rewards), "answers": texts[:5], "base_text": text, "base_tensors": hashes}


def report(before: dict[str, Any], after: dict[str, Any], folder: str) -> None:
    """Prints both measurements and writes them to `folder`/results.json."""
    same = before.pop("base_tensors") == after.pop("base_tensors")
    results = {"before": before, "after": after, "base_bit_equal": same}
    Path(folder, "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    for name, found in (("before", before), ("after", after)):
        text = found["base_text"]
        print(
            f"{name}: {100 * found['sentences']:.1f}% in a sentence, like {found['answers'][0]!r}; base text: "
            f"perplexity {text['before']:.2f} -> {text['after']:.2f}, "
            f"{'every logit bit-equal' if text['bit_equal'] else 'logits differ'}"
        )
    print(f"Base tensors before and after: {'bit-equal' if same else 'CHANGED'}; adapter in {folder}")


def main() -> None:
    chosen = options(__doc__)
    begin(chosen.base, chosen.start)
    print(f"Adapter in {chosen.start}")


if __name__ == "__main__":
    run_script(main)
