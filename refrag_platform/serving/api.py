"""The HTTP API in OpenAI's shape: chat completions (streamed or not), models, retrieval; pages and metrics beside it.

`create_app` makes all that the service answers but its health. The engine is put into `app.state.engine` once it is
loaded; until then every route that needs it answers 503.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from refrag_platform.errors import QueryTooLong, RefragError
from refrag_platform.serving.admission import Admission, Ticket
from refrag_platform.serving.answers import Answer
from refrag_platform.serving.contract import BadRequest, ClientGone
from refrag_platform.serving.errors import ApiError, Json, as_api_error, error_response, request_id
from refrag_platform.serving.fields import MOST_SHOWN
from refrag_platform.serving.guard import LimitBody, RequireKey
from refrag_platform.serving.observe import Metrics, Observe
from refrag_platform.serving.pages import add_pages
from refrag_platform.serving.responses import STREAM, STREAMED, ChatCompletion, Found, ModelCard, ModelList, documented
from refrag_platform.serving.schema import ChatRequest, RetrieveRequest

if TYPE_CHECKING:
    from refrag_platform.serving.engine import Engine
    from refrag_platform.serving.generation import Generation, Refusal

logger = logging.getLogger("refrag.serving")
LOOK_UPS = 4  # at once
# A stream's client has this long after the deadline to take what was sent.
SECONDS_TO_READ = 5.0


@dataclass(frozen=True)
class ApiSettings:
    """Limits of the service.

    api_key: asked for when set. max_body: bytes. max_waiting: requests that may wait beside those that are being
    answered; further ones get 429. deadline: seconds from arrival to the last token.
    """

    api_key: str | None = None
    max_body: int = 4 * 1024 * 1024
    max_waiting: int = 16
    deadline: float = 300.0

    @classmethod
    def from_environment(cls, values: Mapping[str, str]) -> ApiSettings:
        """Settings from REFRAG_API_KEY, REFRAG_MAX_BODY, REFRAG_MAX_WAITING and REFRAG_DEADLINE.

        Raises:
            RefragError: one of them is not a number above zero.
        """

        def number(name: str, default: float) -> float:
            given = values.get(name, "")
            try:
                value = float(given) if given else default
            except ValueError:
                value = 0.0
            if not (value > 0 and math.isfinite(value)):
                raise RefragError(f"{name} is {given!r}; it must be a number above 0")
            return value

        return cls(
            api_key=values.get("REFRAG_API_KEY") or None,
            max_body=int(number("REFRAG_MAX_BODY", cls.max_body)),
            max_waiting=int(number("REFRAG_MAX_WAITING", cls.max_waiting)),
            deadline=number("REFRAG_DEADLINE", cls.deadline),
        )


def create_app(model: str, settings: ApiSettings | None = None, tag: str | None = None) -> FastAPI:
    """The application for one model, by its name; `tag` is a further name that requests may use."""
    settings = settings or ApiSettings()
    app = FastAPI(
        title="refrag-platform",
        description="A decoder that reads retrieved passages as chunk vectors (REFRAG, arXiv 2509.01092).",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        # Else a path with a slash too many is sent on to wherever the client says this host is.
        redirect_slashes=False,
    )
    app.state.engine = None
    app.state.failure = None
    app.state.names = {model, tag} - {None}
    app.state.model = model
    app.state.created = int(time.time())
    app.state.admission = Admission(settings.max_waiting, settings.deadline)
    # Look-ups have a queue of their own: they don't wait for an answer to end.
    app.state.look_ups = Admission(settings.max_waiting, settings.deadline)
    metrics = Metrics()
    # The last one added stands first: the key is asked for before a byte of the body is read.
    app.add_middleware(LimitBody, most=settings.max_body)
    if settings.api_key:
        app.add_middleware(RequireKey, key=settings.api_key)
    app.add_middleware(Observe, site=app, metrics=metrics)
    _add_error_handlers(app)
    chat = documented(ChatCompletion, 400, 401, 404, 408, 413, 429, 500, 503, 504, content=STREAM, description=STREAMED)
    _add(app, "POST", "/v1/chat/completions", chat_completions, chat)
    _add(app, "POST", "/v1/retrieve", retrieve, documented(Found, 400, 401, 408, 413, 429, 500, 503, 504))
    _add(app, "GET", "/v1/models", list_models, documented(ModelList, 401))
    _add(app, "GET", "/v1/models/{model:path}", show_model, documented(ModelCard, 401, 404))
    app.add_api_route("/metrics", metrics.page, include_in_schema=False)
    add_pages(app, settings.api_key is not None)
    return app


def _add(
    app: FastAPI, method: str, path: str, route: Callable[..., Any], responses: dict[int | str, dict[str, Any]]
) -> None:
    app.add_api_route(path, route, methods=[method], response_model=None, responses=responses)


async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer the last message over retrieved passages, over those in the request, or over both."""
    _check_model(request, body.model)
    engine = _engine(request)
    admission: Admission = request.app.state.admission
    ticket = admission.enter(request, engine.settings.slots)
    try:
        generation = await ticket.run(_start, engine, body)
        deltas = ticket.iterate(generation)
        name = request_id(request.scope)
        answer = Answer(
            body.model,
            generation,
            body.n or 1,
            logprobs=bool(body.logprobs),
            usage=bool(body.stream_options and body.stream_options.include_usage),
            request_id=name,
        )
        if body.stream:
            # The first one comes before the status line, so that a failure until then has a status of its own.
            first = await anext(deltas, None)
            return _EventStream(_reported(answer.events(first, deltas), name), ticket)
        whole = [delta async for delta in deltas]
        ticket.leave()
        return Json(answer.whole(whole))
    except BaseException:
        ticket.leave()
        raise


async def list_models(request: Request) -> Response:
    """The one model that is served."""
    return Json({"object": "list", "data": [_model_card(request)]})


async def show_model(request: Request, model: str) -> Response:
    """The model by its name or tag."""
    _check_model(request, model)
    return Json(_model_card(request))


async def retrieve(request: Request, body: RetrieveRequest) -> Response:
    """The passages that fit a query best, best first."""
    engine = _engine(request)
    async with request.app.state.look_ups.enter(request, LOOK_UPS) as ticket:
        try:
            passages = await ticket.run(engine.retrieve, body.query, body.k)
        except QueryTooLong as error:
            raise BadRequest(str(error), code="query_too_long", param="query") from None
    found = [
        {"id": passage.id, "title": passage.title, "text": passage.text, "score": passage.score} for passage in passages
    ]
    return Json({"object": "list", "data": found})


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


async def _reported(events: AsyncIterator[str], name: str | None) -> AsyncIterator[str]:
    """The events; of a failure the client learns by one, because the status line is gone."""
    try:
        async for event in events:
            yield event
    except Exception as error:
        known = as_api_error(error)
        if known.status == 500:
            logger.exception("a streamed answer failed, request %s", name)
        yield f"data: {json.dumps(known.body(name))}\n\n"


def _start(engine: Engine, body: ChatRequest) -> Generation | Refusal:
    """Retrieval and prompt; runs on a thread."""
    count = body.to_retrieve(engine.settings.passages if engine.store else 0)
    sampling = body.sampling(engine.settings.max_new_tokens)
    return engine.ask(body.conversation(), count, body.given(), sampling, body.share_kept)


def _engine(request: Request) -> Engine:
    state = request.app.state
    if state.engine is None:
        if state.failure is not None:
            raise ApiError(503, f"{state.model} can't be served: {state.failure}", code="model_failed")
        raise ApiError(
            503,
            f"{state.model} is still being loaded; try again soon",
            code="model_loading",
            headers={"Retry-After": "5"},
        )
    if not state.engine.alive:
        raise ApiError(503, f"{state.model} can't be served: its device failed, the log says how", code="model_failed")
    return state.engine


def _check_model(request: Request, name: str) -> None:
    state = request.app.state
    if name not in state.names:
        raise ApiError(
            404,
            f"no model {name[:MOST_SHOWN]!r} here; this server serves {state.model!r}",
            code="model_not_found",
            param="model",
        )


def _model_card(request: Request) -> dict[str, Any]:
    state = request.app.state
    return {"id": state.model, "object": "model", "created": state.created, "owned_by": "refrag-platform"}


def _add_error_handlers(app: FastAPI) -> None:
    """Every error leaves in OpenAI's shape, those of the framework included; the others reach `Observe`."""

    async def answer(request: Request, error: Exception) -> Response:
        return error_response(as_api_error(error), request.scope)

    for kind in (ApiError, ClientGone, BadRequest, QueryTooLong, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)
