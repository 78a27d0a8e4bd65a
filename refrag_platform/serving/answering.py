"""The one way to an answer, whatever its shape: admission, engine, deadline, and the body or the events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from refrag_platform.decoding.grammar import SchemaError
from refrag_platform.errors import QueryTooLong
from refrag_platform.serving.admission import Admission, Ticket
from refrag_platform.serving.answers import Answer
from refrag_platform.serving.contract import BadRequest
from refrag_platform.serving.errors import ApiError, Json, as_api_error, request_id
from refrag_platform.serving.fields import MOST_SHOWN
from refrag_platform.serving.guard import collection_of
from refrag_platform.serving.schema import AnswerRequest
from refrag_platform.serving.settings import SECONDS_TO_READ
from refrag_platform.serving.tracing import trace_answer

if TYPE_CHECKING:
    from refrag_platform.serving.engine import Engine
    from refrag_platform.serving.generation import Generation, Refusal

logger = logging.getLogger("refrag.serving")


async def answer(request: Request, asked: AnswerRequest, shape: Callable[..., Answer]) -> Response:
    """Answer over retrieved passages, over those in the request, or over both.

    Args: shape: makes the answer's bodies of request, generation and the request's id.

    Raises:
        ApiError: it can't be had here, or not now, or not in this way.
    """
    require_model(request, asked.model)
    engine = require_engine(request)
    admission: Admission = request.app.state.admission
    ticket = admission.enter(request, engine.settings.slots)
    ticket.at_end = lambda ended: _told(request, ended, ticket.arrived)
    try:
        generation = await ticket.run(_start, engine, asked, collection_of(request.scope))
        deltas = ticket.iterate(generation)
        shaped = shape(asked, generation, request_id(request.scope))
        ticket.show(shaped)
        if asked.stream:
            # The first one comes before the status line, so that a failure until then has a status of its own.
            first = await anext(deltas, None)
            return _EventStream(_reported(shaped, shaped.events(first, deltas), request_id(request.scope)), ticket)
        whole = [delta async for delta in deltas]
        ticket.leave()
        return Json(shaped.whole(whole))
    except BaseException:
        ticket.leave()
        raise


def _told(request: Request, ended: Generation | Refusal, arrived: float) -> None:
    """Figures and spans of an answer that has ended."""
    state = request.app.state
    state.metrics.answered(ended, arrived)
    if state.tracer is not None:
        trace_answer(state.tracer, request, state.model, ended, arrived)


def _start(engine: Engine, asked: AnswerRequest, collection: str) -> Generation | Refusal:
    """Retrieval and prompt; runs on a thread."""
    count = asked.to_retrieve(engine.settings.passages if engine.store else 0)
    sampling = asked.sampling(engine.settings.max_new_tokens)
    try:
        return engine.ask(
            asked.turns(),
            count,
            asked.passages_sent(),
            sampling,
            asked.share,
            rate=asked.rate,
            expand=asked.expand,
            continues=asked.continues,
            collection=collection,
        )
    except (BadRequest, SchemaError, QueryTooLong) as error:
        told = as_api_error(error)
        # The engine speaks of a chat's fields.
        field = "response_format" if isinstance(error, SchemaError) else told.param
        told.param = field and asked.field_here(field)
        raise told from None


def require_engine(request: Request) -> Engine:
    """The engine, once it is loaded and as long as its device works.

    Raises:
        ApiError: 503.
    """
    state = request.app.state
    if state.engine is None:
        if state.failure is not None:
            # The reason may name another collection's folder.
            reason = "its log says why" if collection_of(request.scope) else state.failure
            raise ApiError(503, f"{state.model} can't be served: {reason}", code="model_failed")
        raise ApiError(
            503,
            f"{state.model} is still being loaded; try again soon",
            code="model_loading",
            headers={"Retry-After": "5"},
        )
    if not state.engine.alive:
        raise ApiError(503, f"{state.model} can't be served: its device failed, the log says how", code="model_failed")
    engine: Engine = state.engine
    return engine


def require_model(request: Request, name: str) -> None:
    """The name is that of the model, or its tag.

    Raises:
        ApiError: 404.
    """
    state = request.app.state
    if name not in state.names:
        raise ApiError(
            404,
            f"no model {name[:MOST_SHOWN]!r} here; this server serves {state.model!r}",
            code="model_not_found",
            param="model",
        )


class _EventStream(StreamingResponse):
    """Server-sent events that give the model free however they end: at the last one, or with the client."""

    def __init__(self, events: AsyncIterator[str], ticket: Ticket) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # Sending waits for a client that doesn't read, and the answer's own deadline isn't looked at meanwhile.
            async with asyncio.timeout_at(self._ticket.ends + SECONDS_TO_READ):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            logger.warning("a client did not read its answer, which is given up")
        finally:
            self._ticket.leave()


async def _reported(shaped: Answer, events: AsyncIterator[str], name: str | None) -> AsyncIterator[str]:
    """The events; of a failure the client learns by one, because the status line is gone."""
    try:
        async for event in events:
            yield event
    except Exception as error:
        known = as_api_error(error)
        if known.status == 500:
            logger.exception("a streamed answer failed, request %s", name)
        yield shaped.failure(known.body(name))
