"""Runs the stages of MoExtend: align (projector), extend (which layers, which experts), finetune (new experts).

    python examples/train.py --config configuration/recipes/easy_vqa.yaml
    python examples/train.py --config configuration/recipes/easy_vqa.yaml --stages finetune --adapter outputs/aligned \
        --plan outputs/easy-vqa/adapter/extend/plan.json
    accelerate launch --config_file configuration/accelerate/fsdp2.yaml examples/train.py --config ...

The options are those of `moextend train`, and so is the code.
"""

import sys

from moextend_cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
