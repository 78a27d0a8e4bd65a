"""Answers to questions over 1..K passages, REFRAG against plain decoding: `refrag evaluate rag --help`.

Generation is greedy and one question at a time, so that the time to first token is a user's. It counts from
prompt and chunk vectors to the first token: vectors come from a store, made ahead (section 2).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refrag_platform.corpus.question_files import Question
from refrag_platform.evaluation.decoders import load_control
from refrag_platform.evaluation.items import ItemSet, questions_digest
from refrag_platform.evaluation.metrics import bootstrap_interval, exact_match, f1, rounded
from refrag_platform.evaluation.scoring import PlainSystem
from refrag_platform.model.generate import generate
from refrag_platform.model.policy import PolicyNetwork, select
from refrag_platform.model.prompts import NO_ANSWER, passage_chunks, rag_prompt, stop_ids
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks, Prompt, chunk_tokens, prompt_length, unchunk
from refrag_platform.progress import Progress


@dataclass
class Answers:
    """What one system answered, a figure per question."""

    system: str
    passages: int
    share_kept: float | None
    exact_match: list[float] = field(default_factory=list)
    f1: list[float] = field(default_factory=list)
    decoder_tokens: list[int] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class RagEvaluation:
    """rows: {system, passages, share_kept, exact_match, f1, decoder_tokens, ttft_ms}; answers: the texts.

    items: exact match and F1 of every question, for refrag at the most passages.
    """

    rows: list[dict[str, Any]]
    intervals: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    items: ItemSet


def evaluate_rag(
    model: RefragModel,
    policy: PolicyNetwork | None,
    questions: Sequence[Question],
    *,
    passages: Sequence[int],
    share_kept: float,
    controls: Mapping[PlainSystem, Path] | None = None,
    max_new_tokens: int = 24,
    seed: int = 0,
) -> RagEvaluation:
    """One row per system and number of passages; no context has one row, with 0 passages.

    full and truncated read text: all the passages' tokens, or their last ones, as many as REFRAG's passages
    take positions. They and none run on the tuned controls where these are given, else on the model's own
    fine-tuned decoder, which knows the prompt and the form of the answers. refrag_wrong reads the passages
    of another question.
    """
    readers: dict[str, RefragModel] = {}
    for system, folder in (controls or {}).items():
        readers[system] = load_control(folder, like=model)
    results: dict[tuple[str, int], Answers] = {}
    texts: list[dict[str, Any]] = []
    runs = len(questions) * (1 + 4 * len(passages))
    with Progress("questions", runs, "answers") as progress:

        def ask(system: str, count: int, share: float | None, question: Question, prompt: Prompt) -> None:
            answers = results.setdefault((system, count), Answers(system, count, share))
            text = _ask(readers.get(system, model), question, prompt, max_new_tokens, answers)
            texts.append({"id": question.id, "system": system, "passages": count, "answer": text})
            progress.update(1, system)

        _warm_up([model, *readers.values()])
        generator = torch.Generator().manual_seed(seed)
        for number, question in enumerate(questions):
            tokenizer = model.tokenizer
            ask("none", 0, None, question, rag_prompt(tokenizer, question.question, []))
            wrong = _other_question(questions, number)
            for count in passages:
                right = compressed(model, policy, question.take(count), share_kept, generator)
                tokens = [token for chunks in right for token in unchunk(chunks.token_ids)]
                positions = prompt_length(right)
                full = [_as_text(tokens, model.chunk_size)]
                last = [_as_text(tokens[-positions:], model.chunk_size)]
                ask("full", count, None, question, rag_prompt(tokenizer, question.question, full))
                ask("truncated", count, None, question, rag_prompt(tokenizer, question.question, last))
                ask("refrag", count, share_kept, question, rag_prompt(tokenizer, question.question, right))
                if wrong is not None:
                    misled = compressed(model, policy, wrong.take(count), share_kept, generator)
                    prompt = rag_prompt(tokenizer, question.question, misled)
                    ask("refrag_wrong", count, share_kept, question, prompt)
    if ("refrag_wrong", passages[0]) not in results:
        results |= {("refrag_wrong", n): Answers("refrag_wrong", n, share_kept) for n in passages}
    return RagEvaluation(
        rows=[_row(answers) for answers in results.values()],
        intervals=[_interval(answers, questions, seed) for answers in results.values()],
        answers=texts,
        items=_items(results["refrag", max(passages)], questions, max_new_tokens),
    )


def answer_items(
    model: RefragModel,
    policy: PolicyNetwork | None,
    questions: Sequence[Question],
    *,
    passages: int,
    share_kept: float,
    max_new_tokens: int,
    seed: int = 0,
) -> ItemSet:
    """Exact match and F1 of every question for refrag alone, as `evaluate_rag` finds them."""
    answers = Answers("refrag", passages, share_kept)
    generator = torch.Generator().manual_seed(seed)
    with Progress("questions", len(questions), "answers") as progress:
        for question in questions:
            read = compressed(model, policy, question.take(passages), share_kept, generator)
            prompt = rag_prompt(model.tokenizer, question.question, read)
            _ask(model, question, prompt, max_new_tokens, answers)
            progress.update(1, "refrag")
    return _items(answers, questions, max_new_tokens)


@torch.inference_mode()
def compressed(
    model: RefragModel,
    policy: PolicyNetwork | None,
    passages: Sequence[tuple[str, str]],
    share_kept: float,
    generator: torch.Generator,
) -> list[Chunks]:
    """Passages (title, text) as chunk vectors, a share of all their chunks kept as tokens.

    The policy ranks the chunks of all passages together; without one they are drawn by `generator`.
    """
    cut = [passage_chunks(model.tokenizer, title, text, model.chunk_size) for title, text in passages]
    if not cut:
        return []
    vectors = model.encode(torch.cat([chunks.token_ids for chunks in cut]))
    logits = policy(vectors[None]).cpu() if policy else torch.rand(1, len(vectors), generator=generator)
    keep = select(logits, None, share_kept)[0]
    sizes = [len(chunks.token_ids) for chunks in cut]
    return [
        Chunks(chunks.token_ids, kept, own)
        for chunks, kept, own in zip(cut, keep.split(sizes), vectors.split(sizes), strict=True)
    ]


def _as_text(tokens: Sequence[int], chunk_size: int) -> Chunks:
    """Tokens as chunks that are all expanded: what a plain decoder reads."""
    token_ids = chunk_tokens(tokens, chunk_size)
    return Chunks(token_ids, torch.ones(len(token_ids), dtype=torch.bool))


def _ask(reader: RefragModel, question: Question, prompt: Prompt, max_new_tokens: int, answers: Answers) -> str:
    """The answer's first line; how good it is, the prompt's length and the time to first token go to `answers`."""
    answers.decoder_tokens.append(prompt_length(prompt))
    begun = time.perf_counter()
    stream = generate(reader, prompt, max_new_tokens, stop_ids(reader.tokenizer))
    first = next(stream, None)
    answers.ttft_ms.append((time.perf_counter() - begun) * 1e3)
    ids = [] if first is None else [first, *stream]
    text = str(reader.tokenizer.decode(ids, skip_special_tokens=True)).strip()
    text = text.splitlines()[0].strip() if text else ""
    references = question.answers or (NO_ANSWER,)
    answers.exact_match.append(exact_match(text, references))
    answers.f1.append(f1(text, references))
    return text


def _warm_up(readers: Sequence[RefragModel]) -> None:
    """The first call of a process pays for allocations and kernels that later ones don't."""
    for reader in readers:
        prompt = rag_prompt(reader.tokenizer, "?", [_as_text([0] * 64, reader.chunk_size)])
        for _ in generate(reader, prompt, 2):
            pass


def _other_question(questions: Sequence[Question], number: int) -> Question | None:
    """The next question whose passages can't hold this one's answer: none of its gold ones, or of all if unknown."""
    asked = questions[number]
    own = {asked.passages[gold] for gold in asked.gold} or set(asked.passages)
    for step in range(1, len(questions)):
        other = questions[(number + step) % len(questions)]
        if other.passages and own.isdisjoint(other.passages):
            return other
    return None


def _items(answers: Answers, questions: Sequence[Question], max_new_tokens: int) -> ItemSet:
    digest = questions_digest(questions, answers.passages, max_new_tokens)
    values = {"exact_match": answers.exact_match, "f1": answers.f1}
    return ItemSet.of(digest, [question.document for question in questions], values)


def _row(answers: Answers) -> dict[str, Any]:
    def mean(values: Sequence[float]) -> float | None:
        return rounded(statistics.fmean(values)) if values else None

    return {
        "system": answers.system,
        "passages": answers.passages,
        "share_kept": answers.share_kept,
        "exact_match": mean(answers.exact_match),
        "f1": mean(answers.f1),
        "decoder_tokens": mean(answers.decoder_tokens),
        # The median: one pause of the machine would decide the mean.
        "ttft_ms": round(statistics.median(answers.ttft_ms), 3) if answers.ttft_ms else None,
    }


def _interval(answers: Answers, questions: Sequence[Question], seed: int) -> dict[str, Any]:
    """95% intervals of exact match and F1, documents resampled."""
    documents = [question.document for question in questions]
    found: dict[str, Any] = {"system": answers.system, "passages": answers.passages}
    for name in ("exact_match", "f1"):
        values = np.array(getattr(answers, name))
        interval = None
        # A system that could not answer every question has no interval to compare.
        if len(values) == len(documents):
            interval = bootstrap_interval(values, documents, np.random.default_rng(seed))
        found[name] = None if interval is None else list(interval)
    return found
