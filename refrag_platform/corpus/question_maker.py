"""Questions with known answers: the gold passage among distractors, all of one split."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from refrag_platform.corpus.documents import Document
from refrag_platform.corpus.passages import CorpusPassage


class QuestionMaker:
    """Holds the passages of documents with facts (the Factbook's few megabytes) and asks about them.

    Distractors are passages about the same field of other countries, and other passages of the same
    country that do not hold the answer; never of another split, so that training sees no test text.
    """

    def __init__(self, questions_per_document: int, passages_per_question: int) -> None:
        self._questions = questions_per_document
        self._passages = passages_per_question
        self._documents: dict[str, list[tuple[Document, list[CorpusPassage]]]] = defaultdict(list)

    def add(self, document: Document, split: str, passages: list[CorpusPassage]) -> None:
        """Take a document with facts and its passages."""
        self._documents[split].append((document, passages))

    def questions(self, split: str) -> Iterator[dict[str, Any]]:
        """Rows (id, question, answers, passages [{title, text}], gold [index], field, document_id)."""
        same_field: dict[str, list[CorpusPassage]] = defaultdict(list)
        for document, passages in self._documents[split]:
            for passage in passages:
                same_field[_field_title(document, passage)].append(passage)
        for document, passages in self._documents[split]:
            asked = 0
            for fact in document.facts:
                gold = next((p for p in passages if p.section == fact.section and fact.answers[0] in p.text), None)
                if gold is None or asked == self._questions:
                    continue
                asked += 1
                question_id = f"{document.id}/{fact.field}"
                answer = fact.answers[0].lower()
                near = [p for p in same_field[_field_title(document, gold)] if p.document_id != document.id]
                same_document = [p for p in passages if p.section != gold.section and answer not in p.text.lower()]
                chosen, position = self._mixed(question_id, gold, near, same_document)
                yield {
                    "id": question_id,
                    "question": fact.question,
                    "answers": list(fact.answers),
                    "passages": [{"title": passage.title, "text": passage.text} for passage in chosen],
                    "gold": [position],
                    "field": fact.field,
                    "document_id": document.id,
                }

    def _mixed(
        self, question_id: str, gold: CorpusPassage, near: list[CorpusPassage], same_document: list[CorpusPassage]
    ) -> tuple[list[CorpusPassage], int]:
        """The passages of one question in a random order fixed by its id, and where the gold one stands."""
        generator = random.Random(question_id)
        wanted = self._passages - 1
        from_near = min(len(near), max(wanted - wanted // 2, wanted - len(same_document)))
        from_same = min(len(same_document), wanted - from_near)
        chosen = [gold, *generator.sample(near, from_near), *generator.sample(same_document, from_same)]
        generator.shuffle(chosen)
        return chosen, chosen.index(gold)


def _field_title(document: Document, passage: CorpusPassage) -> str:
    """`Geography: Climate` of `France - Geography: Climate`."""
    return passage.title.removeprefix(document.title)
