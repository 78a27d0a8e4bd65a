"""`refrag keys`: who may use the service, in the file that REFRAG_API_KEYS_FILE names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

File = Annotated[
    Path, typer.Option("--file", "-f", envvar="REFRAG_API_KEYS_FILE", help="The file of keys; a running server obeys.")
]
Name = Annotated[str, typer.Argument(help="Whose key it is: letters, digits, `.`, `_` and `-`.")]

commands = typer.Typer(
    name="keys", no_args_is_help=True, help="Keys of the service: added, revoked and listed while it runs."
)


@commands.command()
def add(
    name: Name,
    file: File,
    per_minute: Annotated[int | None, typer.Option(min=1, help="Requests a minute; default REFRAG_RATE_LIMIT.")] = None,
    collection: Annotated[
        str, typer.Option(help="Documents that it adds are read with keys of this collection alone.")
    ] = "",
) -> None:
    """Make a key, print it once, and keep its hash.

    For example: export REFRAG_API_KEYS_FILE=/etc/refrag/keys; refrag keys add ana; refrag serve --host 0.0.0.0
    """
    from refrag_platform.serving.keys import add_key, new_key

    key, kept = new_key(name, per_minute, collection)
    add_key(file, kept)
    typer.echo(key)
    typer.echo(f"{file} keeps the key's hash alone: write the key down now", err=True)


@commands.command()
def revoke(name: Name, file: File) -> None:
    """Take a key out of the file; requests with it are refused from now on."""
    from refrag_platform.serving.keys import revoke_key

    left = revoke_key(file, name)
    typer.echo(f"{name} is revoked; {file} has {left} keys", err=True)


@commands.command()
def ls(file: File) -> None:
    """List the keys by name, with their own limits and collections."""
    from refrag_platform.serving.keys import read_keys

    for one in read_keys(file):
        rate = "" if one.per_minute is None else f"  {one.per_minute} a minute"
        typer.echo(f"{one.name}{rate}" + (f"  of {one.collection}" if one.collection else ""))
