"""The HTTP API in OpenAI's shape: chat completions, completions, responses, embeddings, models; retrieval beside them.

`create_app` makes all that the service answers but its health. The engine is put into `app.state.engine` once it is
loaded; until then every route that needs it answers 503.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from refrag_platform.decoding.grammar import SchemaError
from refrag_platform.errors import QueryTooLong
from refrag_platform.serving import bodies
from refrag_platform.serving.admission import LOOK_UPS, Admission
from refrag_platform.serving.answering import answer, require_engine, require_model
from refrag_platform.serving.bodies import STREAM, documented
from refrag_platform.serving.chat import ChatAnswer, ChatRequest
from refrag_platform.serving.completions import CompletionAnswer, CompletionRequest
from refrag_platform.serving.contract import BadRequest, ClientGone
from refrag_platform.serving.documents import add_documents
from refrag_platform.serving.embeddings import EmbeddingRequest, embeddings_body
from refrag_platform.serving.errors import ApiError, Json, as_api_error, error_response
from refrag_platform.serving.fields import MOST_SHOWN
from refrag_platform.serving.guard import LimitBody, RequireKey, collection_of, key_digest
from refrag_platform.serving.keys import Keys
from refrag_platform.serving.metrics import Metrics
from refrag_platform.serving.observe import Observe
from refrag_platform.serving.pages import OPEN, add_pages
from refrag_platform.serving.responses import ModelResponse, ResponseRequest
from refrag_platform.serving.schema import RetrieveRequest
from refrag_platform.serving.settings import ApiSettings

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

    from refrag_platform.decoding.scheduler import Load


def create_app(
    model: str, settings: ApiSettings | None = None, tag: str | None = None, tracer: Tracer | None = None
) -> FastAPI:
    """The application for one model, by its name.

    Args: tag: a further name that requests may use. tracer: makes a span of each answer and its parts.

    Raises:
        RefragError: the keys can't be read.
    """
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
    # Documents that are being encoded don't keep others from being looked up.
    app.state.changes = Admission(settings.max_waiting, settings.deadline)
    app.state.tracer = tracer
    app.state.metrics = metrics = Metrics(lambda: _load(app))
    # The last one added stands first: the key is asked for before a byte of the body is read.
    app.add_middleware(LimitBody, most=settings.max_body)
    keys = Keys(settings.api_key, settings.api_keys, settings.api_keys_file)
    app.add_middleware(RequireKey, keys=keys, per_minute=settings.rate_limit, open_paths=OPEN)
    app.add_middleware(Observe, site=app, metrics=metrics)
    _add_error_handlers(app)
    asked = (400, 401, 404, 408, 413, 429, 500, 503, 504)
    choices = {"content": STREAM, "description": bodies.STREAMED_CHOICES}
    response = {"content": STREAM, "description": bodies.STREAMED_RESPONSE}
    look_up = tuple(status for status in asked if status != 404)
    one = "/v1/responses/{response_id}"
    for method, path, route, told in (
        ("POST", "/v1/chat/completions", chat_completions, documented(bodies.ChatCompletion, *asked, **choices)),
        ("POST", "/v1/completions", completions, documented(bodies.Completion, *asked, **choices)),
        ("POST", "/v1/responses", responses, documented(bodies.Response, *asked, **response)),
        ("GET", one, show_response, documented(None, 401, 404)),
        ("DELETE", one, show_response, documented(None, 401, 404)),
        ("POST", f"{one}/cancel", cancel_response, documented(bodies.Response, 401, 404)),
        ("POST", "/v1/embeddings", embeddings, documented(bodies.Embeddings, *asked)),
        ("POST", "/v1/retrieve", retrieve, documented(bodies.Listed[bodies.FoundPassage], *look_up)),
        ("GET", "/v1/models", list_models, documented(bodies.Listed[bodies.ModelCard], 401)),
        ("GET", "/v1/models/{model:path}", show_model, documented(bodies.ModelCard, 401, 404)),
    ):
        app.add_api_route(path, route, methods=[method], response_model=None, responses=told)
    add_documents(app)
    app.add_api_route("/metrics", figures, include_in_schema=False)
    add_pages(app, keys.needed)
    return app


def _load(app: FastAPI) -> Load | None:
    engine = app.state.engine
    return engine.decoder_load() if engine is not None and engine.alive else None


async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer the last message over retrieved passages, over those in the request, or over both."""
    return await answer(request, body, ChatAnswer)


async def completions(request: Request, body: CompletionRequest) -> Response:
    """Go on with a text, after passages of the request or retrieved for it, if it wants some."""
    return await answer(request, body, CompletionAnswer)


async def responses(request: Request, body: ResponseRequest) -> Response:
    """Answer the input as a chat completion does, in the newer shape. The response is not stored."""
    return await answer(request, body, ModelResponse)


async def show_response(request: Request, response_id: str) -> Response:
    """Responses are not stored: there is none to show or to delete."""
    raise ApiError(
        404,
        f"no response {response_id[:MOST_SHOWN]!r} is to be had: responses are not stored here; keep what "
        "POST /v1/responses answered",
        code="response_not_found",
        param="response_id",
    )


async def cancel_response(request: Request, response_id: str) -> Response:
    """End a response that is being streamed; its id came with its first event."""
    # Chat completions have ids of another kind, and no such route.
    known = response_id.startswith(ModelResponse.prefix)
    shaped = request.app.state.admission.cancel(response_id, key_digest(request.scope)) if known else None
    if shaped is None:
        raise ApiError(
            404,
            f"no response {response_id[:MOST_SHOWN]!r} is being written; it has ended, or was never begun",
            code="response_not_found",
            param="response_id",
        )
    return Json(shaped.body("cancelled"))


async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """The retriever's vectors of texts, each of length 1 (of all zeros, where it knows no word of the text)."""
    require_model(request, body.model)
    engine = require_engine(request)
    if engine.store is not None and body.dimensions not in (None, dim := engine.store.retriever.dim):
        raise BadRequest(
            f"dimensions is {body.dimensions}; the retriever's vectors have {dim} and can't be cut", param="dimensions"
        )
    with request.app.state.look_ups.enter(request, LOOK_UPS) as ticket:
        vectors, tokens = await ticket.run(engine.embed, body.texts())
    return Json(embeddings_body(body, vectors, tokens))


async def figures(request: Request) -> Response:
    """All figures, as Prometheus reads them; they would tell keys of a collection what others do."""
    if collection_of(request.scope):
        raise ApiError(403, "the figures are of all collections: ask with a key of none", code="figures_of_all")
    metrics: Metrics = request.app.state.metrics
    return metrics.page()


async def list_models(request: Request) -> Response:
    """The one model that is served."""
    return Json({"object": "list", "data": [_model_card(request)]})


async def show_model(request: Request, model: str) -> Response:
    """The model by its name or tag."""
    require_model(request, model)
    return Json(_model_card(request))


async def retrieve(request: Request, body: RetrieveRequest) -> Response:
    """The passages that fit a query best, best first."""
    engine = require_engine(request)
    with request.app.state.look_ups.enter(request, LOOK_UPS) as ticket:
        try:
            passages = await ticket.run(engine.retrieve, body.query, body.k, collection=collection_of(request.scope))
        except QueryTooLong as error:
            raise BadRequest(str(error), code="query_too_long", param="query") from None
    data = [
        {"id": passage.id, "title": passage.title, "text": passage.text, "score": passage.score} for passage in passages
    ]
    return Json({"object": "list", "data": data})


def _model_card(request: Request) -> dict[str, Any]:
    state = request.app.state
    return {"id": state.model, "object": "model", "created": state.created, "owned_by": "refrag-platform"}


def _add_error_handlers(app: FastAPI) -> None:
    """Every error leaves in OpenAI's shape, those of the framework included; the others reach `Observe`."""

    async def answer(request: Request, error: Exception) -> Response:
        return error_response(as_api_error(error), request.scope)

    for kind in (ApiError, ClientGone, BadRequest, QueryTooLong, SchemaError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)
