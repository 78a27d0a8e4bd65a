"""/v1/documents: what the store holds can be added to, replaced and deleted while it is served (store/live.py)."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response
from pydantic import Field, model_validator

from refrag_platform.corpus.text import is_visible, normalize
from refrag_platform.errors import RefragError
from refrag_platform.limits import MOST_DOCUMENTS
from refrag_platform.serving.admission import CHANGES, LOOK_UPS
from refrag_platform.serving.answering import require_engine
from refrag_platform.serving.bodies import ChangedDocument, Document, DocumentDeleted, DocumentList, Listed, documented
from refrag_platform.serving.contract import BadRequest
from refrag_platform.serving.errors import ApiError, Json
from refrag_platform.serving.fields import MOST_SHOWN, Body, Name, fault, require_characters
from refrag_platform.serving.guard import collection_of
from refrag_platform.serving.schema import FullText, Title

if TYPE_CHECKING:
    from refrag_platform.store.collections import Collections
    from refrag_platform.store.live import LiveStore, StoredDocument

T = TypeVar("T")
DOCUMENT_ID = r"^[^\x00-\x1f\x7f]+$"
ROUTE, ROUTE_OF_ONE = "/v1/documents", "/v1/documents/{document_id:path}"


class GivenDocument(Body):
    """A document to add, or to put in the place of the one with this id."""

    id: Annotated[Name, Field(pattern=DOCUMENT_ID, description="of your choice; the store's documents have ids too")]
    title: Title = Field("", description="stands before each of its passages")
    text: FullText = Field(description="cut into passages as the corpus is")


class DocumentsRequest(Body):
    """Body of POST /v1/documents."""

    documents: list[GivenDocument] = Field(min_length=1, max_length=MOST_DOCUMENTS, description="all of them or none")

    @model_validator(mode="after")
    def _can_be_stored(self) -> DocumentsRequest:
        ids: set[str] = set()
        for place, document in enumerate(self.documents):
            if document.id in ids:
                raise fault("invalid_value", "an id that stands before already", f"documents.{place}.id")
            ids.add(document.id)
            if {".", ".."} & set(document.id.split("/")):
                raise fault("invalid_value", "clients leave . and .. out of a path", f"documents.{place}.id")
        characters = sum(len(document.title) + len(document.text) for document in self.documents)
        require_characters(characters, "the documents", "documents")
        return self


def add_documents(app: FastAPI) -> None:
    """The routes."""
    errors = (401, 429, 500, 501, 503, 504)
    for path, method, route, told in (
        (ROUTE, "POST", put_documents, documented(Listed[ChangedDocument], 400, 408, 413, *errors)),
        (ROUTE, "GET", list_documents, documented(DocumentList, 400, *errors)),
        (ROUTE_OF_ONE, "GET", show_document, documented(Document, 404, *errors)),
        (ROUTE_OF_ONE, "DELETE", delete_document, documented(DocumentDeleted, 404, *errors)),
    ):
        app.add_api_route(path, route, methods=[method], response_model=None, responses=told)


async def put_documents(request: Request, body: DocumentsRequest) -> Response:
    """Add documents or replace them, all or none; the next search finds them. Once answered they outlive any crash."""
    documents = [(one.id, one.title, one.text) for one in body.documents]
    stored = await _change(request, lambda store: _put(store, documents))
    data = [{"id": one.id, "object": "document", "passages": len(one.passages)} for one in stored]
    return Json({"object": "list", "data": data})


async def list_documents(
    request: Request,
    after: Annotated[str, Query(max_length=1024, description="the last id of the page before")] = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """What was added or replaced here, by id; not what the store came with."""
    titles = await _look_up(request, lambda store: store.edits.titles(after, limit + 1))
    data = [{"id": name, "object": "document", "title": title} for name, title in titles[:limit]]
    return Json({"object": "list", "data": data, "has_more": len(titles) > limit})


async def show_document(request: Request, document_id: str) -> Response:
    """The passages of a document, the store's own too."""
    document = await _look_up(request, lambda store: store.document(_sound(document_id)))
    if document is None:
        raise _missing(document_id)
    passages = [{"id": name, "title": title, "text": text} for name, title, text in document.passages]
    return Json({"id": document.id, "object": "document", "passages": passages})


async def delete_document(request: Request, document_id: str) -> Response:
    """Delete a document, the store's own too; no later search finds it."""
    deleted = await _change(request, lambda store: store.delete(_sound(document_id)))
    if not deleted:
        raise _missing(document_id)
    return Json({"id": document_id, "object": "document.deleted", "deleted": True})


def _put(store: LiveStore, documents: list[tuple[str, str, str]]) -> list[StoredDocument]:
    """Check and add documents; on a thread, for long texts take a while to normalize."""
    for place, (_, _, text) in enumerate(documents):
        if not is_visible(normalize(text)):
            raise BadRequest("it has nothing to read in it", param=f"documents.{place}.text")
    try:
        return store.put(documents)
    except RefragError as error:
        raise BadRequest(str(error), param="documents") from None


async def _look_up(request: Request, look: Callable[[LiveStore], T]) -> T:
    """Look into the documents of the request's collection, on a thread."""
    live = _live(request)
    with request.app.state.look_ups.enter(request, LOOK_UPS) as ticket:
        return await ticket.run(lambda: look(live.of(collection_of(request.scope))))


async def _change(request: Request, change: Callable[[LiveStore], T]) -> T:
    """Change the documents of the request's collection, on a thread, when the changes before it are done."""
    live = _live(request)
    with request.app.state.changes.enter(request, CHANGES) as ticket:
        try:
            return await ticket.run(lambda: change(live.of(collection_of(request.scope))))
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            raise ApiError(
                503,
                "another program holds the file of edits; try again soon",
                code="store_busy",
                headers={"Retry-After": "5"},
            ) from None


def _live(request: Request) -> Collections:
    live = require_engine(request).live
    if live is None:
        raise ApiError(
            501,
            "documents can't be changed here: the store is served as it was made. Start the server with REFRAG_STORE "
            "naming a folder for a working copy of it, which outlives restarts",
            code="documents_not_enabled",
        )
    return live


def _sound(document_id: str) -> str:
    if not re.fullmatch(DOCUMENT_ID, document_id):
        raise _missing(document_id)
    return document_id


def _missing(document_id: str) -> ApiError:
    shown = document_id[:MOST_SHOWN]
    return ApiError(404, f"there is no document {shown!r}", code="document_not_found", param="document_id")
