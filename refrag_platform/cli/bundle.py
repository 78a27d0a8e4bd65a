"""`refrag bundle`: run stages on another, bare machine, and take in what it made as if it had been made here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refrag_platform.cli.materialize import materialize
from refrag_platform.cli.options import find_project
from refrag_platform.errors import RefragError
from refrag_platform.progress import say

if TYPE_CHECKING:
    from refrag_platform.project import Project

Wheels = Annotated[Path | None, typer.Option(help="Folder of wheels for the other machine's Python, to take along.")]
commands = typer.Typer(
    name="bundle",
    no_args_is_help=True,
    help="Run stages on another, bare machine (Python and torch, no Git, DVC, Dagster or network), and take in what it "
    "made. docs/other-machines.md has the commands of a whole run.",
)


@commands.command()
def export(
    out: Annotated[Path, typer.Option(help="Folder to make: bundle.json and the pieces.")],
    models: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="A model of `refrag recipes ls`, or a control, NAME--full; again for more."),
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="The last stage to run there; default: all that train.", show_default=False)
    ] = None,
    wheels: Wheels = None,
    results: Annotated[
        bool, typer.Option("--results", help="On the other machine, in the unpacked folder: what was made there.")
    ] = False,
    piece_mib: Annotated[int, typer.Option(min=1, help="Largest piece, in MiB.")] = 30,
    files: Annotated[
        int | None, typer.Option(min=2, help="At most so many files; default: as many as it takes.")
    ] = None,
    part: Annotated[
        int | None, typer.Option(min=1, help="With --files: this set of the pieces alone, to carry it in several goes.")
    ] = None,
) -> None:
    """Write what another machine needs to run stages, or, there, what it made: an archive in pieces with their hashes.

    Taken along are the code, the recipe, current artifacts and files that the stages read, and what an interrupted
    stage goes on from. The other machine unpacks it by `python unbundle.py FOLDER`, which lies beside the pieces.
    """
    options = {"--model": models or None, "--until": until, "--wheels": wheels}
    if results and (idle := [name for name, value in options.items() if value is not None]):
        raise RefragError(f"{', '.join(idle)}: --results takes what was made here, and none of these; leave it out")
    if part is not None and files is None:
        raise RefragError(f"--part is {part}: a part has as many files as --files allows; give both")
    from refrag_platform.bundle.unbundle import in_words

    project = find_project()
    if results:
        from refrag_platform.bundle.results import export_results

        index, left_out = export_results(project, out, piece_mib, files, part)
        if left_out:
            typer.echo(left_out, err=True)
        stopped = in_words(index["unfinished"])
        unfinished = f"; and where to go on with {stopped}" if stopped else ""
        typer.echo(f"{_size(index)} at {out}: {in_words(index['models']) or 'no finished artifact'}{unfinished}")
        return
    if not models:
        raise RefragError("--model is missing: which model's stages shall run there?")
    from refrag_platform.bundle import unbundle
    from refrag_platform.bundle.pieces import write_bundle
    from refrag_platform.bundle.work import work_to_do

    script = Path(unbundle.__file__).read_bytes()
    with work_to_do(project, models, until or "policy", wheels) as work:
        index = write_bundle(work.members, work.facts, out, piece_mib, files, part, {"unbundle.py": script})
    for note in work.notes:
        typer.echo(note, err=True)
    typer.echo(f"{_size(index)} at {out}, to run {in_words(index['models'])}. On the other machine:")
    typer.echo("  python unbundle.py FOLDER")


@commands.command("import")
def import_bundle(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="The bundle's folder; several, if it came in parts.")
    ],
    into: Annotated[Path | None, typer.Option(help="Unpack a bundle of work here, as unbundle.py does.")] = None,
    record: Annotated[
        bool,
        typer.Option("--record/--no-record", help="Record what landed in DVC, and in Dagster as materializations."),
    ] = True,
) -> None:
    """Put artifacts that were made on another machine into place, checked and recorded as if they had been made here.

    Refused, by name, and nothing lands: a piece that is missing or damaged, inputs, settings, code or files that are no
    longer those of this checkout, a failed check.
    """
    from refrag_platform.bundle.landing import import_results
    from refrag_platform.bundle.unbundle import BundleError, in_words, unpack

    if into is not None:
        try:
            index = unpack(folders, into, say)
        except BundleError as error:
            raise RefragError(str(error)) from None
        typer.echo(f"{into} is ready, to run {in_words(index['models'])}")
        return
    project = find_project()
    recorded = 0
    for landed in import_results(
        project, folders, (lambda *artifacts: _require_recordable(project, *artifacts)) if record else None, say
    ):
        for stage, manifest in landed.artifacts.items():
            gpus = ", ".join(manifest.hardware.get("gpus") or []) or "a CPU"
            where = project.stage_dir(stage, landed.model).relative_to(project.root)
            typer.echo(
                f"{stage} of {landed.model}: made in {manifest.seconds:.1f} s on {gpus}, {manifest.hash} at {where}"
            )
        for stage in landed.unfinished:
            typer.echo(f"{stage} of {landed.model}: not finished; a run goes on from where it was stopped there")
        if record and landed.artifacts and not project.control(landed.model):
            recorded |= materialize(project.root, landed.model, *landed.artifacts)
    if recorded != 0:
        typer.secho(
            "refrag: the artifacts are in place, but could not all be recorded; the reason is above. Mend it and run "
            "this again.",
            fg="red",
            err=True,
        )
        raise typer.Exit(1)


@commands.command()
def run(
    stage: Annotated[str, typer.Argument(help="A stage whose inputs are current.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A model of `refrag recipes ls`.")],
    command: Annotated[
        str,
        typer.Option(
            help="For a shell: takes the folder {bundle} to the other machine, runs `python unbundle.py FOLDER --run "
            "SECONDS` there, and copies FOLDER.results to {results}. Also {stage}, {model}, {python}."
        ),
    ],
    wheels: Wheels = None,
) -> None:
    """Make the artifact STAGE on another machine by a command that takes the work there and brings back the results.

    Where the other machine stops after its seconds, what it saved is taken in and the command started again, until the
    artifact is here. Status 0 and 3 (stopped by a signal, saved) as of `refrag run`. Nothing is recorded.
    """
    from refrag_platform.bundle.elsewhere import run_elsewhere

    project = find_project()
    run_elsewhere(project, stage, model, command, wheels)
    typer.echo(f"{stage} of {model}: current at {project.stage_dir(stage, model).relative_to(project.root)}")


def _require_recordable(project: Project, model: str, stages: list[str]) -> None:
    """Refuse what DVC and Dagster couldn't record once it is in place; controls they don't know at all."""
    from refrag_platform.dials import require_named
    from refrag_platform.history import dvc

    if importlib.util.find_spec("dagster") is None:
        raise RefragError("Dagster is not installed; `pip install '.[orchestrate]'`, or give --no-record")
    if project.control(model):
        return
    require_named(project, model)
    for stage in stages:
        dvc.require_recordable(project, stage, model)


def _size(index: dict[str, Any]) -> str:
    return f"{index['bytes'] / (1 << 20):,.1f} MiB in {len(index['pieces'])} piece(s)"
