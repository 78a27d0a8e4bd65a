"""`refrag store`: what was changed in a served store, for the next training; its tables in an object store."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refrag_platform.cli.options import find_project
from refrag_platform.errors import RefragError
from refrag_platform.files import write_text

if TYPE_CHECKING:
    from refrag_platform.store.edits import Edits

commands = typer.Typer(
    name="store",
    no_args_is_help=True,
    help="Stores that are served: documents added (REFRAG_STORE), tables published (REFRAG_TABLES).",
)

Folder = Annotated[Path, typer.Argument(help="The folder that REFRAG_STORE names; the server may run.")]


@commands.command()
def export(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="A .jsonl file, e.g. data/sources/NAME/live.jsonl.")],
    deleted: Annotated[
        Path | None, typer.Option(help="Also write the ids of deleted documents here, one a line.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Write the live documents as a source file, so that the next training and its store hold them.

    A row has id, title and text, as corpus.sources reads them. What was deleted has to leave the sources by hand:
    `refrag forget DOCUMENT` says what still holds it. Collections have folders of their own, FOLDER/collections/NAME;
    what of theirs is trained on, everybody may read. For example:

    refrag store export live --out data/sources/NAME/live.jsonl && refrag run all --model NAME
    """
    from refrag_platform.store.collections import FOLDER, names

    for path in (out, deleted):
        if path is not None and path.is_file() and not force:
            raise RefragError(f"{path} is there already; --force replaces it")
    with _edits(folder) as edits:
        changes = edits.all()
    rows = [{"id": edit.id, "title": edit.title, "text": edit.text} for edit in changes if edit.text is not None]
    gone = [edit.id for edit in changes if edit.text is None]
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if deleted is not None:
        write_text(deleted, "".join(f"{name}\n" for name in gone))
    typer.echo(f"{out}: {len(rows)} documents; deleted since the store was made: {len(gone)}", err=True)
    if others := names(folder):
        typer.echo(f"not in it: the collections {', '.join(others)}, each in {folder / FOLDER}/NAME", err=True)


@commands.command()
def ls(folder: Folder) -> None:
    """List what was added or replaced (+) and what was deleted (-)."""
    with _edits(folder) as edits:
        changes = edits.all()
    # Those that were deleted stand last.
    for edit in sorted(changes, key=lambda edit: edit.text is None):
        typer.echo(f"{'-' if edit.text is None else '+'} {edit.id}")


@commands.command()
def publish(
    url: Annotated[str, typer.Argument(help="s3://BUCKET or s3://BUCKET/PREFIX.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Whose chunk store.")],
) -> None:
    """Build a chunk store's search tables in an object store, for servers with REFRAG_TABLES=URL.

    They lie in a folder named by the store's content: other versions stay beside them, and publishing again changes
    nothing. Credentials, region and endpoint are AWS' own (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ~/.aws, ...).
    """
    from refrag_platform.store.objects import object_url
    from refrag_platform.store.table import ChunkStore

    project = find_project()
    base = project.recipe_path(model).parent
    store = ChunkStore.open(project.content("chunks", model), tables=object_url(url, "the URL"), base=base)
    typer.echo(f"{store.place}: {store.description.passages:,} passages, {store.description.chunks:,} chunks", err=True)


def _edits(folder: Path) -> closing[Edits]:
    from refrag_platform.store.edits import EDITS_FILE, Edits

    path = folder / EDITS_FILE
    if not path.is_file():
        raise RefragError(f"{folder} is no folder of a served store: {EDITS_FILE} is missing (REFRAG_STORE names it)")
    return closing(Edits(path, read_only=True))
