"""What an evaluation asks: the questions of documents that a corpus holds out, or those of a file of the recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from refrag_platform.corpus.question import Question, retrieved
from refrag_platform.corpus.question_files import question_files_of, read_questions
from refrag_platform.errors import RefragError
from refrag_platform.recipes import EvaluationRecipe


def question_file(settings: EvaluationRecipe, base: Path) -> Path | None:
    """The file of questions that the recipe in the folder `base` names, if it names one."""
    return None if settings.question_file is None else (base / os.path.expandvars(settings.question_file)).resolve()


def held_out_questions(settings: EvaluationRecipe, corpus: Path, base: Path) -> list[Question]:
    """What an evaluation asks: the corpus' test questions, or those of the file that the recipe names.

    Args:
        corpus: its content folder. base: the recipe's folder.

    Raises:
        RefragError: there is no such file, a row is wrong, or it asks about a document that the corpus trains on.
    """
    file = question_file(settings, base)
    if file is None:
        return read_questions(corpus / "questions" / "test.jsonl", settings.questions)
    asked = read_questions(file, settings.questions)
    _require_held_out(asked, corpus / "documents.parquet")
    return [retrieved(question, "strong") for question in asked]


def looked_up_questions(asked: Sequence[Question], settings: EvaluationRecipe, corpus: Path) -> list[Question]:
    """What an evaluation looks up in the chunk store: the corpus' test questions, and what else is `asked`, each once.

    A file that the recipe names may ask about documents that the corpus, and so the store, lacks.
    """
    of_corpus = [one for path in question_files_of(corpus, "test") for one in read_questions(path, settings.questions)]
    looked_up: dict[object, Question] = {}
    for one in [*of_corpus, *asked]:
        # A summary asks nothing, and a closed question is about no passage of a store.
        if one.question and not one.closed:
            looked_up.setdefault((one.question, one.history), one)
    return list(looked_up.values())


def _require_held_out(asked: Sequence[Question], documents: Path) -> None:
    """Refuse questions about documents of the corpus that are not held out for tests."""
    import pyarrow.parquet as parquet

    if not documents.is_file():
        raise RefragError(f"{documents} is missing: the corpus is not in place; make it by `refrag run corpus`")
    table = parquet.read_table(documents, columns=["id", "split"])
    split_of = dict(zip(table["id"].to_pylist(), table["split"].to_pylist(), strict=True))
    for question in asked:
        if question.split not in ("", "test"):
            raise RefragError(
                f"{question.where}: {question.id} is a question of the split {question.split!r}, and a model may have "
                "learned or been chosen by it; evaluate on questions of the split 'test'"
            )
        if split_of.get(question.document, "test") != "test":
            raise RefragError(
                f"{question.where}: {question.id} asks about {question.document}, which this corpus has in its split "
                f"{split_of[question.document]}; leave it out, or rank the corpus' own test questions"
            )
