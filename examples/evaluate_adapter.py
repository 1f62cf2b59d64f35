"""Writes a report on an adapter: what it learned, what its base lost. JSON, Markdown, pictures and a model card.

    python examples/evaluate_adapter.py --adapter outputs/x --text assets/tiny-moe/held_out.jsonl --output report
    python examples/evaluate_adapter.py --adapter outputs/x --text assets/tiny-moe/held_out.jsonl \
        --questions new_task.jsonl --compare other/report another/report --output report

--text holds what the base knew: JSON lines {"domain", "text"}, or "messages" in place of "text".
--questions holds the new task: JSON (lines) with "messages", the last one being the reference answer, or LLaVA JSON.
With scope "gate" both are also measured over --thresholds of the gate; the adapter itself is not changed.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from modeling_moextend import MoExtendForCausalLM, load_processor
from modeling_moextend.data.files import read_documents, read_questions
from modeling_moextend.evaluation.report import evaluate_adapter, read_point, write_report
from modeling_moextend.publishing.card import create_card
from modeling_moextend.tools.interrupts import run_script
from modeling_moextend.tools.locations import check_location

THRESHOLDS = [-1.0, -0.5, 0.0, 0.5, 1.0]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    parser.add_argument("--base", help="where the base lies, if elsewhere than the adapter says")
    parser.add_argument("--encoder", nargs="+", help="where the encoder lies, if elsewhere than the adapter says")
    parser.add_argument("--text", required=True, help="JSON lines with texts that the base knew")
    parser.add_argument("--questions", help="JSON or JSON lines with the new task; default: only the base's text")
    parser.add_argument("--image_folder", help="what image paths start from; default: the folder of --questions")
    parser.add_argument("--max_questions", type=int, help="a random sample of so many (seed 0)")
    parser.add_argument("--metric", default="exact_match", choices=["exact_match", "vqa_accuracy"])
    parser.add_argument(
        "--thresholds", type=float, nargs="*", help=f"of the gate, with scope 'gate'; default: {THRESHOLDS}"
    )
    parser.add_argument("--compare", nargs="*", default=[], help="report folders to show in the frontier as well")
    parser.add_argument("--title", help="the adapter's name in the report; default: its folder's")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a text that count")
    parser.add_argument("--max_new_tokens", type=int, default=12, help="length of an answer")
    parser.add_argument("--batch_size", type=int, default=16, help="texts at once; four times as many questions")
    parser.add_argument("--dtype", default="auto", help="e.g. float32; default: the base's")
    parser.add_argument("--output", default="report", help="folder of the report")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[MoExtendForCausalLM, PreTrainedTokenizerBase | ProcessorMixin]:
    """The model, and the processor saved with it or, where none was, its base's."""
    locations = {key: value for key in ("base", "encoder") if (value := getattr(args, key)) is not None}
    device_map = "auto" if torch.accelerator.is_available() else None
    model = MoExtendForCausalLM.from_pretrained(args.adapter, dtype=args.dtype, device_map=device_map, **locations)
    if not Path(args.adapter).is_dir() or Path(args.adapter, "tokenizer_config.json").exists():
        reader = AutoProcessor if model.senses else AutoTokenizer
        return model.eval(), reader.from_pretrained(args.adapter, trust_remote_code=False)
    config = model.config
    encoders = args.encoder or [sense.encoder_name_or_path for sense in config.senses.values()]
    return model.eval(), load_processor(args.base or config.base_model_name_or_path, encoders or None)


def main() -> None:
    args = parse()
    places = [("adapter", args.adapter), ("base", args.base), *(("encoder", one) for one in args.encoder or ())]
    for role, place in places:  # all of it before hours of measuring
        if place is not None:
            check_location(role, place)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    documents = read_documents(args.text)
    questions = read_questions(args.questions, args.image_folder, args.max_questions) if args.questions else []
    points = [read_point(path) for path in args.compare]
    model, processor = load(args)
    if args.thresholds is None:
        args.thresholds = THRESHOLDS if model.config.scope == "gate" else []
    names = ("thresholds", "metric", "max_length", "max_new_tokens", "batch_size")
    options = {name: getattr(args, name) for name in names}
    results = evaluate_adapter(model, processor, documents, questions, **options)
    data = {"text": Path(args.text).stem} | ({"task": Path(args.questions).stem} if args.questions else {})
    card = write_report(args.output, results, title=args.title or Path(args.adapter).name, points=points, **data)
    numbers = {"adapter_bytes": model.adapter_bytes(), "num_parameters": model.num_parameters(only_trainable=True)}
    create_card(model.config, **numbers, **card).save(Path(args.output, "model_card.md"))
    for result in card["results"]:
        print(f"{result['measure']}: {' -> '.join(filter(None, (result['base'], result['with the adapter'])))}")
    print(f"Report in {args.output}: {', '.join(sorted(path.name for path in Path(args.output).iterdir()))}")


if __name__ == "__main__":
    run_script(main)
