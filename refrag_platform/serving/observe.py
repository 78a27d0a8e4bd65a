"""What is known of every request: its id, a line in the log, and its figures (`metrics`)."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from refrag_platform.serving.errors import as_api_error, error_response
from refrag_platform.serving.metrics import Metrics

logger = logging.getLogger("refrag.serving")
HEADER = "x-request-id"
# What a client may call its request: it stands in logs.
GIVEN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
OTHER = "other"
MOST_SHOWN = 200  # characters of a path, in the log
GONE = 499  # the client closed the connection


class Observe:
    """Gives every request an id (the client's own, if it is a sound one), counts it and logs its end.

    Outermost: what fails inside is answered and logged here, once, with the id.
    """

    def __init__(self, app: ASGIApp, site: Starlette, metrics: Metrics) -> None:
        self.app, self._site, self._metrics = app, site, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent = Headers(scope=scope).get(HEADER, "")
        name = sent if GIVEN_ID.fullmatch(sent) else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = name
        endpoint = _endpoint(self._site, scope)
        method = scope["method"] if scope["method"] in METHODS else OTHER
        begun, status = time.monotonic(), 0

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)

        self._metrics.begin(endpoint)
        try:
            await self.app(scope, receive, marked)
        except Exception as error:
            logger.exception("%s %s failed, request %s", method, _path(scope), name, extra={"request_id": name})
            if status == 0:
                await error_response(as_api_error(error), scope)(scope, receive, marked)
        finally:
            seconds = time.monotonic() - begun
            self._metrics.end(endpoint, method, status or GONE, seconds)
            told = {
                "request_id": name,
                "method": method,
                "path": _path(scope),
                "endpoint": endpoint,
                "status": status or GONE,
                "milliseconds": round(seconds * 1000, 1),
            }
            line = "%(method)s %(path)s: %(status)d after %(milliseconds).0f ms, request %(request_id)s"
            logger.info(line, told, extra=told)


def _endpoint(site: Starlette, scope: Scope) -> str:
    """The route that a request is for, as it was declared."""
    known = [(route.matches(scope)[0], getattr(route, "path", OTHER)) for route in site.routes]
    for wanted in (Match.FULL, Match.PARTIAL):
        for match, path in known:
            if match == wanted:
                return str(path)
    return OTHER


def _path(scope: Scope) -> str:
    """The path for a log: as it was sent, on one line, not at any length."""
    sent = scope.get("raw_path") or scope["path"].encode("utf-8", "replace")
    return str(sent[:MOST_SHOWN])[2:-1] + ("..." if len(sent) > MOST_SHOWN else "")
