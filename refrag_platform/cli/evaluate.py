"""`refrag evaluate`."""

import typer


def register(app: typer.Typer) -> None:
    """Add this family to `refrag`."""
