"""Answers to questions over 1..K passages, REFRAG against plain decoding: `refrag evaluate rag --help`.

Generation is greedy. One question at a time, the time to first token is a user's: it counts from prompt and chunk
vectors to the first token, as vectors come from a store, made ahead (section 2). In batches it is not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from refrag_platform.corpus.question import Passage, Question
from refrag_platform.errors import RefragError
from refrag_platform.evaluation.answering import TimedAnswer, answers, warm_up
from refrag_platform.evaluation.items import ItemSet, questions_digest
from refrag_platform.evaluation.metrics import judgeable
from refrag_platform.evaluation.rag_rows import NOT_SEEN, SEEN, Scores, judged, names, parts
from refrag_platform.evaluation.readings import Readers, other_question, prompts
from refrag_platform.evaluation.systems import Order, Reading, System, decoder_of, readings
from refrag_platform.model.loading import load_control
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks, Prompt, prompt_length
from refrag_platform.progress import Progress
from refrag_platform.store.relevance import PassageRelevance

# Questions whose prompts are made before they are answered, in batches.
BLOCK = 4


@dataclass(frozen=True)
class RagEvaluation:
    """What `refrag evaluate rag` found.

    rows: {system, passages, share_kept, exact_match, f1, decoder_tokens, ttft_ms; tuned, decoder, order, tokens_of,
    compression, rouge_l, set_match, refusal_accuracy}. differences: {over, tuned, decoder, passages, share_kept,
    exact_match, f1, rouge_l, set_match}, each [gain of refrag, low, high]. parts: rows, intervals and differences of
    each set of questions and of each `kind` that their rows name, by its name, where there are several, with the number
    of them, `questions_used`. answers: the texts. items: exact match and F1 of every question, refrag at the most
    passages. skipped: {questions_used, questions_skipped, references_skipped, questions_seen}: references of which
    normalization leaves nothing judge no answer, and a question that has no other isn't asked; of those that are asked
    training has shown `questions_seen`, where that is known. order: in which the passages were read.
    """

    rows: list[dict[str, Any]]
    intervals: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    parts: dict[str, dict[str, Any]]
    answers: list[dict[str, Any]]
    items: ItemSet
    skipped: dict[str, int]
    order: Order


def evaluate_rag(
    model: RefragModel,
    policy: PolicyNetwork | None,
    questions: Sequence[Question],
    *,
    passages: Sequence[int],
    share_kept: float,
    systems: Sequence[System],
    shares: Sequence[float] = (),
    controls: Mapping[System, Path] | None = None,
    untuned: PreTrainedModel | None = None,
    relevance: PassageRelevance | None = None,
    told: bool = True,
    order: Order = "nearest",
    sets: Sequence[str] | None = None,
    seen: Sequence[bool] | None = None,
    stored: Mapping[Question, Mapping[Passage, Chunks]] | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 1,
    seed: int = 0,
) -> RagEvaluation:
    """One row per reading of `systems` (evaluation/systems.py) and number of passages; no context has one.

    Plain text is read by the tuned controls where these are given, else by the model's own fine-tuned decoder, which
    knows the prompt and the form of the answers; rows name it. All systems read the passages in one order.

    Args:
        share_kept: p of the rows that every evaluation has. shares: further ones, each with rows of its own.
        untuned: the decoder before any training here, needed for the system `untuned` alone.
        relevance: how near a retriever finds the passages: what the order `nearest` and the system `sentences` are
            by, and what a policy that reads it is told (`told`).
        order: of the passages that are read; without a retriever `nearest` is as they are listed, and rows say so.
        sets: the set that each question is of; figures are given of all together and of each. Wrong passages may be
            another set's.
        seen: whether training has shown each question; figures are given of those that it has and hasn't shown, too.
        stored: by question, the chunks of its passages as a store has them; other passages are encoded here.
        batch_size: prompts answered at once; above 1 the time to first token is null.

    Raises:
        RefragError: no question has a reference by which an answer can be judged, a system lacks what it needs, or a
            closed question has more passages than are read.
    """
    _refuse_parts(questions, min(passages))
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
    if "sentences" in systems and relevance is None:
        raise RefragError("the system `sentences` needs a retriever; give a recipe that names one, or leave it out")
    questions, sets = [questions[place] for place in places], [sets[place] for place in places] if sets else None
    shown = [SEEN if seen[place] else NOT_SEEN for place in places] if seen else []
    if seen:
        skipped["questions_seen"] = shown.count(SEEN)
    readers = Readers(
        model,
        policy,
        {system: load_control(folder, like=model) for system, folder in (controls or {}).items()},
        None if untuned is None else RefragModel(model.encoder, model.projection, untuned, model.tokenizer),
        relevance,
        told,
        "listed" if order == "nearest" and relevance is None else order,
        seed,
        stored or {},
    )
    wanted = readings(systems, passages, list(dict.fromkeys([share_kept, *shares])))
    scores_of = {
        reading: Scores(reading, decoder_of(reading.system, readers.controls), readers.order) for reading in wanted
    }
    texts: list[dict[str, Any]] = []
    with Progress("questions", len(questions) * len(wanted), "answers") as progress:
        for number, reading, prompt, full_tokens, answer in _answered(
            readers, questions, wanted, max_new_tokens, batch_size, seed, progress
        ):
            question = questions[number]
            text = _said(question, answer.text)
            scores_of[reading].add(number, question, text, answer, prompt_length(prompt), full_tokens)
            of_set = {"set": sets[number]} if sets else {}
            texts.append({"id": question.id, **of_set, **names(scores_of[reading]), "answer": text})
    scores = list(scores_of.values())
    return RagEvaluation(
        **judged(scores, questions, seed),
        parts=parts(scores, questions, sets or [], seed)
        | parts(scores, questions, [q.category for q in questions], seed)
        | parts(scores, questions, shown, seed),
        answers=texts,
        items=_items(scores_of.get(Reading("refrag", max(passages), share_kept)), questions, max_new_tokens),
        skipped=skipped,
        order=readers.order,
    )


def _refuse_parts(questions: Sequence[Question], passages: int) -> None:
    """Refuse closed questions that would be asked over a part of the passages that they are about."""
    over = [one for one in questions if one.closed and len(one.passages) > passages]
    if over:
        longest = max(over, key=lambda one: len(one.passages))
        needed = len(longest.passages)
        raise RefragError(
            f"{longest.where or longest.id}: the question is about all of its {needed} passages, and only {passages} "
            f"are to be read (as with {len(over):,} questions in all); read {needed} (--passages, evaluation.passages)"
        )


def _answered(
    readers: Readers,
    questions: Sequence[Question],
    wanted: Sequence[Reading],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> Iterator[tuple[int, Reading, Prompt, int, TimedAnswer]]:
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
            jobs += [(number, *one) for one in prompts(readers, question, wrong, wanted, generator)]
        answered: dict[int, TimedAnswer] = {}
        for reader in {id(reader): reader for reader in map(readers.of, (job[1].system for job in jobs))}.values():
            chosen = [number for number, job in enumerate(jobs) if readers.of(job[1].system) is reader]
            for place, answer in answers(reader, [jobs[number][2] for number in chosen], max_new_tokens, batch_size):
                answered[chosen[place]] = answer
                progress.update(1, jobs[chosen[place]][1].system)
        for number, job in enumerate(jobs):
            yield *job, answered[number]


def _said(question: Question, text: str) -> str:
    """The answer that is judged: a brief one's first line, else all of it."""
    if question.history or question.kind == "summary":
        return " ".join(text.split())
    return text.splitlines()[0].strip() if text else ""


def _items(scores: Scores | None, questions: Sequence[Question], max_new_tokens: int) -> ItemSet:
    if scores is None:
        return ItemSet()
    digest = questions_digest(questions, scores.reading.passages, max_new_tokens, scores.order)
    values = {name: scores.values(name) for name in ("exact_match", "f1")}
    return ItemSet.of(digest, [question.document for question in questions], values)
