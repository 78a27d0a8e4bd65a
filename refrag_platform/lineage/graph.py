"""All versions of all artifacts and what each was made from: in place, in Git, in BentoML's store, in releases.

`trace` (lineage.py) follows one artifact's chain as it lies in place. This is the whole: every node is one version,
named by its hash, so that what was replaced long ago is found too, and both ways.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from refrag_platform.artifacts.digest import file_digest
from refrag_platform.artifacts.manifest import FILE_NAME, Manifest
from refrag_platform.compact.record import earlier_records
from refrag_platform.errors import ArtifactError
from refrag_platform.history import commits
from refrag_platform.project import Project
from refrag_platform.serving import bento
from refrag_platform.stages import SHIPPED

VersionKind = Literal["source", "artifact", "release", "model", "bento"]
IN_PLACE, STORE = "in place", "BentoML's store"
# MODEL@VERSION:STAGE, as history.versions names a released checkpoint.
BASE = re.compile(r"([a-z0-9-]+)@v\d+\.\d+\.\d+:(\w+)")


@dataclass(frozen=True, order=True)
class Version:
    """A file, an artifact or packed weights (`name`: the folder), or a model or Bento of BentoML's store (its tag).

    The hash of packed weights, models/NAME/release, is that of their manifest.json, which states all others.
    """

    kind: VersionKind
    name: str
    hash: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.hash}".rstrip()


@dataclass
class Facts:
    """What is known of a version. `places`: where it was found; none if only something made from it was.

    `made_from` is None where no record says what it was made from.
    """

    made_from: set[Version] | None = None
    places: list[str] = field(default_factory=list)
    model: str = ""


class Graph:
    """Versions and what they were made from."""

    def __init__(self) -> None:
        self.versions: dict[Version, Facts] = {}

    def add(self, version: Version, made_from: Iterable[Version] | None, place: str = "", model: str = "") -> None:
        """Enter what one record says of a version."""
        facts = self.versions.setdefault(version, Facts())
        facts.model = facts.model or model
        if place and place not in facts.places:
            facts.places.append(place)
        if made_from is not None:
            facts.made_from = (facts.made_from or set()) | set(made_from)
            for origin in facts.made_from:
                self.versions.setdefault(origin, Facts(set() if origin.kind == "source" else None))

    def add_manifest(self, folder: str, manifest: Manifest, place: str) -> None:
        """Enter an artifact."""
        inputs = {record.path: record.hash for record in manifest.inputs.values()}
        sources = {record.path: record.hash for record in manifest.sources}
        self.add(Version("artifact", folder, manifest.hash), _origins(inputs, sources), place, manifest.model)

    def named(self, name: str) -> list[Version]:
        """All versions of a file, an artifact's folder or a tag."""
        return sorted(version for version in self.versions if version.name == name)

    def behind(self, start: Iterable[Version]) -> Graph:
        """`start` and all that it was made from."""
        return self._reach(start, lambda version: self.versions[version].made_from or ())

    def after(self, start: Iterable[Version]) -> Graph:
        """`start` and all that was made from it."""
        products: dict[Version, set[Version]] = {}
        for version, facts in self.versions.items():
            for origin in facts.made_from or ():
                products.setdefault(origin, set()).add(version)
        return self._reach(start, lambda version: products.get(version, ()))

    def _reach(self, start: Iterable[Version], step: Callable[[Version], Iterable[Version]]) -> Graph:
        graph, waiting = Graph(), list(start)
        while waiting:
            version = waiting.pop()
            if version not in graph.versions:
                graph.versions[version] = self.versions[version]
                waiting.extend(step(version))
        return graph

    def layers(self) -> list[list[Version]]:
        """Versions in the order in which they are made: each stands in a layer after all that it was made from."""
        depth: dict[Version, int] = {}

        def place(version: Version) -> int:
            if version not in depth:
                # Weights that were taken over unchanged, and packed again, may stand behind themselves.
                depth[version] = 0
                origins = [origin for origin in self.versions[version].made_from or () if origin in self.versions]
                depth[version] = 1 + max(map(place, origins), default=-1)
            return depth[version]

        for version in self.versions:
            place(version)
        layers: list[list[Version]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
        for version in sorted(depth):
            layers[depth[version]].append(version)
        return layers

    def edges(self) -> Iterator[tuple[Version, Version]]:
        """(made from, made), in order, as far as both are here."""
        for product in sorted(self.versions):
            for origin in sorted(self.versions[product].made_from or ()):
                if origin in self.versions:
                    yield origin, product

    def plain(self) -> dict[str, Any]:
        """The graph as JSON values."""
        order = [version for layer in self.layers() for version in layer]
        number = {version: index for index, version in enumerate(order)}
        nodes = [
            {"kind": version.kind, "name": version.name, "hash": version.hash, "places": self.versions[version].places}
            for version in order
        ]
        return {"nodes": nodes, "edges": [[number[origin], number[product]] for origin, product in self.edges()]}


def read_graph(project: Project) -> Graph:
    """Everything that manifests in place, Git and BentoML's store say; what can't be read is left out."""
    graph = Graph()
    for path in sorted(project.root.glob(f"*/*/*/{FILE_NAME}")):
        place = path.parent.relative_to(project.root)
        if place.parts[0] in {"models", "data"}:
            try:
                graph.add_manifest(place.as_posix(), Manifest.read(path.parent), IN_PLACE)
            except ArtifactError:
                continue
    add_releases(graph, project)
    tags = commits.tags(project)
    for commit, names in tags.items():
        for folder, manifest in commits.manifests_at(project, commit).items():
            for name in names:
                graph.add_manifest(folder, manifest, name)
    for commit, folder, manifest in commits.recorded_manifests(project):
        graph.add_manifest(folder, manifest, f"commit {commit[:10]}")
    add_store(graph, bento.home(project))
    return graph


def add_releases(graph: Graph, project: Project) -> None:
    """Enter packed weights in place and the stages that made them, as far as their manifest.json records these."""
    for file in sorted(project.root.glob(f"models/*/{SHIPPED}/{FILE_NAME}")):
        made_by: list[Version] = []
        model = file.parent.parent.name
        try:
            release = recorded_source(file.relative_to(project.root).as_posix(), file_digest(file))
            record = json.loads(file.read_bytes())
            made_by = _add_stages(graph, project, record)
            for before in earlier_records(record):
                earlier = Version("release", before["folder"], before["hash"])
                graph.add(earlier, _add_stages(graph, project, before) or None, model=model)
        except OSError:
            continue
        except (ValueError, KeyError, TypeError, AttributeError):
            made_by = []
        graph.add(release, made_by or None, IN_PLACE, model=model)


def _add_stages(graph: Graph, project: Project, record: Mapping[str, Any]) -> list[Version]:
    """Enter the stages that a record of packed weights names."""
    made_by: list[Version] = []
    for stage, facts in record.get("stages", {}).items():
        folder = project.stage_dir(stage, record["model"]).relative_to(project.root).as_posix()
        inputs = {entry["path"]: entry["hash"] for entry in facts["inputs"].values()}
        sources = {entry["path"]: entry["hash"] for entry in facts["sources"]}
        made_by.append(Version("artifact", folder, facts["hash"]))
        graph.add(made_by[-1], _origins(inputs, sources), model=record["model"])
    return made_by


def add_store(graph: Graph, home: Path) -> None:
    """Enter the models and Bentos of a store of BentoML's, each with the lineage that lies in it."""
    for path in sorted(home.glob(f"models/*/*/{bento.MODEL_FILE}")):
        if description := bento.read_description(path):
            add_model(graph, description)
    for path in sorted(home.glob(f"bentos/*/*/{bento.BENTO_FILE}")):
        if description := bento.read_description(path):
            add_bento(graph, description)


def add_folder(graph: Graph, folder: Path) -> Version:
    """Enter the Bento or model in a folder, wherever it lies, and the models that lie with it.

    Raises:
        ArtifactError: it is not one of this program's.
    """
    is_bento = (folder / bento.BENTO_FILE).is_file()
    description = bento.read_description(folder / (bento.BENTO_FILE if is_bento else bento.MODEL_FILE))
    if description is None:
        raise ArtifactError(f"{folder} holds no model or Bento of refrag-platform; `refrag run package` makes one")
    if not is_bento:
        return add_model(graph, description)
    # Exported, it has its models in it; in a store they lie beside all Bentos.
    for home in (folder, *folder.parents[2:3]):
        add_store(graph, home)
    return add_bento(graph, description)


def add_model(graph: Graph, description: dict[str, Any]) -> Version:
    """Enter a model.yaml: the model, and every artifact behind it."""
    metadata = description.get("metadata") or {}
    lineage: dict[str, Any] = metadata.get("lineage") or {}
    recipe = str((description.get("labels") or {}).get("recipe", ""))
    for content, facts in lineage.items():
        origins = _origins(facts["inputs"], facts.get("sources") or {})
        graph.add(Version("artifact", _folder(content), facts["hash"]), origins, model=recipe)
    folders = {_folder(content).rsplit("/", 1)[-1]: _folder(content) for content in lineage}
    held = metadata.get("hashes") or {}
    origins = [Version("artifact", folders[stage], hash) for stage, hash in held.items() if stage in folders]
    version = Version("model", f"{description['name']}:{description['version']}")
    graph.add(version, origins, STORE, recipe)
    return version


def add_bento(graph: Graph, description: dict[str, Any]) -> Version:
    """Enter a bento.yaml; its models say what they were made from."""
    version = Version("bento", f"{description['name']}:{description['version']}")
    models = [Version("model", tag) for tag in bento.bento_models(description)]
    names = [graph.versions[model].model for model in models if model in graph.versions]
    graph.add(version, models, STORE, next(iter(names), ""))
    return version


def recorded_source(path: str, hash: str) -> Version:
    """A source as its artifact's manifest names it: a file, or the released or packed weights that it started from."""
    if base := BASE.fullmatch(path):
        return Version("artifact", f"models/{base[1]}/{base[2]}", hash)
    if path.endswith(f"/{SHIPPED}/{FILE_NAME}"):
        return Version("release", path.removesuffix(f"/{FILE_NAME}"), hash)
    return Version("source", path, hash)


def _origins(inputs: Mapping[str, str], sources: Mapping[str, str]) -> list[Version]:
    """What a record says went in, each by its path with its hash."""
    artifacts = [Version("artifact", _folder(path), hash) for path, hash in inputs.items()]
    return [*artifacts, *(recorded_source(path, hash) for path, hash in sources.items())]


def _folder(content: str) -> str:
    return content.removesuffix("/content")
