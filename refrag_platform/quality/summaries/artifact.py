"""The artifact under examination, and readers that its summaries share."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refrag_platform.errors import ArtifactError
from refrag_platform.recipes import Recipe

SummaryRow = dict[str, Any]


@dataclass(frozen=True)
class Artifact:
    """Content folder of an artifact, its recipe and the content folders it was made from."""

    recipe: Recipe
    stage: str
    content: Path
    inputs: dict[str, Path]

    def read_json(self, name: str) -> dict[str, Any]:
        """An object of a JSON file in content."""
        return read_json(self.content / name)

    def files(self, names: list[str]) -> list[SummaryRow]:
        """One row per file name or pattern: missing is 1 when nothing but empty files matches it."""
        return [
            {"row": name, "missing": int(not any(path.stat().st_size for path in self.content.glob(name)))}
            for name in names
        ]


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        ArtifactError: the file is missing or is no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path.name} is missing") from None
    except ValueError as error:
        raise ArtifactError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ArtifactError(f"{path.name} must hold an object, not {type(values).__name__}")
    return values


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, one after another."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ArtifactError(f"{path.name} line {number} is not JSON: {error}") from None


def wanted(values: dict[str, Any], key: str, file: str) -> Any:
    """`values[key]`.

    Raises:
        ArtifactError: the file lacks the key.
    """
    if key not in values:
        raise ArtifactError(f"{file} has no {key!r}")
    return values[key]


def is_finite(value: Any) -> bool:
    """A number that is neither NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
