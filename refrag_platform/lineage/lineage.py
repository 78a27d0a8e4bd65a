"""The chain behind an artifact, from manifests alone: no Dagster, no DVC. Run: `refrag lineage PATH`.

`trace` gives one artifact's chain as it lies in place; `find` looks anything up, both ways, in the graph of all
versions (graph.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refrag_platform.artifacts.digest import path_digest
from refrag_platform.artifacts.manifest import FILE_NAME, InputRecord, Manifest
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.lineage.graph import (
    IN_PLACE,
    Graph,
    Version,
    VersionKind,
    add_folder,
    add_releases,
    read_graph,
    recorded_source,
)
from refrag_platform.lineage.impact import find_source, source_file
from refrag_platform.project import Project
from refrag_platform.serving.bento import BENTO_FILE, MODEL_FILE
from refrag_platform.stages import STAGES


@dataclass(frozen=True)
class Source:
    """A file from outside the pipeline. `changed`: it is no longer the one that was read.

    `behind`: of a release's manifest.json all that it says the release was made from, down to the source files.
    """

    record: InputRecord
    changed: bool
    behind: list[Version]


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
                {
                    "path": source.record.path,
                    "hash": source.record.hash,
                    "changed_since": source.changed,
                    "behind": [str(version) for version in source.behind],
                }
                for source in self.sources
            ],
        }


@dataclass(frozen=True)
class NamedVersions:
    """What a name stands for: its versions in the graph of all. `kind`: of these."""

    graph: Graph
    versions: list[Version]
    kind: VersionKind


def find(project: Project | None, what: str) -> NamedVersions:
    """Look up an artifact, a release, a Bento or model (its tag or folder), a source file or a document.

    Without a project, only a Bento's or a model's folder can be looked up: it has its lineage in it.

    Raises:
        RefragError: there is no such thing.
    """
    graph = Graph() if project is None else read_graph(project)
    path = Path(what)
    if (path / BENTO_FILE).is_file() or (path / MODEL_FILE).is_file():
        version = add_folder(graph, path.resolve())
        return NamedVersions(graph, [version], version.kind)
    if project is None:
        raise RefragError(f"{what} is neither in a project nor a folder of a Bento; change into the project")
    kinds: tuple[VersionKind, ...] = ("bento", "model")
    for kind in kinds:
        if (version := Version(kind, what)) in graph.versions:
            return NamedVersions(graph, [version], kind)
    folder = artifact_folder(path)
    if folder.is_relative_to(project.root):
        for version in graph.named(folder.relative_to(project.root).as_posix()):
            if IN_PLACE in graph.versions[version].places:
                return NamedVersions(graph, [version], version.kind)
    if folder.name in STAGES and (folder / FILE_NAME).is_file():
        Manifest.read(folder)  # It is not in the graph because it can't be read: this says why.
    if folder.name in STAGES and folder == project.stage_dir(folder.name, folder.parent.name).resolve():
        raise ArtifactError(
            f"{what} has not been made, or lost its {FILE_NAME}; make it: `refrag run {folder.name} --model "
            f"{folder.parent.name}`"
        )
    source = find_source(project, graph, what)
    return NamedVersions(graph, list(source.start), "source")


def artifact_folder(path: Path) -> Path:
    """An artifact's folder, given that, its content folder or its manifest."""
    folder = path.resolve()
    return folder.parent if folder.name in {"content", FILE_NAME} else folder


def trace(project: Project, path: Path) -> Node:
    """The chain behind the artifact at `path`: its folder, its content folder or its manifest.

    Raises:
        ArtifactError: `path`, or something it was made from, has no readable manifest.
    """
    return _trace(project, artifact_folder(path), None, {}, ())


def _trace(
    project: Project, folder: Path, recorded: str | None, seen: dict[Path, Manifest], after: tuple[Path, ...]
) -> Node:
    """Args: seen: manifests read so far. after: what was made from it, directly or not."""
    if folder in after:
        raise ArtifactError(f"{folder} was made from it, in a former order of the stages")
    if folder not in seen:
        seen[folder] = Manifest.read(folder)
    manifest = seen[folder]
    inputs = {}
    for name, record in manifest.inputs.items():
        below = (project.root / record.path).parent
        try:
            inputs[name] = _trace(project, below, record.hash, seen, (*after, folder))
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
        sources=[Source(record, _changed(project, record), _behind(project, record)) for record in manifest.sources],
    )


def _behind(project: Project, record: InputRecord) -> list[Version]:
    """What the release whose manifest.json a source is was made from, last made first; empty of any other source."""
    release, graph = recorded_source(record.path, record.hash), Graph()
    if release.kind == "release":
        add_releases(graph, project)
    behind = graph.behind([release] if release in graph.versions else [])
    return [version for layer in reversed(behind.layers()) for version in layer if version != release]


def _changed(project: Project, record: InputRecord) -> bool:
    """Whether a source that is still there has other bytes than those that were read."""
    path = source_file(project, record.path)
    if path is None or not path.exists():
        return False
    try:
        # What is neither, a pipe say, can't have been read.
        return not (path.is_file() or path.is_dir()) or path_digest(path) != record.hash
    except OSError:
        return True
