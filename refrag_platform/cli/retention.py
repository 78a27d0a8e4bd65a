"""`refrag diff`, `forget`, `gc`: versions side by side, what a document went into, what may go."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from refrag_platform.cli.options import find_project

AnyModel = Annotated[str | None, typer.Option(help="One model only.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON.")]
WITHOUT_RELEASE = (
    "replace it by weights that never saw it (refrag weights pack --replace), or train from scratch: take "
    "`continue_from: release` out of the recipes and params.yaml"
)
THING = "An artifact's folder (models/tiny/finetuned), or a commit, tag, branch or model for a whole run."

commands = typer.Typer()


@commands.command()
def diff(
    a: Annotated[str, typer.Argument(help=THING)],
    b: Annotated[str, typer.Argument(help=THING)],
    model: AnyModel = None,
    everything: Annotated[bool, typer.Option("--all", help="Equal rows too.")] = False,
    as_json: Json = False,
) -> None:
    """Show two versions side by side: settings, data, code, metrics, evaluation; differing rows only.

    For example two runs of a model: refrag diff runs/tiny~1 runs/tiny; or a release and what is in place:
    refrag diff tiny@v1.0.0 models/tiny/finetuned.
    """
    from refrag_platform.lineage.difference import compare, side

    project = find_project()
    left, right = side(project, a, model), side(project, b, model)
    rows = [row for row in compare(project, left, right) if everything or row.differs]
    if as_json:
        typer.echo(json.dumps({"a": a, "b": b, "rows": [asdict(row) for row in rows]}, indent=2))
        return
    if not rows:
        typer.echo(f"{a} and {b} are the same")
        return
    table = [(row.name, _cell(row.a), _cell(row.b), _change(row.a, row.b)) for row in rows]
    widths = [max(len(line[column]) for line in [*table, ("", a, b, "")]) for column in range(3)]
    part = ""
    for row, line in zip(rows, table, strict=True):
        if row.part != part:
            part = row.part
            head = f"{part:<{widths[0]}}  {a:<{widths[1]}}  {b:<{widths[2]}}"
            typer.secho(head.rstrip(), bold=True)
        text = "  ".join(f"{cell:<{width}}" for cell, width in zip(line, [*widths, 0], strict=True))
        typer.secho(text.rstrip(), fg=typer.colors.YELLOW if everything and row.differs else None)


@commands.command()
def forget(
    document: Annotated[str, typer.Argument(help="A source file or folder, or a document's id.")],
    model: AnyModel = None,
    as_json: Json = False,
) -> None:
    """Say what a document went into: what must be rebuilt once it goes, and what holds it still. Deletes nothing."""
    from refrag_platform.lineage import impact

    forgetting = impact.forget(find_project(), document, model)
    if as_json:
        typer.echo(json.dumps(forgetting.plain(), indent=2))
        return
    for versions in forgetting.rebuild.values():
        for version in versions:
            typer.echo(f"rebuild  {version.name:<36} {version.hash}")
    for version, places in forgetting.elsewhere:
        typer.echo(f"holds it {version.name:<36} {version.hash:<36} {', '.join(places)}".rstrip())
    for version, missing in forgetting.unclear:
        typer.echo(f"unclear  {version.name:<36} {version.hash:<36} no record says what {missing} was made from")
    typer.echo("\nTo forget it:")
    steps = [
        forgetting.remove,
        *(f"{release}: {WITHOUT_RELEASE}" for release in forgetting.releases_with_it),
        *(
            f"if it may be in {release} (its manifest.json says in words of what `data` it is): {WITHOUT_RELEASE}"
            for release in forgetting.releases
            if release not in forgetting.releases_with_it
        ),
        *(f"refrag run all --model {name}" for name in forgetting.rebuild),
    ]
    if any(version.kind != "release" for version, _ in forgetting.unclear):
        steps.append("refrag status   # what is unclear and stale is made again by the same runs")
    if stored := [places for version, places in forgetting.elsewhere if version.kind != "release"]:
        if any(place.startswith("commit ") for places in stored for place in places):
            steps += [f"refrag commit --model {name}" for name in forgetting.rebuild]
        steps.append("refrag gc --keep 1   # old versions; a release stays until its tags are deleted (git tag -d TAG)")
        steps.append("where it was pushed, clear the remote too: dvc gc --cloud, which keeps only what you tell it to")
    for number, step in enumerate(steps, start=1):
        typer.echo(f"  {number}. {step}")
    if forgetting.duplicates:
        typer.echo(
            f"{forgetting.duplicates} documents were dropped because their text had come before. If the same text is "
            "in another file, it comes in from there: look for it."
        )


@commands.command()
def gc(
    keep: Annotated[int, typer.Option(min=0, help="Runs of each model on runs/NAME that stay.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go, with sizes; remove nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Remove old versions from DVC's cache, BentoML's store and the search tables.

    What is in place stays, every tagged release, the last runs, all that these were made from, and every Bento
    that a kept package names or that is being served. Remotes are left alone.
    """
    from rich.filesize import decimal

    from refrag_platform.history import retention

    project = find_project()
    plan = retention.plan(project, keep) if dry_run else retention.collect(project, keep)
    if as_json:
        garbage = [{"kind": item.kind, "name": item.name, "bytes": item.bytes} for item in plan.garbage]
        typer.echo(json.dumps({"removed": not dry_run, "garbage": garbage, "notes": plan.notes}, indent=2))
        return
    for item in plan.garbage:
        typer.echo(f"{item.kind:<9} {decimal(item.bytes):>10}  {item.name}")
    for note in plan.notes:
        typer.echo(note, err=True)
    total = decimal(sum(item.bytes for item in plan.garbage))
    typer.echo(f"{total} would be freed" if dry_run else f"{total} freed")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _change(a: Any, b: Any) -> str:
    """How much a figure rose or fell."""
    if isinstance(a, bool) or isinstance(b, bool) or not isinstance(a, int | float) or not isinstance(b, int | float):
        return ""
    return f"{b - a:+.4g}" if b != a else ""
