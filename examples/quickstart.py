"""Teaches a small pretrained MoE to see: easy-VQA -> align -> extend -> finetune -> save -> answer in a fresh process.

    make quickstart                                   # scope="modality", selection="exclusive"
    make quickstart ARGS="--paper true"               # the paper's routing, one new expert a layer
    python examples/quickstart.py --base mistralai/Mixtral-8x7B-Instruct-v0.1 \
        --encoder openai/clip-vit-large-patch14-336 --dtype bfloat16 \
        --data train.json --align_data captions.json --test test.json --image_folder images

The options are those of `moextend quickstart`, and so is the code.
"""

import sys

from moextend_cli import main

if __name__ == "__main__":
    sys.exit(main(["quickstart", *sys.argv[1:]]))
