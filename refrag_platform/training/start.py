"""Packed weights as a pipeline's start: a stage whose `continue_from` is `release` takes its artifact from there.

A control may start there, too: its decoder is then REFRAG's, trained on for what the control reads.
"""

from __future__ import annotations

from typing import Any

from refrag_platform.compact.packing import load_packed
from refrag_platform.compact.record import read_manifest
from refrag_platform.errors import ArtifactError
from refrag_platform.model.policy import WEIGHTS_FILE as POLICY_WEIGHTS
from refrag_platform.model.refrag import RefragModel
from refrag_platform.stages import StageContext, starts_from
from refrag_platform.training.core.artifact import finish, parameter_counts, write_training
from refrag_platform.training.core.ranks import is_main


def take_over_packed(context: StageContext) -> dict[str, Any]:
    """Make a stage's artifact of the packed weights: the model as it is, or its policy; returns its figures.

    Raises:
        ArtifactError: none are there, or they are not whole, of another recipe, or without a policy or the stage's
            figures.
    """
    recipe, stage = context.recipe, context.stage
    base_dir = context.project.recipe_path(recipe.name).parent
    folder = context.project.shipped(recipe.name)
    manifest = read_manifest(folder)
    if stage == "policy" and POLICY_WEIGHTS not in manifest["files"]:
        raise ArtifactError(f"{folder} holds no policy; leave policy.continue_from out, so that one is trained")
    if stage not in manifest["training"]:
        raise ArtifactError(
            f"{folder} holds no figures of the training of {stage}; pack it again with --training {stage}=FILE"
        )
    model, policy = load_packed(folder, recipe, base_dir)
    figures = manifest["training"][stage]
    if stage != "policy":
        return finish(context, model, figures)
    assert policy is not None
    policy.encoder_digest = model.encoder_digest()
    if is_main():
        policy.save(context.out)
    return write_training(context, figures, parameter_counts({"policy": policy}))


def control_start(context: StageContext) -> RefragModel:
    """The model whose decoder a control trains: as before any training here, or that of the packed weights.

    Raises:
        ArtifactError: packed weights are not there, not whole, or of another recipe.
    """
    recipe = context.recipe
    base_dir = context.project.recipe_path(recipe.name).parent
    if starts_from(recipe, "cpt") is None:
        return RefragModel.create(recipe, base_dir)
    model, _ = load_packed(context.project.shipped(recipe.name), recipe, base_dir)
    return model
