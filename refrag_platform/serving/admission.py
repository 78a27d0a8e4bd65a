"""Who may use the model: so many requests at once, a short queue behind them, a deadline for each."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from starlette.requests import Request

from refrag_platform.serving.contract import ClientGone
from refrag_platform.serving.doorbell import Doorbell
from refrag_platform.serving.errors import ApiError
from refrag_platform.serving.guard import key_digest

if TYPE_CHECKING:
    from refrag_platform.serving.answers import Answer
    from refrag_platform.serving.contract import Delta
    from refrag_platform.serving.generation import Generation, Refusal

P = ParamSpec("P")
T = TypeVar("T")
# Retrieval and prompts are made on these.
MOST_THREADS = 256
# At once. Documents are changed one request after the other.
LOOK_UPS, CHANGES = 4, 1


class Admission:
    """Counts who is inside. Whoever may enter starts at once; the scheduler behind it keeps the order."""

    def __init__(self, max_waiting: int, deadline: float) -> None:
        self.max_waiting, self.deadline = max_waiting, deadline
        self._inside = 0
        self.shown: dict[str, Ticket] = {}
        self._seconds = 1.0  # what a request has taken of late, for Retry-After
        self.threads = ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="request")
        self._bell: Doorbell | None = None

    def enter(self, request: Request, at_once: int) -> Ticket:
        """A ticket for a request, where `at_once` are answered at a time.

        Raises:
            ApiError: 429 when the queue is full.
        """
        if self._inside >= at_once + self.max_waiting:
            seconds = max(1, round(self._seconds * self._inside / at_once))
            raise ApiError(
                429,
                f"{self._inside} requests are being answered or wait already; try again in about {seconds} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(seconds)},
            )
        self._inside += 1
        return Ticket(self, request)

    def doorbell(self, loop: asyncio.AbstractEventLoop) -> Doorbell:
        """Of this loop, one for all requests."""
        if self._bell is None or self._bell.loop is not loop:
            self._bell = Doorbell(loop)
        return self._bell

    def leave(self, seconds: float) -> None:
        """One request less."""
        self._inside -= 1
        self._seconds = 0.7 * self._seconds + 0.3 * seconds

    def cancel(self, answer_id: str, key: str | None) -> Answer | None:
        """End the answer with this id and return it; None: none is being written that was asked for with this key."""
        ticket = self.shown.get(answer_id)
        if ticket is None or ticket.answer is None or ticket.key != key:
            return None
        ticket.cancel()
        return ticket.answer


class Ticket:
    """One request inside, until it leaves and its thread has ended; what it has begun ends with it.

    arrived: in seconds of time.monotonic. at_end: is told of the answer, if there is one, as the request leaves.
    """

    def __init__(self, admission: Admission, request: Request) -> None:
        self._admission, self._request = admission, request
        self.key = key_digest(request.scope)
        self.ends = asyncio.get_running_loop().time() + admission.deadline  # in the loop's time
        self._generation: Generation | Refusal | None = None
        self.answer: Answer | None = None
        self._left = False
        self._work: Future[Any] | None = None
        self.arrived = time.monotonic()
        self.at_end: Callable[[Generation | Refusal], None] = lambda generation: None

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()

    async def run(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """The result of `work` on a thread.

        Raises:
            ApiError: 504 when the deadline passes first.
            ClientGone: the client went away.
        """
        self._work = submitted = self._admission.threads.submit(work, *arguments, **named)
        return await self.until_deadline(asyncio.wrap_future(submitted))

    async def iterate(self, generation: Generation | Refusal) -> AsyncIterator[Delta]:
        """What is new in an answer, as it comes from the decoder's thread; no other waits for it.

        Raises:
            ApiError: 504 when the deadline passes first.
            ClientGone: the client went away.
        """
        from refrag_platform.serving.generation import Refusal

        self._generation = generation
        if isinstance(generation, Refusal):
            for told in generation.deltas():
                yield told
            return
        stream, loop, news = await self.run(generation.begin), asyncio.get_running_loop(), asyncio.Event()
        bell = self._admission.doorbell(loop)
        gone = asyncio.ensure_future(self._disconnected())
        gone.add_done_callback(lambda ended: news.set())
        # The timer comes once, and a clock that is read again may say a moment less.
        over = asyncio.Event()

        def end() -> None:
            over.set()
            news.set()

        late = loop.call_at(self.ends, end)
        stream.listen(lambda: bell.ring(news.set))
        try:
            while not stream.ended:
                await news.wait()
                news.clear()
                if over.is_set():
                    raise self._too_late()
                for event in stream.arrived():
                    if over.is_set():
                        raise self._too_late()
                    if (delta := generation.take(event)) is not None:
                        yield delta
                if gone.done() and not stream.ended:
                    raise ClientGone
        finally:
            late.cancel()
            gone.cancel()
            stream.cancel()

    def show(self, answer: Answer) -> None:
        """Let the answer be cancelled by its id, as long as the request is inside."""
        self.answer = answer
        self._admission.shown[answer.id] = self

    def cancel(self) -> None:
        """Let the answer end where it is."""
        if self._generation is not None:
            self._generation.close()

    def leave(self) -> None:
        """Free what the request holds. May be called twice."""
        if self._left:
            return
        self._left = True
        if self.answer is not None:
            self._admission.shown.pop(self.answer.id, None)
        if self._generation is not None:
            self._generation.close()
            self.at_end(self._generation)
        if self._work is None or self._work.done():
            self._count_out()
        else:
            # A thread can't be stopped. As long as it works for a client that gave up, nobody takes its place.
            loop = asyncio.get_running_loop()

            def ended(work: Future[Any]) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                    loop.call_soon_threadsafe(self._count_out)

            self._work.add_done_callback(ended)

    def _count_out(self) -> None:
        self._admission.leave(time.monotonic() - self.arrived)

    async def until_deadline(self, waited: Awaitable[T]) -> T:
        """Await something, but no longer than the deadline and the client's patience."""
        task = asyncio.ensure_future(waited)
        gone = asyncio.ensure_future(self._disconnected())
        try:
            left = self.ends - asyncio.get_running_loop().time()
            await asyncio.wait({task, gone}, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientGone
            raise self._too_late()
        finally:
            task.cancel()
            gone.cancel()

    def _too_late(self) -> ApiError:
        return ApiError(
            504,
            f"not answered within {self._admission.deadline:g} s, waiting included",
            code="deadline_exceeded",
            headers={"Retry-After": "1"},
        )

    async def _disconnected(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
