"""The chain behind an artifact, from manifests alone: no Dagster, no DVC. Run: `refrag lineage PATH`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refrag_platform.errors import ArtifactError
from refrag_platform.project import Project
from refrag_platform.versioning.digest import path_digest
from refrag_platform.versioning.manifest import FILE_NAME, InputRecord, Manifest


@dataclass(frozen=True)
class Source:
    """A file from outside the pipeline. `changed`: it is no longer the one that was read."""

    record: InputRecord
    changed: bool


@dataclass(frozen=True)
class Node:
    """An artifact and what it was made from.

    `recorded` is the hash that the artifact made from this one read; it differs from the manifest's when
    this one was replaced since, and then everything below is the new one's chain.
    """

    path: str
    manifest: Manifest
    recorded: str
    inputs: dict[str, Node]
    sources: list[Source]

    @property
    def replaced(self) -> bool:
        return self.recorded != self.manifest.hash

    def walk(self) -> Iterator[Node]:
        """This artifact and all behind it, each once, last made first."""
        seen: set[str] = set()
        waiting = [self]
        while waiting:
            node = waiting.pop(0)
            if node.path not in seen:
                seen.add(node.path)
                yield node
                waiting.extend(node.inputs.values())

    def plain(self) -> dict[str, Any]:
        """The chain as JSON values."""
        return {
            "path": self.path,
            "stage": self.manifest.stage,
            "model": self.manifest.model,
            "hash": self.manifest.hash,
            "recorded_hash": self.recorded,
            "replaced_since": self.replaced,
            "settings": self.manifest.settings,
            "seed": self.manifest.seed,
            "commit": self.manifest.commit,
            "metrics": self.manifest.metrics,
            "inputs": {name: node.plain() for name, node in self.inputs.items()},
            "sources": [
                {"path": source.record.path, "hash": source.record.hash, "changed_since": source.changed}
                for source in self.sources
            ],
        }


def trace(project: Project, path: Path) -> Node:
    """The chain behind the artifact at `path`: its folder, its content folder or its manifest.

    Raises:
        ArtifactError: `path`, or something it was made from, has no readable manifest.
    """
    folder = path.resolve()
    if folder.name in {"content", FILE_NAME}:
        folder = folder.parent
    return _trace(project, folder, None, {})


def _trace(project: Project, folder: Path, recorded: str | None, seen: dict[Path, Manifest]) -> Node:
    if folder not in seen:
        seen[folder] = Manifest.read(folder)
    manifest = seen[folder]
    inputs = {}
    for name, record in manifest.inputs.items():
        below = (project.root / record.path).parent
        try:
            inputs[name] = _trace(project, below, record.hash, seen)
        except ArtifactError as error:
            raise ArtifactError(
                f"the chain of {folder} breaks at its input {name} ({record.hash}): {error}; fetch it with "
                f"`refrag pull` or make it with `refrag run {name} --model {manifest.model}`"
            ) from None
    return Node(
        path=folder.relative_to(project.root).as_posix() if folder.is_relative_to(project.root) else str(folder),
        manifest=manifest,
        recorded=recorded or manifest.hash,
        inputs=inputs,
        sources=[Source(record, _changed(project, record)) for record in manifest.sources],
    )


def _changed(project: Project, record: InputRecord) -> bool:
    """Whether a source that is still there has other bytes than those that were read."""
    path = project.root / record.path
    return path.exists() and path_digest(path) != record.hash
