"""The release as the start of a pipeline: a stage whose `continue_from` is `release` takes its artifact from there."""

from __future__ import annotations

from typing import Any

from refrag_platform.compact.release import load_release, read_manifest
from refrag_platform.errors import ArtifactError
from refrag_platform.stages import SHIPPED, StageContext
from refrag_platform.training.core.artifact import finish, parameter_counts, write_training
from refrag_platform.training.core.ranks import is_main


def take_over(context: StageContext) -> dict[str, Any]:
    """Make a stage's artifact of the release: the model as it is, or its policy; returns its figures.

    Raises:
        ArtifactError: there is no whole release, it is of other base weights, or has no policy or figures of the stage.
    """
    recipe, stage = context.recipe, context.stage
    base_dir = context.project.recipe_path(recipe.name).parent
    folder = base_dir / SHIPPED
    figures = read_manifest(folder).get("training", {}).get(stage)
    model, policy = load_release(folder, recipe, base_dir)
    if figures is None or (stage == "policy" and policy is None):
        raise ArtifactError(
            f"{folder} holds no {'policy' if policy is None else 'figures'} for the stage {stage} of {recipe.name}; "
            f"set {stage}.continue_from to null, or pack the release with --training {stage}=FILE"
        )
    if stage != "policy":
        return finish(context, model, figures)
    assert policy is not None
    if is_main():
        policy.save(context.out)
    return write_training(context, figures, parameter_counts({"policy": policy}))
