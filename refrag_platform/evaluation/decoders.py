"""The plain decoders that REFRAG is held against: the untrained base, and controls tuned on the same tokens.

A recipe declares its controls, which the stages cpt (for log-perplexity) and finetuned (for questions) train. A folder
of controls holds model folders (docs/architecture.md) named full, none and truncated, each trained by `cpt` on the same
documents with that kind of context; fewer are allowed. For questions there may be one of any kind of plain text
(`CONTROL_KINDS`), fine-tuned on the same questions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from refrag_platform.artifacts.manifest import FILE_NAME, Manifest
from refrag_platform.controls import trained_controls
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.evaluation.scoring import PLAIN_SYSTEMS, PlainSystem
from refrag_platform.evaluation.systems import CONTROL_KINDS, System
from refrag_platform.model.refrag import RefragModel, read_settings
from refrag_platform.project import Project
from refrag_platform.recipes import Recipe, control_name
from refrag_platform.weights import load_decoder

K = TypeVar("K", bound=str)


def control_folders(controls: Path) -> dict[PlainSystem, Path]:
    """The tuned controls in a folder, by system.

    Raises:
        ArtifactError: the folder is missing or holds none.
    """
    return _model_folders(controls, PLAIN_SYSTEMS)


def question_controls(controls: Path) -> dict[System, Path]:
    """The tuned controls in a folder that answer questions, by the system whose prompts they were trained for.

    Raises:
        ArtifactError: the folder is missing or holds none.
    """
    return _model_folders(controls, CONTROL_KINDS)


def declared_controls(project: Project, recipe: Recipe) -> dict[PlainSystem, Path]:
    """The controls of a recipe that cpt has trained, which continue text, by what they read.

    One that would be another now is left out, and a line on stderr says so.

    Raises:
        ArtifactError: as `trained_controls`.
    """
    found = _trained(project, recipe, "cpt")
    return {system: found[system] for system in PLAIN_SYSTEMS if system in found}


def declared_question_controls(project: Project, recipe: Recipe) -> dict[System, Path]:
    """The controls of a recipe that are fine-tuned, which answer questions; else as `declared_controls`."""
    found = _trained(project, recipe, "finetuned")
    return {system: found[system] for system in CONTROL_KINDS if system in found}


def _trained(project: Project, recipe: Recipe, stage: str) -> dict[str, Path]:
    controls = trained_controls(project, recipe, stage)
    for kind, reason in controls.unmatched.items():
        name = control_name(recipe.name, kind)
        print(
            f"{stage} of the control {name} is left out: {reason}; `refrag run all --model {name}` trains it again",
            file=sys.stderr,
        )
    return {kind: project.content(stage, manifest.model) for kind, manifest in controls.matched.items()}


def _model_folders(controls: Path, kinds: Sequence[K]) -> dict[K, Path]:
    found: dict[K, Path] = {}
    for system in kinds:
        for folder in (controls / system, controls / system / "content", controls / system / "model"):
            if folder.is_dir() and (folder / "model.json").is_file():
                read_settings(folder)
                found[system] = folder
    if not found:
        raise ArtifactError(
            f"{controls} holds no tuned controls; it must have model folders named {', '.join(kinds)}, "
            "each with a model.json"
        )
    return found


def recipe_of(name_or_dir: str, folder: Path) -> tuple[Recipe, Path] | None:
    """The recipe of a model and its folder, by name or by the manifest beside the artifact; None if unknown."""
    name = name_or_dir
    if (folder.parent / FILE_NAME).is_file():
        name = Manifest.read(folder.parent).model
    try:
        project = Project.find()
        return project.recipe(name), project.recipe_path(name).parent
    except RefragError:
        return None


def untuned_decoder(recipe: Recipe, base: Path, like: RefragModel) -> PreTrainedModel:
    """The recipe's decoder before any training here, in the type and on the device of `like`.

    Raises:
        RefragError: the recipe's source can't be had, or its tokens are others.
    """
    decoder = load_decoder(recipe.decoder, base, recipe.seed)
    own, wanted = (each.get_input_embeddings().num_embeddings for each in (decoder, like.decoder))
    if own != wanted:
        raise RefragError(
            f"the decoder of the recipe {recipe.name} has {own:,} tokens, the model {wanted:,}; give the recipe that "
            "the model was made from"
        )
    # Not decoder.to(...): transformers wraps it in a way that type checkers can't follow.
    torch.nn.Module.to(decoder, device=like.device, dtype=like.dtype)
    return decoder.eval()
