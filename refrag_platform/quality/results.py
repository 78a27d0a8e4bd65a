"""checks/results.json beside an artifact: what its checks found, and for which bytes, inputs, recipe and suite.

Checks read every weight and load models; what they found stays true as long as none of these changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from refrag_platform.artifacts.digest import code_digest
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.errors import ArtifactError
from refrag_platform.files import write_json
from refrag_platform.recipes import Recipe

DOCS_FOLDER = "checks"
RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class CheckResult:
    """What came of one expectation. `observed`: what stood in which row (a shard, a split, a file)."""

    name: str
    passed: bool
    blocking: bool
    message: str
    observed: dict[str, Any] = field(default_factory=dict)


def subject(recipe: Recipe, manifest: Manifest) -> str:
    """One hash over all that decides the results: the artifact's bytes, its inputs', the recipe, the checks."""
    facts = {
        "artifact": manifest.hash,
        "inputs": {name: record.hash for name, record in manifest.inputs.items()},
        "recipe": recipe.model_dump(mode="json"),
        "checks": code_digest(Path(__file__).parent, (".",)),
    }
    return hashlib.md5(json.dumps(facts, sort_keys=True).encode(), usedforsecurity=False).hexdigest()


def write_results(docs: Path, results: Sequence[CheckResult], of: str | None) -> None:
    """Write results.json, the last file of the folder: where it is, the Data Docs are whole."""
    values = {"subject": of, "results": [asdict(result) for result in results]}
    write_json(docs / RESULTS_FILE, values, default=str, allow_nan=True)


def read_results(docs: Path, of: str | None = None) -> list[CheckResult]:
    """The results in the folder `docs`.

    Raises:
        ArtifactError: there are none, or they are of another subject than `of`.
    """
    path = docs / RESULTS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        subject, results = values["subject"], [CheckResult(**row) for row in values["results"]]
    except (OSError, ValueError, TypeError, KeyError):
        raise ArtifactError(f"{path} holds no results of checks; run the stage again") from None
    if of is not None and subject != of:
        raise ArtifactError(f"{path} holds the results of other bytes or other checks; run the stage again")
    return results
