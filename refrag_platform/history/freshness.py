"""Whether an artifact is current: the one place that decides it, by the manifest beside the artifact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from refrag_platform.artifacts.digest import code_digest
from refrag_platform.artifacts.manifest import FILE_NAME, InputRecord, Manifest
from refrag_platform.errors import ArtifactError
from refrag_platform.history.outside import outside_digest, outside_files
from refrag_platform.project import Project
from refrag_platform.recipes import Recipe
from refrag_platform.stages import STAGES, inputs_of, settings_of

State = Literal["current", "stale", "damaged", "missing"]


@dataclass(frozen=True)
class Dependencies:
    """All that decides the bytes of an artifact, as it is now.

    `sources`: files that the stage reads beside its inputs, as far as `outside_files` lists them. `fingerprint`: one
    hash over everything; equal fingerprints need no second run.
    """

    inputs: dict[str, InputRecord]
    sources: list[InputRecord]
    settings: dict[str, Any]
    seed: int
    code: str
    fingerprint: str


@dataclass(frozen=True)
class Standing:
    """An artifact's state, and its manifest where there is one that can be read.

    `stale`: a run of the stage now would start from other inputs, settings, sources, seed or code. `damaged`: the
    bytes are not the manifest's.
    """

    state: State
    manifest: Manifest | None


def input_records(
    project: Project, stage: str, model: str, arriving: Mapping[str, str] | None = None
) -> dict[str, InputRecord]:
    """Path and hash of every input artifact, as their manifests say; the bytes are not read.

    Args: arriving: hashes of artifacts that are about to be put into place, by stage; they count instead.

    Raises:
        ArtifactError: an input has not been made.
    """
    records = {}
    for name in inputs_of(project, STAGES[stage], model):
        folder = project.stage_dir(name, model)
        new = (arriving or {}).get(name)
        if new is None and not (folder / FILE_NAME).is_file():
            raise ArtifactError(
                f"{stage} needs the {STAGES[name].title} of {model}, which is not at {folder}; "
                f"make it with `refrag run {name} --model {model}`"
            )
        path = (folder / "content").relative_to(project.root).as_posix()
        records[name] = InputRecord(path=path, hash=new or Manifest.read(folder).hash)
    return records


def dependencies(
    project: Project, name: str, recipe: Recipe, arriving: Mapping[str, str] | None = None
) -> Dependencies:
    """What a run of the stage `name` of the recipe's model would start from now.

    Args: arriving: as of `input_records`.

    Raises:
        ArtifactError: an input has not been made.
    """
    stage = STAGES[name]
    inputs, sources = input_records(project, name, recipe.name, arriving), outside_files(project, name, recipe)
    settings, code = settings_of(stage, recipe), code_digest(project.root, stage.code(project.root))
    facts = {
        "stage": name,
        "inputs": {put: record.hash for put, record in inputs.items()},
        "settings": settings,
        "seed": recipe.seed,
        "sources": outside_digest(project, name, recipe, sources),
        "code": code,
    }
    fingerprint = hashlib.md5(json.dumps(facts, sort_keys=True).encode(), usedforsecurity=False).hexdigest()
    return Dependencies(inputs, sources, settings, recipe.seed, code, fingerprint)


def standing(project: Project, stage: str, model: str, now: Dependencies | None = None) -> Standing:
    """The state of the artifact in place; whether its inputs are current themselves, status.py asks.

    Args:
        now: what a run would start from, where that is known already.

    Raises:
        RecipeError: the recipe is missing or wrong.
    """
    folder = project.stage_dir(stage, model)
    try:
        manifest = Manifest.read(folder)
    except ArtifactError:
        return Standing("damaged" if folder.exists() else "missing", None)
    if not manifest.describes(folder):
        return Standing("damaged", manifest)
    try:
        now = now or dependencies(project, stage, project.recipe(model))
    except ArtifactError:
        return Standing("stale", manifest)
    return Standing("current" if now.fingerprint == manifest.fingerprint else "stale", manifest)


def is_current(project: Project, stage: str, model: str) -> bool:
    """Whether a run of the stage now would find its artifact in place."""
    return standing(project, stage, model).state == "current"
