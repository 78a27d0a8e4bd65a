"""Summary rows of a package: one per artifact that it names by digest."""

from __future__ import annotations

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.quality.summaries.artifact import Artifact, SummaryRow, wanted

LOCK_FILE = "package.json"


def files(artifact: Artifact) -> list[SummaryRow]:
    """The lock."""
    return artifact.files([LOCK_FILE])


def holds(artifact: Artifact) -> list[SummaryRow]:
    """One row per input of the stage: whether the lock names it by the hash of its bytes."""
    lock = artifact.read_json(LOCK_FILE)
    stated = wanted(lock, "inputs", LOCK_FILE)
    return [
        {"row": name, "differs": int(folder_digest(folder) != stated.get(name))}
        for name, folder in sorted(artifact.inputs.items())
    ]
