"""Kill retraining in Dagster with SIGKILL at random seconds, start it again, and see that it goes on where it was.

    python scripts/kill_retraining.py /tmp/clone --model tiny --kills 20

The folder is a project of its own (a fresh clone), whose artifacts of that model are removed. By turns the trainer,
the daemon and the whole process tree of `make ui` are killed. After each kill the run must end, the device's slot be
free and no artifact be half; the next run must go on from the newest complete checkpoint, its log of losses kept line
by line. Whenever a run gets through, its artifacts and losses must be those of the undisturbed run.
"""

import random
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from dagster import DagsterRunStatus

sys.path.insert(0, str(Path(__file__).parent))
from deployment import FINISHED, Deployment, Role

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.artifacts.manifest import FILE_NAME, Manifest
from refrag_platform.errors import ArtifactError
from refrag_platform.project import Project
from refrag_platform.stages import STAGES
from refrag_platform.training.core import checkpoint, metrics

ROLES: tuple[Role, ...] = ("trainer", "daemon", "tree")
METRICS = "metrics.jsonl"
# Most kills come while one of the trainings runs and has saved, which a small model does in a small part of the time.
TRAINING_SHARE, SECONDS_OF_TRAINING = 0.7, 5.0
Lines = list[dict[str, float]]
Curve = list[tuple[float, float]]


def main(
    folder: Annotated[Path, typer.Argument(help="The project to run in.")],
    model: Annotated[str, typer.Option("--model", "-m")] = "tiny",
    kills: Annotated[int, typer.Option(help="How many of running runs, by turns of trainer, daemon and tree.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the random moments.")] = 0,
    assets: Annotated[list[str] | None, typer.Option("--asset", help="Only these; default: to the release.")] = None,
) -> None:
    """Exit 1 if a run did not go on, the slot was not given back, an artifact was half, or the end differs."""
    project, chance = Project(folder.resolve()), random.Random(seed)
    remove(project, model)
    faults: list[str] = []
    with Deployment(project) as dagster:
        began = time.monotonic()
        if dagster.finish(launch(dagster, model, assets)) is not DagsterRunStatus.SUCCESS:
            raise SystemExit(f"the undisturbed run failed: {dagster.log}")
        seconds = time.monotonic() - began
        expected, curves = hashes(project, model), losses(project, model)
        typer.echo(f"undisturbed: {seconds:.0f} s")
        remove(project, model)
        kept: dict[str, Lines] = {}
        number = 0
        while number < kills:
            role, run, moment = ROLES[number % len(ROLES)], launch(dagster, model, assets), chance.uniform(0, seconds)
            since = "it began"
            ahead = [stage for stage in assets or STAGES if stage in curves and not made(project, model, stage)]
            if ahead and chance.random() < TRAINING_SHARE:
                stage, moment = chance.choice(ahead), chance.uniform(0, SECONDS_OF_TRAINING)
                wait_until_saved(dagster, model, run, stage)
                since = f"{stage} saved"
            killed, ended = kill_at(dagster, run, role, moment)
            number += killed > 0
            said = (
                f"{killed} of {role} killed {moment:.1f} s after {since}" if killed else f"over before the {role} was"
            )
            found = half_made(project, model) + not_continued(project, model, kept)
            if not killed and ended is not DagsterRunStatus.SUCCESS:
                found.append(f"it failed by itself: {dagster.log}")
            if ended is DagsterRunStatus.SUCCESS:
                found += compare(project, model, expected, curves)
                remove(project, model)
                kept.clear()
            else:
                kept |= saved(project, model)
            steps = ", ".join(f"{stage} {lines[-1]['step']:.0f}" for stage, lines in kept.items() if lines)
            typer.echo(f"{number} of {kills}: {said}; run {ended.value}; saved: {steps or 'nothing yet'}")
            faults += [f"{number}, {said}: {fault}" for fault in found]
            if faults and not killed:
                break  # or it would fail again and again
        if dagster.finish(launch(dagster, model, assets)) is not DagsterRunStatus.SUCCESS:
            faults.append(f"the last run failed: {dagster.log}")
        faults += not_continued(project, model, kept) + compare(project, model, expected, curves)
    typer.echo("\n".join(faults) or f"{kills} kills: every run went on, every artifact and loss is as undisturbed")
    sys.exit(bool(faults))


def launch(dagster: Deployment, model: str, assets: list[str] | None) -> str:
    return dagster.launch(model, "refrag_pipeline", assets) if assets else dagster.launch(model)


def made(project: Project, model: str, stage: str) -> bool:
    return (project.stage_dir(stage, model) / FILE_NAME).is_file()


def wait_until_saved(dagster: Deployment, model: str, run: str, stage: str) -> None:
    """Wait until the run trains a stage and has saved a checkpoint of its own, or has ended."""
    before = saved(dagster.project, model).get(stage)

    def has_saved() -> bool:
        return saved(dagster.project, model).get(stage) != before or dagster.status(run) in FINISHED

    dagster.until(has_saved, f"{stage} trains")


def kill_at(dagster: Deployment, run: str, role: Role, moment: float) -> tuple[int, DagsterRunStatus]:
    """Kill a part in `moment` seconds, once the run has begun; returns how many processes and how the run ended.

    None are killed where the run has ended before.
    """
    dagster.until(lambda: dagster.status(run) is not DagsterRunStatus.QUEUED, "the run starts")
    ends = time.monotonic() + moment
    while time.monotonic() < ends and dagster.status(run) not in FINISHED:
        time.sleep(0.1)
    if role == "trainer":  # between two stages there is none
        dagster.until(lambda: bool(dagster.find("assets.child")) or dagster.status(run) in FINISHED, "a stage runs")
    if dagster.status(run) in FINISHED:
        return 0, dagster.finish(run)
    killed = dagster.kill(role)
    if role != "trainer":
        dagster.start()
    return len(killed), dagster.finish(run)


def saved(project: Project, model: str) -> dict[str, Lines]:
    """By stage that was cut off: the log of losses up to its newest complete checkpoint."""
    found = {}
    for stage in STAGES:
        state = project.work_dir(stage, model) / "state"
        checkpoints = checkpoint.complete(state / "checkpoints")
        if checkpoints:
            step = int(checkpoints[-1].name.removeprefix("step-"))
            found[stage] = [line for line in metrics.read(state / METRICS) if line["step"] <= step]
    return found


def not_continued(project: Project, model: str, kept: dict[str, Lines]) -> list[str]:
    """Trainings that began anew. A line holds its speed, too: none is written alike twice."""
    faults = []
    for stage, lines in kept.items():
        published = project.stage_dir(stage, model) / METRICS
        now = metrics.read(published if published.is_file() else project.work_dir(stage, model) / "state" / METRICS)
        if now[: len(lines)] != lines:
            faults.append(f"{stage} did not go on from step {lines[-1]['step']}")
    return faults


def compare(project: Project, model: str, expected: dict[str, str], curves: dict[str, Curve]) -> list[str]:
    """What differs from the undisturbed run: hashes of artifacts, losses step by step."""
    now, course = hashes(project, model), losses(project, model)
    return [
        *(f"{stage}: {now.get(stage)}, undisturbed {was}" for stage, was in expected.items() if now.get(stage) != was),
        *(f"{stage}: other losses than undisturbed" for stage, was in curves.items() if course.get(stage) != was),
    ]


def hashes(project: Project, model: str) -> dict[str, str]:
    """Of the artifacts in place, by stage."""
    there = [stage for stage in STAGES if made(project, model, stage)]
    return {stage: Manifest.read(project.stage_dir(stage, model)).hash for stage in there}


def losses(project: Project, model: str) -> dict[str, Curve]:
    """Step and loss of every line of every training in place."""
    logs = {stage: metrics.read(project.stage_dir(stage, model) / METRICS) for stage in STAGES}
    return {stage: [(line["step"], line["loss"]) for line in log] for stage, log in logs.items() if log}


def half_made(project: Project, model: str) -> list[str]:
    """Artifacts in place that are not what their manifest says."""
    faults = []
    for stage in STAGES:
        folder = project.stage_dir(stage, model)
        if folder.exists():
            try:
                if folder_digest(folder / "content") != Manifest.read(folder).hash:
                    faults.append(f"{stage}: its content is not what its manifest says")
            except ArtifactError as error:
                faults.append(f"{stage}: {error}")
    return faults


def remove(project: Project, model: str) -> None:
    """Remove the model's artifacts and scratch."""
    for stage in STAGES:
        shutil.rmtree(project.stage_dir(stage, model), ignore_errors=True)
    shutil.rmtree(project.root / "work" / model, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
