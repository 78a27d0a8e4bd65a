"""`refrag sources`: documents of elsewhere as a model's source files."""

from __future__ import annotations

from typing import Annotated

import typer

from refrag_platform.cli.options import find_project
from refrag_platform.errors import RefragError

SHOWN = 10  # names of a kind

commands = typer.Typer(name="sources", no_args_is_help=True, help="Source files (data/sources/NAME) from a bucket.")


@commands.command()
def pull(
    url: Annotated[str, typer.Argument(help="s3://BUCKET, s3://BUCKET/PREFIX, or an object's own.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Whose sources.")],
    delete: Annotated[
        bool, typer.Option("--delete", help="Also remove pulled files whose objects are no longer there.")
    ] = False,
) -> None:
    """Copy a bucket's objects to data/sources/NAME/BUCKET/KEY, where the recipe's `files` source reads them.

    Run it again to go on after a stop, or for what changed since: an object whose ETag is that of its file isn't read.
    Files of yours are never replaced. Credentials, region and endpoint are AWS' own (AWS_ACCESS_KEY_ID,
    AWS_ENDPOINT_URL, ~/.aws, ...). For example:

    refrag sources pull s3://documents/manuals --model NAME && refrag run all --model NAME
    """
    from refrag_platform.corpus.pull import pull

    project = find_project()
    project.recipe(model)
    pulled = pull(project.source_dir(model), url, delete)
    typer.echo(f"{pulled.folder}: {len(pulled.fetched)} pulled, {len(pulled.unchanged)} unchanged", err=True)
    if pulled.left_out:
        typer.echo(f"left out, hidden or no name of a file: {_names(pulled.left_out)}", err=True)
    if pulled.gone:
        said = "removed" if delete else "still here (--delete removes them)"
        typer.echo(f"no longer in the bucket, {said}: {_names(pulled.gone)}", err=True)
    if pulled.kept:
        raise RefragError(
            f"not pulled, since other files stand there, or were changed: {_names(pulled.kept)}; move them away, and "
            "pull again"
        )


def _names(keys: list[str]) -> str:
    from refrag_platform.names import name_text

    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(map(name_text, keys[:SHOWN])) + more
