"""Answers questions about images or audio with a saved adapter: only transformers (and what reads the files), no
MoExtend package.

    python examples/answer.py --adapter outputs/easy-vqa/adapter --questions outputs/easy-vqa/test.json

Prints the answers to the first questions of a LLaVA JSON file as one JSON list, in its order.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.modules["modeling_moextend"] = None  # an installed package can't help: the folders and transformers must do

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedModel, ProcessorMixin


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    parser.add_argument("--base", help="where the base lies, if elsewhere than the adapter says")
    parser.add_argument("--encoder", nargs="+", help="where the encoders lie, if elsewhere than the adapter says")
    parser.add_argument("--questions", required=True, help="LLaVA JSON file: entries with an image or clip each")
    parser.add_argument("--image_folder", help="what paths in it start from; default: the folder of --questions")
    parser.add_argument("--zero_inputs", action="store_true", help="with pixels set to zero, and a second of silence")
    parser.add_argument("--max_questions", type=int, help="only the first so many")
    parser.add_argument("--batch_size", type=int, default=64, help="questions answered at once")
    parser.add_argument("--output", help="write the answers to this JSON file as well")
    return parser.parse_args()


KINDS = {"image": "images", "audio": "audio"}  # key of an entry -> keyword of the processor


def inputs_of(entry: dict[str, Any], kind: str, folder: str | os.PathLike) -> list[str]:
    """Paths of an entry's images, or of its clips."""
    paths = entry.get(kind) or []
    return [str(Path(folder, path)) for path in (paths if isinstance(paths, list) else [paths])]


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    entries: list[dict[str, Any]],
    image_folder: str | os.PathLike,
    zero_inputs: bool,
) -> list[str]:
    """The model's answers (greedy, at most 8 tokens) to one batch of LLaVA entries."""
    questions = [entry["conversations"][0]["value"] for entry in entries]
    for mark, token in (("<image>", processor.image_token), ("<audio>", processor.audio_token)):
        questions = [text.replace(mark, token or mark) for text in questions]
    prompts = [
        processor.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in questions
    ]
    given = {name: [inputs_of(entry, kind, image_folder) for entry in entries] for kind, name in KINDS.items()}
    given = {name: own for name, own in given.items() if any(own)}
    if zero_inputs and "audio" in given:
        given["audio"] = [
            [torch.zeros(processor.feature_extractor.sampling_rate)] * len(own) for own in given["audio"]
        ]
    options = {"add_special_tokens": False, "padding": True, "padding_side": "left", "return_tensors": "pt"}
    inputs = processor(**given, text=prompts, **options).to(model.device)
    if zero_inputs and "images" in given:
        inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    args = parse()
    entries = json.loads(Path(args.questions).read_text(encoding="utf-8"))[: args.max_questions]
    folder, answers = args.image_folder or Path(args.questions).parent, []
    blind = [
        index for index, entry in enumerate(entries) if not any(isinstance(entry.get(kind), str) for kind in KINDS)
    ]
    if blind:
        raise SystemExit(f"Entry {blind[0]} of {args.questions} has no image and no audio: leave it out.")
    for kind, name in KINDS.items():
        missing = [entry[kind] for entry in entries if kind in entry and not Path(folder, entry[kind]).is_file()]
        if missing:  # before a model is loaded
            name = name if kind == "image" else "clips"
            raise SystemExit(
                f"{len(missing)} {name} are not in {folder}, the first of them {missing[0]}: pass --image_folder."
            )
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    locations = {key: value for key in ("base", "encoder") if (value := getattr(args, key)) is not None}
    model = AutoModelForCausalLM.from_pretrained(args.adapter, trust_remote_code=True, **locations)
    processor = AutoProcessor.from_pretrained(args.adapter, trust_remote_code=True)
    for start in tqdm(range(0, len(entries), args.batch_size), desc="answering", file=sys.stderr):
        answers += answer(model, processor, entries[start : start + args.batch_size], folder, args.zero_inputs)
    if args.output:
        Path(args.output).write_text(json.dumps(answers), encoding="utf-8")
    print(json.dumps(answers))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nStopped: nothing was written; the same command begins anew", file=sys.stderr)
        raise SystemExit(130) from None
