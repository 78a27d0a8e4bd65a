"""What a request's caller reads: its events as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
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

    def __iter__(self) -> Iterator[Event]:
        """Until every choice has ended, or the stream is cancelled.

        Raises:
            SchemaError: the answer can't follow its schema any further.
            RefragError: the request failed; its cause is chained.
        """
        while self._open and not self.cancelled:
            event = self._events.get()
            if event is None:
                return
            if isinstance(event, SchemaError):
                raise event
            if isinstance(event, Exception):
                raise RefragError(f"the answer failed: {event}") from event
            if event.choice not in self._open:
                continue
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
        self._events.put(None)
        self._wake()

    def put(self, event: Event | Exception) -> None:
        """Called by the scheduler."""
        self._events.put(event)
