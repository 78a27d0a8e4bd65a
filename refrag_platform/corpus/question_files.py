"""Questions with passages and known answers, from a JSON Lines file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refrag_platform.errors import RefragError


@dataclass(frozen=True)
class Question:
    """passages: (title, text), best first; gold: numbers of those that hold the answer, if known.

    document: what the question is about; intervals resample documents. Default: the question's own id.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[tuple[str, str], ...]
    gold: tuple[int, ...] = ()
    document: str = ""

    def take(self, count: int) -> tuple[tuple[str, str], ...]:
        """`count` passages in the order listed: the gold ones, then the first of the others.

        Without gold numbers these are the first `count`, as a retriever ranked them.
        """
        others = [number for number in range(len(self.passages)) if number not in self.gold]
        chosen = sorted([*self.gold, *others][:count])
        return tuple(self.passages[number] for number in chosen)


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Rows id, question, answers, passages [{title, text}] and, if known, gold [numbers]; blank lines are skipped.

    Args:
        limit: take this many, evenly spread over the file, whose neighbours are about one document.

    Raises:
        RefragError: the file is missing, has no questions, or a row is wrong; it names file, row and fault.
    """
    if not path.is_file():
        raise RefragError(f"no questions at {path}; give a .jsonl file of rows id, question, answers, passages")
    questions = []
    with path.open(encoding="utf-8", errors="strict") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    questions.append(_question(line, f"{path}, row {number}", str(number)))
        except UnicodeDecodeError as error:
            raise RefragError(f"{path} is not UTF-8 ({error.reason} after row {len(questions)})") from None
    if not questions:
        raise RefragError(f"{path} has no questions")
    if limit is None or limit >= len(questions):
        return questions
    return [questions[turn * len(questions) // limit] for turn in range(limit)]


def _question(line: str, where: str, default_id: str) -> Question:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise RefragError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise RefragError(f"{where}: {type(row).__name__} instead of an object")
    question, answers, passages = row.get("question"), row.get("answers"), row.get("passages")
    if not isinstance(question, str) or not question.strip():
        raise RefragError(f"{where}: `question` is {question!r}; it must be a text")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise RefragError(f"{where}: `answers` is {answers!r}; it must be a list of texts")
    if not isinstance(passages, list) or not all(
        isinstance(passage, dict) and isinstance(passage.get("text"), str) for passage in passages
    ):
        raise RefragError(f"{where}: `passages` must be a list of objects with `text` and, if known, `title`")
    gold = row.get("gold") or []
    if not isinstance(gold, list) or not all(isinstance(g, int) and 0 <= g < len(passages) for g in gold):
        raise RefragError(f"{where}: `gold` is {gold!r}; it must list numbers of the {len(passages)} passages")
    name = str(row.get("id", default_id))
    return Question(
        id=name,
        question=question,
        answers=tuple(answers),
        passages=tuple((str(passage.get("title") or ""), passage["text"]) for passage in passages),
        gold=tuple(gold),
        document=str(row.get("document_id") or name),
    )
