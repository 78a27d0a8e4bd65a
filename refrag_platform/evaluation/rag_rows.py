"""Rows, intervals and paired differences of questions that several systems have answered."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refrag_platform.corpus.question import Question
from refrag_platform.evaluation.answering import TimedAnswer
from refrag_platform.evaluation.metrics import (
    bootstrap_interval,
    exact_match,
    f1,
    is_refusal,
    mean_gain,
    rouge_l,
    rounded,
    set_match,
)
from refrag_platform.evaluation.systems import VECTOR_SYSTEMS, Decoder, Order, Reading
from refrag_platform.model.prompts import NO_ANSWER
from refrag_platform.model.segments import compression_rate

# Parts by whether training has shown a question.
SEEN, NOT_SEEN = "seen in training", "not seen in training"
SCORERS = {"exact_match": exact_match, "f1": f1, "rouge_l": rouge_l, "set_match": set_match}


@dataclass(frozen=True)
class JudgedAnswer:
    """A figure of each kind for one answered question; number: the question's. scores: by SCORERS."""

    number: int
    scores: dict[str, float]
    refused: bool
    decoder_tokens: int
    full_tokens: int
    ttft_ms: float | None


@dataclass(frozen=True)
class Scores:
    """How one reading answered the questions that it did. decoder: which one read. order: that of the passages."""

    reading: Reading
    decoder: Decoder
    order: Order
    answers: list[JudgedAnswer] = field(default_factory=list)

    def of(self, numbers: Sequence[int]) -> Scores:
        """The figures of these questions alone."""
        wanted = set(numbers)
        return replace(self, answers=[one for one in self.answers if one.number in wanted])

    def add(
        self, number: int, question: Question, text: str, answer: TimedAnswer, tokens: int, full_tokens: int
    ) -> None:
        references = question.answers or (NO_ANSWER,)
        scores = {name: score(text, references) for name, score in SCORERS.items()}
        self.answers.append(JudgedAnswer(number, scores, is_refusal(text), tokens, full_tokens, answer.ttft_ms))

    def values(self, name: str) -> NDArray[np.float64]:
        """One of SCORERS of each question."""
        return np.array([one.scores[name] for one in self.answers])


def parts(
    scores: Sequence[Scores], questions: Sequence[Question], sets: Sequence[str], seed: int
) -> dict[str, dict[str, Any]]:
    """What is found of each set alone, where there are several; a question without a name is of none."""
    named = dict.fromkeys(name for name in sets if name)
    numbers = {name: [number for number, of in enumerate(sets) if of == name] for name in named}
    if len(numbers) < 2:
        return {}
    return {
        name: {
            "questions_used": len(chosen),
            **judged([one.of(chosen) for one in scores], [questions[number] for number in chosen], seed),
        }
        for name, chosen in numbers.items()
    }


def judged(scores: Sequence[Scores], questions: Sequence[Question], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows, intervals and differences of all readings."""
    return {
        "rows": [_row(one, questions) for one in scores],
        "intervals": [_interval(one, questions, seed) for one in scores],
        "differences": _differences(scores, questions, seed),
    }


def names(scores: Scores) -> dict[str, Any]:
    """A reading as the rows name it."""
    reading, is_refrag = scores.reading, scores.reading.system in {"refrag", "refrag_wrong"}
    return {
        "system": reading.system,
        "passages": reading.passages,
        "share_kept": reading.at if is_refrag else None,
        # What reads vectors was trained for just that.
        "tuned": scores.decoder == "tuned" or reading.system in VECTOR_SYSTEMS,
        "decoder": scores.decoder,
        "order": scores.order if reading.passages else None,
        # The REFRAG row whose p fixes how many tokens it has.
        "tokens_of": None if is_refrag else reading.at,
    }


def _row(scores: Scores, questions: Sequence[Question]) -> dict[str, Any]:
    named, answers = names(scores), scores.answers
    means = {name: rounded(statistics.fmean(scores.values(name))) if answers else None for name in SCORERS}
    tokens, full = sum(one.decoder_tokens for one in answers), sum(one.full_tokens for one in answers)
    times = [one.ttft_ms for one in answers if one.ttft_ms is not None]
    return {
        **{name: named.pop(name) for name in ("system", "passages", "share_kept")},
        **{name: means.pop(name) for name in ("exact_match", "f1")},
        "decoder_tokens": rounded(tokens / len(answers)) if answers else None,
        # The median: one pause of the machine would decide the mean.
        "ttft_ms": round(statistics.median(times), 3) if times else None,
        **named,
        "compression": compression_rate(full, tokens) if tokens and scores.reading.passages else None,
        **means,
        "refusal_accuracy": _refusal_accuracy(scores, questions),
    }


def _refusal_accuracy(scores: Scores, questions: Sequence[Question]) -> float | None:
    """Share of questions that were refused just when they have no answer; null where all have one."""
    if all(question.answerable is not False for question in questions) or len(scores.answers) < len(questions):
        return None
    known = [
        one.refused != question.answerable
        for one, question in zip(scores.answers, questions, strict=True)
        if question.answerable is not None
    ]
    return rounded(statistics.fmean(known))


def _interval(scores: Scores, questions: Sequence[Question], seed: int) -> dict[str, Any]:
    """95% intervals of the scores, documents resampled."""
    documents = [question.document for question in questions]
    # A system that could not answer every question has no interval to compare.
    whole = len(scores.answers) == len(questions)
    return names(scores) | {
        name: bootstrap_interval(scores.values(name), documents, seed) if whole else None for name in SCORERS
    }


def _differences(scores: Sequence[Scores], questions: Sequence[Question], seed: int) -> list[dict[str, Any]]:
    """Gain of refrag, question by question, over no context and whatever read the same passages; 95% intervals."""
    rows, documents = [], [question.document for question in questions]
    for refrag in scores:
        if refrag.reading.system != "refrag":
            continue
        for other in scores:
            there = other.reading
            if there.system == "refrag" or there.passages not in {0, refrag.reading.passages}:
                continue
            if there.at not in {None, refrag.reading.at}:
                continue
            named = names(other)
            row = {"over": named["system"], "tuned": named["tuned"], "decoder": named["decoder"]}
            row |= {"passages": refrag.reading.passages, "share_kept": refrag.reading.at}
            both = len(refrag.answers) == len(other.answers) == len(questions)
            for name in SCORERS:
                gain = refrag.values(name) - other.values(name) if both else None
                row[name] = None if gain is None else mean_gain(gain, documents, seed)
            rows.append(row)
    return rows
