"""OpenAI's bodies around one generation: a chat.completion, or the events of a streamed one."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from refrag_platform.serving.contract import Delta, Sources, TokenLogprob, Usage
from refrag_platform.serving.text import REPLACEMENT

if TYPE_CHECKING:
    from refrag_platform.serving.generation import Generation, Refusal


class Answer:
    """The bodies of one answer with `choices` choices.

    logprobs: whether their field is filled. usage: whether a stream ends with one. request_id: of the request.
    """

    def __init__(
        self,
        model: str,
        generation: Generation | Refusal,
        choices: int = 1,
        *,
        logprobs: bool = False,
        usage: bool = False,
        request_id: str | None = None,
    ) -> None:
        self._generation, self._choices, self._logprobs = generation, choices, logprobs
        self._usage, self._request_id = usage, request_id
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        """A chat.completion with its usage and the `refrag` field."""
        texts = [""] * self._choices
        reasons: list[str | None] = [None] * self._choices
        tokens: list[list[TokenLogprob]] = [[] for _ in range(self._choices)]
        for delta in deltas:
            texts[delta.choice] += delta.text
            tokens[delta.choice] += delta.logprobs
            reasons[delta.choice] = delta.finish_reason or reasons[delta.choice]
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": texts[number]},
                "finish_reason": reasons[number],
                "logprobs": self._logprobs_body(tokens[number]),
            }
            for number in range(self._choices)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, **self._usage_field(), **self._tail()}

    async def events(self, first: Delta | None, deltas: AsyncIterator[Delta]) -> AsyncIterator[str]:
        """Server-sent chat.completion.chunk events; the last choice's last one bears the `refrag` field.

        Usage comes in a chunk of its own after it, if it was asked for, as in OpenAI's API.
        """
        for number in range(self._choices):
            yield self._event(number, {"role": "assistant", "content": ""})
        left = self._choices
        delta = first
        while delta is not None:
            if delta.text or delta.logprobs:
                yield self._event(delta.choice, {"content": delta.text}, delta.logprobs)
            if delta.finish_reason is not None:
                left -= 1
                yield self._event(delta.choice, {}, (), delta.finish_reason, None if left else self._tail())
            delta = await anext(deltas, None)
        if self._usage:
            yield self._data({"choices": [], **self._usage_field()})
        yield "data: [DONE]\n\n"

    def _event(
        self,
        choice: int,
        delta: dict[str, str],
        logprobs: tuple[TokenLogprob, ...] = (),
        reason: str | None = None,
        tail: dict[str, Any] | None = None,
    ) -> str:
        tokens = self._logprobs_body(logprobs) if logprobs else None
        body = {"index": choice, "delta": delta, "finish_reason": reason, "logprobs": tokens}
        return self._data({"choices": [body], **(tail or {})})

    def _data(self, fields: dict[str, Any]) -> str:
        """An event. In ASCII: a client may take U+2028, U+2029 or U+0085 for the end of a line."""
        return f"data: {json.dumps({**self._head, 'object': 'chat.completion.chunk', **fields})}\n\n"

    def _logprobs_body(self, tokens: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            {
                **_token_body(token.text, token.logprob),
                "top_logprobs": [_token_body(text, logprob) for text, logprob in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _tail(self) -> dict[str, Any]:
        read = refrag_body(self._generation.usage, self._generation.sources)
        return {"refrag": {**read, "request_id": self._request_id}}

    def _usage_field(self) -> dict[str, Any]:
        return {"usage": usage_body(self._generation.usage)}


def _token_body(text: str, logprob: float) -> dict[str, Any]:
    # Part of a character has no text of its own, and its bytes are not to be had from a tokenizer of any kind.
    spelled = None if REPLACEMENT in text else list(text.encode())
    # JSON has no infinity; OpenAI's API writes this for tokens that can't come.
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": spelled}


def usage_body(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage: prompt tokens are the positions that the decoder read."""
    return {
        "prompt_tokens": usage.prompt_positions,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_positions + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.positions_reused},
    }


def refrag_body(usage: Usage, sources: Sources) -> dict[str, Any]:
    """The `refrag` field: what was read, how far it was compressed, how soon the first token came."""
    return {**asdict(sources), **asdict(usage)}
