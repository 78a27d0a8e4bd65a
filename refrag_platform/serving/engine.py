"""Answers questions with one model: retrieval, policy, prompt, generation. Knows nothing of HTTP.

    engine = Engine.load(project, "tiny")
    generation = engine.start([Message("user", "What is the capital of Peru?")], engine.retrieve("capital of Peru", 4))
    for piece in generation: print(piece, end="")
    generation.citations, generation.usage
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from refrag_platform.errors import RefragError
from refrag_platform.model.generate import generate
from refrag_platform.model.loading import Bundle, load_bundle
from refrag_platform.model.policy import select
from refrag_platform.model.prompts import passage_text, rag_prompt
from refrag_platform.model.segments import Chunks, Prompt, chunk_tokens, plain_tokens, prompt_length
from refrag_platform.project import Project
from refrag_platform.recipes import ServingRecipe
from refrag_platform.serving.text import Detokenizer, StopStrings
from refrag_platform.store import ChunkStore

SNIPPET_CHARACTERS = 240


class BadRequest(RefragError):
    """A question that this model can't take; `code` and `param` are those of OpenAI's error shape."""

    def __init__(self, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Passage:
    """A passage to read. Those of the store bring token_ids [n, k] and vectors [n, dim]; others are encoded."""

    id: str
    title: str
    text: str
    score: float | None = None
    token_ids: Tensor | None = None
    vectors: Tensor | None = None


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. Temperature 0 takes the likeliest token each time."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Citation:
    """A passage of the prompt, as the answer names it."""

    id: str
    title: str
    score: float | None
    text: str
    chunks: int
    chunks_expanded: int


@dataclass(frozen=True)
class Usage:
    """What an answer cost. `prompt_positions` is what the decoder read, `plain_prompt_tokens` what it would
    have read without compression; `compression_rate` is the ratio of the two over the passages alone."""

    prompt_positions: int
    plain_prompt_tokens: int
    completion_tokens: int
    chunks: int
    chunks_expanded: int
    share_kept: float
    compression_rate: float
    time_to_first_token_ms: float | None


class Engine:
    """One model with its policy and, if there is one, its chunk store. Answers one question at a time."""

    def __init__(self, name: str, bundle: Bundle, store: ChunkStore | None, settings: ServingRecipe) -> None:
        self.name, self.bundle, self.store, self.settings = name, bundle, store, settings
        self._model_free = threading.Lock()

    @classmethod
    def load(cls, project: Project, model: str) -> Engine:
        """The fine-tuned model of a project with its chunk store.

        Raises:
            RefragError: an artifact is missing, or the store was made by another encoder.
        """
        recipe = project.recipe(model)
        return cls.open(
            model, project.content("finetuned", model), project.content("chunks", model), recipe.serving, project
        )

    @classmethod
    def open(
        cls, name: str, model_dir: Path, chunks_dir: Path, settings: ServingRecipe, project: Project | None = None
    ) -> Engine:
        """The model and the store in two content folders.

        Raises:
            RefragError: either is damaged, or the store was made by another encoder.
        """
        bundle = load_bundle(model_dir, project=project)
        store = ChunkStore.open(chunks_dir, expect_encoder=bundle.model.encoder_digest())
        return cls(name, bundle, store, settings)

    def retrieve(self, query: str, count: int) -> list[Passage]:
        """The `count` passages of the store that fit the query best, best first.

        Raises:
            BadRequest: this engine has no store.
        """
        if count == 0:
            return []
        if self.store is None:
            raise BadRequest(f"{self.name} is served without a chunk store; send `passages`", param="retrieve")
        return [
            Passage(hit.id, hit.title, hit.text, float(hit.score), hit.token_ids, hit.vectors)
            for hit in self.store.search(query, count)
        ]

    def start(
        self,
        messages: Sequence[Message],
        passages: Sequence[Passage] = (),
        sampling: Sampling | None = None,
        share_kept: float | None = None,
    ) -> Generation:
        """Build the prompt; the answer is generated as the result is iterated.

        Args:
            messages: the conversation; the last one is the question.
            passages: what to read, in this order.
            share_kept: p, share of chunks kept as tokens; default the recipe's.

        Raises:
            BadRequest: the prompt is too long, or p needs a policy that the model hasn't got.
        """
        begun = time.monotonic()
        sampling = sampling or Sampling(self.settings.max_new_tokens)
        share = self.bundle.share_kept if share_kept is None else share_kept
        with self._model_free:
            chunks = self.choose([self._chunks(passage) for passage in passages], share)
        history = [{"role": message.role, "content": message.content} for message in messages[:-1]]
        prompt = rag_prompt(self.bundle.model.tokenizer, messages[-1].content, chunks, history)
        self._check_length(prompt, sampling.max_tokens)
        citations = [
            Citation(
                id=passage.id,
                title=passage.title,
                score=passage.score,
                text=_snippet(passage.text),
                chunks=len(part.keep),
                chunks_expanded=int(part.keep.sum()),
            )
            for passage, part in zip(passages, chunks, strict=True)
        ]
        usage = Usage(
            prompt_positions=prompt_length(prompt),
            plain_prompt_tokens=len(plain_tokens(prompt)),
            completion_tokens=0,
            chunks=sum(citation.chunks for citation in citations),
            chunks_expanded=sum(citation.chunks_expanded for citation in citations),
            share_kept=share,
            compression_rate=round(len(plain_tokens(chunks)) / max(prompt_length(chunks), 1), 4) if chunks else 1.0,
            time_to_first_token_ms=None,
        )
        return Generation(self, prompt, sampling, citations, usage, begun)

    @torch.inference_mode()
    def choose(self, passages: Sequence[Chunks], share: float) -> list[Chunks]:
        """Keep the share of chunks that the policy scores highest, over all passages together (appendix A.1).

        Raises:
            BadRequest: the share is neither 0 nor 1 and the model has no policy.
        """
        if not passages or share in (0, 1):
            return [part.kept(torch.full((len(part.keep),), share == 1)) for part in passages]
        policy = self.bundle.policy
        if policy is None:
            raise BadRequest(
                f"share_kept is {share}, but {self.name} has no policy to choose with; only 0 and 1 are possible",
                param="share_kept",
            )
        device, dtype = self.bundle.model.device, next(policy.parameters()).dtype
        vectors = torch.cat([part.vectors for part in passages])[None].to(device, dtype)
        mask = torch.ones(vectors.shape[:2], dtype=torch.bool, device=device)
        keep = select(policy(vectors, mask), mask, share)[0].cpu()
        pieces = keep.split([len(part.keep) for part in passages])
        return [part.kept(flags) for part, flags in zip(passages, pieces, strict=True)]

    @torch.inference_mode()
    def _chunks(self, passage: Passage) -> Chunks:
        """A passage as chunks with vectors: from the store, or encoded now."""
        model = self.bundle.model
        token_ids = passage.token_ids
        if token_ids is None:
            ids = model.tokenizer.encode(passage_text(passage.title, passage.text), add_special_tokens=False)
            token_ids = chunk_tokens(ids, model.chunk_size)
        vectors = model.encode(token_ids) if passage.vectors is None else passage.vectors
        return Chunks(token_ids.long(), vectors=vectors)

    def _check_length(self, prompt: Prompt, max_tokens: int) -> None:
        positions, limit = prompt_length(prompt), self.settings.max_prompt_positions
        if positions > limit:
            raise BadRequest(
                f"the prompt takes {positions} decoder positions, the limit of {self.name} is {limit}; send fewer or "
                "shorter passages or messages, or a lower share_kept",
                code="context_length_exceeded",
                param="messages",
            )
        window = self.bundle.model.decoder.config.max_position_embeddings
        if positions + max_tokens > window:
            raise BadRequest(
                f"the prompt takes {positions} decoder positions and max_tokens asks for {max_tokens} more, the "
                f"decoder's window is {window}; lower max_tokens to {window - positions} or shorten the prompt",
                code="context_length_exceeded",
                param="max_tokens",
            )


class Generation:
    """One answer: iterate for its text, piece by piece, then read `usage` and `finish_reason`.

    The model is taken at the first piece and freed after the last, on an error, or by `close`.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Prompt,
        sampling: Sampling,
        citations: list[Citation],
        usage: Usage,
        begun: float,
    ) -> None:
        self.citations, self.usage = citations, usage
        self.finish_reason: Literal["stop", "length"] | None = None
        self._engine, self._prompt, self._sampling, self._begun = engine, prompt, sampling, begun
        self._pieces = self._generate()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def close(self) -> None:
        """Stop generating and free the model; harmless when all has been said."""
        self._pieces.close()  # type: ignore[attr-defined]

    def _generate(self) -> Iterator[str]:
        model, sampling = self._engine.bundle.model, self._sampling
        text, stops = Detokenizer(model.tokenizer), StopStrings(sampling.stop)
        with self._engine._model_free:
            count = 0
            for token_id in self._token_ids():
                count += 1
                self._count(count)
                if piece := stops.push(text.push(token_id)):
                    yield piece
                if stops.stopped:
                    self.finish_reason = "stop"
                    return
            self.finish_reason = "length" if count >= sampling.max_tokens else "stop"
            if piece := stops.flush():
                yield piece

    def _token_ids(self) -> Iterator[int]:
        sampling = self._sampling
        raise NotImplementedError(generate, sampling)

    def _count(self, tokens: int) -> None:
        first = self.usage.time_to_first_token_ms
        if first is None:
            first = round((time.monotonic() - self._begun) * 1000, 3)
        self.usage = replace(self.usage, completion_tokens=tokens, time_to_first_token_ms=first)


def _snippet(text: str) -> str:
    """The start of a passage, cut at a word."""
    if len(text) <= SNIPPET_CHARACTERS:
        return text
    return text[:SNIPPET_CHARACTERS].rsplit(" ", 1)[0] + " …"


__all__ = ["Any", "BadRequest", "Citation", "Engine", "Generation", "Message", "Passage", "Sampling", "Usage"]
