"""Reading a recipe file, and saying all that is wrong with it at once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from refrag_platform.errors import RecipeError
from refrag_platform.faults import explain
from refrag_platform.recipes.recipe import Recipe


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `overrides` put over it, mapping by mapping; lists are replaced whole."""
    merged = copy.deepcopy(base)
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def read_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Load and check a recipe file.

    Raises:
        RecipeError: the file is missing, is not YAML, or has a wrong key or value; every fault is
            listed with its key, its value and what is allowed.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}; `refrag recipes ls` lists the ones there are") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder; give the recipe's file, e.g. {path / 'recipe.yaml'}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must be a mapping of keys, not {type(values).__name__}")
    values = merge(values, {key: value for key, value in (overrides or {}).items() if value not in (None, {})})
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{path}:\n{explain(error, Recipe)}") from None
