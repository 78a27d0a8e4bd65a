"""`refrag demo`: the whole pipeline through Dagster, a question over HTTP, and a report. `make demo` runs it."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from refrag_platform.cli.materialize import materialize
from refrag_platform.cli.options import find_project

commands = typer.Typer()


@commands.command()
def demo(
    model: Annotated[str, typer.Option("--model", "-m", help="A model that params.yaml names.")] = "smollm2-135m",
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="Asked over HTTP; default: one from the held-out set.")
    ] = None,
) -> None:
    """Make every artifact of a model through Dagster, serve the Bento, ask it a question, and report.

    What is up to date is said to be cached. The report is printed and written to reports/demo.json.
    Interrupt it at any time: the next run continues.
    """
    from refrag_platform.demo import ask_served, demo_report, held_out_question, print_report
    from refrag_platform.dials import require_named
    from refrag_platform.history.dvc import ensure_repo

    begun = time.monotonic()
    project = find_project()
    recipe = project.recipe(model)
    ensure_repo(project)
    require_named(project, model)
    typer.secho(f"refrag demo: {model}. {recipe.description}", bold=True)
    if materialize(project.root, model) != 0:
        typer.secho("refrag: the pipeline failed; its reason is above. Mend it and run again.", fg="red", err=True)
        raise typer.Exit(1)
    asked = question or held_out_question(project, model)
    typer.secho(f"\nServing the Bento and asking: {asked}", bold=True)
    served = ask_served(project, model, asked)
    report = demo_report(project, model, served, time.monotonic() - begun)
    print_report(model, report, served)
