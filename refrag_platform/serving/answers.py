"""What the shapes of an answer share: chat completions, completions and responses are bodies around one generation."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from refrag_platform.serving.contract import Delta, Sources, TokenLogprob, Usage
from refrag_platform.serving.text import REPLACEMENT

if TYPE_CHECKING:
    from refrag_platform.serving.generation import Generation, Refusal
    from refrag_platform.serving.schema import AnswerRequest, ChoicesRequest


@dataclass
class PartialChoice:
    """One choice as far as it has come."""

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """Take what is new in it."""
        self.text += delta.text
        self.tokens += delta.logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason


class Answer(ABC):
    """The bodies of the answer to one request; `request_id` stands in the `refrag` field."""

    prefix: ClassVar[str]  # of the answer's id

    def __init__(self, asked: AnswerRequest, generation: Generation | Refusal, request_id: str | None) -> None:
        self._generation, self._request_id = generation, request_id
        self.id, self.created, self.model = f"{self.prefix}{uuid.uuid4().hex}", int(time.time()), asked.model

    @abstractmethod
    def whole(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        """The body of an answer that is not streamed, with usage and the `refrag` field."""

    @abstractmethod
    def events(self, first: Delta | None, deltas: AsyncIterator[Delta]) -> AsyncIterator[str]:
        """Server-sent events; the one that ends the answer bears the `refrag` field."""

    def failure(self, body: dict[str, Any]) -> str:
        """The event of a failure, whose status line is gone; body: an error's, in OpenAI's shape."""
        return event(body)

    def refrag(self) -> dict[str, Any]:
        """The `refrag` field: complete once all deltas have come."""
        return {**refrag_body(self._generation.usage, self._generation.sources), "request_id": self._request_id}


class ChoicesAnswer(Answer):
    """What chat completions and completions have in common: numbered choices, and how a stream of them goes."""

    whole_object: ClassVar[str]
    event_object: ClassVar[str]

    def __init__(self, asked: ChoicesRequest, generation: Generation | Refusal, request_id: str | None) -> None:
        super().__init__(asked, generation, request_id)
        self._choices, self._usage = asked.n or 1, asked.wants_usage

    @abstractmethod
    def whole_choice(self, choice: PartialChoice) -> dict[str, Any]:
        """A choice that has ended, without its index and finish_reason."""

    @abstractmethod
    def piece(self, delta: Delta) -> dict[str, Any]:
        """What is new in a choice, likewise."""

    def opening(self) -> dict[str, Any] | None:
        """What each choice of a stream begins with, likewise."""
        return None

    def whole(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        choices = [PartialChoice() for _ in range(self._choices)]
        for delta in deltas:
            choices[delta.choice].add(delta)
        bodies = [
            {"index": number, "finish_reason": choice.finish_reason, **self.whole_choice(choice)}
            for number, choice in enumerate(choices)
        ]
        return {**self._head(self.whole_object), "choices": bodies, **self._usage_field(), "refrag": self.refrag()}

    async def events(self, first: Delta | None, deltas: AsyncIterator[Delta]) -> AsyncIterator[str]:
        """Usage comes in a chunk of its own at the end, if it was asked for, as in OpenAI's API."""
        opening, left, delta = self.opening(), self._choices, first
        for number in range(self._choices if opening else 0):
            yield self._event({"index": number, "finish_reason": None, **(opening or {})})
        while delta is not None:
            if delta.text or delta.logprobs:
                yield self._event({"index": delta.choice, "finish_reason": None, **self.piece(delta)})
            if delta.finish_reason is not None:
                left -= 1
                ended = self.piece(Delta(delta.choice, ""))
                last = {} if left else {"refrag": self.refrag()}
                yield self._event({"index": delta.choice, "finish_reason": delta.finish_reason, **ended}, **last)
            delta = await anext(deltas, None)
        if self._usage:
            yield event({**self._head(self.event_object), "choices": [], **self._usage_field()})
        yield "data: [DONE]\n\n"

    def _event(self, choice: dict[str, Any], **fields: Any) -> str:
        return event({**self._head(self.event_object), "choices": [choice], **fields})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _usage_field(self) -> dict[str, Any]:
        """OpenAI's usage: prompt tokens are the positions that the decoder read."""
        usage = self._generation.usage
        return {
            "usage": {
                "prompt_tokens": usage.prompt_positions,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_positions + usage.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": usage.positions_reused},
            }
        }


def event(body: dict[str, Any], kind: str | None = None) -> str:
    """A server-sent event. In ASCII: a client may take U+2028, U+2029 or U+0085 for the end of a line."""
    return (f"event: {kind}\n" if kind else "") + f"data: {json.dumps(body)}\n\n"


def logprobs_body(tokens: Iterable[TokenLogprob], no_bytes: list[int] | None = None) -> list[dict[str, Any]]:
    """Drawn tokens with the likeliest in their place; no_bytes: what is said of those whose bytes aren't known."""
    return [
        {
            **_token_body(token.text, token.logprob, no_bytes),
            "top_logprobs": [_token_body(text, logprob, no_bytes) for text, logprob in token.top],
        }
        for token in tokens
    ]


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's API writes -9999 for tokens that can't come."""
    return max(logprob, -9999.0)


def _token_body(text: str, logprob: float, no_bytes: list[int] | None) -> dict[str, Any]:
    # Part of a character has no text of its own, and its bytes are not to be had from a tokenizer of any kind.
    spelled = no_bytes if REPLACEMENT in text else list(text.encode())
    return {"token": text, "logprob": finite(logprob), "bytes": spelled}


def refrag_body(usage: Usage, sources: Sources) -> dict[str, Any]:
    """The `refrag` field: what was read and why, how far it was compressed, what took how long."""
    return {**asdict(sources), **asdict(usage)}
