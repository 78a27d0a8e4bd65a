"""Who may use the model: one request at a time, a short queue, a deadline for each.

A request gets a `Ticket` when its turn has come; all its work runs on the model's one thread, so that
nothing ever runs beside it, and the ticket gives the turn to the next one whatever happens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from starlette.requests import Request

from refrag_platform.serving.errors import ApiError

if TYPE_CHECKING:
    from refrag_platform.serving.engine import Generation

P = ParamSpec("P")
T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection before it was answered."""


class Admission:
    """The queue before the model."""

    def __init__(self, max_waiting: int, deadline: float) -> None:
        self.max_waiting, self.deadline = max_waiting, deadline
        self._turn = asyncio.Lock()
        self._inside = 0
        self._seconds = 1.0  # what a request has taken of late, for Retry-After
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def enter(self, request: Request) -> Ticket:
        """Wait for the model.

        Raises:
            ApiError: 429 when the queue is full, 504 when the deadline passes first.
            ClientGone: the client went away.
        """
        if self._inside > self.max_waiting:
            seconds = max(1, round(self._seconds * self._inside))
            raise ApiError(
                429,
                f"{self._inside} requests are being answered or wait already; try again in about {seconds} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(seconds)},
            )
        self._inside += 1
        ticket = Ticket(self, request)
        turn = asyncio.ensure_future(self._turn.acquire())
        try:
            await ticket.until_deadline(turn)
        except BaseException:
            self._inside -= 1
            if turn.done() and not turn.cancelled():
                self._turn.release()
            raise
        ticket.begun = time.monotonic()
        return ticket

    def leave(self, seconds: float) -> None:
        """The model is free again."""
        self._inside -= 1
        self._seconds = 0.7 * self._seconds + 0.3 * seconds
        self._turn.release()

    def submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Run on the model's thread."""
        return asyncio.get_running_loop().run_in_executor(self._thread, work)


class Ticket:
    """One request's turn at the model."""

    def __init__(self, admission: Admission, request: Request) -> None:
        self._admission, self._request = admission, request
        self._ends = asyncio.get_running_loop().time() + admission.deadline
        self._generation: Generation | None = None
        self._left = False
        self.begun = time.monotonic()

    async def __aenter__(self) -> Ticket:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    async def run(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """The result of `work` on the model's thread.

        Raises:
            ApiError: 504 when the deadline passes first.
            ClientGone: the client went away.
        """
        return await self.until_deadline(self._admission.submit(lambda: work(*arguments, **named)))

    async def iterate(self, generation: Generation) -> AsyncIterator[str]:
        """The pieces of an answer, one by one."""
        self._generation = generation
        pieces = iter(generation)
        while (piece := await self.run(next, pieces, None)) is not None:
            yield piece

    def leave(self) -> None:
        """Give the turn on; what still runs on the model's thread ends first. May be called twice."""
        if self._left:
            return
        self._left = True
        if self._generation is not None:
            # Runs behind the step in progress and before the next request's first: the thread is one.
            self._admission.submit(self._generation.close)
        self._admission.leave(time.monotonic() - self.begun)

    async def until_deadline(self, waited: Awaitable[T]) -> T:
        """Await something, but no longer than the deadline and the client's patience."""
        task = asyncio.ensure_future(waited)
        gone = asyncio.ensure_future(self._disconnected())
        try:
            left = self._ends - asyncio.get_running_loop().time()
            await asyncio.wait({task, gone}, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientGone
            raise ApiError(
                504,
                f"not answered within {self._admission.deadline:g} s, waiting included",
                code="deadline_exceeded",
                headers={"Retry-After": "1"},
            )
        finally:
            task.cancel()
            gone.cancel()

    async def _disconnected(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
