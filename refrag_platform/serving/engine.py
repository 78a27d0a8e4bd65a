"""Answers questions with one model: retrieval, policy, prompt, generation.

    engine = Engine.load(project, "tiny")
    generation = engine.start([Message("user", question)], engine.retrieve(question, 4))
    print(*generation, sep="")
    generation.citations, generation.usage

It knows nothing of HTTP; `refrag ask QUESTION` uses it as it is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from refrag_platform.model.generate import generate
from refrag_platform.model.loading import Bundle, load_bundle
from refrag_platform.model.prompts import Turn, passage_chunks, rag_prompt, stop_ids
from refrag_platform.model.segments import Chunks, Prompt, plain_tokens, prompt_length
from refrag_platform.model.selection import expand
from refrag_platform.project import Project
from refrag_platform.recipes import ServingRecipe
from refrag_platform.serving.contract import BadRequest, Citation, Message, Passage, Sampling, Usage
from refrag_platform.serving.text import Detokenizer, StopStrings
from refrag_platform.store.retriever import load_retriever
from refrag_platform.store.table import ChunkStore, Hit

SNIPPET_CHARACTERS = 240


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
        return cls.open(
            model,
            project.content("finetuned", model),
            project.content("chunks", model),
            project.recipe(model).serving,
            base=project.recipe_path(model).parent,
        )

    @classmethod
    def open(
        cls,
        name: str,
        model_dir: Path,
        chunks_dir: Path,
        settings: ServingRecipe,
        tables: Path | None = None,
        base: Path | None = None,
        retriever: str | None = None,
    ) -> Engine:
        """The model and the store in two content folders.

        Args:
            tables: where the store's search tables lie. base: folder of the recipe, for `path:` sources.
            retriever: source of the retriever, if it is no longer where the store says.

        Raises:
            RefragError: either is damaged, or the store was made by another encoder.
        """
        bundle = load_bundle(str(model_dir))
        store = ChunkStore.open(
            chunks_dir,
            expect_encoder=bundle.model.encoder_digest(),
            tables=tables,
            base=base,
            retriever=load_retriever(retriever, base or model_dir) if retriever else None,
        )
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
        return [_passage(hit) for hit in self.store.search(query, count)]

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
        chunks = self._expand(passages, share)
        history = [Turn(role=message.role, content=message.content) for message in messages[:-1]]
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

    def _expand(self, passages: Sequence[Passage], share: float) -> list[Chunks]:
        """The passages as chunks, the share that the policy scores highest kept as tokens (appendix A.1)."""
        if self.bundle.policy is None and passages and share not in (0, 1):
            raise BadRequest(
                f"share_kept is {share}, but {self.name} has no policy to choose with; use 0 or 1",
                param="share_kept",
            )
        with self._model_free:
            chunks = [self._chunks(passage) for passage in passages]
            return expand(self.bundle.model, chunks, share, self.bundle.policy) if chunks else []

    @torch.no_grad()
    def _chunks(self, passage: Passage) -> Chunks:
        """A passage as chunks with vectors: from the store, or encoded now."""
        if passage.token_ids is not None and passage.vectors is not None:
            return Chunks(passage.token_ids, vectors=passage.vectors.float())
        model = self.bundle.model
        chunks = passage_chunks(model.tokenizer, passage.title, passage.text, model.chunk_size)
        # On the CPU and in one type, so that they can stand beside vectors of the store.
        return Chunks(chunks.token_ids, vectors=model.encode(chunks.token_ids).float().cpu())

    def _check_length(self, prompt: Prompt, max_tokens: int) -> None:
        positions, limit = prompt_length(prompt), self.settings.max_prompt_positions
        if positions > limit:
            raise BadRequest(
                f"the prompt takes {positions} decoder positions, the limit of {self.name} is {limit}; "
                "send fewer or shorter passages or messages, or a lower share_kept",
                code="context_length_exceeded",
                param="messages",
            )
        window = self.bundle.model.decoder.config.max_position_embeddings
        if positions + max_tokens > window:
            raise BadRequest(
                f"the prompt takes {positions} decoder positions and max_tokens asks for {max_tokens} more, "
                f"the decoder's window is {window}; lower max_tokens or shorten the prompt",
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
        sampling = self._sampling
        text, stops = Detokenizer(self._decode), StopStrings(sampling.stop)
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
        sampling, model = self._sampling, self._engine.bundle.model
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        return generate(
            model,
            self._prompt,
            sampling.max_tokens,
            stop_ids(model.tokenizer),
            sampling.temperature,
            sampling.top_p,
            generator,
        )

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._engine.bundle.model.tokenizer.decode(token_ids, skip_special_tokens=True))

    def _count(self, tokens: int) -> None:
        first = self.usage.time_to_first_token_ms
        if first is None:
            first = round((time.monotonic() - self._begun) * 1000, 3)
        self.usage = replace(self.usage, completion_tokens=tokens, time_to_first_token_ms=first)


def _passage(hit: Hit) -> Passage:
    token_ids, vectors = torch.from_numpy(hit.token_ids.astype("int64")), torch.from_numpy(hit.vectors.copy())
    return Passage(hit.id, hit.title, hit.text, float(hit.score), token_ids, vectors)


def _snippet(text: str) -> str:
    """The start of a passage, cut at a word."""
    if len(text) <= SNIPPET_CHARACTERS:
        return text
    return text[:SNIPPET_CHARACTERS].rsplit(" ", 1)[0] + " …"
