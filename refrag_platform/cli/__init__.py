"""`refrag`: every stage of the pipeline and every look at its results, from a shell.

Each module here holds one family of commands; heavy libraries are imported inside the commands,
so that `refrag --help` answers at once.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Annotated, Any

import typer

from refrag_platform import __version__
from refrag_platform.errors import Paused, RefragError
from refrag_platform.names import printable

FAMILIES = (
    "recipes", "run", "bundle", "evaluate", "questions", "weights", "lineage", "ask", "serve", "demo", "plan", "bench",
    "release", "retention", "store", "sources", "keys",
)  # fmt: skip
NO_TELEMETRY = {
    "DAGSTER_DISABLE_TELEMETRY": "1",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "BENTOML_DO_NOT_TRACK": "True",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
# torch asks for large pages for large tensors on a CPU: a training step faults in hundreds of megabytes anew.
LARGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}

# What the system says of names and folders that a user gave: no fault of this program.
MENDABLE = {errno.ENAMETOOLONG, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ELOOP}
PAUSED = 3  # exit status: neither done nor failed
QUOTED = 200  # characters of a name


class RefragGroup(typer.core.TyperGroup):
    """Turns what a user can mend into one message on stderr and exit status 2, a run that was stopped into 3."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RefragError as error:
            # It may quote a name or a file: what a terminal would obey is escaped.
            typer.secho(f"refrag: {printable(str(error), lines=True)}", fg=typer.colors.RED, err=True)
            sys.exit(PAUSED if isinstance(error, Paused) else 2)
        except OSError as error:
            if error.errno not in MENDABLE:
                raise
            name = printable(str(error.filename or "the disk"))
            typer.secho(f"refrag: {name[:QUOTED]}: {error.strerror}", fg=typer.colors.RED, err=True)
            sys.exit(2)


app = typer.Typer(
    cls=RefragGroup,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Train, version, check and serve a decoder that reads retrieved passages as chunk vectors (REFRAG).",
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"refrag-platform {__version__}")
        raise typer.Exit


@app.callback()
def _environment(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """No telemetry leaves the machine by default, and large tensors lie on large pages; every stage begins here."""
    for name, value in (NO_TELEMETRY | LARGE_PAGES).items():
        os.environ.setdefault(name, value)


for _family in FAMILIES:
    app.add_typer(importlib.import_module(f"refrag_platform.cli.{_family}").commands)
