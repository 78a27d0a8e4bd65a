"""What comes back from another machine: the artifacts made there, and the state of a stage that was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from refrag_platform.artifacts.digest import file_digest
from refrag_platform.artifacts.manifest import FILE_NAME, Manifest
from refrag_platform.bundle.pieces import Members, TooLarge, write_bundle
from refrag_platform.bundle.unbundle import INDEX, in_words
from refrag_platform.bundle.work import files_below, state_of
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.project import Project
from refrag_platform.stages import STAGES


def export_results(
    project: Project, out: Path, piece_mib: int, files: int | None, part: int | None
) -> tuple[dict[str, Any], str | None]:
    """Write what was made in an unpacked bundle into the folder `out`; returns its bundle.json, and what was left out.

    Every byte comes back as it was made: weights are not rounded. The state of an unfinished stage is left out where it
    alone does not fit into `files`.

    Raises:
        RefragError: the project is no unpacked bundle, nothing was made in it yet, or the artifacts don't fit.
        ArtifactError: an artifact is damaged.
    """
    work = _index(project)
    finished: dict[str, list[str]] = {model: [] for model in work["models"]}
    members: dict[str, Path | bytes] = {}
    states: dict[tuple[str, str], Members] = {}
    code: dict[str, str] = {}
    for model, stage in ((model, stage) for model, stages in work["models"].items() for stage in stages):
        folder = project.stage_dir(stage, model)
        if (folder / FILE_NAME).is_file():
            if not Manifest.read(folder).describes(folder):
                raise ArtifactError(f"the bytes of {folder} are not its manifest's; run {stage} again, with --force")
            finished[model].append(stage)
            members |= files_below(project, folder)
        if state := state_of(project, stage, model):
            states[model, stage] = state
        code |= {file: file_digest(project.root / file) for file in STAGES[stage].code(project.root)}
    if not members and not states:
        raise RefragError(f"nothing was made in {project.root} yet; run {in_words(work['models'])} first")
    facts = {"kind": "results", "models": finished, "commit": work["commit"], "code": code}

    def write(unfinished: dict[tuple[str, str], Members]) -> dict[str, Any]:
        held = {name: source for state in unfinished.values() for name, source in state.items()}
        stopped = {model: [stage for name, stage in unfinished if name == model] for model in finished}
        return write_bundle(members | held, facts | {"unfinished": stopped}, out, piece_mib, files, part)

    try:
        return write(states), None
    except TooLarge as error:
        if not states or not members:
            raise
        stopped = ", ".join(f"{stage} of {model}" for model, stage in states)
        return write({}), f"left out: the state of {stopped}, with which {error}"


def _index(project: Project) -> dict[str, Any]:
    path = project.root / INDEX
    if not path.is_file():
        raise RefragError(
            f"{project.root} has no {INDEX}, so it is no unpacked bundle, whose results could be brought home; "
            "without --results, `refrag bundle export` makes one"
        )
    return dict(json.loads(path.read_text(encoding="utf-8")))
