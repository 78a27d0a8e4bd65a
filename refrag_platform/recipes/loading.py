"""A recipe out of its files, and all that is wrong with it at once, with the file and line of each fault."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from refrag_platform.errors import RecipeError
from refrag_platform.faults import explain, section_at
from refrag_platform.recipes.layers import KeyPath, Layer, recipe_layers
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
    """Load and check a recipe file, with all that it extends.

    Raises:
        RecipeError: as `resolve`, or a file is missing or is not YAML.
    """
    return resolve(path, [*recipe_layers(path), Layer("", overrides or {}, {})])


def resolve(path: Path, layers: Sequence[Layer]) -> Recipe:
    """The recipe of these layers, each put over those before it, checked.

    `null` takes away a value that may be absent, and gives any other setting its default again.

    Raises:
        RecipeError: a key or value is wrong; every fault of the recipe, which is that at `path`, is listed with its
            key, its value, what is allowed, and the file and line that it is written in.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        values = merge(values, layer.values)
    try:
        return Recipe.model_validate(_without_nulls(values, Recipe))
    except ValidationError as error:
        raise RecipeError(f"{path}:\n{explain(error, Recipe, places=_places(layers))}") from None


def origins(layers: Sequence[Layer]) -> dict[str, list[str]]:
    """By section, the files that say something of it, the one that wins last."""
    files: dict[str, list[str]] = {}
    for layer in layers:
        for section, value in layer.values.items():
            if value != {}:
                files.setdefault(section, []).append(layer.name)
    return files


def _places(layers: Sequence[Layer]) -> dict[KeyPath, str]:
    """Where each value that counts was written."""
    places: dict[KeyPath, str] = {}
    for layer in layers:
        places |= {keys: f"{layer.name}, line {line}" for keys, line in layer.lines.items()}
        if not layer.name:
            places = {keys: place for keys, place in places.items() if keys[0] not in layer.values}
    return places


def _without_nulls(values: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Values of a section without the nulls of keys that have a default and can't be null."""
    kept = {}
    for key, value in values.items():
        field = model.model_fields.get(key)
        if field and value is None and not field.is_required() and NoneType not in get_args(field.annotation):
            continue
        inner = section_at(model, (key,))
        kept[key] = _without_nulls(value, inner) if isinstance(value, dict) and inner is not model else value
    return kept
