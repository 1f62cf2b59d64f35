"""Answers questions about images with a saved adapter: only transformers (and pillow), no MoExtend package.

    python examples/answer.py --adapter outputs/quickstart --questions outputs/easy-vqa/test.json

The questions are a LLaVA JSON file. Prints one JSON object: accuracy by kind of question (exact match), their numbers.
"""

import argparse
import json
import random
import sys

if __name__ == "__main__":
    sys.modules["modeling_moextend"] = None  # an installed package can't help: the folders and transformers must do

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    parser.add_argument("--base", help="where the base lies, if elsewhere than the adapter says")
    parser.add_argument("--encoder", help="where the encoder lies, if elsewhere than the adapter says")
    parser.add_argument("--questions", required=True, help="LLaVA JSON file, one question and answer an entry")
    parser.add_argument(
        "--zero_images", action="store_true", help="put black pixels in place of every image's features"
    )
    parser.add_argument("--max_questions", type=int, help="a random sample of so many (seed 0), half of them open")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--output", help="also write every answer to this JSON file")
    return parser.parse_args()


def read_questions(path, number):
    """[{image, question, answer, kind}]; with `number`, a sample with as many open as yes/no questions."""
    rows = []
    for entry in json.load(open(path, encoding="utf-8")):
        question, answer = (turn["value"] for turn in entry["conversations"][:2])
        kind = "yes/no" if answer in ("yes", "no") else "open"
        rows.append({"image": entry["image"], "question": question, "answer": answer, "kind": kind})
    if number is None:
        return rows
    generator = random.Random(0)
    kinds = [[row for row in rows if row["kind"] == kind] for kind in ("open", "yes/no")]
    return [row for kind in kinds for row in generator.sample(kind, min(number // 2, len(kind)))]


@torch.inference_mode()
def answer(model, processor, rows, zero_images):
    """The model's answers (greedy, at most 8 tokens) to one batch of rows."""
    text = [row["question"].replace("<image>", processor.image_token) for row in rows]
    prompts = [
        processor.apply_chat_template([{"role": "user", "content": t}], tokenize=False, add_generation_prompt=True)
        for t in text
    ]
    images = [[Image.open(row["image"])] for row in rows]
    options = {"add_special_tokens": False, "padding": True, "padding_side": "left", "return_tensors": "pt"}
    inputs = processor(images=images, text=prompts, **options).to(model.device)
    if zero_images:
        inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main():
    args = parse()
    places = {key: value for key in ("base", "encoder") if (value := getattr(args, key)) is not None}
    model = AutoModelForCausalLM.from_pretrained(args.adapter, trust_remote_code=True, **places)
    processor = AutoProcessor.from_pretrained(args.adapter, trust_remote_code=True)
    rows = read_questions(args.questions, args.max_questions)
    for start in tqdm(range(0, len(rows), args.batch_size), desc="answering", file=sys.stderr):
        batch = rows[start : start + args.batch_size]
        for row, given in zip(batch, answer(model, processor, batch, args.zero_images), strict=True):
            row["given"] = given.strip().lower()
    result = {}
    for kind in ("open", "yes/no"):
        hits = [row["given"] == row["answer"] for row in rows if row["kind"] == kind]
        result[kind] = {"accuracy": sum(hits) / max(len(hits), 1), "questions": len(hits)}
    if args.output:
        json.dump(rows, open(args.output, "w", encoding="utf-8"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
