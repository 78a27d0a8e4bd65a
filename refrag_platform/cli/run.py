"""`refrag run`: make one artifact, or all of them, without Dagster. `refrag pipeline`: dvc.yaml of the stages."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from refrag_platform.cli.options import find_project
from refrag_platform.errors import RefragError

commands = typer.Typer()


@commands.command()
def run(
    stages: Annotated[
        list[str],
        typer.Argument(
            metavar="STAGE...",
            help="corpus, reconstruction, cpt, finetuned, chunks, policy, evaluation, package, in this order; or all.",
        ),
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A model of `refrag recipes ls`, or a control, e.g. NAME--full.")
    ],
    force: Annotated[bool, typer.Option("--force", help="Run even if the artifact is up to date.")] = False,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Stop, saved, after this long; the same command goes on from there.")
    ] = None,
    engine: Annotated[
        Literal["process", "ray"],
        typer.Option(help="What encodes the stage chunks: this process, or the workers of a Ray cluster."),
    ] = "process",
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster: HOST:PORT, or auto. Default: this machine, for the run.")
    ] = None,
) -> None:
    """Make the artifact STAGE of a model, or several, from the artifacts before it.

    Nothing is done when inputs, settings, seed and code are those of the artifact in place. A killed
    run continues from its newest complete checkpoint. The artifact replaces the old one only when it
    is whole and passes its blocking checks. Which engine encoded is no part of it: the artifact is the same.

    Exit status: 0 when all is made, 3 when it was stopped and saved (by --seconds or a signal), 2 when it was refused
    or failed in a way that the message says how to mend, 1 for any other failure.
    """
    from functools import partial

    from refrag_platform.processes import stopped_after
    from refrag_platform.runner import run_stage
    from refrag_platform.stages import stages_of

    project = find_project()
    names = [stage.name for stage in stages_of(project, model)] if stages == ["all"] else stages
    functions = {}
    if engine == "ray":
        if "chunks" not in names:
            raise RefragError(f"--engine ray encodes the stage chunks, which is not among {', '.join(names)}")
        from refrag_platform.store.cluster import build_chunks_on_ray

        functions["chunks"] = partial(build_chunks_on_ray, address=address)
    elif address is not None:
        raise RefragError(f"--address {address} is that of a Ray cluster; give --engine ray too")
    with stopped_after(seconds):
        for name in names:
            result = run_stage(project, name, model, force=force, function=functions.get(name))
            state = "cached" if result.cached else f"made in {result.manifest.seconds:.1f} s"
            typer.echo(f"{name} of {model}: {state}, {result.manifest.hash} at {result.path.relative_to(project.root)}")


@commands.command("pipeline")
def write_stages() -> None:
    """Write the stages of dvc.yaml from the registry, each with the files that it runs; the rest of the file stays.

    Run it after you changed refrag_platform/stages.py or what a stage imports; a test holds the file against both.
    """
    from refrag_platform.history.pipeline import write_pipeline

    typer.echo(f"dvc.yaml: {'written' if write_pipeline(find_project()) else 'is up to date'}")
