"""The recipe's sources, read one after the other as one stream of documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from refrag_platform.artifacts.digest import file_digest, folder_digest
from refrag_platform.artifacts.manifest import InputRecord
from refrag_platform.corpus import factbook
from refrag_platform.corpus.bad_input import BadInput
from refrag_platform.corpus.documents import Document
from refrag_platform.corpus.files import read_file, row_document
from refrag_platform.corpus.listing import find_files, sizes
from refrag_platform.errors import RefragError
from refrag_platform.names import name_text
from refrag_platform.progress import Progress
from refrag_platform.project import Project
from refrag_platform.recipes import Recipe, SourceRecipe


def source_records(project: Project, recipe: Recipe, ask_hub: bool = True) -> list[InputRecord]:
    """Every file, package and dataset that the corpus of `recipe` is made from, with its hash.

    Without `ask_hub`, those that a hub holds are left out and no network is used.

    Raises:
        RefragError: a source is not there.
    """
    records = []
    if (recipe.decoder.tokenizer or "").startswith("path:"):
        named = str(recipe.decoder.tokenizer).removeprefix("path:")
        records.append(InputRecord.of(project.root, project.recipe_path(recipe.name).parent / named, named))
    for source in recipe.corpus.sources:
        if source.kind == "factbook":
            name = f"package:{factbook.PACKAGE}=={factbook.version()}"
            records.append(InputRecord(path=name, hash=folder_digest(factbook.folder())))
        elif source.kind == "hub":
            if ask_hub or Path(str(source.path)).is_dir():
                records.append(InputRecord(path=f"hub:{source.path}", hash=_hub_revision(str(source.path))))
        else:
            root = _root(project, recipe, source)
            for file in find_files(root).files:
                inside = file.relative_to(root).as_posix() if file != root else ""
                named = "/".join(filter(None, (source.path or "", inside)))
                # One that has gone meanwhile, or can't be read, is reported where it is read.
                with suppress(OSError):
                    records.append(InputRecord.of(project.root, file, named))
    return records


def sources_digest(project: Project, recipe: Recipe) -> str:
    """One hash over all sources on this machine: equal digests need no second corpus run.

    What a hub holds counts by its id, which is in the recipe: looking at artifacts must not need a network.
    """
    lines = (f"{record.path} {record.hash}\n" for record in source_records(project, recipe, ask_hub=False))
    return hashlib.md5("".join(lines).encode(), usedforsecurity=False).hexdigest()


def read_sources(project: Project, recipe: Recipe, bad: BadInput) -> Iterator[Document]:
    """The documents of all sources in the recipe's order, with progress on the screen."""
    for number, source in enumerate(recipe.corpus.sources, start=1):
        reader = {"factbook": _read_factbook, "files": _read_files, "hub": _read_hub}[source.kind]
        # Only the first source of a kind goes without a number, so that ids stay unique.
        earlier = sum(other.kind == source.kind for other in recipe.corpus.sources[: number - 1])
        prefix = source.kind if not earlier else f"{source.kind}-{earlier + 1}"
        yield from reader(project, recipe, source, prefix, bad)


def _read_factbook(
    project: Project, recipe: Recipe, source: SourceRecipe, prefix: str, bad: BadInput
) -> Iterator[Document]:
    documents = factbook.read_factbook(recipe.corpus, source.documents)
    with Progress("corpus from the World Factbook", len(documents), "countries") as progress:
        for document in documents:
            yield document
            progress.update()


def _read_files(
    project: Project, recipe: Recipe, source: SourceRecipe, prefix: str, bad: BadInput
) -> Iterator[Document]:
    root = _root(project, recipe, source)
    files, unusable = find_files(root)

    def name(file: Path) -> str:
        return f"{prefix}/{name_text(file.relative_to(root) if file != root else file.name)}"

    for file, why in unusable:
        bad.report("unreadable_file", name(file), why)
    if not files:
        return
    with Progress(f"corpus from {name_text(root.name)}", sum(sizes(files)) // 1024, "KiB") as progress:
        read = taken = 0

        def advance(count: int) -> None:
            nonlocal read
            progress.update((read + count) // 1024 - read // 1024)
            read += count

        for file in files:
            for document in read_file(file, name(file), source, bad, advance):
                yield document
                taken += 1
                if taken == source.documents:
                    return


def _read_hub(project: Project, recipe: Recipe, source: SourceRecipe, prefix: str, bad: BadInput) -> Iterator[Document]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise RefragError("hub sources need the datasets package; run `pip install '.[hub]'` in the checkout") from None
    path = str(source.path)
    revision = None if Path(path).is_dir() else _hub_revision(path)
    try:
        rows = load_dataset(path, split="train", streaming=True, revision=revision)
        with Progress(f"corpus from {path}", source.documents or 0, "rows") as progress:
            for row, values in enumerate(rows, start=1):
                for document in row_document(values, f"{prefix}/{Path(path).name}", row, source, bad):
                    yield document
                    progress.update()
                if progress.done == source.documents:
                    return
    except (OSError, ValueError) as error:
        raise RefragError(f"dataset {path} can't be read: {str(error).splitlines()[0]}") from error


def _hub_revision(path: str) -> str:
    """The commit of a hub dataset, or the hash of a local folder that is one."""
    if Path(path).is_dir():
        return _folder_revision(Path(path))
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return str(HfApi().dataset_info(path).sha)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise RefragError(f"dataset {path} can't be reached on the hub: {str(error).splitlines()[0]}") from error


def _folder_revision(folder: Path) -> str:
    """The hash of a folder with what links in it lead to."""
    digest = hashlib.md5(usedforsecurity=False)
    for file in find_files(folder).files:
        with suppress(OSError):
            digest.update(f"{name_text(file.relative_to(folder))} {file_digest(file)}\n".encode())
    return digest.hexdigest()


def _root(project: Project, recipe: Recipe, source: SourceRecipe) -> Path:
    """The file or folder of a `files` source; the model's own folder may be missing, another must be there."""
    path = project.source_path(recipe.name, source.path)
    if source.path is not None and not path.exists():
        raise RefragError(f"corpus.sources: path is {source.path!r}, and there is no {path}")
    return path
