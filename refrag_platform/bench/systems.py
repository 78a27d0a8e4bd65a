"""The systems that are compared, each as cases to time, the least work of each case, and what is kept afterwards.

full     every context token is read.
refrag   chunk vectors are read; ttft: fetched from a store on disk, ttft_cached: already on the device,
         ttft_uncached: encoded now, by an encoder of whole passages as the service does it. Projection and question
         are included each time.
cepe     every layer attends to the encoder's states of all context tokens; the three times as above, of states.
prefix   the context's keys and values are kept from before: exact reuse at its best, for one order of passages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from refrag_platform.bench.arithmetic import DecoderSize, Work, encoder_work, projection_work
from refrag_platform.bench.cepe import Cepe
from refrag_platform.bench.clock import Case
from refrag_platform.bench.machine import BUCKETS_PER_OCTAVE
from refrag_platform.bench.shapes import Subject
from refrag_platform.bench.vectors import PASSAGE, StoredVectors, encode_passages, reads_chunks
from refrag_platform.decoding.graphs import GraphedStep
from refrag_platform.decoding.runner import DecoderRunner
from refrag_platform.errors import RefragError
from refrag_platform.model.encoder import ChunkEncoder
from refrag_platform.model.fused import FusedLayers

logger = logging.getLogger("refrag.bench")

SYSTEMS = ("full", "refrag", "cepe", "prefix")
# Further tokens that one measurement of the time per token generates.
STEPS = 8


@dataclass(frozen=True)
class LatencyPlan:
    """What one run measures.

    context, question: decoder tokens. ks: chunk sizes. runs, warmup: of each measure.
    """

    context: int
    question: int
    ks: tuple[int, ...]
    systems: tuple[str, ...]
    runs: int
    warmup: int
    seed: int

    def check(self) -> None:
        """Raises: RefragError: a system is unknown, or the context isn't whole chunks."""
        for system in self.systems:
            if system not in SYSTEMS:
                raise RefragError(f"there is no system {system!r}; there are {', '.join(SYSTEMS)}")
        for k in self.ks:
            if k < 1 or self.context % k:
                raise RefragError(f"context {self.context} is no multiple of k = {k}; give one that is")


@dataclass(frozen=True)
class MeasuredSystem:
    """One row in the making: cases by measure, the least work of each, and what is kept for further tokens."""

    name: str
    k: int | None
    cases: dict[str, Case]
    work: dict[str, Work]
    kv_bytes: int
    facts: dict[str, Any]


class Bench:
    """The systems of one plan: their inputs on the device, their steps, one cache for all."""

    def __init__(self, subject: Subject, plan: LatencyPlan, folder: Path) -> None:
        self.subject, self.plan, self.folder = subject, plan, folder
        self.size = DecoderSize.of(subject.decoder)
        self.device = subject.device
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        generator = torch.Generator().manual_seed(plan.seed)
        vocabulary = self.embeddings.num_embeddings
        self.context = torch.randint(vocabulary, (plan.context,), generator=generator)
        self.question = torch.randint(vocabulary, (plan.question,), generator=generator)
        self.runner = self._runner(subject.decoder, plan.context + plan.question)

    @property
    def embeddings(self) -> Any:
        return self.subject.decoder.get_input_embeddings()

    def systems(self) -> Iterator[MeasuredSystem]:
        """The plan's systems, ready to run."""
        if "full" in self.plan.systems:
            yield self._full()
        if "refrag" in self.plan.systems:
            yield from (self._refrag(k) for k in self.plan.ks)
        if "cepe" in self.plan.systems:
            yield self._cepe()
        if "prefix" in self.plan.systems:
            yield self._prefix()

    def _full(self) -> MeasuredSystem:
        return self._of_text("full", "ttft", torch.cat([self.context, self.question]))

    def _prefix(self) -> MeasuredSystem:
        # What is reused must be there: cells never written are read at another speed.
        self.runner.prefill(self.embeddings(self.context.to(self.device)), 0)
        return self._of_text("prefix", "ttft_cached", self.question, start=self.plan.context)

    def _of_text(self, name: str, measure: str, tokens: Tensor, start: int = 0) -> MeasuredSystem:
        """A system that reads these tokens as they are, after `start` positions that the cache has."""
        positions = start + len(tokens)
        read = self._step(lambda tokens: self.embeddings(tokens), tokens=tokens)

        def first_token() -> int:
            read.inputs["tokens"].copy_(tokens)
            return _token(self.runner.prefill(read(), 0, start=start))

        cases = {measure: Case(first_token), "ttit": self._further(self.runner, positions)}
        work = {measure: self.size.prefill(len(tokens), start), "ttit": self.size.step(positions + STEPS // 2)}
        return MeasuredSystem(name, None, cases, work, self._kv_bytes(positions), {})

    def _refrag(self, k: int) -> MeasuredSystem:
        encoder, projection = self.subject.at(k)
        chunks = self.plan.context // k
        by_chunk = reads_chunks(encoder)
        layers = self._fused(encoder) if by_chunk else None
        positions = chunks + self.plan.question

        def read(vectors: Tensor, question: Tensor) -> Tensor:
            return torch.cat([projection(vectors), self.embeddings(question)])

        cases = self._from_store(
            StoredVectors(self.folder / f"{k}.safetensors", chunks, encoder.vector_dim, self.plan.seed),
            self.context.view(chunks, k),
            lambda ids: encoder(ids, padded=False, layers=layers) if by_chunk else encode_passages(encoder, ids),
            read,
            self.runner,
            fixed=by_chunk,
        )
        cached = projection_work(projection, chunks, self.size.number_bytes) + self.size.prefill(positions)
        work = {
            "ttft_cached": cached,
            "ttft_uncached": cached + encoder_work(encoder, chunks, self.size.number_bytes, min(PASSAGE, chunks)),
            "ttit": self.size.step(positions + STEPS // 2),
        }
        facts: dict[str, Any] = {"projection": "random" if self.subject.is_random(k) else self.subject.weights}
        if not by_chunk:
            facts["passage_tokens"] = min(PASSAGE, chunks) * k
        cases["ttit"] = self._further(self.runner, positions)
        return MeasuredSystem("refrag", k, cases, work, self._kv_bytes(positions), facts)

    def _fused(self, encoder: ChunkEncoder) -> FusedLayers | None:
        """The encoder's layers as they are fastest, or None: a CPU gains nothing by it, and some can't be fused."""
        if self.device.type != "cuda":
            return None
        try:
            return FusedLayers(encoder, compile=True)
        except RefragError as error:
            logger.warning("%s", error)
            return None

    def _cepe(self) -> MeasuredSystem:
        context, question = self.plan.context, self.plan.question
        cepe = Cepe(self.subject.decoder, self.subject.encoder, context)
        runner = self._runner(cepe.decoder, question)

        def read(vectors: Tensor, question: Tensor) -> Tensor:
            cepe.read(vectors)
            return self.embeddings(question)

        cases = self._from_store(
            StoredVectors(self.folder / "states.safetensors", context, cepe.width, self.plan.seed),
            self.context,
            cepe.encode,
            read,
            runner,
        )
        cached = cepe.prefill_work(question)
        work = {
            "ttft_cached": cached,
            "ttft_uncached": cached + cepe.encode_work(),
            "ttit": cepe.step_work(question + STEPS // 2),
        }
        cases["ttit"] = self._further(runner, question)
        return MeasuredSystem("cepe", None, cases, work, cepe.kv_bytes(question), {"projection": "random"})

    def _from_store(
        self,
        stored: StoredVectors,
        ids: Tensor,
        encode: Callable[[Tensor], Tensor],
        read: Callable[[Tensor, Tensor], Tensor],
        runner: DecoderRunner,
        fixed: bool = True,
    ) -> dict[str, Case]:
        """The first token with vectors from disk, with vectors on the device, and from token ids.

        Args:
            encode: ids to vectors. read: vectors and question ids to the decoder's input, [N, d]. fixed: whether
                encoding is a step of fixed shape that never asks what its input says.
        """
        vectors = stored.fetch().to(self.device, self.subject.dtype)

        def encoded(ids: Tensor, question: Tensor) -> Tensor:
            return read(encode(ids), question)

        reading = self._step(read, vectors=vectors, question=self.question)
        encoding = self._step(encoded, ids=ids, question=self.question) if fixed else None

        def first_token(step: GraphedStep, **inputs: Tensor) -> int:
            for name, value in {**inputs, "question": self.question}.items():
                step.inputs[name].copy_(value)
            return _token(runner.prefill(step(), 0))

        def from_tokens() -> int:
            return first_token(encoding, ids=ids) if encoding else first_token(reading, vectors=encode(ids))

        return {
            "ttft": Case(lambda: first_token(reading, vectors=stored.fetch()), stored.evict),
            "ttft_cached": Case(lambda: first_token(reading, vectors=vectors)),
            "ttft_uncached": Case(from_tokens),
            "store_fetch": Case(lambda: stored.fetch().to(self.device, self.subject.dtype), stored.evict),
        }

    def _further(self, runner: DecoderRunner, positions: int) -> Case:
        """STEPS further tokens; each is the next one's input, and none leaves the device in between."""
        token = torch.zeros(1, dtype=torch.long, device=self.device)

        def steps() -> None:
            following = token
            for step in range(STEPS):
                following = runner.decode(following, [0], [positions + step]).argmax(-1)

        return Case(steps)

    def _kv_bytes(self, positions: int) -> int:
        return self.runner.kv_bytes_per_position * positions

    def _runner(self, decoder: PreTrainedModel, positions: int) -> DecoderRunner:
        return DecoderRunner(decoder, max_positions=positions + STEPS, buckets_per_octave=BUCKETS_PER_OCTAVE)

    def _step(self, function: Callable[..., Tensor], **inputs: Tensor) -> GraphedStep:
        """A step of the decoder's surroundings, treated as the runner treats its own."""
        return GraphedStep(function, {name: value.to(self.device).clone() for name, value in inputs.items()}, self.pool)


def _token(logits: Tensor) -> int:
    """The first token, known on the host."""
    return int(logits.argmax())
