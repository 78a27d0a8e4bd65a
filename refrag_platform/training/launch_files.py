"""The accelerate config file that a stage's `accelerate_config` names, and what it names itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from refrag_platform.errors import RecipeError
from refrag_platform.recipes import Recipe


@dataclass(frozen=True)
class LaunchFiles:
    """`deepspeed`: the file of DeepSpeed's own settings, which `config` names relative to itself, if it does."""

    config: Path
    deepspeed: Path | None
    processes: int

    def paths(self) -> list[Path]:
        return [self.config, *([self.deepspeed] if self.deepspeed else [])]


def launch_files(base: Path, stage: str, recipe: Recipe) -> LaunchFiles | None:
    """The files that `stage` is launched with; None where it runs as one process of ours.

    Args: base: the recipe's folder.

    Raises:
        RecipeError: there is no such file, or it is no accelerate config.
    """
    name = getattr(getattr(recipe, stage, None), "accelerate_config", None)
    if name is None:
        return None
    path = base / Path(os.path.expandvars(name)).expanduser()
    if not path.is_file():
        raise RecipeError(f"{stage}.accelerate_config of {recipe.name}: no file {path}")
    try:
        values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        processes = int(values.get("num_processes", 1))
        config_file = (values.get("deepspeed_config") or {}).get("deepspeed_config_file")
        deepspeed = None if config_file is None else path.parent / config_file
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise RecipeError(f"{path} is no accelerate config ({error}); `accelerate config` writes one") from None
    if deepspeed is not None and not deepspeed.is_file():
        raise RecipeError(f"{path}: deepspeed_config_file is {config_file!r}, and there is no {deepspeed}")
    return LaunchFiles(path, deepspeed, processes)
