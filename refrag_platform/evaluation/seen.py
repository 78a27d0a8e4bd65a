"""Which of the questions that an evaluation asks the model's own training has shown: their figures flatter."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from refrag_platform.corpus.overlap import Overlap, overlap_row, overlaps
from refrag_platform.corpus.question import Question
from refrag_platform.corpus.question_files import named_files, question_files_of
from refrag_platform.names import name_text
from refrag_platform.project import Project
from refrag_platform.recipes import Recipe


def training_files(project: Project, recipe: Recipe) -> list[Path]:
    """Files whose text the stages of a recipe train on: its corpus', and all that it names; some may not be here."""
    corpus = project.content("corpus", recipe.name)
    tuned = recipe.finetuned
    named = [*recipe.policy.questions, *tuned.questions, *tuned.summaries, *tuned.distractors]
    if recipe.cpt.reading:
        named += recipe.cpt.reading.questions
    return list(
        dict.fromkeys(
            [corpus / "passages.parquet", *question_files_of(corpus, "train"), *named_files(project.root, named)]
        )
    )


def seen_in_training(
    project: Project, recipe: Recipe, *sets: Sequence[Question]
) -> list[tuple[list[Overlap], dict[str, Any]]]:
    """For each set of questions the overlap of each with what the recipe trains on, and the sum of it.

    Returns: of each set the second is {questions, same_question, run_of_words, half_a_passage, seen, files, missing}:
        `overlap_row`, the training files that were read, and those that can't be here: more may have been seen.
    """
    root, files = project.root, training_files(project, recipe)
    # A bare machine has no pyarrow.
    readable = [path for path in files if path.suffix != ".parquet" or find_spec("pyarrow")]
    there = [path for path in readable if path.is_file()]
    overlapping = iter(overlaps([question for questions in sets for question in questions], there))

    def named(paths: Sequence[Path]) -> list[str]:
        return [name_text(path.relative_to(root) if path.is_relative_to(root) else path.name) for path in paths]

    told = {"files": named(there), "missing": named([path for path in files if path not in there])}
    by_set = [[next(overlapping) for _ in questions] for questions in sets]
    return [(one, {**overlap_row(one), **told}) for one in by_set]
