"""The pipeline: one stage = one function = one CLI verb = one DVC stage = one Dagster asset, by one name.

This is the registry; `runner.py` runs what is in it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refrag_platform.artifacts.manifest import InputRecord
from refrag_platform.imports import code_files
from refrag_platform.project import Project
from refrag_platform.recipes import CONTROL_STAGES, Recipe

# As a stage's `continue_from`: the weights in models/NAME/release, in place of a released version.
SHIPPED = "release"
# What counts of a section whose stage takes its artifact over: from where, and how weights are written.
OF_TAKEN = ("continue_from", "precision")
# A control reads text: neither vectors nor a policy come before it, but the untrained decoder.
INPUTS_OF_CONTROL = frozenset({"corpus", "cpt"})
UNTRAINED = ("decoder", "encoder", "projection")
# In a stage's state/: the released checkpoint that it continues from.
RELEASED = "released"


@dataclass(frozen=True)
class Stage:
    """What a stage is made from.

    `function`: module:name. `inputs`: earlier stages, whose artifacts it reads. `sections`: of the recipe.
    `further`: files that run without being imported, in a program that the function starts, and what that reads.
    `packs_code`: whether the artifact holds the code itself, so that every file of it counts.
    """

    name: str
    title: str
    function: str
    inputs: tuple[str, ...]
    sections: tuple[str, ...]
    further: tuple[str, ...] = ()
    packs_code: bool = False

    def code(self, root: Path) -> tuple[str, ...]:
        """The files that the stage runs, relative to the checkout `root`, sorted."""
        module, _ = self.function.split(":")
        starts = (f"{module.replace('.', '/')}.py", *self.further)
        return code_files(root, *starts, leave_out=()) if self.packs_code else code_files(root, *starts)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "corpus",
            "tokenized corpus",
            "refrag_platform.corpus.build:build_corpus",
            (),
            ("decoder", "encoder", "corpus"),
        ),
        Stage(
            "reconstruction",
            "reconstruction checkpoint",
            "refrag_platform.training.reconstruction:train_reconstruction",
            ("corpus",),
            ("decoder", "encoder", "projection", "reconstruction"),
        ),
        Stage(
            "cpt",
            "CPT checkpoint",
            "refrag_platform.training.cpt:train_cpt",
            ("corpus", "reconstruction"),
            ("encoder", "cpt"),
        ),
        Stage(
            "finetuned",
            "fine-tuned model",
            "refrag_platform.training.finetuned:train_finetuned",
            ("corpus", "cpt"),
            ("encoder", "finetuned"),
        ),
        # What reads the encoder's vectors comes after all that trains it.
        Stage(
            "chunks",
            "chunk-embedding store",
            "refrag_platform.store.build:build_chunks",
            ("corpus", "finetuned"),
            ("chunks",),
        ),
        Stage(
            "policy",
            "RL policy",
            "refrag_platform.training.policy:train_policy",
            ("corpus", "finetuned"),
            ("policy",),
        ),
        Stage(
            "evaluation",
            "evaluation",
            "refrag_platform.evaluation.stage:evaluate_stage",
            ("corpus", "chunks", "policy", "finetuned"),
            ("evaluation", "serving"),
        ),
        Stage(
            "package",
            "Bento",
            "refrag_platform.serving.package:build_package",
            ("chunks", "policy", "finetuned", "evaluation"),
            ("serving",),
            further=(
                "bentofile.yaml",
                "refrag_platform/serving/page.html",
                "refrag_platform/serving/page.js",
                "refrag_platform/serving/service.py",
            ),
            packs_code=True,
        ),
    )
}


@dataclass
class StageContext:
    """What a stage function gets.

    It reads `inputs[NAME]` (content folders of earlier artifacts) and `recipe`, writes the artifact
    into `out` (empty at the start), keeps what a killed run can continue from in `work`, and puts what
    is not content (metrics.jsonl, timings, pictures) into `beside`. Files that it reads from outside the
    pipeline go to `sources`. It returns its metrics.
    """

    project: Project
    recipe: Recipe
    stage: str
    inputs: dict[str, Path]
    out: Path
    work: Path
    beside: Path
    sources: list[InputRecord] = field(default_factory=list)

    @property
    def released(self) -> Path | None:
        """The released version's checkpoint of this stage that the recipe continues from, if it names one."""
        folder = self.work / RELEASED
        return folder if folder.is_dir() else None


def stage_function(stage: Stage) -> Callable[[StageContext], dict[str, Any]]:
    """Import and return the function of a stage; heavy imports happen here and nowhere earlier."""
    module, name = stage.function.split(":")
    return getattr(importlib.import_module(module), name)


def starts_from(recipe: Recipe, stage: str) -> str | None:
    """The weights that a stage goes on from: `release`, or a released version; None where it needs neither."""
    if recipe.as_control:
        return SHIPPED if stage == "cpt" and recipe.as_control.start == SHIPPED else None
    return getattr(getattr(recipe, stage), "continue_from", None)


def takes_over(stage: str, continue_from: str | None) -> bool:
    """Whether a stage with this `continue_from` takes the artifact from there as it is, instead of training one."""
    # From a released version cpt trains on.
    return continue_from == SHIPPED or (continue_from is not None and stage == "reconstruction")


def settings_of(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """The recipe sections a stage depends on; of a training that doesn't take place only where its result is from."""
    settings: dict[str, Any] = {name: recipe.section(name) for name in stage.sections}
    if recipe.as_control and stage.name in CONTROL_STAGES:
        settings["system"] = recipe.system
        if stage.name == "cpt":
            settings |= {name: recipe.section(name) for name in UNTRAINED}
            settings |= {"start": SHIPPED} if starts_from(recipe, "cpt") else {}
        else:
            settings["control"] = recipe.as_control.model_dump(mode="json")
            # By what passages are ordered.
            settings |= {"retriever": recipe.chunks.retriever} if recipe.system == "plain" else {}
    section = settings.get(stage.name, {})
    if takes_over(stage.name, section.get("continue_from")):
        settings[stage.name] = {name: section[name] for name in OF_TAKEN if name in section}
    return settings


def stages_of(project: Project, model: str) -> list[Stage]:
    """The stages that make a model, or a control."""
    return [stage for stage in STAGES.values() if stage.name in CONTROL_STAGES or not project.control(model)]


def inputs_of(project: Project, stage: Stage, model: str) -> tuple[str, ...]:
    """The earlier stages whose artifacts a stage of this model reads."""
    return tuple(name for name in stage.inputs if name in INPUTS_OF_CONTROL or not project.control(model))
