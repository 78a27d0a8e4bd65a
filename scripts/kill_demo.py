"""Kill `refrag demo` with SIGKILL in every stage, start it again, and see that nothing half-made is taken for whole.

python scripts/kill_demo.py /tmp/clone --model tiny --kills 2

The folder is a project of its own (a fresh clone with its .venv), whose artifacts of that model are removed. An
undisturbed run gives each stage's duration and the hashes that the disturbed runs must end with; with --as-made, the
artifacts that are there, made undisturbed, do.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import psutil
import typer

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.errors import ArtifactError
from refrag_platform.project import Project
from refrag_platform.stages import STAGES

POLL = 0.002
# Seconds; a trainer whose parent was killed saves before it ends.
GRACE = 60.0


def main(
    folder: Annotated[Path, typer.Argument(help="The project to run in.")],
    model: Annotated[str, typer.Option("--model", "-m")] = "tiny",
    kills: Annotated[int, typer.Option(help="Kills at random moments of each stage.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the random moments.")] = 0,
    as_made: Annotated[bool, typer.Option(help="Take hashes and durations from the artifacts that are there.")] = False,
    random_only: Annotated[bool, typer.Option(help="All kills at random moments, none as it is published.")] = False,
    parent_only: Annotated[bool, typer.Option(help="Kill the demo's own process, not those below it.")] = False,
    only: Annotated[list[str] | None, typer.Option("--stage", help="Of these stages only; default: of each.")] = None,
) -> None:
    """Exit 1 if a half artifact was accepted, a process was left, or the end differs from an undisturbed run."""
    project, chance = Project(folder.resolve()), random.Random(seed)
    stages = [stage for stage in STAGES if not only or stage in only]
    if unknown := set(only or ()) - set(STAGES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; stages are {', '.join(STAGES)}")
    expected, durations = _made(project, model) if as_made else _undisturbed(project, model)
    _remove(project, model, stages)
    faults = []
    for stage in stages:
        for kill in range(kills):
            # One kill of each stage comes as it is published, the others at any moment of it.
            moment = None if kill == 0 and not random_only else chance.uniform(0, durations[stage])
            faults += _kill_in(project, model, stage, moment, parent_only)
    finished = _start(project, model, "last.log").wait()
    found = _hashes(project, model)
    if finished:
        faults.append(f"the last run failed: {project.root / 'last.log'}")
    faults += [
        f"{stage}: {found.get(stage)}, undisturbed {hash_}"
        for stage, hash_ in expected.items()
        if found.get(stage) != hash_
    ]
    typer.echo("\n".join(faults) or f"{len(stages) * kills} kills: every artifact is whole and as it was undisturbed")
    sys.exit(bool(faults))


def _undisturbed(project: Project, model: str) -> tuple[dict[str, str], dict[str, float]]:
    """Hashes and seconds of each stage of a run that nobody kills."""
    _remove(project, model, STAGES)
    running = _start(project, model, "undisturbed.log")
    seen: dict[str, tuple[float, float]] = {}
    while running.poll() is None:
        for stage in STAGES:
            if (project.work_dir(stage, model) / "making").exists():
                first = seen.setdefault(stage, (time.monotonic(), 0.0))[0]
                seen[stage] = (first, time.monotonic())
        time.sleep(0.02)
    if running.returncode:
        raise SystemExit(f"the undisturbed run failed: {project.root / 'undisturbed.log'}")
    durations = {stage: last - first for stage, (first, last) in seen.items()}
    typer.echo("undisturbed: " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in durations.items()))
    return _hashes(project, model), durations


def _made(project: Project, model: str) -> tuple[dict[str, str], dict[str, float]]:
    """The same of the artifacts that are there."""
    made = {stage: Manifest.read(project.stage_dir(stage, model)) for stage in STAGES}
    return {stage: one.hash for stage, one in made.items()}, {stage: one.seconds for stage, one in made.items()}


def _kill_in(project: Project, model: str, stage: str, moment: float | None, parent_only: bool) -> list[str]:
    """Start the demo and kill it in a stage, `moment` seconds after it began or (None) as it is published."""
    work, published = project.work_dir(stage, model), project.stage_dir(stage, model)
    shutil.rmtree(published, ignore_errors=True)
    running = _start(project, model, "killed.log")
    try:
        begun = None
        while running.poll() is None:
            if begun is None and (work / "making").exists():
                begun = time.monotonic()
            due = (work / "ready").exists() if moment is None else begun and time.monotonic() - begun >= moment
            if due or published.exists():
                break
            time.sleep(POLL)
    finally:
        left = _kill(running, parent_only)
    when = "as published" if moment is None else f"after {moment:.2f} s"
    typer.echo(f"killed in {stage} {when}; whole: {', '.join(_hashes(project, model)) or 'none'}")
    return [f"{stage} {when}: {fault}" for fault in [*left, *_half_made(project, model)]]


def _kill(running: subprocess.Popen[bytes], parent_only: bool) -> list[str]:
    """SIGKILL; returns the processes that are still there after a while."""
    try:
        below = psutil.Process(running.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    for process in [] if parent_only else below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    running.kill()
    running.wait()
    _, alive = psutil.wait_procs(below, timeout=GRACE)
    return [f"process {process.pid} outlived the kill" for process in alive]


def _half_made(project: Project, model: str) -> list[str]:
    """Published artifacts that are not what their manifest says."""
    faults = []
    for stage in STAGES:
        folder = project.stage_dir(stage, model)
        if not folder.exists():
            continue
        try:
            stated = Manifest.read(folder).hash
        except ArtifactError as error:
            faults.append(f"{stage}: {error}")
            continue
        if folder_digest(folder / "content") != stated:
            faults.append(f"{stage}: its content is not what its manifest says")
    return faults


def _hashes(project: Project, model: str) -> dict[str, str]:
    folders = {stage: project.stage_dir(stage, model) for stage in STAGES}
    return {
        stage: Manifest.read(folder).hash for stage, folder in folders.items() if (folder / "manifest.json").exists()
    }


def _remove(project: Project, model: str, stages: Iterable[str]) -> None:
    for stage in stages:
        shutil.rmtree(project.stage_dir(stage, model), ignore_errors=True)
        shutil.rmtree(project.work_dir(stage, model), ignore_errors=True)


def _start(project: Project, model: str, log: str) -> subprocess.Popen[bytes]:
    root = project.root
    homes = {"DAGSTER_HOME": root / ".dagster_home", "BENTOML_HOME": root / ".bentoml", "REFRAG_ROOT": root}
    command = [str(root / ".venv/bin/refrag"), "demo", "--model", model]
    with (root / log).open("wb") as output:
        environment = {**os.environ, **{name: str(path) for name, path in homes.items()}}
        return subprocess.Popen(
            command, cwd=root, env=environment, stdout=output, stderr=output, start_new_session=True
        )


if __name__ == "__main__":
    typer.run(main)
