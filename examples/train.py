"""Runs the stages of MoExtend: align (projector), extend (which layers, which experts), finetune (new experts).

    python examples/train.py --config configuration/recipes/easy_vqa.yaml
    python examples/train.py --config configuration/recipes/easy_vqa.yaml --stages finetune --adapter outputs/aligned \
        --plan outputs/easy-vqa/adapter/extend/plan.json
    accelerate launch --config_file configuration/accelerate/fsdp2.yaml examples/train.py --config ...

Options on the command line win over the recipe; unknown ones are an error.
"""

from pathlib import Path

from trl import TrlParser

from modeling_moextend.publishing.hub import publish_folder
from modeling_moextend.tools.interrupts import run_script
from modeling_moextend.training.config import MoExtendSFTConfig
from modeling_moextend.training.stages import StagesConfig, run_stages


def main() -> None:
    config, args = TrlParser((StagesConfig, MoExtendSFTConfig)).parse_args_and_config()
    model = run_stages(config, args)
    model.print_trainable_parameters()
    pushed = "finetune" in config.stages  # by the trainer
    if args.push_to_hub and not pushed and args.process_index == 0:
        options = {"private": args.hub_private_repo, "token": args.hub_token, "revision": args.hub_revision}
        publish_folder(args.output_dir, args.hub_model_id or Path(args.output_dir).name, **options)
    print(f"Adapter in {args.output_dir}")


if __name__ == "__main__":
    run_script(main)
