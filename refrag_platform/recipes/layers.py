"""The files that a recipe is made of: what it `extends`, itself, overrides; each value with where it was written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from refrag_platform.errors import RecipeError

# A value's keys from the top, e.g. ("cpt", "steps") or ("corpus", "sources", 0).
KeyPath = tuple[str | int, ...]
FILE_NAME = "recipe.yaml"
# Settings beside `path:` sources that name a file or folder relative to the recipe's own folder.
BESIDE = frozenset({"accelerate_config", "question_file"})


@dataclass(frozen=True)
class Layer:
    """What one file says of a recipe. `name`: of the file; `lines`: where its values are written, from 1."""

    name: str
    values: dict[str, Any]
    lines: dict[KeyPath, int]


def extended(path: Path) -> list[Path]:
    """The recipe file at `path` and those that it extends, the nearest first.

    Raises:
        RecipeError: one is missing, can't be read, or they go round in a circle.
    """
    files = [path]
    while (other := read_layer(files[-1]).values.get("extends")) is not None:
        file = path.parent.parent / str(other) / FILE_NAME
        if not file.is_file():
            beside = ", ".join(sorted(each.parent.name for each in path.parent.parent.glob(f"*/{FILE_NAME}")))
            raise RecipeError(f"{files[-1]}: extends is {other!r}, and there is no {file}; there are: {beside}")
        if file.parent.resolve() in [each.parent.resolve() for each in files]:
            circle = " -> ".join(each.parent.name for each in (*files, file))
            raise RecipeError(f"{files[-1]}: extends is {other!r}, which goes round in a circle: {circle}")
        files.append(file)
    return files


def recipe_layers(path: Path) -> list[Layer]:
    """What the recipe file at `path` is made of, the farthest that it extends first; its name is its own.

    Raises:
        RecipeError: as `extended`.
    """
    layers = []
    for file in reversed(extended(path)):
        layer = read_layer(file)
        if file != path:
            values = {key: value for key, value in layer.values.items() if key not in ("name", "extends")}
            layer = Layer(layer.name, _seen_from_beside(file.parent.name, values), layer.lines)
        layers.append(layer)
    return layers


def read_layer(path: Path, *under: str) -> Layer:
    """The mapping in a YAML file, or the one `under` these keys; empty where there is none under them, and without
    sections of which only the name is there.

    Raises:
        RecipeError: the file is missing, is not YAML, or no mapping is there.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}; `refrag recipes ls` lists the ones there are") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder; give the recipe's file, e.g. {path / FILE_NAME}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from None
    for key in under:
        values = values.get(key) if isinstance(values, dict) else values
    if under and values is None:
        values = {}
    if not isinstance(values, dict):
        place = f"{path}: {'.'.join(under)}" if under else f"{path}"
        raise RecipeError(f"{place} must be a mapping of keys, not {type(values).__name__}")
    if under:
        values = {key: value for key, value in values.items() if value is not None}
    lines = {keys[len(under) :]: line for keys, line in _lines(node).items() if keys[: len(under)] == under}
    return Layer("/".join(path.parts[-3:]) if path.name == FILE_NAME else path.name, values, lines)


def _lines(node: yaml.Node | None, keys: KeyPath = ()) -> dict[KeyPath, int]:
    """The line of every value below a node."""
    if isinstance(node, yaml.MappingNode):
        inside = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inside = [(number, value, value) for number, value in enumerate(node.value)]
    else:
        return {}
    lines: dict[KeyPath, int] = {}
    for name, mark, value in inside:
        lines[(*keys, name)] = mark.start_mark.line + 1
        lines |= _lines(value, (*keys, name))
    return lines


def _seen_from_beside(folder: str, value: Any, key: str = "") -> Any:
    """A value of the recipe in `folder` for one in a folder beside it: files that it names stay the same ones."""
    if isinstance(value, dict):
        return {name: _seen_from_beside(folder, inner, str(name)) for name, inner in value.items()}
    if not isinstance(value, str):
        return value
    scheme, name = ("path:", value[5:]) if value.startswith("path:") else ("", value)
    if (not scheme and key not in BESIDE) or Path(os.path.expandvars(name)).expanduser().is_absolute():
        return value
    return f"{scheme}../{folder}/{name}"
