"""Answers to questions over 1..K passages, REFRAG against plain decoding: `refrag evaluate rag --help`.

Generation is greedy. One question at a time, the time to first token is a user's: it counts from prompt and chunk
vectors to the first token, as vectors come from a store, made ahead (section 2). In batches it is not measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from refrag_platform.corpus.question_files import Question
from refrag_platform.errors import RefragError
from refrag_platform.evaluation.answering import Answer, answers, warm_up
from refrag_platform.evaluation.items import ItemSet, questions_digest
from refrag_platform.evaluation.metrics import (
    bootstrap_interval,
    exact_match,
    f1,
    is_refusal,
    judgeable,
    rouge_l,
    rounded,
)
from refrag_platform.evaluation.readings import (
    DEFAULT_SYSTEMS,
    Readers,
    Reading,
    System,
    other_question,
    prompts,
    readings,
)
from refrag_platform.evaluation.scoring import PlainSystem
from refrag_platform.model.loading import load_control
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.prompts import NO_ANSWER
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Prompt, compression_rate, prompt_length
from refrag_platform.progress import Progress
from refrag_platform.store.relevance import PassageRelevance

SCORES = ("exact_match", "f1", "rouge_l")
# Questions whose prompts are made before they are answered, in batches.
BLOCK = 4


@dataclass
class Scores:
    """How one reading answered: a figure for each question that it answered, whose number is in `numbers`."""

    reading: Reading
    numbers: list[int] = field(default_factory=list)
    exact_match: list[float] = field(default_factory=list)
    f1: list[float] = field(default_factory=list)
    rouge_l: list[float] = field(default_factory=list)
    refused: list[bool] = field(default_factory=list)
    decoder_tokens: list[int] = field(default_factory=list)
    full_tokens: list[int] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)

    def of(self, numbers: Sequence[int]) -> Scores:
        """The figures of these questions alone."""
        wanted = set(numbers)
        chosen = [place for place, number in enumerate(self.numbers) if number in wanted]
        lists = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "reading"}
        # Times are of all questions or, in batches, of none.
        return Scores(self.reading, **{n: [own[place] for place in chosen] if own else [] for n, own in lists.items()})

    def add(self, number: int, question: Question, text: str, answer: Answer, tokens: int, full_tokens: int) -> None:
        self.numbers.append(number)
        references = question.answers or (NO_ANSWER,)
        self.exact_match.append(exact_match(text, references))
        self.f1.append(f1(text, references))
        self.rouge_l.append(rouge_l(text, references))
        self.refused.append(is_refusal(text))
        self.decoder_tokens.append(tokens)
        self.full_tokens.append(full_tokens)
        if answer.ttft_ms is not None:
            self.ttft_ms.append(answer.ttft_ms)


@dataclass(frozen=True)
class RagEvaluation:
    """What `refrag evaluate rag` found.

    rows: {system, passages, share_kept, exact_match, f1, decoder_tokens, ttft_ms; tuned, tokens_of, compression,
    rouge_l, refusal_accuracy}. differences: {over, passages, share_kept, exact_match, f1, rouge_l}, each [gain of
    refrag, low, high]. parts: rows, intervals and differences of each set of questions, by its name, where there are
    several, with the number of them, `questions_used`. answers: the texts. items: exact match and F1 of every
    question, refrag at the most passages. skipped: {questions_used, questions_skipped, references_skipped}: references
    of which normalization leaves nothing judge no answer, and a question that has no other isn't asked.
    """

    rows: list[dict[str, Any]]
    intervals: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    parts: dict[str, dict[str, Any]]
    answers: list[dict[str, Any]]
    items: ItemSet
    skipped: dict[str, int]


def evaluate_rag(
    model: RefragModel,
    policy: PolicyNetwork | None,
    questions: Sequence[Question],
    *,
    passages: Sequence[int],
    share_kept: float,
    shares: Sequence[float] = (),
    systems: Sequence[System] = DEFAULT_SYSTEMS,
    controls: Mapping[PlainSystem, Path] | None = None,
    untuned: PreTrainedModel | None = None,
    relevance: PassageRelevance | None = None,
    sets: Sequence[str] | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 1,
    seed: int = 0,
) -> RagEvaluation:
    """One row per reading of `systems` (evaluation/readings.py) and number of passages; no context has one.

    Plain text is read by the tuned controls where these are given, else by the model's own fine-tuned decoder, which
    knows the prompt and the form of the answers.

    Args:
        share_kept: p of the rows that every evaluation has. shares: further ones, each with rows of its own.
        untuned: the decoder before any training here, needed for the system `untuned` alone.
        relevance: what a policy is told of the passages that reads it; without, it does without.
        sets: the set that each question is of; figures are given of all together and of each. Wrong passages may be
            another set's.
        batch_size: prompts answered at once; above 1 the time to first token is null.

    Raises:
        RefragError: no question has a reference by which an answer can be judged.
    """
    places = [place for place, one in enumerate(questions) if judgeable(one.answers) or not one.answers]
    if not places:
        raise RefragError(
            f"none of {len(questions)} questions can be judged: normalization (no punctuation, no articles) leaves "
            "nothing of their answers; give questions with other answers"
        )
    skipped = {
        "questions_used": len(places),
        "questions_skipped": len(questions) - len(places),
        "references_skipped": sum(len(one.answers) - len(judgeable(one.answers)) for one in questions),
    }
    questions, sets = [questions[place] for place in places], [sets[place] for place in places] if sets else None
    readers = Readers(
        model,
        policy,
        {system: load_control(folder, like=model) for system, folder in (controls or {}).items()},
        None if untuned is None else RefragModel(model.encoder, model.projection, untuned, model.tokenizer),
        relevance,
    )
    wanted = readings(systems, passages, list(dict.fromkeys([share_kept, *shares])))
    found = {reading: Scores(reading) for reading in wanted}
    texts: list[dict[str, Any]] = []
    with Progress("questions", len(questions) * len(wanted), "answers") as progress:
        for number, reading, prompt, full_tokens, answer in _answered(
            readers, questions, wanted, max_new_tokens, batch_size, seed, progress
        ):
            question = questions[number]
            text = _said(question, answer.text)
            found[reading].add(number, question, text, answer, prompt_length(prompt), full_tokens)
            of_set = {"set": sets[number]} if sets else {}
            texts.append({"id": question.id, **of_set, **_names(reading), "answer": text})
    scores = list(found.values())
    return RagEvaluation(
        **_judged(scores, questions, seed),
        parts=_parts(scores, questions, sets or [], seed),
        answers=texts,
        items=_items(found.get(Reading("refrag", max(passages), share_kept)), questions, max_new_tokens),
        skipped=skipped,
    )


def answer_items(
    model: RefragModel,
    policy: PolicyNetwork | None,
    questions: Sequence[Question],
    *,
    passages: int,
    share_kept: float,
    max_new_tokens: int,
    relevance: PassageRelevance | None = None,
    seed: int = 0,
) -> ItemSet:
    """Exact match and F1 of every question for refrag alone, as `evaluate_rag` finds them."""
    return evaluate_rag(
        model,
        policy,
        questions,
        passages=[passages],
        share_kept=share_kept,
        systems=["refrag"],
        relevance=relevance,
        max_new_tokens=max_new_tokens,
        seed=seed,
    ).items


def _answered(
    readers: Readers,
    questions: Sequence[Question],
    wanted: Sequence[Reading],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> Iterator[tuple[int, Reading, Prompt, int, Answer]]:
    """Every question in every reading: its number, the reading, the prompt, the full prompt's length, the answer.

    For each reading the questions come in their order.
    """
    if batch_size == 1:
        for reader in {id(reader): reader for reader in map(readers.of, (r.system for r in wanted))}.values():
            warm_up(reader)
    block = batch_size * BLOCK if batch_size > 1 else 1
    for start in range(0, len(questions), block):
        jobs: list[tuple[int, Reading, Prompt, int]] = []
        readers.learn_relevance(questions[start : start + block], wanted)
        for number in range(start, min(start + block, len(questions))):
            question, wrong = questions[number], other_question(questions, number)
            # Chance of its own for each question: what other systems draw changes nothing.
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            jobs += [(number, *made) for made in prompts(readers, question, wrong, wanted, generator)]
        made: dict[int, Answer] = {}
        for reader in {id(reader): reader for reader in map(readers.of, (job[1].system for job in jobs))}.values():
            own = [number for number, job in enumerate(jobs) if readers.of(job[1].system) is reader]
            for place, answer in answers(reader, [jobs[number][2] for number in own], max_new_tokens, batch_size):
                made[own[place]] = answer
                progress.update(1, jobs[own[place]][1].system)
        for number, job in enumerate(jobs):
            yield *job, made[number]


def _parts(
    scores: Sequence[Scores], questions: Sequence[Question], sets: Sequence[str], seed: int
) -> dict[str, dict[str, Any]]:
    """What is found of each set alone, where there are several."""
    numbers = {name: [number for number, own in enumerate(sets) if own == name] for name in dict.fromkeys(sets)}
    if len(numbers) < 2:
        return {}
    return {
        name: {
            "questions_used": len(own),
            **_judged([one.of(own) for one in scores], [questions[number] for number in own], seed),
        }
        for name, own in numbers.items()
    }


def _judged(scores: Sequence[Scores], questions: Sequence[Question], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows, intervals and differences of all readings."""
    return {
        "rows": [_row(one, questions) for one in scores],
        "intervals": [_interval(one, questions, seed) for one in scores],
        "differences": _differences(scores, questions, seed),
    }


def _said(question: Question, text: str) -> str:
    """The answer that is judged: a brief one's first line, else all of it."""
    if question.history or question.kind == "summary":
        return " ".join(text.split())
    return text.splitlines()[0].strip() if text else ""


def _names(reading: Reading) -> dict[str, Any]:
    """A reading as the rows name it."""
    is_refrag = reading.system.startswith("refrag")
    return {
        "system": "full" if reading.system == "untuned" else reading.system,
        "passages": reading.passages,
        "share_kept": reading.at if is_refrag else None,
        "tuned": reading.system != "untuned",
        # The REFRAG row that has as many decoder tokens.
        "tokens_of": None if is_refrag else reading.at,
    }


def _row(scores: Scores, questions: Sequence[Question]) -> dict[str, Any]:
    def mean(values: Sequence[float]) -> float | None:
        return rounded(statistics.fmean(values)) if values else None

    named = _names(scores.reading)
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
    values = {name: np.array(getattr(scores, name)) for name in SCORES}
    return _names(scores.reading) | {name: _bootstrapped(found, questions, seed) for name, found in values.items()}


def _differences(found: Sequence[Scores], questions: Sequence[Question], seed: int) -> list[dict[str, Any]]:
    """Gain of refrag, question by question, over whatever read the same passages, with 95% intervals."""
    rows = []
    for own in found:
        if own.reading.system != "refrag":
            continue
        for other in found:
            there = other.reading
            if there.system in {"none", "refrag"} or there.passages != own.reading.passages:
                continue
            if there.at not in {None, own.reading.at}:
                continue
            named = _names(there)
            row = {"over": named["system"], "tuned": named["tuned"], "passages": there.passages}
            row["share_kept"] = own.reading.at
            for name in SCORES:
                ours, theirs = np.array(getattr(own, name)), np.array(getattr(other, name))
                gain = ours - theirs if len(ours) == len(theirs) else np.empty(0)
                low, high = _bootstrapped(gain, questions, seed) or (None, None)
                row[name] = [rounded(gain.mean()), low, high] if len(gain) else None
            rows.append(row)
    return rows


def _bootstrapped(values: np.ndarray, questions: Sequence[Question], seed: int) -> list[float] | None:
    # A system that could not answer every question has no interval to compare.
    if len(values) != len(questions):
        return None
    interval = bootstrap_interval(values, [q.document for q in questions], np.random.default_rng(seed))
    return None if interval is None else list(interval)


def _items(scores: Scores | None, questions: Sequence[Question], max_new_tokens: int) -> ItemSet:
    if scores is None:
        return ItemSet()
    digest = questions_digest(questions, scores.reading.passages, max_new_tokens)
    values = {"exact_match": scores.exact_match, "f1": scores.f1}
    return ItemSet.of(digest, [question.document for question in questions], values)
