"""Recipes: flat YAML files with the options of a run, by the name of one that ships or by its path."""

import argparse
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from ..publishing.hub import publish_folder
from ..tools.base_weights import Unusable
from .config import MoExtendSFTConfig
from .stages import StagesConfig, run_stages
from .trainer import torch_dtype

SHIPPED = files(__package__).joinpath("recipe_files")


class RecipeParser(TrlParser):
    """TRL's parser of a YAML file and options that win over it; wrong ones are a `ValueError`, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise Unusable(f"{message.removesuffix('.')}. The options: {self.prog} --help-all")

    def parse(self, words: Sequence[str]) -> tuple[Any, ...]:
        """One object a dataclass, from `--config RECIPE` (its name or path) and options.

        Raises:
            ValueError: an unknown option or key, a value of another kind, no such recipe.
        """
        if words and not words[0].startswith("-"):
            self.error(f"{words[0]!r} is no option; a recipe is named by --config {words[0]}")
        words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        if "--config" in words[:-1]:
            position = words.index("--config") + 1
            words[position] = find_recipe(words[position])
        try:
            *parsed, unknown = self.parse_args_and_config(words, return_remaining_strings=True)
        except (argparse.ArgumentError, ValueError, TypeError, yaml.YAMLError) as error:
            if isinstance(error, Unusable):
                raise
            what = "The recipe is no text in UTF-8: " if isinstance(error, UnicodeDecodeError) else ""
            raise Unusable(f"{what}{str(error).removesuffix('.')}. The options: {self.prog} --help-all") from error
        if unknown:
            self.error(f"no such options: {' '.join(unknown)}")
        return tuple(parsed)


def recipe_names() -> list[str]:
    """Names of the recipes that ship."""
    return sorted(path.name.removesuffix(".yaml") for path in SHIPPED.iterdir() if path.name.endswith(".yaml"))


def find_recipe(name: str) -> str:
    """The path of a recipe that is given by its path, or by the name of one that ships.

    Raises:
        ValueError: names those that ship.
    """
    if os.path.isfile(name):
        return name
    if name in recipe_names():
        return str(SHIPPED / f"{name}.yaml")
    raise Unusable(f"config={name!r}: there is no such file, and no such recipe among {', '.join(recipe_names())}.")


def recipe_parser() -> RecipeParser:
    """Of `moextend train`: every option, the trainer's too."""
    return RecipeParser((StagesConfig, MoExtendSFTConfig), prog="moextend train")


def train(words: Sequence[str]) -> dict[str, Any]:
    """Runs the stages that a recipe and options name, and publishes where they say so; what was made, JSON-ready."""
    config, args = recipe_parser().parse(words)
    model = run_stages(config, args)
    result = {"adapter": args.output_dir, "stages": config.stages, "parameters": 0}
    result["parameters"] = sum(tensor.numel() for tensor in model.adapter_tensors().values())
    result["bytes"] = model.adapter_bytes(torch_dtype(args.adapter_dtype))
    pushed = "finetune" in config.stages  # by the trainer
    if args.push_to_hub and not pushed and args.process_index == 0:
        options = {"private": args.hub_private_repo, "token": args.hub_token, "revision": args.hub_revision}
        publish_folder(args.output_dir, args.hub_model_id or Path(args.output_dir).name, **options)
    return result
