"""Rows, intervals and paired differences of questions that several systems have answered."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from refrag_platform.corpus.question import Question
from refrag_platform.evaluation.answering import Answer
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
SCORES = ("exact_match", "f1", "rouge_l", "set_match")


@dataclass
class Scores:
    """How one reading answered: a figure for each question that it answered, whose number is in `numbers`.

    decoder: which one read. order: that of the passages.
    """

    reading: Reading
    decoder: Decoder
    order: Order
    numbers: list[int] = field(default_factory=list)
    exact_match: list[float] = field(default_factory=list)
    f1: list[float] = field(default_factory=list)
    rouge_l: list[float] = field(default_factory=list)
    set_match: list[float] = field(default_factory=list)
    refused: list[bool] = field(default_factory=list)
    decoder_tokens: list[int] = field(default_factory=list)
    full_tokens: list[int] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)

    def of(self, numbers: Sequence[int]) -> Scores:
        """The figures of these questions alone."""
        wanted = set(numbers)
        chosen = [place for place, number in enumerate(self.numbers) if number in wanted]
        lists = {one.name: getattr(self, one.name) for one in fields(self) if isinstance(getattr(self, one.name), list)}
        # Times are of all questions or, in batches, of none.
        figures = {n: [column[place] for place in chosen] if column else [] for n, column in lists.items()}
        return Scores(self.reading, self.decoder, self.order, **figures)

    def add(self, number: int, question: Question, text: str, answer: Answer, tokens: int, full_tokens: int) -> None:
        self.numbers.append(number)
        references = question.answers or (NO_ANSWER,)
        self.exact_match.append(exact_match(text, references))
        self.f1.append(f1(text, references))
        self.rouge_l.append(rouge_l(text, references))
        self.set_match.append(set_match(text, references))
        self.refused.append(is_refusal(text))
        self.decoder_tokens.append(tokens)
        self.full_tokens.append(full_tokens)
        if answer.ttft_ms is not None:
            self.ttft_ms.append(answer.ttft_ms)


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
    def mean(values: Sequence[float]) -> float | None:
        return rounded(statistics.fmean(values)) if values else None

    named = names(scores)
    tokens, full = sum(scores.decoder_tokens), sum(scores.full_tokens)
    return {
        **{name: named.pop(name) for name in ("system", "passages", "share_kept")},
        "exact_match": mean(scores.exact_match),
        "f1": mean(scores.f1),
        "decoder_tokens": mean(scores.decoder_tokens),
        # The median: one pause of the machine would decide the mean.
        "ttft_ms": round(statistics.median(scores.ttft_ms), 3) if scores.ttft_ms else None,
        **named,
        "compression": compression_rate(full, tokens) if tokens and scores.reading.passages else None,
        "rouge_l": mean(scores.rouge_l),
        "set_match": mean(scores.set_match),
        "refusal_accuracy": _refusal_accuracy(scores, questions),
    }


def _refusal_accuracy(scores: Scores, questions: Sequence[Question]) -> float | None:
    """Share of questions that were refused just when they have no answer; null where all have one."""
    if all(question.answerable is not False for question in questions) or len(scores.refused) < len(questions):
        return None
    known = [
        refused != question.answerable
        for refused, question in zip(scores.refused, questions, strict=True)
        if question.answerable is not None
    ]
    return rounded(statistics.fmean(known))


def _interval(scores: Scores, questions: Sequence[Question], seed: int) -> dict[str, Any]:
    """95% intervals of the scores, documents resampled."""
    documents = [question.document for question in questions]
    values = {name: np.array(getattr(scores, name)) for name in SCORES}
    # A system that could not answer every question has no interval to compare.
    return names(scores) | {
        name: bootstrap_interval(column, documents, seed) if len(column) == len(documents) else None
        for name, column in values.items()
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
            for name in SCORES:
                ours, theirs = np.array(getattr(refrag, name)), np.array(getattr(other, name))
                both = len(ours) == len(theirs) == len(questions)
                row[name] = mean_gain(ours - theirs, documents, seed) if both else None
            rows.append(row)
    return rows
