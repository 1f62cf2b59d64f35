"""Answers questions about images with a saved adapter: only transformers (and pillow), no MoExtend package.

    python examples/answer.py --adapter outputs/easy-vqa/adapter --questions outputs/easy-vqa/test.json

The questions are a LLaVA JSON file, or a dataset (Hub id or folder; that needs the datasets library). Prints one JSON
object: exact-match accuracy by kind of question.
"""

import argparse
import json
import sys

if __name__ == "__main__":
    sys.modules["modeling_moextend"] = None  # an installed package can't help: the folders and transformers must do

import torch
from measure import accuracy, read_questions
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    parser.add_argument("--base", help="where the base lies, if elsewhere than the adapter says")
    parser.add_argument("--encoder", help="where the encoder lies, if elsewhere than the adapter says")
    parser.add_argument("--questions", required=True, help="LLaVA JSON file, or dataset in TRL's format (split test)")
    parser.add_argument("--image_folder", help="what image paths start from; default: the folder of --questions")
    parser.add_argument("--zero_images", action="store_true", help="answer with every pixel value set to zero")
    parser.add_argument("--max_questions", type=int, help="a random sample of so many (seed 0), half of them open")
    parser.add_argument("--batch_size", type=int, default=64, help="questions answered at once")
    parser.add_argument("--output", help="also write every question with the answer given to this JSON file")
    return parser.parse_args()


@torch.inference_mode()
def answer(model, processor, rows, zero_images):
    """The model's answers (greedy, at most 8 tokens) to one batch of rows."""
    prompts = [row["question"].replace("<image>", processor.image_token) for row in rows]
    prompts = [
        processor.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in prompts
    ]
    images = [[Image.open(row["image"]) if isinstance(row["image"], str) else row["image"]] for row in rows]
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
    rows = read_questions(args.questions, args.image_folder, args.max_questions)
    given = []
    for start in tqdm(range(0, len(rows), args.batch_size), desc="answering", file=sys.stderr):
        given += answer(model, processor, rows[start : start + args.batch_size], args.zero_images)
    if args.output:
        answered = [{**row, "image": str(row["image"]), "given": text} for row, text in zip(rows, given, strict=True)]
        json.dump(answered, open(args.output, "w", encoding="utf-8"))
    print(json.dumps(accuracy(rows, given)))


if __name__ == "__main__":
    main()
