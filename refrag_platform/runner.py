"""Running a stage: whether there is anything to do, and how its artifact gets made, checked and into its place.

`run_stage` works in a scratch folder and renames, so that no half-written artifact is ever taken for a whole one.
Run: `refrag run cpt --model tiny`.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refrag_platform import publication
from refrag_platform.errors import ArtifactError, CheckFailed, RefragError
from refrag_platform.project import Project
from refrag_platform.recipes import Recipe
from refrag_platform.stages import RELEASED, STAGES, Stage, StageContext, settings_of, stage_function
from refrag_platform.versioning import manifest as manifests
from refrag_platform.versioning import reports
from refrag_platform.versioning.digest import code_digest, folder_digest
from refrag_platform.versioning.manifest import InputRecord, Manifest
from refrag_platform.versioning.outside import outside_digest, outside_files


@dataclass(frozen=True)
class StageResult:
    """An artifact that is in place. `cached`: nothing had to be done."""

    manifest: Manifest
    path: Path
    cached: bool


def recorded_inputs(project: Project, stage: Stage, model: str) -> dict[str, InputRecord]:
    """Path and hash of every input artifact, as their manifests say; the bytes are not read.

    Raises:
        ArtifactError: an input has not been made.
    """
    records = {}
    for name in stage.inputs:
        folder = project.stage_dir(name, model)
        if not (folder / manifests.FILE_NAME).is_file():
            raise ArtifactError(
                f"{stage.name} needs the {STAGES[name].title} of {model}, which is not at {folder}; "
                f"make it with `refrag run {name} --model {model}`"
            )
        path = (folder / "content").relative_to(project.root).as_posix()
        records[name] = InputRecord(path=path, hash=Manifest.read(folder).hash)
    return records


def input_records(project: Project, stage: Stage, model: str) -> dict[str, InputRecord]:
    """Path and hash of every input artifact, after their bytes were found to be the manifests'.

    Raises:
        ArtifactError: an input has not been made, or is damaged.
    """
    for name in stage.inputs:
        folder, work = project.stage_dir(name, model), project.work_dir(name, model)
        if not folder.exists():
            # Where the stage is running, its own runner does this.
            with suppress(RefragError), publication.only_runner(work):
                publication.recover(folder, work)
    records = recorded_inputs(project, stage, model)
    for name, record in records.items():
        content = project.root / record.path
        found = folder_digest(content)
        if found != record.hash:
            raise ArtifactError(
                f"{content} has hash {found}, its manifest says {record.hash}: the files were changed; "
                f"restore them with `dvc checkout {name}@{model}` or make them again with "
                f"`refrag run {name} --model {model}`"
            )
    return records


def fingerprint(
    project: Project, stage: Stage, recipe: Recipe, inputs: dict[str, InputRecord], outside: list[InputRecord]
) -> str:
    """One hash over all that decides an artifact's bytes; equal fingerprints need no second run.

    Args:
        outside: what `versioning.outside.outside_files` finds for the stage.
    """
    facts = {
        "stage": stage.name,
        "inputs": {name: record.hash for name, record in inputs.items()},
        "settings": settings_of(stage, recipe),
        "seed": recipe.seed,
        "sources": outside_digest(project, stage.name, recipe, outside),
        "code": code_digest(project.root, stage.code),
    }
    return hashlib.md5(json.dumps(facts, sort_keys=True).encode(), usedforsecurity=False).hexdigest()


def made_from_current(project: Project, manifest: Manifest) -> bool:
    """Whether a run of the stage now would start from the same inputs, settings, seed and code.

    Raises:
        ArtifactError: an input has not been made.
    """
    stage, recipe = STAGES[manifest.stage], project.recipe(manifest.model)
    inputs = recorded_inputs(project, stage, manifest.model)
    outside = outside_files(project, stage.name, recipe)
    return fingerprint(project, stage, recipe, inputs, outside) == manifest.fingerprint


def published(project: Project, stage: str, model: str) -> Manifest | None:
    """The manifest of the artifact in place; None when there is none or its bytes are not the manifest's."""
    folder = project.stage_dir(stage, model)
    try:
        manifest = Manifest.read(folder)
    except ArtifactError:
        return None
    return manifest if folder_digest(folder / "content") == manifest.hash else None


def run_stage(project: Project, name: str, model: str, *, force: bool = False) -> StageResult:
    """Make the artifact `name` of `model`, or find that it is up to date.

    Raises:
        RefragError: an unknown stage, or another process is running this one.
        ArtifactError: an input is missing or damaged.
        CheckFailed: a blocking check failed; the last good version stays in place.
    """
    if name not in STAGES:
        raise RefragError(f"no stage {name!r}; the stages are: {', '.join(STAGES)}")
    stage, recipe = STAGES[name], project.recipe(model)
    folder, work = project.stage_dir(name, model), project.work_dir(name, model)
    # Knows releases, which know the stages.
    from refrag_platform.versioning.continuation import fetch_base

    with publication.only_runner(work):
        publication.recover(folder, work)
        inputs, outside = input_records(project, stage, model), outside_files(project, name, recipe)
        wanted = fingerprint(project, stage, recipe, inputs, outside)
        current = published(project, name, model)
        if current is not None and current.fingerprint == wanted and not force:
            publication.settle(work, wanted)
            reports.export(project, current)
            return StageResult(current, folder, cached=True)
        making, state = publication.prepare(work, wanted)
        context = StageContext(
            project=project,
            recipe=recipe,
            stage=name,
            inputs={put: project.root / record.path for put, record in inputs.items()},
            out=making / "content",
            work=state,
            beside=making,
        )
        started, clock = manifests.now(), time.monotonic()
        fetch_base(project, name, recipe, state / RELEASED)
        metrics = _call(stage, context)
        context.sources += [record for record in outside if record not in context.sources]
        hashes = {put: record.hash for put, record in inputs.items()}
        publication.seal(context.out, hashes, [record.hash for record in context.sources])
        manifest = Manifest(
            stage=name,
            model=model,
            hash=folder_digest(context.out),
            fingerprint=wanted,
            inputs=inputs,
            sources=context.sources,
            settings=settings_of(stage, recipe),
            seed=recipe.seed,
            code=code_digest(project.root, stage.code),
            commit=manifests.git_commit(project.root),
            started=started,
            finished=manifests.now(),
            seconds=round(time.monotonic() - clock, 3),
            hardware=manifests.hardware(),
            libraries=manifests.libraries(),
            metrics=metrics,
        )
        if recorded_inputs(project, stage, model) != inputs:
            raise ArtifactError(f"an input of {name} was replaced while it ran; run it again")
        _check(manifest, context, work)
        manifest.write(making)
        publication.publish(folder, work)
        reports.export(project, manifest)
        return StageResult(manifest, folder, cached=False)


def _call(stage: Stage, context: StageContext) -> dict[str, Any]:
    """The stage's function here, or on every rank of the launcher that its recipe names."""
    config = getattr(getattr(context.recipe, stage.name, None), "accelerate_config", None)
    if config is None:
        return stage_function(stage)(context)
    from refrag_platform.training.launch import launch

    return launch(context, config)


def _check(manifest: Manifest, context: StageContext, work: Path) -> None:
    """Run the stage's quality suite over the artifact before it is published.

    Great Expectations is an extra: a bare GPU machine trains without it, and the pipeline that takes
    the artifact in checks it there.
    """
    try:
        from refrag_platform.quality.checks import check_once

        results = check_once(context.recipe, manifest, context.beside, context.inputs)
    except ModuleNotFoundError as error:
        if error.name not in {"great_expectations", "pandas"}:
            raise
        return
    failed = [result for result in results if not result.passed and result.blocking]
    if failed:
        kept = publication.keep_failed(work)
        raise CheckFailed(
            f"{manifest.stage} of {manifest.model} fails {len(failed)} blocking check(s) and is not published:\n"
            + "\n".join(f"  {result.name}: {result.message}" for result in failed)
            + f"\nIts files are at {kept}"
        )
