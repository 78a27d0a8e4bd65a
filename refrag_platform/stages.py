"""The pipeline: one stage = one function = one CLI verb = one DVC stage = one Dagster asset, by one name.

This is the registry; `runner.py` runs what is in it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refrag_platform.project import Project
from refrag_platform.recipes import Recipe
from refrag_platform.versioning.manifest import InputRecord

# As a stage's `continue_from`: the weights in models/NAME/release, in place of a released version.
SHIPPED = "release"
# What counts of a section whose stage takes its artifact over: from where, and how weights are written.
OF_TAKEN = ("continue_from", "precision")
# In a stage's state/: the released checkpoint that it continues from.
RELEASED = "released"
MODEL_CODE = ("refrag_platform/model", "refrag_platform/weights.py")
TRAINING_CODE = (*MODEL_CODE, "refrag_platform/corpus/shards.py", "refrag_platform/training/core")
# What takes over the release, where a stage's `continue_from` says so.
RELEASE_CODE = (
    "refrag_platform/compact/coding.py",
    "refrag_platform/compact/quantization.py",
    "refrag_platform/compact/release.py",
    "refrag_platform/compact/start.py",
)
RELEVANCE_CODE = (
    "refrag_platform/store/content.py",
    "refrag_platform/store/relevance.py",
    "refrag_platform/store/retriever.py",
)
# Question files and all that reads them.
QUESTION_CODE = (
    "refrag_platform/corpus/encodings.py",
    "refrag_platform/corpus/names.py",
    "refrag_platform/corpus/question_fields.py",
    "refrag_platform/corpus/question_files.py",
    "refrag_platform/corpus/rows.py",
    "refrag_platform/corpus/text.py",
)
# Evaluation shares the head's blockwise loss with training and reads corpora as the corpus stage does.
EVALUATION_CODE = (
    *MODEL_CODE,
    "refrag_platform/corpus",
    "refrag_platform/training/core/losses.py",
    "refrag_platform/training/core/groups.py",
    "refrag_platform/training/core/packed.py",
    "refrag_platform/training/core/speed.py",
    "refrag_platform/store",
    "refrag_platform/limits.py",
    "refrag_platform/evaluation",
)


@dataclass(frozen=True)
class Stage:
    """What a stage is made from. `code` and `sections` are what dvc.yaml lists as deps and params."""

    name: str
    title: str
    function: str
    inputs: tuple[str, ...]
    sections: tuple[str, ...]
    code: tuple[str, ...]


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "corpus",
            "tokenized corpus",
            "refrag_platform.corpus.build:build_corpus",
            (),
            ("decoder", "encoder", "corpus"),
            ("refrag_platform/corpus", "refrag_platform/weights.py"),
        ),
        Stage(
            "reconstruction",
            "reconstruction checkpoint",
            "refrag_platform.training.reconstruction:train_reconstruction",
            ("corpus",),
            ("decoder", "encoder", "projection", "reconstruction"),
            (*TRAINING_CODE, *RELEASE_CODE, "refrag_platform/training/reconstruction.py"),
        ),
        Stage(
            "cpt",
            "CPT checkpoint",
            "refrag_platform.training.cpt:train_cpt",
            ("corpus", "reconstruction"),
            ("cpt",),
            (*TRAINING_CODE, *RELEASE_CODE, "refrag_platform/training/cpt.py"),
        ),
        Stage(
            "chunks",
            "chunk-embedding store",
            "refrag_platform.store.build:build_chunks",
            ("corpus", "cpt"),
            ("chunks",),
            (*MODEL_CODE, "refrag_platform/store"),
        ),
        Stage(
            "policy",
            "RL policy",
            "refrag_platform.training.policy:train_policy",
            ("corpus", "cpt"),
            ("policy",),
            (
                *TRAINING_CODE,
                *RELEASE_CODE,
                *QUESTION_CODE,
                *RELEVANCE_CODE,
                "refrag_platform/training/episodes.py",
                "refrag_platform/training/evidence.py",
                "refrag_platform/training/policy.py",
                "refrag_platform/training/usable.py",
            ),
        ),
        Stage(
            "finetuned",
            "fine-tuned model",
            "refrag_platform.training.finetuned:train_finetuned",
            ("corpus", "cpt", "policy"),
            ("finetuned", "policy"),
            (
                *TRAINING_CODE,
                "refrag_platform/corpus/swapping.py",
                *QUESTION_CODE,
                *RELEVANCE_CODE,
                "refrag_platform/training/examples.py",
                "refrag_platform/training/finetuned.py",
                "refrag_platform/training/passage_table.py",
                "refrag_platform/training/usable.py",
            ),
        ),
        Stage(
            "evaluation",
            "evaluation",
            "refrag_platform.evaluation.stage:evaluate_stage",
            ("corpus", "chunks", "finetuned"),
            ("policy", "evaluation", "serving"),
            EVALUATION_CODE,
        ),
        Stage(
            "package",
            "Bento",
            "refrag_platform.serving.package:build_package",
            ("chunks", "finetuned", "evaluation"),
            ("policy", "serving"),
            (
                "refrag_platform/serving",
                "refrag_platform/decoding",
                "refrag_platform/store",
                "refrag_platform/limits.py",
                *MODEL_CODE,
                "bentofile.yaml",
            ),
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


def takes_over(stage: str, continue_from: str | None) -> bool:
    """Whether a stage with this `continue_from` takes the artifact from there as it is, instead of training one."""
    # From a released version cpt trains on.
    return continue_from == SHIPPED or (continue_from is not None and stage == "reconstruction")


def settings_of(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """The recipe sections a stage depends on; of a training that doesn't take place only where its result is from."""
    settings = {name: recipe.section(name) for name in stage.sections}
    own = settings.get(stage.name, {})
    if takes_over(stage.name, own.get("continue_from")):
        settings[stage.name] = {name: own[name] for name in OF_TAKEN if name in own}
    return settings
