"""One answer, or several choices of it, as text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from transformers import PreTrainedTokenizerFast

from refrag_platform.decoding.sampling import Token
from refrag_platform.decoding.stream import Event, Stream
from refrag_platform.model.segments import Prompt, compression_rate, plain_tokens, prompt_length
from refrag_platform.serving.contract import Citation, Delta, Sampling, Seconds, Sources, TokenLogprob, Usage
from refrag_platform.serving.text import Detokenizer, StopStrings

# In the words by which evaluation knows that an answer says there is none.
NOTHING_FOUND = "The documents here do not say anything about this."


class Generation:
    """Iterate `deltas` (or, of a single choice, the generation itself, for its text); then read `usage`.

    The decoder is asked at the first delta. `close` may be called by any thread, at any time.

    parts: begin and end of each part of the answer that has ended, as `Seconds` names them. token_times: when each
    token of each choice was drawn. Both in seconds of time.monotonic.
    """

    def __init__(
        self,
        submit: Callable[[], Stream],
        tokenizer: PreTrainedTokenizerFast,
        token_text: Callable[[int], str],
        sampling: Sampling,
        sources: Sources,
        usage: Usage,
        begun: float,
        explain: Callable[[], Sources],
    ) -> None:
        """token_text: a token as log-probabilities name it. explain: the sources with each passage's `selection`; asked
        while the decoder reads the prompt.
        """
        self.sources, self.usage, self._explain = sources, usage, explain
        self.finish_reason: Literal["stop", "length"] | None = None  # of the choice that ended last
        self._submit, self._token_text, self._begun = submit, token_text, begun

        def decode(token_ids: list[int]) -> str:
            return str(tokenizer.decode(token_ids, skip_special_tokens=True))

        self._choices = [(Detokenizer(decode), StopStrings(sampling.stop)) for _ in range(sampling.n)]
        self._stream: Stream | None = None
        self._submitted = begun
        self._closed = False
        self.parts: dict[str, tuple[float, float]] = {}
        self.token_times: list[list[float]] = [[] for _ in range(sampling.n)]

    def __iter__(self) -> Iterator[str]:
        return (delta.text for delta in self.deltas() if delta.text)

    def add_part(self, name: str, begun: float, ended: float) -> None:
        """Tell when a part of the answer began and ended; name: a field of `Seconds`."""
        self.parts[name] = (begun, ended)
        self.usage = replace(self.usage, seconds=replace(self.usage.seconds, **{name: round(ended - begun, 6)}))

    def close(self) -> None:
        """Say no more and free what the answer holds; harmless when all has been said."""
        self._closed = True
        if self._stream is not None:
            self._stream.cancel()

    def deltas(self) -> Iterator[Delta]:
        """What is new, choice by choice as it comes; each choice's last delta has its finish_reason.

        Raises:
            RefragError: the decoder failed.
        """
        stream = self.begin()
        try:
            for event in stream:
                if (delta := self.take(event)) is not None:
                    yield delta
        finally:
            stream.cancel()

    def begin(self) -> Stream:
        """Ask the decoder, and say of what the answer is made while it reads the prompt: `take` what it writes."""
        self._submitted = time.monotonic()
        self._stream = stream = self._submit()
        if self._closed:
            stream.cancel()
        try:
            told = self._explain()
        except BaseException:
            stream.cancel()
            raise
        self.sources = replace(self.sources, citations=told.citations, retrieved=told.retrieved)
        return stream

    def take(self, event: Event) -> Delta | None:
        """What an event of the stream adds to the answer, if it does: texts of a token and of those in its place."""
        assert self._stream is not None
        text, stops = self._choices[event.choice]
        if event.token is None:
            self.finish_reason = event.finish_reason
            return Delta(event.choice, stops.flush(), finish_reason=event.finish_reason)
        self._count(event.choice, event.at, self._submitted, self._stream.reused)
        piece, logprobs = stops.push(text.push(event.token.id)), self._logprobs(event.token)
        if stops.stopped:
            self._stream.stop(event.choice)
            self.finish_reason = "stop"
            return Delta(event.choice, piece, logprobs, "stop")
        return Delta(event.choice, piece, logprobs) if piece or logprobs else None

    def _count(self, choice: int, drawn: float, submitted: float, reused: int) -> None:
        self.token_times[choice].append(drawn)
        first = self.usage.time_to_first_token_ms
        if first is None:
            self.add_part("prefill", submitted, drawn)
            first = round((drawn - self._begun) * 1000, 3)
        self.usage = replace(
            self.usage,
            completion_tokens=self.usage.completion_tokens + 1,
            positions_reused=reused,
            time_to_first_token_ms=first,
        )

    def _logprobs(self, token: Token) -> tuple[TokenLogprob, ...]:
        if token.logprob is None:
            return ()
        top = tuple((self._token_text(one), logprob) for one, logprob in token.top)
        return (TokenLogprob(self._token_text(token.id), token.logprob, top),)


class Refusal:
    """In place of a generation, where the store holds nothing about the question: one sentence, no decoder asked."""

    finish_reason: Literal["stop"] = "stop"

    def __init__(
        self, sources: Sources, share_kept: float, rate: int, searched: tuple[float, float], choices: int
    ) -> None:
        """sources: passages that were found, and are not read. searched: when the search began and ended."""
        self.sources, self._choices, self.parts = sources, choices, {"retrieve": searched}
        seconds = Seconds(retrieve=round(searched[1] - searched[0], 6))
        self.usage = replace(usage_of([], sources.retrieved, share_kept, rate), seconds=seconds)
        self.token_times: list[list[float]] = []

    def __iter__(self) -> Iterator[str]:
        return iter([NOTHING_FOUND])

    def close(self) -> None:
        """Nothing is held."""

    def deltas(self) -> Iterator[Delta]:
        """The sentence, as each choice's text."""
        return (Delta(choice, NOTHING_FOUND, finish_reason="stop") for choice in range(self._choices))


def usage_of(prompt: Prompt, read: Sequence[Citation], share_kept: float, rate: int) -> Usage:
    """What a prompt takes, before anything is generated. read: its passages."""
    positions, plain = prompt_length(prompt), len(plain_tokens(prompt))
    return Usage(
        prompt_positions=positions,
        positions_reused=0,
        plain_prompt_tokens=plain,
        completion_tokens=0,
        chunks=sum(one.chunks for one in read),
        chunks_expanded=sum(one.chunks_expanded for one in read),
        share_kept=share_kept,
        rate=rate,
        compression_rate=compression_rate(plain, positions),
        time_to_first_token_ms=None,
        seconds=Seconds(),
    )
