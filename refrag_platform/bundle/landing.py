"""What another machine made is put into place here, as if it had been made here, or refused whole.

Each artifact is held against this checkout by `history/freshness.py`, the one place that says what is current: what
lands is current, and only that lands.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refrag_platform.artifacts import publication, reports
from refrag_platform.artifacts.digest import file_digest
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.bundle.unbundle import BundleError, unpack
from refrag_platform.errors import ArtifactError, CheckFailed, RefragError
from refrag_platform.history.freshness import Dependencies, dependencies, standing
from refrag_platform.lineage.difference import flat
from refrag_platform.project import Project
from refrag_platform.quality.results import DOCS_FOLDER
from refrag_platform.recipes import Recipe
from refrag_platform.runner import blocking_failures
from refrag_platform.stages import STAGES, inputs_of
from refrag_platform.training.core import checkpoint


@dataclass(frozen=True)
class Landed:
    """What is in place of a model now: artifacts by stage, and stages whose state a run here would go on from."""

    model: str
    artifacts: dict[str, Manifest]
    unfinished: list[str]


def import_results(
    project: Project,
    folders: Sequence[Path],
    require_recordable: Callable[[str, list[str]], None] | None = None,
    on_piece: Callable[[str], None] = lambda text: None,
) -> list[Landed]:
    """Put the artifacts of a bundle of results into place, after all of them were checked; what landed of each model.

    Args:
        require_recordable: refuses, by an error, a model and stages that can't be recorded once they are in place.

    Raises:
        RefragError: the bundle is damaged or incomplete, is no bundle of results, or a stage is running here.
        ArtifactError: inputs, settings, code or files differ from those here; the message names them.
        CheckFailed: a blocking check failed.
    """
    arrived = Project(project.root / "work" / ".bundle" / "unpacked")
    with publication.only_runner(arrived.root.parent):
        shutil.rmtree(arrived.root, ignore_errors=True)
        try:
            index = _unpacked(folders, arrived.root, on_piece)
            if require_recordable is not None:
                for model, stages in index["models"].items():
                    require_recordable(model, stages)
            return _land(project, arrived, index)
        finally:
            shutil.rmtree(arrived.root, ignore_errors=True)


def _unpacked(folders: Sequence[Path], target: Path, on_piece: Callable[[str], None]) -> dict[str, Any]:
    try:
        index = unpack(folders, target, on_piece)
    except BundleError as error:
        raise RefragError(str(error)) from None
    if index["kind"] != "results":
        raise RefragError(
            f"{folders[0]} holds work to be done on another machine; unpack it there, by --into FOLDER or `python "
            "unbundle.py FOLDER`"
        )
    if unknown := [stage for _, stage in _pairs(index, "models", "unfinished") if stage not in STAGES]:
        raise RefragError(f"{folders[0]} has results of {', '.join(unknown)}, which is no stage here")
    return index


def _pairs(index: dict[str, Any], *kinds: str) -> list[tuple[str, str]]:
    """Model and stage of what the bundle has of these kinds."""
    pairs = [(model, stage) for kind in kinds for model, stages in index[kind].items() for stage in stages]
    return list(dict.fromkeys(pairs))


def _land(project: Project, arrived: Project, index: dict[str, Any]) -> list[Landed]:
    manifests: dict[str, dict[str, Manifest]] = {model: {} for model in index["models"]}
    recipes = {model: project.recipe(model) for model in manifests}
    with ExitStack() as locks:
        for model, stage in _pairs(index, "models", "unfinished"):
            locks.enter_context(publication.only_runner(project.work_dir(stage, model)))
            publication.recover(project.stage_dir(stage, model), project.work_dir(stage, model))
        for model, stage in _pairs(index, "models"):
            hashes = {name: manifest.hash for name, manifest in manifests[model].items()}
            manifests[model][stage] = _accepted(project, arrived, recipes[model], stage, hashes, index)
        for model, stage in _pairs(index, "unfinished"):
            hashes = {name: manifest.hash for name, manifest in manifests[model].items()}
            _require_same_run(project, arrived, recipes[model], stage, hashes)
        for model, stage in _pairs(index, "models"):
            _require_checks(project, arrived, recipes[model], manifests[model][stage], manifests[model])
        for model, stage in _pairs(index, "models"):
            _put_artifact(project, arrived, manifests[model][stage])
        return [
            Landed(
                model,
                artifacts,
                [stage for stage in index["unfinished"][model] if _put_state(project, arrived, stage, model)],
            )
            for model, artifacts in manifests.items()
        ]


def _accepted(
    project: Project, arrived: Project, recipe: Recipe, stage: str, hashes: Mapping[str, str], index: dict[str, Any]
) -> Manifest:
    """The manifest of an artifact that arrived, made from what a run here would start from; with this Git's commit."""
    folder = arrived.stage_dir(stage, recipe.name)
    manifest = Manifest.read(folder)
    if (manifest.stage, manifest.model) != (stage, recipe.name) or not manifest.describes(folder):
        raise ArtifactError(f"the bytes of {stage} in the bundle are not its manifest's; export the results again")
    now = dependencies(project, stage, recipe, hashes)
    if manifest.fingerprint != now.fingerprint:
        told = "\n".join(f"  {line}" for line in _differences(project, manifest, now, index["code"]))
        raise ArtifactError(
            f"{stage} of {recipe.name} was not made from what is here, so nothing of the bundle is put into place:\n"
            f"{told}\nBring this checkout to what it was at the export, or run the stage again"
        )
    here = standing(project, stage, recipe.name, now)
    if here.state == "current" and here.manifest is not None and here.manifest.hash != manifest.hash:
        raise ArtifactError(
            f"{project.stage_dir(stage, recipe.name)} is current with hash {here.manifest.hash}, the bundle's has "
            f"{manifest.hash}; move the one here away to take the bundle's"
        )
    # Of a folder the record holds its whole path, which was another one there.
    known = {record.hash: record for record in now.sources}
    sources = [known.get(record.hash, record) for record in manifest.sources]
    return manifest.model_copy(update={"sources": sources, "commit": manifest.commit or index["commit"]})


def _differences(project: Project, manifest: Manifest, now: Dependencies, code: dict[str, str]) -> Iterator[str]:
    """What differs between what an artifact was made from and what is here, in words."""
    for name in {*manifest.inputs, *now.inputs}:
        there, here = manifest.inputs.get(name), now.inputs.get(name)
        if there is None or here is None or there.hash != here.hash:
            yield f"input {name}: made from {there.hash if there else 'none'}, here is {here.hash if here else 'none'}"
    former, wanted = dict(flat(manifest.settings)), dict(flat(now.settings))
    for key in dict.fromkeys([*former, *wanted]):
        if former.get(key) != wanted.get(key):
            yield f"setting {key}: made with {former.get(key)!r}, here it is {wanted.get(key)!r}"
    if manifest.seed != now.seed:
        yield f"seed: made with {manifest.seed}, here it is {now.seed}"
    read = {record.hash for record in manifest.sources}
    for record in now.sources:
        if record.hash not in read:
            yield f"file {record.path}: it has hash {record.hash} here, and was not read there"
    if manifest.code != now.code:
        files = {*STAGES[manifest.stage].code(project.root), *code}
        changed = [file for file in sorted(files) if _digest_here(project, file) != code.get(file)]
        yield f"code: {', '.join(changed) or 'other files'}"


def _digest_here(project: Project, file: str) -> str | None:
    path = project.root / file
    return file_digest(path) if path.is_file() else None


def _require_same_run(
    project: Project, arrived: Project, recipe: Recipe, stage: str, hashes: Mapping[str, str]
) -> None:
    mark = arrived.work_dir(stage, recipe.name) / "fingerprint"
    if not mark.is_file() or mark.read_text() != dependencies(project, stage, recipe, hashes).fingerprint:
        raise ArtifactError(
            f"the unfinished {stage} of {recipe.name} was begun with other inputs, settings or code than are here, so "
            "nothing of the bundle is put into place; bring this checkout to what it was at the export"
        )


def _require_checks(
    project: Project, arrived: Project, recipe: Recipe, manifest: Manifest, manifests: Mapping[str, Manifest]
) -> None:
    inputs = {
        name: (arrived if name in manifests else project).content(name, recipe.name)
        for name in inputs_of(project, STAGES[manifest.stage], recipe.name)
    }
    folder = arrived.stage_dir(manifest.stage, recipe.name)
    # What was found there is not believed.
    shutil.rmtree(folder / DOCS_FOLDER, ignore_errors=True)
    if failed := blocking_failures(recipe, manifest, folder, inputs):
        raise CheckFailed(
            f"{manifest.stage} of {recipe.name} fails {len(failed)} blocking check(s), so nothing of the bundle is put "
            "into place:\n" + "\n".join(f"  {failure}" for failure in failed)
        )


def _put_artifact(project: Project, arrived: Project, manifest: Manifest) -> None:
    """Publish an artifact as its run would have."""
    stage, model = manifest.stage, manifest.model
    folder, work = project.stage_dir(stage, model), project.work_dir(stage, model)
    if standing(project, stage, model).state != "current":
        making, _ = publication.prepare(work, manifest.fingerprint)
        shutil.rmtree(making)
        arrived.stage_dir(stage, model).rename(making)
        manifest.write(making)
        publication.publish(folder, work)
    publication.settle(work, manifest.fingerprint)
    reports.export(project, manifest)


def _put_state(project: Project, arrived: Project, stage: str, model: str) -> bool:
    """Let a run here go on from where the other machine stopped, unless one here got as far; whether it will."""
    new, work = arrived.work_dir(stage, model), project.work_dir(stage, model)
    _, state = publication.prepare(work, (new / "fingerprint").read_text())
    if (done := checkpoint.steps_done(state)) and done >= checkpoint.steps_done(new / "state"):
        return False
    shutil.rmtree(state)
    (new / "state").rename(state)
    return True
