"""Which written questions are dropped, and why: the reasons are what the manifest counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from refrag_platform.corpus.question import Passage, mention
from refrag_platform.model.prompts import passage_text
from refrag_platform.training.reading.blanks import QuestionAnswer

SHORTEST_QUESTION = 12

# Of a question, its answer and the passage.
Filter = Callable[[QuestionAnswer, Passage], bool]


def answer_missing(asked: QuestionAnswer, passage: Passage) -> bool:
    """Whether the answer doesn't stand in the passage, in whole words and in its case."""
    return not re.search(rf"(?<!\w){re.escape(asked.answer)}(?!\w)", passage_text(*passage))


def answer_told(asked: QuestionAnswer, passage: Passage) -> bool:
    """Whether the question says its answer, which would be copied from there."""
    return bool(mention([asked.answer]).search(asked.question))


def too_short(asked: QuestionAnswer, passage: Passage) -> bool:
    """Whether the question has too few characters to ask for one thing."""
    return len(asked.question) < SHORTEST_QUESTION


FAULTS: dict[str, Filter] = {
    "answer not in the passage": answer_missing,
    "answer in the question": answer_told,
    "question too short": too_short,
}


def same_text(one: str, other: str) -> bool:
    """Whether two questions or answers differ in case and spaces at most."""
    return one.casefold().split() == other.casefold().split()


def repeated(asked: QuestionAnswer, before: Collection[str]) -> bool:
    """Whether the question was asked of its passage before."""
    return any(same_text(asked.question, question) for question in before)


def unsure(answer: str, log_probability: float, written: str, least: float) -> bool:
    """Whether a reader answers otherwise than was written, at a mean log-probability below `least`, in nats."""
    return log_probability < least and not same_text(answer, written)


def fault(asked: QuestionAnswer, passage: Passage) -> str | None:
    """The first of FAULTS that a question with its answer has."""
    return next((reason for reason, has in FAULTS.items() if has(asked, passage)), None)
