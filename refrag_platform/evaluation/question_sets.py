"""Question files for evaluation: passages ranked out of a pool, and whole documents as context."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refrag_platform.corpus.question import Passage, Question
from refrag_platform.errors import RefragError
from refrag_platform.files import whole
from refrag_platform.model.prompts import passage_text
from refrag_platform.progress import Progress

if TYPE_CHECKING:
    from refrag_platform.store.retriever import Retriever

# Questions scored against the whole pool at once.
SCORED_AT_ONCE = 256
# Passages embedded between two signs of progress.
PASSAGES_AT_ONCE = 1024


def ranked(
    questions: Sequence[Question], pool: Sequence[Passage], retriever: Retriever, top: int
) -> Iterator[Question]:
    """Each question with the `top` nearest passages of the pool, best first.

    The questions' own passages are part of the pool, and where those that were gold come up, they are gold again.

    Raises:
        RefragError: one asks for a summary: there is no question to rank by. Or one is closed.
    """
    for question in questions:
        if question.kind == "summary":
            raise RefragError(f"{question.id} asks for a summary, by which no passage can be ranked; leave it out")
        if question.closed:
            raise RefragError(f"{question.id} is about just the passages that it lists (`closed`); leave it out")
    every = list(dict.fromkeys([*pool, *(passage for question in questions for passage in question.passages)]))
    top = min(top, len(every))
    with Progress("rank", len(every) + len(questions), "texts") as progress:
        blocks = []
        for start in range(0, len(every), PASSAGES_AT_ONCE):
            block = every[start : start + PASSAGES_AT_ONCE]
            blocks.append(retriever.encode([passage_text(*passage) for passage in block]))
            progress.update(len(block), "passages")
        vectors = np.concatenate(blocks)
        for start in range(0, len(questions), SCORED_AT_ONCE):
            asked = questions[start : start + SCORED_AT_ONCE]
            scores = retriever.encode([question.question for question in asked]) @ vectors.T
            best = np.argpartition(-scores, top - 1, axis=1)[:, :top]
            for question, similarities, nearest in zip(asked, scores, best, strict=True):
                passages = [every[number] for number in nearest[np.argsort(-similarities[nearest], kind="stable")]]
                gold = {question.passages[number] for number in question.gold}
                numbers = tuple(number for number, passage in enumerate(passages) if passage in gold)
                yield replace(question, passages=tuple(passages), gold=numbers)
            progress.update(len(asked), "questions")


def whole_documents(questions: Iterable[Question], content: Path, most: int) -> Iterator[Question]:
    """Each question of a corpus with its whole document as passages, in the document's order; gold is as it was.

    Args:
        content: the corpus. most: passages of a document, at most; questions whose gold passage lies beyond are left
            out.

    Raises:
        RefragError: the corpus has no passages of any question's document.
    """
    import pyarrow.parquet as parquet

    documents: dict[str, list[Passage]] = {}
    for row in parquet.read_table(content / "passages.parquet", columns=["document_id", "title", "text"]).to_pylist():
        documents.setdefault(row["document_id"], []).append((row["title"], row["text"]))
    has_passages = False
    for question in questions:
        passages = documents.get(question.document, [])[:most]
        has_passages = has_passages or bool(passages)
        gold = {question.passages[number] for number in question.gold}
        numbers = tuple(number for number, passage in enumerate(passages) if passage in gold)
        if numbers:
            yield replace(question, passages=tuple(passages), gold=numbers)
    if not has_passages:
        raise RefragError(f"{content} has no passages of these questions' documents; give questions of this corpus")


def write_questions(path: Path, questions: Iterable[Question]) -> int:
    """Write a question file, as a whole; returns how many questions it has."""
    return write_rows(path, map(_row, questions))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows of a question file, as a whole; returns how many they are."""
    count = 0
    with whole(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _row(question: Question) -> dict[str, Any]:
    row = {
        "id": question.id,
        "question": question.question,
        "answers": list(question.answers),
        "passages": [{"title": title, "text": text} for title, text in question.passages],
        "gold": list(question.gold),
        "document_id": question.document,
        "answerable": question.answerable,
    }
    if question.category:
        row["kind"] = question.category
    if question.closed:
        row["closed"] = True
    if question.split:
        row["split"] = question.split
    if question.history:
        row["history"] = [{"role": role, "text": text} for role, text in question.history]
    return row
