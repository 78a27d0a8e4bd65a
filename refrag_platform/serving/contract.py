"""What passes between the engine and those who ask it. Imports no torch: the API's process starts with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from refrag_platform.decoding.settings import Sampling as Sampling
from refrag_platform.errors import RefragError

if TYPE_CHECKING:
    from torch import Tensor


class BadRequest(RefragError):
    """A question that this model can't take; `code` and `param` are those of OpenAI's error shape."""

    def __init__(self, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


class ClientGone(Exception):
    """The client closed its connection before it was answered."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    is_result: a tool's result, which the decoder reads as the user's, and nobody asked.
    """

    role: Literal["system", "user", "assistant"]
    content: str
    is_result: bool = False


@dataclass(frozen=True)
class ServedPassage:
    """A passage to read. The store's bring token_ids [n, k] and vectors [n, dim]; others are encoded.

    score: its cosine similarity to the question that brought it (store/ranking.py); None of what a client sent.
    follows: what was said before the question makes it nearer.
    """

    id: str
    title: str
    text: str
    score: float | None = None
    token_ids: Tensor | None = None
    vectors: Tensor | None = None
    follows: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """A drawn token as text, its log-probability, and the likeliest tokens in its place, best first."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Delta:
    """What is new in a choice: text, the log-probabilities of the tokens drawn since (if asked for), its end.

    Text may come later than its tokens: it waits for whole characters and for what may be a stop string.
    """

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: Literal["stop", "length"] | None = None


@dataclass(frozen=True)
class ChunkRead:
    """A chunk of a passage that was read: kept as its tokens, or compressed to a vector.

    start, end: its characters in the passage's text; both 0 where it lies in the title. score: the policy's, by which
    the highest are kept; None where there was nothing to choose (p = 0 or 1, or too few chunks).
    """

    start: int
    end: int
    score: float | None
    kept: bool


@dataclass(frozen=True)
class Citation:
    """A passage, as the answer names it.

    score: its cosine similarity to the question, -1 to 1, if it was looked up. text: its beginning. selection: its
    chunks in order; empty where it wasn't read.
    """

    id: str
    title: str
    score: float | None
    text: str
    chunks: int
    chunks_expanded: int
    selection: list[ChunkRead]


@dataclass(frozen=True)
class Sources:
    """What an answer rests on.

    citations: the passages that the policy kept chunks of; all that were read, where it kept none at all (p = 0).
    retrieved: the others: they were read as vectors alone, or not at all, if there is no answer.
    answered: False where the store was asked and what it found is too far from the question.
    similarity: the nearest passage's score; None where nothing was looked up. least_similarity: what an answer needs.
    """

    citations: list[Citation]
    retrieved: list[Citation]
    answered: bool = True
    similarity: float | None = None
    least_similarity: float | None = None


@dataclass(frozen=True)
class Seconds:
    """What an answer's parts took, in seconds; None: not done, or not yet.

    retrieve: the search. select: cutting, encoding what came without vectors, the policy's choice. project: vectors to
    the decoder's input (on a GPU its launch; the arithmetic is awaited by the prefill). prefill: from the decoder's
    queue to the first token.
    """

    retrieve: float | None = None
    select: float | None = None
    project: float | None = None
    prefill: float | None = None


@dataclass(frozen=True)
class Usage:
    """What an answer cost. `prompt_positions` is what the decoder read, `plain_prompt_tokens` what it would
    have read without compression; `compression_rate` is the second over the first.
    `positions_reused` of the prompt's came from an earlier prompt that began alike. `rate`: the encoder's chunks in a
    chunk of the prompt."""

    prompt_positions: int
    positions_reused: int
    plain_prompt_tokens: int
    completion_tokens: int
    chunks: int
    chunks_expanded: int
    share_kept: float
    rate: int
    compression_rate: float
    time_to_first_token_ms: float | None
    seconds: Seconds
