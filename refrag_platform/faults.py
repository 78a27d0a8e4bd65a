"""What is wrong with a mapping that a user wrote, a line a fault: key, value and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from pydantic import BaseModel, ValidationError


def explain(
    error: ValidationError,
    model: type[BaseModel],
    name: str = "",
    places: Mapping[tuple[int | str, ...], str] | None = None,
) -> str:
    """The faults of `error`, which checking a mapping against `model` raised.

    Args:
        name: of the mapping, where it is a section of its file.
        places: where values were written, by their keys from the top.
    """
    lines = []
    for fault in error.errors():
        location, value = fault["loc"], fault["input"]
        key = ".".join(filter(None, (name, *map(str, location))))
        said = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            allowed = ", ".join(section_at(model, location[:-1]).model_fields)
            lines.append(f"  {key} is {value!r}; unknown key, allowed here: {allowed}")
        elif fault["type"] == "missing":
            lines.append(f"  {key} is missing, and has no default")
        elif fault["type"] == "value_error" and isinstance(value, dict):
            # About several keys, which it names itself.
            lines.append(f"  {key}: {said}" if key else f"  {said}")
        else:
            lines.append(f"  {key} is {value!r}; {said}")
        # What is missing has no place of its own, but its section has.
        above = (location[:end] for end in range(len(location), 0, -1))
        if place := next((places[keys] for keys in above if places and keys in places), None):
            lines[-1] += f" ({place})"
    return "\n".join(lines)


def section_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The section at a location inside `model`; list positions and the like stay where they are."""
    for part in location:
        if part in model.model_fields:
            annotation = model.model_fields[str(part)].annotation
            inside = [annotation, *get_args(annotation)]
            model = next((kind for kind in inside if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return model
