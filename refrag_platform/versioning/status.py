"""Which artifacts are there, and would a run make them again. Run: `refrag status`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from refrag_platform.errors import ArtifactError
from refrag_platform.project import Project
from refrag_platform.runner import made_from_current
from refrag_platform.stages import STAGES
from refrag_platform.versioning.digest import folder_digest
from refrag_platform.versioning.dvc import recorded_hash
from refrag_platform.versioning.manifest import Manifest

State = Literal["current", "stale", "damaged", "missing"]


@dataclass(frozen=True)
class ArtifactStatus:
    """One artifact.

    `stale`: inputs, settings or code changed, or an input is itself not current. `damaged`: the bytes are
    not the manifest's. `recorded`: dvc.lock names this very artifact.
    """

    stage: str
    model: str
    path: str
    state: State
    hash: str | None
    recorded: bool


def status(project: Project, model: str) -> list[ArtifactStatus]:
    """The state of every artifact of `model`, in the pipeline's order.

    Raises:
        RecipeError: the recipe is missing or wrong.
    """
    states: dict[str, ArtifactStatus] = {}
    for stage in STAGES.values():
        fresh = all(states[name].state == "current" for name in stage.inputs)
        states[stage.name] = _status(project, stage.name, model, fresh)
    return list(states.values())


def _status(project: Project, stage: str, model: str, fresh: bool) -> ArtifactStatus:
    folder = project.stage_dir(stage, model)
    path = folder.relative_to(project.root).as_posix()
    try:
        manifest = Manifest.read(folder)
    except ArtifactError:
        return ArtifactStatus(stage, model, path, "damaged" if folder.exists() else "missing", None, False)
    state: State = "stale"
    if folder_digest(folder / "content") != manifest.hash:
        state = "damaged"
    elif fresh and made_from_current(project, manifest):
        state = "current"
    recorded = manifest.hash == recorded_hash(project, stage, model)
    return ArtifactStatus(stage, model, path, state, manifest.hash, recorded)
