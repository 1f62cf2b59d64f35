"""Gives a small pretrained MoE eyes: easy-VQA -> align -> extend -> finetune -> save -> answer in a fresh process.

    make quickstart                                   # scope="modality", selection="exclusive"
    make quickstart ARGS="--paper"                    # the paper's routing
    python examples/quickstart.py --base mistralai/Mixtral-8x7B-Instruct-v0.1 \
        --encoder openai/clip-vit-large-patch14-336 --data train.json --align_data captions.json --test test.json

Every option of configuration/recipes/easy_vqa.yaml can be given. Writes the adapter, the picture of stage extend,
results.json and a model card to --output_dir, and prints the table.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import easy_vqa_data
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
from trl import TrlParser

from modeling_moextend import MoExtendForCausalLM, create_card
from modeling_moextend.sft_config import MoExtendSFTConfig
from modeling_moextend.stages import StagesConfig, run_stages

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "configuration/recipes/easy_vqa.yaml"


@dataclass
class QuickstartConfig:
    """What the quickstart itself needs."""

    test: str = field(default="outputs/easy-vqa/test.json", metadata={"help": "LLaVA JSON with held-out questions."})
    held_out_text: str | None = field(
        default=None, metadata={"help": "JSON lines {domain, text} for base perplexity."}
    )
    max_questions: int = field(default=2000, metadata={"help": "Held-out questions to answer, half of them open."})
    paper: bool = field(
        default=False, metadata={"help": "The paper's routing: one new expert, all tokens, one top-k."}
    )


def answer(folder, config, quick, *flags):
    """Accuracies of a saved adapter, by `answer.py` in a process that has only the three folders and transformers."""
    command = [sys.executable, str(HERE / "answer.py"), "--adapter", folder, "--questions", quick.test]
    command += [
        "--base",
        config.base,
        "--encoder",
        config.encoder,
        "--max_questions",
        str(quick.max_questions),
        *flags,
    ]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {kind: part["accuracy"] for kind, part in json.loads(output.splitlines()[-1]).items()}


def blind_readers(train, test, number):
    """Accuracies without seeing: always the commonest answer of a kind, and the commonest answer to each question."""
    from answer import read_questions

    known, asked = read_questions(train, None), read_questions(test, number)
    by_kind = {kind: Counter(r["answer"] for r in known if r["kind"] == kind) for kind in ("open", "yes/no")}
    by_question = {}
    for row in known:
        by_question.setdefault(row["question"], Counter())[row["answer"]] += 1
    result = {"majority answer": {}, "question-only reader": {}}
    for kind, counts in by_kind.items():
        rows = [row for row in asked if row["kind"] == kind]
        best = [by_question.get(row["question"], counts).most_common(1)[0][0] for row in rows]
        result["majority answer"][kind] = sum(r["answer"] == counts.most_common(1)[0][0] for r in rows) / len(rows)
        result["question-only reader"][kind] = sum(r["answer"] == b for r, b in zip(rows, best, strict=True)) / len(
            rows
        )
    return result


@torch.inference_mode()
def text_losses(model, tokenizer, path):
    """(perplexity per domain, all logits) on held-out text: exp of nats a token, first 256 tokens a document."""
    sums, logits = {}, []
    for row in map(json.loads, Path(path).read_text(encoding="utf-8").splitlines()):
        ids = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=256).input_ids
        output = model(input_ids=ids, labels=ids)
        loss, tokens = sums.get(row["domain"], (0.0, 0))
        sums[row["domain"]] = (loss + output.loss.item() * (ids.shape[1] - 1), tokens + ids.shape[1] - 1)
        logits.append(output.logits)
    return {domain: torch.tensor(loss / tokens).exp().item() for domain, (loss, tokens) in sums.items()}, logits


def base_on_text(model, config, path):
    """Base perplexity before and after (geometric mean of the domains), and whether all logits are bit-equal."""
    tokenizer = AutoTokenizer.from_pretrained(config.base)
    base = AutoModelForCausalLM.from_pretrained(config.base, dtype=config.dtype).eval()
    (before, one), (after, other) = (text_losses(m, tokenizer, path) for m in (base, model.eval()))
    mean = [torch.tensor(list(part.values())).log().mean().exp().item() for part in (before, after)]
    equal = all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    return {"before": mean[0], "after": mean[1], "bit_equal": equal, "per_domain": {"before": before, "after": after}}


def show(results):
    """The table on the terminal."""
    table = Table(title="Held-out questions about held-out images (exact match)")
    for heading in ("", "open questions", "yes/no"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, part in results["accuracy"].items():
        table.add_row(name, *(f"{100 * part[kind]:.1f}%" for kind in ("open", "yes/no")))
    console, text = Console(), results.get("base_text")
    console.print(table)
    if text:
        same = "every logit bit-equal" if text["bit_equal"] else "logits differ"
        console.print(f"Base perplexity on held-out text: {text['before']:.2f} -> {text['after']:.2f} ({same})")
    console.print(
        f"Adapter: {results['adapter_bytes'] / 2**20:.2f} MiB, {results['tensors']} tensors trained or stored"
    )
    console.print("Base and encoder tensors after training: bit-equal (every one hashed before and after)")
    console.print(f"Time: {results['seconds']:.0f} s, of which training stages {results['training_seconds']:.0f} s")


def main():
    arguments = sys.argv[1:] if "--config" in sys.argv else ["--config", str(RECIPE), *sys.argv[1:]]
    if "--paper" in arguments:
        arguments += "--scope all --selection compete --calibration all --new_experts 1".split()
    parser = TrlParser((QuickstartConfig, StagesConfig, MoExtendSFTConfig))
    quick, config, args = parser.parse_args_and_config(arguments)
    args.verify_base, start = True, time.time()
    logging.set_verbosity_error()
    if config.data.startswith("outputs/easy-vqa/"):
        easy_vqa_data.write(Path(config.data).parent)
    model = run_stages(config, args)
    training_seconds = time.time() - start
    untrained = MoExtendForCausalLM.from_pretrained(
        f"{args.output_dir}/align", base=config.base, encoder=config.encoder
    )
    untrained.extend(model.config.extended_layers)
    untrained.save_pretrained(f"{args.output_dir}/untrained")
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        Path(args.output_dir, "untrained", file).write_bytes(Path(args.output_dir, file).read_bytes())
    accuracy = blind_readers(config.data, quick.test, quick.max_questions)
    accuracy["untrained extension"] = answer(f"{args.output_dir}/untrained", config, quick)
    accuracy["trained, images zeroed"] = answer(args.output_dir, config, quick, "--zero_images")
    accuracy["trained"] = answer(args.output_dir, config, quick)
    results = {
        "accuracy": accuracy,
        "adapter_bytes": Path(args.output_dir, "moextend_adapter.safetensors").stat().st_size,
    }
    text = quick.held_out_text or f"{config.base}/held_out.jsonl"
    if Path(text).exists():
        results["base_text"] = base_on_text(model, config, text)
    results |= {"tensors": len(model.adapter_tensors()), "training_seconds": training_seconds}
    results["seconds"] = time.time() - start
    Path(args.output_dir, "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    rows = [{"": name, **{k: f"{100 * v:.1f}%" for k, v in part.items()}} for name, part in accuracy.items()]
    create_card(model.config, results=rows, adapter_bytes=results["adapter_bytes"]).save(
        f"{args.output_dir}/README.md"
    )
    show(results)


if __name__ == "__main__":
    main()
