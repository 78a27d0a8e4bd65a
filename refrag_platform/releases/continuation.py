"""Training on from a released checkpoint, on the documents there are now, instead of from scratch.

`continue_from: v1.2.0` of `reconstruction` and `cpt` says so, in the run's own overrides: params.yaml is the user's.
The released reconstruction is taken over as it is and `cpt` trains on with the encoder frozen, so that, unless
fine-tuning trains it, the chunk store keeps the vectors of every passage that did not change.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.dials import require_named
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.files import whole, write_text
from refrag_platform.history.pipeline import write_resolved
from refrag_platform.history.versions import Release, release_named, released
from refrag_platform.project import Project
from refrag_platform.recipes import Recipe, resolve
from refrag_platform.releases.restore import contents
from refrag_platform.stages import SHIPPED

CONTINUED = ("reconstruction", "cpt")
OVERRIDES_HEAD = """\
# From where the last retraining run trained, over the recipe and params.yaml; the next one writes this file anew.
"""
WHOLE_STORE = "the whole chunk store is encoded again"
# What the released checkpoint must share with the recipe, or its weights don't fit.
SHAPE = ("decoder", "encoder", "projection")


class Start(NamedTuple):
    """`continue_from` by stage, and what it means, in a sentence."""

    values: dict[str, str | None]
    meaning: str


def set_start(project: Project, model: str, mode: Literal["full", "continue"]) -> str:
    """Set in the run's overrides from where the model's training starts; returns what that means, in a sentence.

    To continue, there must be a release that fits the recipe; else the run is a full one, and the sentence says why.
    A full run starts from the weights in models/NAME/release where recipe or params.yaml say so, else from scratch.

    Raises:
        RecipeError: the recipe is wrong. RefragError: params.yaml does not name the model.
    """
    require_named(project, model)
    users = resolve(project.recipe_path(model), project.recipe_layers(model, of_runs=False))
    set_now = {stage: getattr(users, stage).continue_from for stage in (*CONTINUED, "policy")}
    if set_now["reconstruction"] == SHIPPED:
        full = Start(
            {stage: set_now[stage] for stage in CONTINUED},
            f"training starts from models/{model}/{SHIPPED}, as the settings say",
        )
    else:
        full = Start(dict.fromkeys(CONTINUED), f"training starts from scratch; {WHOLE_STORE}")
    start = full._replace(meaning=f"full: {full.meaning}") if mode == "full" else _continued(project, model, full)
    values = dict(start.values)
    if set_now["policy"] is not None:
        # It reads the vectors of the release's encoder, and of no other.
        values["policy"] = set_now["policy"] if values["cpt"] == SHIPPED else None
    changed = {stage: {"continue_from": value} for stage, value in values.items() if value != set_now[stage]}
    file = project.run_overrides(model)
    if changed:
        write_text(file, OVERRIDES_HEAD + yaml.safe_dump(changed, sort_keys=False))
    else:
        file.unlink(missing_ok=True)
    write_resolved(project, model)
    return start.meaning


def fetch_base(project: Project, stage: str, recipe: Recipe, target: Path) -> None:
    """Put the released checkpoint that `stage` starts from into the folder `target`, where it is not there yet.

    Nothing happens when the stage starts from scratch.

    Raises:
        RefragError: there is no such release, it does not fit the recipe, or its bytes can't be had.
    """
    version = getattr(getattr(recipe, stage, None), "continue_from", None)
    # The release itself needs no fetching: it comes with the repository.
    if version in (None, SHIPPED) or target.is_dir():
        return
    release = release_named(project, recipe.name, version)
    if why := _misfit(release, recipe):
        raise RefragError(f"{stage}.continue_from of {recipe.name} is {version!r}, but {why}; train in full")
    with contents(project, release, [stage]) as folders, whole(target) as partial:
        shutil.copytree(folders[stage], partial)


def _continued(project: Project, model: str, full: Start) -> Start:
    """Continue from the released version; `full` is how a full run would start, where there is none that fits."""
    release = released(project, model)
    why = f"no version of {model} is released yet" if release is None else _misfit(release, project.recipe(model))
    if release is None or why:
        return full._replace(meaning=f"{why}, so this run is a full one: {full.meaning}")
    try:
        corpus = Manifest.read(project.stage_dir("corpus", model)).hash
    except ArtifactError:
        corpus = ""
    if corpus == release.hashes["corpus"]:
        # Continued from itself on the same text, a model would never be up to date.
        starts = {stage: release.manifests[stage].settings[stage].get("continue_from") for stage in CONTINUED}
        return Start(starts, f"the corpus is the one of {model}@{release.version}: there is nothing to continue with")
    frozen = not project.recipe(model).finetuned.encoder_learning_rate
    store = "only passages that changed are encoded again" if frozen else f"fine-tuning trains it, so {WHOLE_STORE}"
    return Start(
        dict.fromkeys(CONTINUED, release.version),
        f"continue: training goes on from {model}@{release.version} on the corpus as it is now, in cpt the encoder "
        f"frozen; {store}",
    )


def _misfit(release: Release, recipe: Recipe) -> str | None:
    """Why a released checkpoint can't be trained on; None when it can."""
    settings = release.manifests["reconstruction"].settings
    changed = [section for section in SHAPE if settings.get(section) != recipe.section(section)]
    if not changed:
        return None
    return f"the recipe's {' and '.join(changed)} changed since {release.model}@{release.version} was made"
