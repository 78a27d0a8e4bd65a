"""What a request's caller reads: its events as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Literal

from refrag_platform.decoding.grammar import SchemaError
from refrag_platform.decoding.sampling import Token
from refrag_platform.errors import RefragError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Event:
    """A token of a choice, or the choice's end: "stop" after a stop id (which is no token) or once the JSON of
    a schema is whole, "length" at max_tokens.

    at: when, in seconds of time.monotonic; a reader may come later.
    """

    choice: int
    token: Token | None = None
    finish_reason: FinishReason | None = None
    at: float = field(default_factory=time.monotonic, compare=False)


class Stream:
    """The events of one request as they come; for one reader. `cancel` and `stop` may be called by any thread.

    reused: prompt positions that a kept prefix saved reading, known with the first event.
    """

    def __init__(self, choices: int, wake: Callable[[], None]) -> None:
        self._wake = wake
        self.reused = 0
        self._events: SimpleQueue[Event | Exception | None] = SimpleQueue()
        self._open = set(range(choices))
        self.stopped: set[int] = set()
        self.cancelled = False
        self._tell: Callable[[], None] | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will be read of it."""
        return self.cancelled or not self._open

    def __iter__(self) -> Iterator[Event]:
        """Until every choice has ended, or the stream is cancelled.

        Raises:
            SchemaError: the answer can't follow its schema any further.
            RefragError: the request failed; its cause is chained.
        """
        while not self.ended:
            yield from self._read(self._events.get())

    def arrived(self) -> Iterator[Event]:
        """What has come by now, without waiting.

        Raises: as when it is iterated.
        """
        while not self.ended:
            try:
                came = self._events.get_nowait()
            except Empty:
                return
            yield from self._read(came)

    def listen(self, tell: Callable[[], None]) -> None:
        """Have `tell` called whenever something has come, by the thread that put it there, and once now."""
        self._tell = tell
        tell()

    def _read(self, event: Event | Exception | None) -> Iterator[Event]:
        if isinstance(event, SchemaError):
            raise event
        if isinstance(event, Exception):
            raise RefragError(f"the answer failed: {event}") from event
        if event is None or event.choice not in self._open:
            return
        if event.finish_reason is not None:
            self._open.discard(event.choice)
        yield event

    def stop(self, choice: int) -> None:
        """No more of this choice; what it holds is freed before the next step."""
        self._open.discard(choice)
        self.stopped.add(choice)
        self._wake()

    def cancel(self) -> None:
        """No more at all; a reader that waits returns, and what the request holds is freed before the next step."""
        self.cancelled = True
        self.put(None)
        self._wake()

    def put(self, event: Event | Exception | None) -> None:
        """Called by the scheduler; None only wakes the reader."""
        self._events.put(event)
        if self._tell is not None:
            self._tell()
