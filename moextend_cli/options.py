"""The options of a recipe, read from the library's source: importing it takes seconds, and --help has none."""

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# What TRL and transformers add, and nearly every run sets; --help-all asks them for the rest.
COMMON = {
    "output_dir": "Where the adapter goes.",
    "num_train_epochs": "Epochs of stage finetune.",
    "max_steps": "Steps of stage finetune, in place of epochs.",
    "per_device_train_batch_size": "Samples a device and micro-batch.",
    "gradient_accumulation_steps": "Micro-batches a step.",
    "max_length": "Longest sample, in tokens.",
    "assistant_only_loss": "Whether only the assistant's answers are labels.",
    "bf16": "Whether to compute in bfloat16. Unset: where the machine can.",
    "use_cpu": "Whether to train on CPUs, launched processes together.",
    "seed": "Of start values and of the order of the data.",
    "logging_steps": "Steps between two lines of metrics.",
    "report_to": "Trackers, like tensorboard or wandb, or none.",
    "save_strategy": "When to write checkpoints: no, steps or epoch.",
    "save_steps": "Steps between two of them.",
    "resume_from_checkpoint": "A checkpoint to go on from; true: the last whole one.",
    "push_to_hub": "Whether to publish the adapter at the end.",
    "hub_model_id": "Where to.",
}


class Option(NamedTuple):
    name: str
    help: str
    several: bool  # whether it takes a list


def options_of(path: Path, class_name: str) -> Iterator[Option]:
    """The fields of a dataclass in a source file; a help text of theirs is written out there, not computed."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    (metadata,) = (key.value for key in field.value.keywords if key.arg == "metadata")
                    values = {key.value: value for key, value in zip(metadata.keys, metadata.values, strict=True)}
                    several = ast.unparse(field.annotation).startswith("list[")
                    yield Option(field.target.id, ast.literal_eval(values["help"]), several)


def add_recipe_options(parser: argparse.ArgumentParser, library: Path, quickstart: bool = False) -> None:
    """The options of a recipe, in groups. They are for --help and completion: the library parses the words itself."""
    sources = [
        ("what to build", library / "training" / "stages.py", "StagesConfig"),
        ("how an adapter trains", library / "training" / "config.py", "MoExtendSFTConfig"),
    ]
    if quickstart:
        sources.insert(0, ("the quickstart", library / "quickstart" / "run.py", "QuickstartConfig"))
    for title, path, class_name in sources:
        group = parser.add_argument_group(title)
        for option in options_of(path, class_name):
            add_option(group, option)
    group = parser.add_argument_group("how training runs (all of transformers' and TRL's: --help-all)")
    for name, text in COMMON.items():
        add_option(group, Option(name, text, False))


def add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    text = option.help.replace("%", "%%")
    several = {"nargs": "*"} if option.several else {"nargs": "?"}
    group.add_argument(f"--{option.name.replace('_', '-')}", help=text, metavar="X", **several)
