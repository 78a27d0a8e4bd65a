"""What the service would find and answer: held-out questions looked up in the chunk store, and answered over that.

Elsewhere in an evaluation the passages are those that a question lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from refrag_platform.corpus.question import Passage, Question
from refrag_platform.evaluation.items import HELD, ItemSet, lookups_digest
from refrag_platform.evaluation.metrics import judgeable
from refrag_platform.evaluation.rag import RagEvaluation, evaluate_rag
from refrag_platform.evaluation.retrieval import (
    IN_STORE,
    Looked,
    LookupQuestion,
    cuts_of,
    file_cases,
    look_up,
    retrieval_report,
)
from refrag_platform.evaluation.systems import RETRIEVAL_SYSTEMS
from refrag_platform.model.loading import Bundle
from refrag_platform.model.segments import Chunks
from refrag_platform.recipes import Recipe
from refrag_platform.store.content import StoreDescription
from refrag_platform.store.ranking import texts_to_ask
from refrag_platform.store.relevance import PassageRelevance
from refrag_platform.store.table import ChunkStore, Hit


@dataclass(frozen=True)
class ServedEvaluation:
    """What `evaluate_served` found.

    report: {passages, least_similarity, retriever, lookups: [{kind, questions, hit_1, hit_5, hit_10, hit_20,
    answered}], rows, intervals}; passages: as many as the service sends. lookups: shares of 1 by kind of question: in
    the store, not in the store, gold unknown; hit_k: hit rates, answered: what least_similarity lets pass. rows,
    intervals: as of `evaluate_rag`, of the questions in the store. answers: the texts. items: figures of every question
    whose gold is known, for the gate; none where none is in the store.
    """

    report: dict[str, Any]
    answers: list[dict[str, Any]]
    items: ItemSet


def evaluate_served(
    bundle: Bundle, questions: Sequence[Question], chunks: Path, recipe: Recipe, base: Path, relevance: PassageRelevance
) -> ServedEvaluation:
    """Look questions up as the service does, and answer those whose gold passage the store holds over what it sends.

    Questions below `serving.least_similarity`, which the service would refuse, are answered all the same: `answered`
    counts them.

    Args:
        chunks: content folder of the store. base: folder of the recipe. relevance: by which `sentences` chooses.

    Raises:
        ArtifactError: the store was made by another encoder, or its retriever is another.
    """
    settings, serving = recipe.evaluation, recipe.serving
    questions = [one for one in questions if judgeable(one.answers) or not one.answers]
    # What embeds a question for its search need not embed it again for `sentences`. A released store may have another.
    shared = relevance if StoreDescription.read(chunks).retriever_digest == relevance.digest else None
    store = ChunkStore.open(chunks, bundle.model.encoder_digest(), base=base, retriever=shared)
    looked: list[Looked] = []
    stored: dict[Question, dict[Passage, Chunks]] = {}
    for question, (one, hits) in zip(
        questions, look_up(store, file_cases(questions, chunks), serving.passages), strict=True
    ):
        looked.append(one)
        if one.case.gold:
            sent = {(hit.title, hit.text): _chunks(hit) for hit in hits}
            stored[_as_asked(question, one.case, hits)] = sent
    cuts, least = cuts_of(store), serving.least_similarity
    report: dict[str, Any] = {
        "passages": serving.passages,
        "least_similarity": least,
        "retriever": store.description.retriever,
        # Flat, of searches with what was said before.
        "lookups": [
            {
                "kind": row["kind"],
                "questions": row["questions"],
                **{f"hit_{cut}": (row["together"] or {}).get(str(cut)) for cut in cuts},
                "answered": row["answered"],
            }
            for row in retrieval_report(looked, least, cuts)["rows"]
        ],
    }
    if not stored:
        return ServedEvaluation(report | {"rows": [], "intervals": []}, [], ItemSet())
    answered = evaluate_rag(
        bundle.model,
        bundle.policy,
        list(stored),
        passages=[serving.passages],
        share_kept=bundle.share_kept,
        systems=RETRIEVAL_SYSTEMS,
        relevance=relevance,
        # As the search ranked them.
        order="listed",
        stored=stored,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        seed=recipe.seed,
    )
    # No time to first token is measured in batches.
    rows = [{name: value for name, value in row.items() if name != "ttft_ms"} for row in answered.rows]
    items = _items(questions, looked, answered, least, cuts, settings.max_new_tokens)
    return ServedEvaluation(report | {"rows": rows, "intervals": answered.intervals}, answered.answers, items)


def beside_found(report: Mapping[str, Any]) -> str | None:
    """How often the store's search finds the right passage, and the answers over what it finds, in one line.

    None where no question's gold passage is in the store.

    Args: report: that of `evaluate_served`.
    """
    answers = {row["system"]: row for row in report["rows"]}
    held = next((row for row in report["lookups"] if row["kind"] == IN_STORE), None)
    if held is None or not answers:
        return None
    hits = ", ".join(
        f"{cut} for {value:.0%}"
        for name, value in held.items()
        if (cut := name.removeprefix("hit_")) != name and value is not None
    )
    scores = ", ".join(f"{name} {row['f1']:.3f}" for name, row in answers.items())
    return (
        f"Looked up as served: of {held['questions']:,} held-out questions that the store can answer, the right "
        f"passage is among the first {hits}. F1 over the first {report['passages']}: {scores}."
    )


def _as_asked(question: Question, case: LookupQuestion, hits: Sequence[Hit]) -> Question:
    """The question with the passages that were found, put as the engine puts it to policy and decoder."""
    nearest = max(hits, key=lambda hit: hit.score or 0.0, default=None)
    text = texts_to_ask(case.question, case.before)[-1] if nearest and nearest.follows else question.question
    passages = tuple(dict.fromkeys((hit.title, hit.text) for hit in hits))
    return replace(question, question=text, passages=passages, gold=(), ranked=True)


def _chunks(hit: Hit) -> Chunks:
    token_ids = torch.from_numpy(hit.token_ids.astype("int64"))
    return Chunks(token_ids, vectors=torch.from_numpy(hit.vectors), relevance=hit.score)


def _items(
    questions: Sequence[Question],
    looked: Sequence[Looked],
    answered: RagEvaluation,
    least: float | None,
    cuts: Sequence[int],
    max_new_tokens: int,
) -> ItemSet:
    """Figures of every question whose gold passages are known, whether this store holds them or not."""
    known = [place for place, one in enumerate(questions) if one.gold and one.answerable is not False]
    lookups = [looked[place] for place in known]
    held = [bool(one.case.gold) for one in lookups]
    values: dict[str, list[float]] = {HELD: [float(one) for one in held]}
    for cut in cuts:
        values[f"retrieval_hit_{cut}"] = [float(0 < one.together <= cut) for one in lookups]
    values["retrieval_answered"] = [
        float(there and (least is None or one.similarity >= least)) for there, one in zip(held, lookups, strict=True)
    ]
    for name, scores in answered.items.values.items():
        score = iter(scores)
        values[f"retrieval_{name}"] = [next(score) if there else 0.0 for there in held]
    asked = [questions[place] for place in known]
    return ItemSet.of(lookups_digest(asked, max_new_tokens), [one.document for one in asked], values)
