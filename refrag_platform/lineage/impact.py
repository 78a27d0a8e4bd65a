"""What one source file or document went into: what to rebuild, and what still holds it. Run: `refrag forget PATH`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from refrag_platform.errors import RefragError
from refrag_platform.lineage.graph import IN_PLACE, Graph, Version, read_graph
from refrag_platform.lineage.unrecorded import Weights, unrecorded_weights
from refrag_platform.names import name_of, name_text
from refrag_platform.project import Project

DOCUMENTS_FILE, DESCRIPTION_FILE = "documents.parquet", "corpus.json"
LOST = "made from a version of which no record is left"


@dataclass(frozen=True)
class Forgetting:
    """What it takes to forget a document.

    `rebuild`: artifacts in place that saw it, by model. `elsewhere`: the other versions that did, and where each
    is: committed ones, BentoML's models and Bentos. `unclear`: artifacts in place behind which a version is missing
    that may have seen it. `weights`: those from outside, whose documents can't be looked up, with the artifacts that
    have them in them: unclear as well, those to rebuild among them. `remove`: what to take away, in words.
    `duplicates`: documents that the corpora dropped because their text had come before; one of them may be this one.
    """

    remove: str
    rebuild: dict[str, list[Version]]
    elsewhere: list[tuple[Version, list[str]]]
    unclear: list[Version]
    weights: list[Weights]
    duplicates: int

    def reasons(self) -> Iterator[tuple[Version, str]]:
        """Every artifact that may have seen it, and why nobody can tell."""
        yield from ((version, LOST) for version in self.unclear)
        yield from ((version, weights.why) for weights in self.weights for version in weights.made)

    def plain(self) -> dict[str, object]:
        """The same as JSON values."""
        return {
            "remove": self.remove,
            "rebuild": {
                model: [{"path": version.name, "hash": version.hash} for version in versions]
                for model, versions in self.rebuild.items()
            },
            "elsewhere": [
                {"kind": version.kind, "name": version.name, "hash": version.hash, "places": places}
                for version, places in self.elsewhere
            ],
            "unclear": [{"path": version.name, "hash": version.hash, "why": why} for version, why in self.reasons()],
            "weights": [
                {"path": weights.path, "data": weights.data, "models": weights.models, "remedy": weights.remedy}
                for weights in self.weights
            ],
            "duplicates": self.duplicates,
        }


@dataclass(frozen=True)
class _Found:
    """Where a document comes in: as files that were read, or only as a row of corpora."""

    start: tuple[Version, ...]
    remove: str


def forget(project: Project, what: str, model: str | None = None) -> Forgetting:
    """What must be rebuilt once a source goes; nothing is deleted.

    Args:
        what: a source's path (a folder means all files in it), as recorded or as it lies; or a document's id.
        model: look at this model's artifacts only.

    Raises:
        RefragError: nothing here was ever made from it.
    """
    graph = read_graph(project)
    found = find_source(project, graph, what)
    after = graph.after(found.start)
    saw = [
        version
        for layer in after.layers()
        for version in layer
        if version.kind != "source" and (model is None or graph.versions[version].model == model)
    ]
    here = [version for version in saw if IN_PLACE in graph.versions[version].places]
    rebuild: dict[str, list[Version]] = {}
    for version in here:
        rebuild.setdefault(graph.versions[version].model, []).append(version)
    elsewhere = [(version, graph.versions[version].places) for version in saw if version not in here]
    unclear = [
        version
        for version, facts in sorted(graph.versions.items())
        if IN_PLACE in facts.places and version not in saw and model in {None, facts.model}
        if any(facts.made_from is None for facts in graph.behind([version]).versions.values())
    ]
    return Forgetting(
        remove=found.remove,
        rebuild=rebuild,
        elsewhere=[entry for entry in elsewhere if entry[1]],
        unclear=unclear,
        weights=unrecorded_weights(project, graph, model),
        duplicates=sum(_duplicates(project, version) for version in here),
    )


def find_source(project: Project, graph: Graph, what: str) -> _Found:
    """The recorded versions of a source file, or those that a document is in.

    Raises:
        RefragError: there is none; the message names sources that there are.
    """
    sources = [version for version in graph.versions if version.kind == "source"]
    paths = {version: source_file(project, version.name) for version in sources}
    wanted = (Path.cwd() / Path(what).expanduser()).resolve(), (project.root / what).resolve()
    files = [
        version
        for version, path in paths.items()
        if version.name == what or (path is not None and any(path.is_relative_to(folder) for folder in wanted))
    ]
    if files:
        # The same bytes under another name are the same document.
        files += [version for version in sources if version.hash in {file.hash for file in files}]
        names = sorted({version.name for version in files})
        return _Found(tuple(set(files)), _how_to_remove(names, paths[files[0]]))
    rows = list(_with_document(project, graph, what))
    if not rows:
        names = sorted({version.name for version in sources})
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        hidden = [f" {weights.training}" for weights in unrecorded_weights(project, graph)]
        raise RefragError(
            f"no artifact was made from {what!r}: it is neither a recorded source nor a document of a corpus in "
            f"place. Sources: {shown or 'none'}.{''.join(hidden)}"
        )
    model, _, name = rows[0]
    file = _document_file(project, model, name)
    if file is None:
        return _Found(
            tuple(corpus for _, corpus, _ in rows),
            f"{what} comes from {name.split('/')[0]}, not from a file of yours: leave it out with corpus.sources "
            f"(kind, documents) in {project.recipe_path(model).relative_to(project.root)} or params.yaml",
        )
    found = find_source(project, graph, str(file))
    # One document a file: its id is the file's own name, or that and the number of a part.
    if what.removeprefix(name).removeprefix("#").isdigit() or what == name:
        return found
    return replace(found, remove=f"take the row of document {what} out of {name_text(file)}")


def source_file(project: Project, recorded: str) -> Path | None:
    """Where a recorded source lies; None for packages and hubs."""
    if recorded.startswith(("package:", "hub:")):
        return None
    return (project.root / Path(os.path.expandvars(name_of(recorded))).expanduser()).resolve()


def _how_to_remove(names: list[str], path: Path | None) -> str:
    if path is None:
        return f"{names[0]} is no file of yours: take it out of corpus.sources in the recipe or params.yaml"
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"remove {shown}" + ("" if path.exists() else " (it is gone already)")


def _with_document(project: Project, graph: Graph, document: str) -> Iterator[tuple[str, Version, str]]:
    """Model, version and the document's `source` of every corpus in place that holds it."""
    import pyarrow.parquet as pq

    for version, facts in sorted(graph.versions.items()):
        path = project.root / version.name / "content" / DOCUMENTS_FILE
        if version.kind == "artifact" and IN_PLACE in facts.places and path.is_file():
            for batch in pq.ParquetFile(path).iter_batches(columns=["id", "source"]):
                ids = batch["id"].to_pylist()
                if document in ids:
                    yield facts.model, version, batch["source"][ids.index(document)].as_py()
                    break


def _document_file(project: Project, model: str, name: str) -> Path | None:
    """The file of a document's `source`, e.g. files/notes.txt or files-2/rows.jsonl; None if it is not of a file."""
    prefix, _, inside = name.partition("/")
    kind, _, number = prefix.partition("-")
    given = [source.path for source in project.recipe(model).corpus.sources if source.kind == "files"]
    position = int(number or 1) - 1
    if kind != "files" or position >= len(given):
        return None
    root = project.source_path(model, given[position])
    return root if root.is_file() else root / name_of(inside)


def _duplicates(project: Project, version: Version) -> int:
    """How many documents a corpus in place dropped because their text had come before."""
    path = project.root / version.name / "content" / DESCRIPTION_FILE
    return int(json.loads(path.read_text(encoding="utf-8"))["duplicates"]) if path.is_file() else 0
