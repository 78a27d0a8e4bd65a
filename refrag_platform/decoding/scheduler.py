"""Continuous batching: requests are admitted and freed between the decoder's steps.

    with Scheduler(runner, prefix) as scheduler:
        stream = scheduler.submit(prompt_input(model, prompt), Sampling(max_tokens=64), stop_ids)
        for event in stream: ...

One thread runs the decoder. Each of its steps prefills at most `prefill_positions` of admitted prompts, then decodes a
token for every running choice, so that a long prompt delays the others by one such piece at a time.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from types import TracebackType

import torch

from refrag_platform.decoding.grammar import Matcher, SchemaError
from refrag_platform.decoding.prefix import PrefixCache
from refrag_platform.decoding.prompts import PromptInput, require_positions
from refrag_platform.decoding.runner import DecoderRunner
from refrag_platform.decoding.sampling import Sampler, Token, pick_batch
from refrag_platform.decoding.settings import Sampling
from refrag_platform.decoding.stream import Event, Stream
from refrag_platform.errors import RefragError

logger = logging.getLogger("refrag.decoding")

# A prompt is prefilled in larger pieces while nobody waits for a token: a GPU does more with them.
ALONE = 4


@dataclass(eq=False)
class _Choice:
    """A sequence that is being decoded: its slot holds `positions` positions, `last` is to follow."""

    request: _Request
    number: int
    slot: int
    sampler: Sampler
    positions: int = 0
    drawn: int = 0
    last: int = 0


@dataclass(eq=False)
class _Request:
    prompt: PromptInput
    sampling: Sampling
    stop_ids: frozenset[int]
    stream: Stream
    matcher: Matcher | None
    keys: list[bytes] = field(default_factory=list)
    choices: list[_Choice] = field(default_factory=list)  # those that hold a slot
    prefilled: int = 0

    @property
    def tokens(self) -> int:
        """Positions that the request may come to hold."""
        return self.sampling.n * (len(self.prompt.embeds) + self.sampling.max_tokens)


@dataclass(frozen=True)
class Load:
    """What a scheduler has to do, and holds.

    running, waiting: requests with and without slots. positions: of prompts and answers, in the cache now, of
    `most_positions`. kept_positions: of prompts' beginnings, kept for later ones. bytes_per_position: of keys and
    values.
    """

    running: int
    waiting: int
    positions: int
    most_positions: int
    kept_positions: int
    bytes_per_position: int


class Scheduler:
    """Requests in order of arrival; each waits until its slots are free and its tokens fit the cap."""

    def __init__(
        self,
        runner: DecoderRunner,
        prefix: PrefixCache | None = None,
        *,
        prefill_positions: int = 512,
        max_tokens_in_flight: int | None = None,
    ) -> None:
        """Start the thread.

        Args:
            prefix: where beginnings of prompts are kept. prefill_positions: prefilled in one step at most.
            max_tokens_in_flight: prompt positions and tokens to come of all running requests; default as many as
                the cache holds.
        """
        self.runner, self.prefix = runner, prefix
        self.prefill_positions = prefill_positions
        self.max_tokens_in_flight = max_tokens_in_flight or runner.max_batch * runner.max_positions
        self._changed = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._prefilling: deque[_Request] = deque()
        self._decoding: list[_Choice] = []
        self._free_slots = set(range(runner.max_batch))
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="decoder", daemon=True)
        self._thread.start()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether requests can be taken: neither closed nor ended by a fault, of the device say."""
        return not self._closed

    def load(self) -> Load:
        """As it is now; any thread may ask, between two steps or within one."""
        prefilling, decoding = list(self._prefilling), list(self._decoding)
        runner, prefix = self.runner, self.prefix
        return Load(
            running=len({*prefilling, *(choice.request for choice in decoding)}),
            waiting=len(self._waiting),
            positions=sum(one.prefilled for one in prefilling) + sum(choice.positions for choice in decoding),
            most_positions=runner.max_batch * runner.max_positions,
            kept_positions=len(prefix) * prefix.block if prefix is not None else 0,
            bytes_per_position=runner.kv_bytes_per_position,
        )

    def memory(self) -> str:
        """What keys and values take, for a log."""
        runner, prefix = self.runner, self.prefix
        kept = prefix.max_blocks * prefix.block if prefix is not None else 0
        held, most = (n * runner.kv_bytes_per_position / 2**30 for n in (runner.max_batch * runner.max_positions, kept))
        # Memory of a CPU is taken as positions are first used, and kept.
        taken = "at once" if runner.device.type == "cuda" else "as they are first used"
        return (
            f"keys and values of {runner.max_batch} slots of {runner.max_positions:,} positions take {held:.2f} GiB, "
            f"{taken}; those of prompts' beginnings up to {most:.2f} GiB"
        )

    def submit(
        self,
        prompt: PromptInput,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        cache_salt: str = "",
        matcher: Matcher | None = None,
    ) -> Stream:
        """Queue a request; any thread may.

        Args:
            cache_salt: it uses the beginnings that prompts of the same one left, and no others.
            matcher: of `sampling.schema`, at the beginning of an answer; each choice goes on with a copy.

        Raises:
            RefragError: it could never run, whatever else does, or the scheduler is closed.
        """
        request = _Request(prompt, sampling, frozenset(stop_ids), Stream(sampling.n, self.wake), matcher)
        require_positions(prompt, sampling, self.runner.max_positions)
        if sampling.n > self.runner.max_batch or request.tokens > self.max_tokens_in_flight:
            raise RefragError(
                f"{sampling.n} choices of {len(prompt.embeds) + sampling.max_tokens} positions can't run here: there "
                f"are {self.runner.max_batch} slots for {self.max_tokens_in_flight} tokens in flight"
            )
        if self.prefix is not None:
            request.keys = self.prefix.keys(prompt.content, cache_salt)
        with self._changed:
            if self._closed:
                raise RefragError("the decoder has been shut down")
            self._waiting.append(request)
            self._changed.notify()
        return request.stream

    def wake(self) -> None:
        """Look at the requests again: one was cancelled or stopped."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """End the thread after its step; open streams fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @torch.inference_mode()
    def _work(self) -> None:
        error: Exception = RefragError("the decoder has been shut down")
        try:
            while self._next_step():
                self._prefill()
                self._decode()
        except Exception as unexpected:
            logger.exception("the decoder's thread ended")
            error = unexpected
        with self._changed:
            self._closed = True
        for request in {*self._waiting, *self._prefilling, *(choice.request for choice in self._decoding)}:
            request.stream.put(error)

    def _next_step(self) -> bool:
        """Wait until there is something to do; free what was cancelled, admit what waits. False once it's all over."""
        with self._changed:
            self._drop_cancelled()
            while not (self._closed or self._waiting or self._prefilling or self._decoding):
                self._changed.wait()
                self._drop_cancelled()
            self._admit()
            return not self._closed

    def _drop_cancelled(self) -> None:
        for queue in (self._waiting, self._prefilling):
            for request in [request for request in queue if request.stream.cancelled]:
                queue.remove(request)
                if request.prefilled:
                    # Nobody has looked yet whether what was prefilled so far is NaN.
                    self.runner.cache.clear(request.choices[0].slot)
                self._free(*request.choices)
        for choice in list(self._decoding):
            stream = choice.request.stream
            if stream.cancelled or choice.number in stream.stopped:
                self._free(choice)

    def _admit(self) -> None:
        """Give slots to those who wait, the first first: none is overtaken for ever by smaller ones."""
        in_flight = sum(
            request.tokens for request in {*self._prefilling, *(choice.request for choice in self._decoding)}
        )
        while self._waiting:
            request = self._waiting[0]
            in_flight += request.tokens
            if request.sampling.n > len(self._free_slots) or in_flight > self.max_tokens_in_flight:
                return
            # The lowest slots: a padded step computes every slot below the highest in use.
            for number, slot in enumerate(sorted(self._free_slots)[: request.sampling.n]):
                self._free_slots.remove(slot)
                matcher = request.matcher.copy() if request.matcher is not None else None
                request.choices.append(_Choice(request, number, slot, Sampler(request.sampling, number, matcher)))
            self._prefilling.append(self._waiting.popleft())

    def _prefill(self) -> None:
        """One step's positions of the admitted prompts, the first first."""
        prefilled = 0
        while self._prefilling and prefilled < (most := self.prefill_positions * (1 if self._decoding else ALONE)):
            request = self._prefilling[0]
            try:
                prefilled += self._prefill_some(request, most - prefilled)
            except torch.AcceleratorError:
                raise
            except Exception as error:
                self._prefilling.popleft()
                self._fail([request], error)
                continue
            if request.prefilled == len(request.prompt.embeds):
                self._prefilling.popleft()

    def _prefill_some(self, request: _Request, most: int) -> int:
        """Go on in a prompt; draw the first token of each choice at its end. Returns the positions prefilled."""
        slot, cache = request.choices[0].slot, self.runner.cache
        found = self.prefix.find(request.keys) if self.prefix is not None and request.prefilled == 0 else None
        if found is not None:
            cache.write(slot, 0, found)
            request.prefilled = request.stream.reused = found.shape[3]
        piece = request.prompt.embeds[request.prefilled : request.prefilled + most]
        logits = self.runner.prefill(piece, slot, request.prefilled)
        request.prefilled += len(piece)
        if request.prefilled == len(request.prompt.embeds):
            self._decoding += request.choices
            for choice in request.choices:
                choice.positions = request.prefilled
                if choice.slot != slot:
                    cache.copy(slot, choice.slot, request.prefilled)
            tokens = pick_batch([choice.sampler for choice in request.choices], logits.expand(request.sampling.n, -1))
            for choice, token in zip(list(request.choices), tokens, strict=True):
                if isinstance(token, Exception):
                    raise token
                self._append(choice, token)
            if self.prefix is not None:
                self.prefix.keep(request.keys, lambda begin, end: cache.read(slot, begin, end))
        return len(piece)

    def _decode(self) -> None:
        """One token more for every running choice."""
        batch = sorted(self._decoding, key=lambda choice: choice.slot)
        if not batch:
            return
        try:
            logits = self.runner.decode(
                [choice.last for choice in batch],
                [choice.slot for choice in batch],
                [choice.positions for choice in batch],
            )
            tokens = pick_batch([choice.sampler for choice in batch], logits)
        except torch.AcceleratorError:
            # No call on the device works after it: better to end, and be started anew, than to fail request by request.
            raise
        except Exception as error:
            self._fail({choice.request for choice in batch}, error)
            return
        for choice, token in zip(batch, tokens, strict=True):
            if isinstance(token, Exception):
                # Unless another choice of the same request has failed already.
                if choice in choice.request.choices:
                    self._fail([choice.request], token)
            elif choice in choice.request.choices:
                choice.positions += 1
                self._append(choice, token)

    def _append(self, choice: _Choice, token: Token) -> None:
        """Give a choice its next token; one that ends it frees it."""
        stream, most = choice.request.stream, choice.request.sampling.max_tokens
        if token.id in choice.request.stop_ids:
            stream.put(Event(choice.number, finish_reason="stop"))
            self._free(choice)
            return
        choice.drawn, choice.last = choice.drawn + 1, token.id
        stream.put(Event(choice.number, token))
        if choice.sampler.whole or choice.drawn == most:
            stream.put(Event(choice.number, finish_reason="stop" if choice.sampler.whole else "length"))
            self._free(choice)

    def _free(self, *choices: _Choice) -> None:
        """Free what the choices hold."""
        for choice in choices:
            choice.request.choices.remove(choice)
            self._free_slots.add(choice.slot)
        self._decoding = [choice for choice in self._decoding if choice not in choices]

    def _fail(self, requests: Iterable[_Request], error: Exception) -> None:
        """The requests' callers get the error; the others go on."""
        if not isinstance(error, SchemaError):  # which is the client's fault, who is told
            logger.error("the decoder failed", exc_info=error)
        for request in requests:
            request.stream.put(error)
            for choice in request.choices:
                self.runner.cache.clear(choice.slot)
            self._free(*request.choices)
