"""What passes between the engine and those who ask it. Imports no torch: the API's process starts with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from refrag_platform.errors import RefragError

if TYPE_CHECKING:
    from torch import Tensor


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
    """A passage to read. The store's bring token_ids [n, k] and vectors [n, dim]; others are encoded."""

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
