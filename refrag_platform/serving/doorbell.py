"""Other threads' news for an event loop: it is woken once for all that came since it last looked."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable


class Doorbell:
    """Runs on its loop what other threads hand in.

    A decoder's step has a token for each of its answers. To wake the loop is a system call: it is woken anew only once
    it has looked, so mostly once a step.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._rung = False

    def ring(self, call: Callable[[], None]) -> None:
        """Let the loop run `call` soon; any thread may."""
        self._calls.append(call)
        # Set before the loop looks, and looked at after a call lies there: none is left lying.
        if not self._rung:
            self._rung = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                self.loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._rung = False
        while self._calls:
            self._calls.popleft()()
