"""Which artifacts are there, and would a run make them again. Run: `refrag status`."""

from __future__ import annotations

from dataclasses import dataclass

from refrag_platform.history.dvc import recorded_hash
from refrag_platform.history.freshness import State, standing
from refrag_platform.project import Project
from refrag_platform.stages import STAGES, inputs_of, stages_of


@dataclass(frozen=True)
class ArtifactStatus:
    """One artifact.

    `state`: as in freshness.py; `stale` as well where an input is itself not current. `recorded`: dvc.lock names this
    very artifact.
    """

    stage: str
    model: str
    path: str
    state: State
    hash: str | None
    recorded: bool


def status(project: Project, model: str) -> list[ArtifactStatus]:
    """The state of every artifact of `model`, in the pipeline's order; of a control beside its model's corpus.

    Raises:
        RecipeError: the recipe is missing or wrong.
    """
    states: dict[str, ArtifactStatus] = {}
    for stage in dict.fromkeys([STAGES["corpus"], *stages_of(project, model)]):
        fresh = all(states[name].state == "current" for name in inputs_of(project, stage, model))
        states[stage.name] = _status(project, stage.name, model, fresh)
    return list(states.values())


def _status(project: Project, stage: str, model: str, fresh: bool) -> ArtifactStatus:
    path = project.stage_dir(stage, model).relative_to(project.root).as_posix()
    place = standing(project, stage, model)
    if place.manifest is None:
        return ArtifactStatus(stage, model, path, place.state, None, False)
    state = "stale" if place.state == "current" and not fresh else place.state
    recorded = place.manifest.hash == recorded_hash(project, stage, model)
    return ArtifactStatus(stage, model, path, state, place.manifest.hash, recorded)
