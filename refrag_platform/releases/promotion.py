"""The promotion of a model to the released one, and the way back. Run: `refrag release promote MODEL`.

Only tags decide: they change when everything else is in place, so that a refusal, an error or a kill leaves
the released version as it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from refrag_platform.artifacts.manifest import Manifest, published
from refrag_platform.artifacts.publication import only_runner
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.evaluation.items import Items
from refrag_platform.history import tags
from refrag_platform.history.dvc import ensure_repo
from refrag_platform.history.git import Git
from refrag_platform.history.runs import commit_run
from refrag_platform.history.tags import Bump
from refrag_platform.history.versions import Release, read_manifests, read_release, released, version_at
from refrag_platform.project import Project
from refrag_platform.releases.gate import Decision, decide
from refrag_platform.releases.restore import contents
from refrag_platform.stages import STAGES


@dataclass(frozen=True)
class PromotionResult:
    """What came of a promotion. `release`: the one that is prod now; `new`: it was not before."""

    decision: Decision | None
    release: Release | None
    new: bool


def promote(
    project: Project,
    model: str,
    *,
    evaluate_again: bool = False,
    force_reason: str | None = None,
    bump: Bump = "minor",
    judge_only: bool = False,
) -> PromotionResult:
    """Release the artifacts in place, if the gate lets them; the tags change only if it does.

    Their dvc.lock and manifests are committed on runs/MODEL, and that commit is tagged as a version and as prod.

    Args:
        evaluate_again: where the held-out set is another than the released version was evaluated on (new
            documents change it), or lacks a figure, evaluate that version on the candidate's set instead of refusing.
        judge_only: find out what the gate decides and release nothing.
        force_reason: releases what the gate refuses; the reason is kept in the tag.

    Raises:
        ArtifactError: an artifact is missing, damaged or not made from the others, or can't be compared.
        RefragError: another process is releasing this model; no Git or DVC repository.
    """
    ensure_repo(project)
    with only_runner(project.work_dir("release", model)):
        manifests = _chain(project, model)
        git, current = Git(project.root), released(project, model)
        if current is not None and current.hashes == {stage: manifest.hash for stage, manifest in manifests.items()}:
            return PromotionResult(None, current, new=False)
        decision = _judge(project, model, current, evaluate_again)
        if judge_only or (not decision.promoted and force_reason is None):
            return PromotionResult(decision, current, new=False)
        commit = commit_run(project, model, f"Release candidate of {model}")
        if read_manifests(project, git, model, commit) != manifests:
            raise ArtifactError(f"artifacts of {model} were replaced while they were judged; nothing was released")
        reason = decision.reason if decision.promoted else f"forced ({force_reason}), the gate had {decision.reason}"
        record = {
            "decision": decision.plain(),
            "over": None if current is None else current.version,
            "force_reason": None if decision.promoted else force_reason,
        }
        known = [version for version in tags.versions(git, model) if version.commit == commit]
        message = _message(model, reason, record)
        version = known[-1] if known else tags.register(git, model, commit, message, bump)
        tags.assign(git, model, commit, message)
        return PromotionResult(decision, read_release(project, git, model, version), new=True)


def rollback(project: Project, model: str, reason: str | None = None) -> Release:
    """Make the version before the released one prod again, by a new assignment; nothing is deleted.

    That is the one that was prod when the released one first became it, so that a second step back goes
    further back.

    Raises:
        RefragError: nothing is released, or nothing was before it.
    """
    with only_runner(project.work_dir("release", model)):
        git, current = Git(project.root), released(project, model)
        if current is None:
            raise RefragError(f"no version of {model} is released; `refrag release promote {model}` releases one")
        before: str | None = None
        for assignment in tags.assignments(git, model):
            if assignment.commit == current.commit:
                break
            before = None if assignment.cancelled else assignment.commit
        if before is None:
            raise RefragError(
                f"{model} {current.version} is its first release: there is none to go back to; "
                f"`refrag release ls {model}` lists them"
            )
        version = version_at(git, model, before)
        text = f"rolled back from {current.version}{f': {reason}' if reason else ''}"
        tags.assign(git, model, before, _message(model, text, {"rolled_back_from": current.version, "reason": reason}))
        return read_release(project, git, model, version)


def _judge(project: Project, model: str, current: Release | None, evaluate_again: bool) -> Decision:
    """The gate's decision on the evaluation in place."""
    candidate, recipe = Items.read(project.content("evaluation", model)), project.recipe(model)
    if current is None:
        return decide(candidate, None, recipe.release)
    with contents(project, current, ["evaluation"]) as folders:
        known = Items.read(folders["evaluation"])
    decision = decide(candidate, known, recipe.release)
    if evaluate_again and decision.needs_again:
        from refrag_platform.releases.again import MEASURED, measure

        trained, corpus = project.content("finetuned", model), project.content("corpus", model)
        base = project.recipe_path(model).parent
        with contents(project, current, MEASURED) as folders:
            again = measure(folders, trained, corpus, recipe, base)
        decision = decide(candidate, again, recipe.release)
    return decision


def _chain(project: Project, model: str) -> dict[str, Manifest]:
    """The manifests of all artifacts in place, each of which is whole and made from the others.

    Raises:
        ArtifactError: one is missing, damaged, or made from something else.
    """
    manifests: dict[str, Manifest] = {}
    for stage in STAGES.values():
        manifest = published(project, stage.name, model)
        if manifest is None:
            raise ArtifactError(
                f"the {stage.title} of {model} is missing or damaged at {project.stage_dir(stage.name, model)}, so "
                f"the model can't be released; make it with `refrag run {stage.name} --model {model}`"
            )
        if manifest.inputs.keys() != set(stage.inputs):
            raise ArtifactError(
                f"the {stage.title} of {model} was made from {', '.join(manifest.inputs)}, in a former order of the "
                f"stages; make it again, from {', '.join(stage.inputs)}: `refrag run {stage.name} --model {model}`"
            )
        for name, record in manifest.inputs.items():
            if record.hash != manifests[name].hash:
                raise ArtifactError(
                    f"the {stage.title} of {model} was made from {name} {record.hash}, but {manifests[name].hash} is "
                    f"in place: a release holds one chain; make it again with `refrag run {stage.name} --model {model}`"
                )
        manifests[stage.name] = manifest
    return manifests


def _message(model: str, subject: str, record: dict[str, Any]) -> str:
    """A tag's message: a line to read, then the record as JSON."""
    line = " ".join(f"{model}: {subject}".split())
    return f"{line}\n\n{json.dumps(record, indent=2, allow_nan=False)}\n"
