"""Running a stage: whether there is anything to do, and how its artifact gets made, checked and into its place.

`run_stage` works in a scratch folder and renames, so that no half-written artifact is ever taken for a whole one.
Run: `refrag run cpt --model tiny`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refrag_platform.artifacts import manifest as manifests
from refrag_platform.artifacts import publication, reports
from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.artifacts.manifest import InputRecord, Manifest
from refrag_platform.controls import require_matched_start
from refrag_platform.errors import ArtifactError, CheckFailed, RefragError
from refrag_platform.history.freshness import dependencies, input_records, standing
from refrag_platform.history.git import git_commit
from refrag_platform.project import Project
from refrag_platform.recipes import Recipe
from refrag_platform.releases.continuation import fetch_base
from refrag_platform.stages import RELEASED, STAGES, Stage, StageContext, inputs_of, stage_function, stages_of
from refrag_platform.training.launch_files import launch_files


@dataclass(frozen=True)
class StageResult:
    """An artifact that is in place. `cached`: nothing had to be done."""

    manifest: Manifest
    path: Path
    cached: bool


def run_stage(
    project: Project,
    name: str,
    model: str,
    *,
    force: bool = False,
    function: Callable[[StageContext], dict[str, Any]] | None = None,
) -> StageResult:
    """Make the artifact `name` of `model`, or find that it is up to date.

    Args: function: makes the same artifact in another way than the stage's own, on a cluster say.

    Raises:
        RefragError: an unknown stage, or another process is running this one.
        ArtifactError: an input is missing or damaged.
        CheckFailed: a blocking check failed; the last good version stays in place.
    """
    if name not in STAGES:
        raise RefragError(f"no stage {name!r}; the stages are: {', '.join(STAGES)}")
    stage, recipe = STAGES[name], project.recipe(model)
    if stage not in stages_of(project, model):
        raise RefragError(
            f"{model} is a control and has {' and '.join(one.name for one in stages_of(project, model))} alone; "
            f"{name} is its model's: `refrag run {name} --model {project.recipe_path(model).parent.name}`"
        )
    require_matched_start(project, model)
    folder, work = project.stage_dir(name, model), project.work_dir(name, model)
    with publication.only_runner(work):
        publication.recover(folder, work)
        _recover_inputs(project, stage, model)
        now = dependencies(project, name, recipe)
        _verify(project, model, now.inputs)
        place = standing(project, name, model, now)
        if place.state == "current" and place.manifest is not None and not force:
            publication.settle(work, now.fingerprint)
            reports.export(project, place.manifest)
            return StageResult(place.manifest, folder, cached=True)
        making, state = publication.prepare(work, now.fingerprint)
        context = StageContext(
            project=project,
            recipe=recipe,
            stage=name,
            inputs={put: project.root / record.path for put, record in now.inputs.items()},
            out=making / "content",
            work=state,
            beside=making,
        )
        started, clock = manifests.now(), time.monotonic()
        fetch_base(project, name, recipe, state / RELEASED)
        metrics = function(context) if function else _call(stage, context)
        context.sources += [record for record in now.sources if record not in context.sources]
        hashes = {put: record.hash for put, record in now.inputs.items()}
        publication.seal(context.out, hashes, [record.hash for record in context.sources])
        manifest = Manifest(
            stage=name,
            model=model,
            hash=folder_digest(context.out),
            fingerprint=now.fingerprint,
            inputs=now.inputs,
            sources=context.sources,
            settings=now.settings,
            seed=now.seed,
            code=now.code,
            commit=git_commit(project.root),
            started=started,
            finished=manifests.now(),
            seconds=round(time.monotonic() - clock, 3),
            hardware=manifests.hardware(),
            libraries=manifests.libraries(),
            metrics=metrics,
        )
        if input_records(project, name, model) != now.inputs:
            raise ArtifactError(f"an input of {name} was replaced while it ran; run it again")
        _check(manifest, context, work)
        manifest.write(making)
        publication.publish(folder, work)
        reports.export(project, manifest)
        return StageResult(manifest, folder, cached=False)


def _recover_inputs(project: Project, stage: Stage, model: str) -> None:
    """Put inputs into place whose publication was killed."""
    for name in inputs_of(project, stage, model):
        folder, work = project.stage_dir(name, model), project.work_dir(name, model)
        if not folder.exists():
            # Where the stage is running, its own runner does this.
            with suppress(RefragError), publication.only_runner(work):
                publication.recover(folder, work)


def _verify(project: Project, model: str, inputs: dict[str, InputRecord]) -> None:
    """Hold the bytes of the inputs against their manifests.

    Raises:
        ArtifactError: one is damaged.
    """
    for name, record in inputs.items():
        content = project.root / record.path
        digest = folder_digest(content)
        if digest != record.hash:
            raise ArtifactError(
                f"{content} has hash {digest}, its manifest says {record.hash}: the files were changed; "
                f"restore them with `dvc checkout {name}@{model}` or make them again with "
                f"`refrag run {name} --model {model}`"
            )


def _call(stage: Stage, context: StageContext) -> dict[str, Any]:
    """The stage's function here, or on every rank of the launcher that its recipe names."""
    files = launch_files(context.project.recipe_path(context.recipe.name).parent, stage.name, context.recipe)
    if files is None:
        return stage_function(stage)(context)
    from refrag_platform.training.launch import launch

    return launch(context, files)


def blocking_failures(recipe: Recipe, manifest: Manifest, folder: Path, inputs: dict[str, Path]) -> list[str]:
    """Name and message of every blocking check that the artifact in `folder` fails; its bytes must be its manifest's.

    Great Expectations is an extra: a bare GPU machine trains without it, and the checkout that takes the artifact in
    (`refrag bundle import`) checks it there.
    """
    try:
        from refrag_platform.quality.checks import check_once

        results = check_once(recipe, manifest, folder, inputs)
    except ModuleNotFoundError as error:
        if error.name not in {"great_expectations", "pandas"}:
            raise
        return []
    return [f"{result.name}: {result.message}" for result in results if not result.passed and result.blocking]


def _check(manifest: Manifest, context: StageContext, work: Path) -> None:
    """Run the stage's quality suite over the artifact before it is published."""
    failed = blocking_failures(context.recipe, manifest, context.beside, context.inputs)
    if failed:
        kept = publication.keep_failed(work)
        raise CheckFailed(
            f"{manifest.stage} of {manifest.model} fails {len(failed)} blocking check(s) and is not published:\n"
            + "\n".join(f"  {failure}" for failure in failed)
            + f"\nIts files are at {kept}"
        )
