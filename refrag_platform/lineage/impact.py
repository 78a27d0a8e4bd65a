"""What one source file or document went into: what to rebuild, and what still holds it. Run: `refrag forget PATH`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from refrag_platform.errors import RefragError
from refrag_platform.lineage.graph import IN_PLACE, Graph, Version, read_graph
from refrag_platform.names import name_of, name_text
from refrag_platform.project import Project

DOCUMENTS_FILE, DESCRIPTION_FILE = "documents.parquet", "corpus.json"
# How sources begin that are no files.
OF_NO_FILE = ("package:", "hub:")


@dataclass(frozen=True)
class Forgetting:
    """What it takes to forget a document.

    `rebuild`: artifacts in place that saw it, by model. `elsewhere`: the other versions that did, and where each
    is: releases, committed versions, BentoML's models and Bentos; of a package's document all that are made of that
    package. `unclear`: artifacts and releases in place behind which there is a version of which no record says what it
    was made from; with that version: they may have seen it, or seen it once more. `remove`: what to take
    away, in words. `duplicates`: documents that the corpora dropped because their text had come before; one of them may
    be this one.
    """

    remove: str
    rebuild: dict[str, list[Version]]
    elsewhere: list[tuple[Version, list[str]]]
    unclear: list[tuple[Version, Version]]
    duplicates: int

    @property
    def releases(self) -> list[str]:
        """Releases that saw it or may have: what starts from them has it again, however often it is made."""
        return sorted({*self.releases_with_it} | {one.name for one, _ in self.unclear if one.kind == "release"})

    @property
    def releases_with_it(self) -> list[str]:
        """Those of them of which it is known."""
        return sorted({version.name for version, _ in self.elsewhere if version.kind == "release"})

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
            "unclear": [
                {"path": version.name, "hash": version.hash, "unrecorded": str(missing)}
                for version, missing in self.unclear
            ],
            "releases": self.releases,
            "duplicates": self.duplicates,
        }


@dataclass(frozen=True)
class _Source:
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
    source = find_source(project, graph, what)
    after = graph.after(source.start)
    saw = [
        version
        for layer in after.layers()
        for version in layer
        if version.kind != "source" and model in {None, graph.versions[version].model}
    ]
    here = [version for version in saw if version.kind != "release" and IN_PLACE in graph.versions[version].places]
    rebuild: dict[str, list[Version]] = {}
    for version in here:
        rebuild.setdefault(graph.versions[version].model, []).append(version)
    elsewhere = [(version, graph.versions[version].places) for version in saw if version not in here]
    missing = {
        version: sorted(origin for origin, facts in graph.behind([version]).versions.items() if facts.made_from is None)
        for version, facts in graph.versions.items()
        if IN_PLACE in facts.places and model in {None, facts.model}
    }
    return Forgetting(
        remove=source.remove,
        rebuild=rebuild,
        elsewhere=[entry for entry in elsewhere if entry[1]],
        unclear=[(version, origins[0]) for version, origins in sorted(missing.items()) if origins],
        duplicates=sum(_duplicates(project, version) for version in here),
    )


def find_source(project: Project, graph: Graph, what: str) -> _Source:
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
        return _Source(tuple(set(files)), _how_to_remove(names, paths[files[0]]))
    rows = list(_with_document(project, graph, what))
    if not rows:
        names = sorted({version.name for version in sources})
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise RefragError(
            f"no artifact was made from {what!r}: it is neither a recorded source nor a document of a corpus in "
            f"place. Sources: {shown or 'none'}.{''.join(_not_here(graph))}"
        )
    model, _, name = rows[0]
    file = _document_file(project, model, name)
    if file is None:
        corpora = [corpus for _, corpus, _ in rows]
        return _Source(
            (*corpora, *_of_the_same_packages(graph, corpora)),
            f"{what} comes from {name.split('/')[0]}, not from a file of yours: leave it out with corpus.sources "
            f"(kind, documents) in {project.recipe_path(model).relative_to(project.root)} or params.yaml",
        )
    source = find_source(project, graph, str(file))
    # One document a file: its id is the file's own name, or that and the number of a part.
    if what.removeprefix(name).removeprefix("#").isdigit() or what == name:
        return source
    return replace(source, remove=f"take the row of document {what} out of {name_text(file)}")


def source_file(project: Project, recorded: str) -> Path | None:
    """Where a recorded source lies; None for packages and hubs."""
    if recorded.startswith(OF_NO_FILE):
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


def _of_the_same_packages(graph: Graph, corpora: Iterable[Version]) -> Iterator[Version]:
    """Artifacts made of a package or dataset that `corpora` are of, and not in place to be looked into."""

    def packages(version: Version) -> set[str]:
        origins = graph.versions[version].made_from or ()
        return {origin.name.partition("==")[0] for origin in origins if origin.name.startswith(OF_NO_FILE)}

    wanted = set().union(*map(packages, corpora))
    yield from (
        version
        for version, facts in graph.versions.items()
        if IN_PLACE not in facts.places and wanted & packages(version)
    )


def _not_here(graph: Graph) -> Iterator[str]:
    """A sentence on each corpus of which only the record is here, and on each release of which there is none."""
    for version, facts in sorted(graph.versions.items()):
        if version.kind == "release" and facts.made_from is None:
            yield f" No record says what {version} was made from."
        if version.name.endswith("/corpus") and facts.made_from and not facts.places:
            sources = ", ".join(map(str, sorted(facts.made_from)))
            yield (
                f" The documents of {version} can't be looked up: only its record is here. With its sources in place, "
                f"`refrag run corpus --model {facts.model}` makes it again: {sources}."
            )


def _document_file(project: Project, model: str, name: str) -> Path | None:
    """The file of a document's `source`, e.g. files/notes.txt or files-2/rows.jsonl; None if it is not of a file."""
    prefix, _, inside = name.partition("/")
    kind, _, number = prefix.partition("-")
    paths = [source.path for source in project.recipe(model).corpus.sources if source.kind == "files"]
    position = int(number or 1) - 1
    if kind != "files" or position >= len(paths):
        return None
    root = project.source_path(model, paths[position])
    return root if root.is_file() else root / name_of(inside)


def _duplicates(project: Project, version: Version) -> int:
    """How many documents a corpus in place dropped because their text had come before."""
    path = project.root / version.name / "content" / DESCRIPTION_FILE
    return int(json.loads(path.read_text(encoding="utf-8"))["duplicates"]) if path.is_file() else 0
