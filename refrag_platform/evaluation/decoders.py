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
from typing import Literal, TypeVar

import torch
from transformers import PreTrainedModel

from refrag_platform.artifacts.manifest import FILE_NAME, Manifest
from refrag_platform.controls import trained_controls
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.model.decoder import in_dtype
from refrag_platform.model.refrag import RefragModel, read_settings
from refrag_platform.project import Project
from refrag_platform.recipes import Recipe, control_name
from refrag_platform.weights import load_decoder

K = TypeVar("K", bound=str)


def control_folders(controls: Path, kinds: Sequence[K]) -> dict[K, Path]:
    """The tuned controls in a folder, by the kind of text that each was trained to read.

    Args: kinds: those that are wanted: PLAIN_SYSTEMS continue text, CONTROL_KINDS answer questions.

    Raises:
        ArtifactError: the folder is missing or holds none.
    """
    folders: dict[K, Path] = {}
    for kind in kinds:
        for folder in (controls / kind, controls / kind / "content", controls / kind / "model"):
            if folder.is_dir() and (folder / "model.json").is_file():
                read_settings(folder)
                folders[kind] = folder
    if not folders:
        raise ArtifactError(
            f"{controls} holds no tuned controls; it must have model folders named {', '.join(kinds)}, "
            "each with a model.json"
        )
    return folders


def declared_controls(
    project: Project, recipe: Recipe, stage: Literal["cpt", "finetuned"], kinds: Sequence[K]
) -> dict[K, Path]:
    """The controls of a recipe that a stage has trained, by what they read.

    One that would be another now is left out, and a line on stderr says so.

    Args: stage: cpt, which trains controls to continue text, or finetuned, to answer questions. kinds: as above.

    Raises:
        ArtifactError: as `trained_controls`.
    """
    controls = trained_controls(project, recipe, stage)
    for kind, reason in controls.unmatched.items():
        name = control_name(recipe.name, kind)
        print(
            f"{stage} of the control {name} is left out: {reason}; `refrag run all --model {name}` trains it again",
            file=sys.stderr,
        )
    matched = controls.matched
    return {kind: project.content(stage, matched[kind].model) for kind in kinds if kind in matched}


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
    size, wanted = (each.get_input_embeddings().num_embeddings for each in (decoder, like.decoder))
    if size != wanted:
        raise RefragError(
            f"the decoder of the recipe {recipe.name} has {size:,} tokens, the model {wanted:,}; give the recipe that "
            "the model was made from"
        )
    # Not decoder.to(...): transformers wraps it in a way that type checkers can't follow.
    torch.nn.Module.to(decoder, device=like.device)
    return in_dtype(decoder, like.dtype).eval()
