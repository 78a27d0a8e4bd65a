"""Time to first token, from a question's arrival, of configurations that were judged: `refrag bench frontier`.

One question at a time, as it is served (serving/engine.py): search in a store of all passages, choice of what is read,
prompt with its vectors projected, prefill by the decoder's runner. Every configuration takes the same questions, in
turns. Each reads the very prompt that was judged: the question's own passages, nearest first. So what the search finds
is timed, and not read. What can be made ahead of a question is: the passages' tokens and chunk vectors, and, of the
baseline `sentences`, each sentence's tokens and vector. The store hands out chunk vectors to all, text alone included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import torch

from refrag_platform.bench.clock import Case, Ceilings, Times, in_turns, synchronize
from refrag_platform.bench.judged import Judged, read_result
from refrag_platform.bench.machine import measured_on
from refrag_platform.bench.report import PARTS
from refrag_platform.bench.stores import Store, open_store, passage_id
from refrag_platform.corpus.question import Question, spread
from refrag_platform.decoding.prompts import prompt_input
from refrag_platform.decoding.runner import DecoderRunner
from refrag_platform.errors import RefragError
from refrag_platform.evaluation.digests import difference
from refrag_platform.evaluation.readings import Context, Readers, passages_read, question_prompt
from refrag_platform.model.loading import Bundle
from refrag_platform.model.prompts import content_ids
from refrag_platform.model.segments import Chunks, Text, prompt_length
from refrag_platform.model.selection import expand
from refrag_platform.progress import Progress, waiting
from refrag_platform.recipes import Recipe
from refrag_platform.store.relevance import PassageRelevance
from refrag_platform.store.retriever import Retriever


@dataclass(frozen=True)
class PreparedQuestion:
    """A question, its passages by how many are read, and what REFRAG reads of them by that and p."""

    question: Question
    contexts: dict[int, Context]
    refrag: dict[tuple[int, float], list[Chunks]]


def bench_frontier(
    bundle: Bundle,
    known: tuple[Recipe, Path],
    retriever: Retriever,
    judged: Sequence[Judged],
    files: Mapping[str, Sequence[Question]],
    *,
    limit: int | None,
    runs: int,
    warmup: int,
    stores: Path,
) -> dict[str, Any]:
    """A row for each configuration, quality beside time, and what it was measured on.

    Args:
        known: the model's recipe and its folder. retriever: the one that it names. files: questions, by name of their
            file; all their passages are in the store. limit: questions of each to time, evenly spread; None: all.
        runs: of each question in each configuration. warmup: questions in each before them. stores: folder of stores.

    Raises:
        RefragError: a file has something else than questions over passages.
    """
    model, (recipe, base) = bundle.model, known
    for name, questions in files.items():
        if wrong := next((one for one in questions if not one.question or not one.passages), None):
            raise RefragError(f"{wrong.where or name}: {wrong.id} is no question over passages, which is what is timed")
    passages = list(dict.fromkeys(p for questions in files.values() for one in questions for p in one.passages))
    store, how = open_store(stores, bundle.folder, retriever, recipe, base, passages)
    timed = {name: spread(questions, limit) for name, questions in files.items()}
    every = [question for questions in timed.values() for question in questions]
    facts = measured_on(recipe.name, "finetuned", model.decoder, Ceilings.measure(model.device, model.dtype))
    with torch.inference_mode():
        frontier = Frontier(bundle, store, PassageRelevance(retriever), judged, every)
        rows = frontier.rows(runs, warmup)
    machine = {
        **facts,
        "k": model.chunk_size,
        "retrieval": how,
        "stored_passages": len(passages),
        "timed": {name: len(questions) for name, questions in timed.items()},
        "runs": runs,
    }
    place = {"device": facts["device"], "k": model.chunk_size}
    return {"benchmark": "frontier", "machines": [machine], "rows": [{**place, **row} for row in rows]}


class Frontier:
    """The questions with all that is made ahead of them, and the decoder that reads."""

    def __init__(
        self,
        bundle: Bundle,
        store: Store,
        relevance: PassageRelevance,
        judged: Sequence[Judged],
        questions: Sequence[Question],
    ) -> None:
        self.model, self.store, self.judged = bundle.model, store, judged
        self.readers = Readers(bundle.model, bundle.policy, {}, relevance=relevance, order="nearest")
        with waiting("what can be made ahead of the questions"):
            self.asked = [self._ahead(question) for question in questions]
            # Also the first look at each context's tokens and sentences, which it keeps.
            self.positions = [
                [
                    prompt_length(question_prompt(self.model, asked.question, self._read(one, asked)))
                    for asked in self.asked
                ]
                for one in judged
            ]
            lengths = sorted({length for row in self.positions for length in row})
            # As the server makes its own: with one form for all lengths.
            self.runner = DecoderRunner(self.model.decoder, max_positions=lengths[-1], dynamic=True)
            self.runner.warm_up(lengths)

    def rows(self, runs: int, warmup: int) -> list[dict[str, Any]]:
        """A row for each configuration: medians of all its questions, in ms, with quartiles."""
        rounds = runs * len(self.asked)
        parts: list[list[list[float]]] = [[] for _ in self.judged]
        with Progress("first tokens", len(self.judged) * (warmup + rounds), "questions") as progress:
            cases = {
                str(number): Case(partial(self._answer_next, one, cycle(self.asked), parts[number], progress))
                for number, one in enumerate(self.judged)
            }
            in_turns(cases, rounds, warmup, self.model.device)
        return [
            {
                **one.row(),
                "timed_tokens": round(statistics.fmean(self.positions[number]), 2),
                **_times(parts[number][warmup:]),
            }
            for number, one in enumerate(self.judged)
        ]

    def _answer_next(
        self, one: Judged, following: Iterator[PreparedQuestion], parts: list[list[float]], progress: Progress
    ) -> None:
        """Answer with one token: a question more at each call, and from the first one again where they end."""
        parts.append(self.first_token(one, next(following)))
        progress.update(1, one.reading.system)

    def first_token(self, one: Judged, asked: PreparedQuestion) -> list[float]:
        """Answer with one token; seconds of each of PARTS. The device is waited for between them."""
        question, moments = asked.question, [time.perf_counter()]

        def done() -> None:
            synchronize(self.model.device)
            moments.append(time.perf_counter())

        wanted = 1 if one.reading.system == "first" else len(asked.contexts[one.reading.passages].passages)
        self.store.search(question.question, wanted)
        done()
        read = self._read(one, asked)
        done()
        embeds = prompt_input(self.model, question_prompt(self.model, question, read)).embeds
        done()
        int(self.runner.prefill(embeds, 0).argmax())
        done()
        return [after - before for before, after in pairwise(moments)]

    def _read(self, one: Judged, asked: PreparedQuestion) -> Sequence[Chunks | Text]:
        """What stands in the passages' place. A baseline's number of tokens, which is REFRAG's, costs it nothing."""
        reading = one.reading
        context = asked.contexts[reading.passages]
        if reading.system == "refrag":
            return self._expanded(asked.question, context, reading.at or 0.0)
        refrag = [] if reading.at is None else asked.refrag[reading.passages, reading.at]
        return passages_read(self.readers, asked.question, reading.system, context, refrag)

    def _expanded(self, question: Question, context: Context, share: float) -> list[Chunks]:
        asked = content_ids(self.model.tokenizer, question.question)
        chance = torch.Generator().manual_seed(0)
        return expand(self.model, context.chunks, share, self.readers.policy, chance, asked)

    def _ahead(self, question: Question) -> PreparedQuestion:
        counts = {one.reading.passages for one in self.judged}
        contexts = {count: self._context(question, count) for count in counts}
        settings = {(one.reading.passages, one.reading.at) for one in self.judged}
        refrag = {
            (count, share): self._expanded(question, contexts[count], share)
            for count, share in settings
            if share is not None
        }
        return PreparedQuestion(question, contexts, refrag)

    def _context(self, question: Question, count: int) -> Context:
        """The question's passages with the store's tokens and vectors, and the nearness that the search would tell."""
        near = self.readers.relevance
        assert near is not None
        passages = self.readers.arranged(question, question.take(count))
        hits = [self.store.passage(passage_id(passage)) for passage in passages]
        cut = [
            Chunks(torch.from_numpy(hit.token_ids.astype("int64")), vectors=torch.from_numpy(hit.vectors))
            for hit in hits
        ]
        context = Context(self.model.tokenizer, passages, near.tell(question.question, passages, cut))
        near.learn(
            [], [(passages[one.passage][0], one.text) for _, sentences in context.sentences for one in sentences]
        )
        return context


def _times(parts: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Medians and quartiles in ms of the whole, `ttft`, and of each part."""
    columns = {"ttft": [sum(one) for one in parts], **dict(zip(PARTS, zip(*parts, strict=True), strict=True))}
    times = {f"{name}_ms": Times(tuple(1e3 * value for value in values)) for name, values in columns.items()}
    return {
        **{name: round(measured.median, 3) for name, measured in times.items()},
        "spread": {name: [round(end, 3) for end in measured.quartiles] for name, measured in times.items()},
    }


def joined(files: Sequence[Path]) -> dict[str, Any]:
    """Results of several machines, or of models with other k, in one.

    Raises:
        RefragError: a file holds no such result, two time the same configuration on the same device, or models of one k
            have other weights, or were asked other questions.
    """
    machines, rows, judged = [], list[dict[str, Any]](), list[str]()
    seen: dict[tuple[Any, ...], Path] = {}
    known: dict[int, tuple[Path, Mapping[str, Any]]] = {}
    for file in files:
        result = read_result(file, "refrag bench frontier")
        if result.get("benchmark") != "frontier":
            raise RefragError(f"{file} holds no result of `refrag bench frontier`; leave it out")
        for machine in result["machines"]:
            # Results of older versions don't tell, and their figure says so.
            if its_digests := machine.get("digests"):
                other, digests = known.setdefault(machine["k"], (file, its_digests))
                if told := difference(digests, its_digests):
                    raise RefragError(
                        f"{other} and {file} time models of k = {machine['k']} that differ in {told}; time one model "
                        "on all machines"
                    )
        machines += result["machines"]
        rows += result["rows"]
        judged += result["judged"]
        for row in result["rows"]:
            place = tuple(
                row[name] for name in ("device", "k", "system", "passages", "share_kept", "tokens_of", "decoder")
            )
            if (other := seen.setdefault(place, file)) is not file:
                raise RefragError(f"{other} and {file} both time k = {row['k']} on {row['device']}; give one of them")
    return {"benchmark": "frontier", "machines": machines, "judged": sorted(set(judged)), "rows": rows}
