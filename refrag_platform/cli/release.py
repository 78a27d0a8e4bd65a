"""`refrag release`: which version of a model is the released one; promote, roll back, restore."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from refrag_platform.cli.options import find_project
from refrag_platform.errors import RefragError

if TYPE_CHECKING:
    from refrag_platform.history.versions import Release
    from refrag_platform.project import Project
    from refrag_platform.releases.gate import Decision

Model = Annotated[str, typer.Argument(help="A model, e.g. tiny.")]
Json = Annotated[bool, typer.Option("--json", help="Everything, the gate's figures too, as JSON.")]
KEY_METRICS = ("P32_refrag", "P128_refrag", "refrag_exact_match", "refrag_f1")

commands = typer.Typer(
    name="release", no_args_is_help=True, help="Versions of a model, and which one is released (prod)."
)


@commands.command("ls")
def list_releases(
    model: Annotated[str | None, typer.Argument(help="One model; default: all with a recipe.")] = None,
) -> None:
    """List versions with date, commit, key figures and the fine-tuned model's hash; * marks the released one."""
    from refrag_platform.history.versions import released, releases

    project = find_project()
    known = {name: releases(project, name) for name in ([model] if model else project.recipes())}
    if not any(known.values()):
        if model:
            project.recipe(model)  # an unknown one is refused; of one whose recipe is gone there may be releases yet
        which = model or "any model"
        typer.echo(
            f"No version of {which} is released yet. Once the artifacts of a model are made (`refrag status`), "
            f"`refrag release promote {model or 'MODEL'}` releases them.",
            err=True,
        )
        return
    line = "{} {:<24} {:<25} {:<12} {:<36} {}"
    typer.secho(line.format(" ", "version", "date", "commit", "finetuned", "figures"), bold=True)
    for name, versions in known.items():
        current = released(project, name)
        for release in versions:
            mark = "*" if current is not None and release.version == current.version else " "
            figures = _figures(release)
            digest = release.hashes.get("finetuned", "")
            text = line.format(mark, f"{name}@{release.version}", release.date, release.commit[:12], digest, figures)
            typer.secho(text.rstrip(), fg=typer.colors.GREEN if mark == "*" else None)


@commands.command()
def show(
    model: Model,
    version: Annotated[str | None, typer.Option(help="e.g. v1.0.0; default: the released one.")] = None,
    as_json: Json = False,
) -> None:
    """Show a version: commit, hashes of all its artifacts, figures, and what the gate found."""
    release = _find(find_project(), model, version)
    if as_json:
        typer.echo(json.dumps(release.plain(), indent=2))
        return
    typer.secho(f"{model}@{release.version}  {release.date}  commit {release.commit}", bold=True)
    for stage, digest in release.hashes.items():
        typer.echo(f"  {stage:<16} {digest}")
    for name, value in release.metrics.items():
        typer.echo(f"  {name:<32} {value}")
    decision = release.record.get("decision", {})
    if forced := release.record.get("force_reason"):
        typer.secho(f"forced: {forced}", fg=typer.colors.YELLOW)
    typer.echo(decision.get("reason", "no decision recorded"))


@commands.command()
def promote(
    model: Model,
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="Evaluate the released version on the candidate's held-out set, where that is another or a figure of "
            "the released version is missing.",
        ),
    ] = False,
    force_reason: Annotated[
        str | None, typer.Option(help="Release it whatever the gate says; the reason is kept.")
    ] = None,
    bump: Annotated[Literal["major", "minor", "patch"], typer.Option(help="Part to count up.")] = "minor",
    as_json: Json = False,
) -> None:
    """Release the artifacts in place, if they hold against the released version on the held-out sets.

    Each figure of the recipe's `release.tolerances` is compared window by window and question by question. A
    refused candidate changes nothing: status 1. What is released is committed on runs/MODEL and tagged
    MODEL@vX.Y.Z and MODEL#prod#N; `git push --tags` and `refrag push` take it elsewhere.
    """
    from refrag_platform.releases import promotion

    outcome = promotion.promote(find_project(), model, evaluate_again=again, force_reason=force_reason, bump=bump)
    if as_json:
        decision = None if outcome.decision is None else outcome.decision.plain()
        release = None if outcome.release is None else outcome.release.plain()
        typer.echo(json.dumps({"new": outcome.new, "decision": decision, "release": release}, indent=2))
    else:
        if outcome.decision is not None:
            _print(outcome.decision)
        if outcome.release is not None:
            state = "is released" if outcome.new or outcome.decision is None else "stays the released one"
            typer.echo(f"{model}@{outcome.release.version} {state}, commit {outcome.release.commit[:12]}")
    if outcome.decision is not None and not outcome.new:
        raise typer.Exit(1)


@commands.command()
def rollback(model: Model, reason: Annotated[str | None, typer.Option(help="Why; kept in the tag.")] = None) -> None:
    """Make the version before the released one the released one again; nothing is deleted.

    `refrag release restore` then puts its artifacts into place.
    """
    from refrag_platform.releases import promotion

    release = promotion.rollback(find_project(), model, reason)
    typer.echo(f"{model}@{release.version} is released again, commit {release.commit[:12]}")


@commands.command()
def restore(
    model: Model, version: Annotated[str | None, typer.Option(help="e.g. v1.0.0; default: the released one.")] = None
) -> None:
    """Put a version's chunks, fine-tuned model and package into their places, from DVC's cache or remote.

    Git's files and dvc.lock stay as they are: `dvc checkout` brings back what was there before.
    """
    from refrag_platform.releases.restore import SERVED
    from refrag_platform.releases.restore import restore as put_back

    project = find_project()
    release = _find(project, model, version)
    changed = put_back(project, release)
    for stage in SERVED:
        state = "restored" if stage in changed else "was in place"
        typer.echo(f"{stage} of {model}@{release.version} {state}, {release.hashes[stage]}")


def _find(project: Project, model: str, version: str | None) -> Release:
    from refrag_platform.history.versions import release_named, released

    release = released(project, model) if version is None else release_named(project, model, version, "--version")
    if release is None:
        raise RefragError(f"no version of {model} is released; `refrag release promote {model}` releases one")
    return release


def _figures(release: Release) -> str:
    return "  ".join(f"{name} {release.metrics[name]:.4g}" for name in KEY_METRICS if name in release.metrics)


def _print(decision: Decision) -> None:
    line = "{:<21} {:<20} {:>10} {:>10} {:>9} {:>20} {:>10} {:>7}"
    typer.secho(
        line.format("figure", "verdict", "candidate", "released", "gain", "interval", "tolerance", "items"), bold=True
    )
    for verdict in decision.verdicts:
        interval = "" if verdict.low is None else f"[{verdict.low:+.4f}, {verdict.high:+.4f}]"
        numbers = [_number(verdict.candidate), _number(verdict.released), _number(verdict.gain, "+.4f"), interval]
        text = line.format(verdict.metric, verdict.outcome, *numbers, f"{verdict.tolerance:g}", verdict.items)
        typer.secho(text, fg=typer.colors.GREEN if verdict.passes else typer.colors.RED)
    typer.echo(decision.reason)
    if decision.needs_again:
        typer.echo("--again evaluates the released version on the candidate's held-out set and compares then")


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)
