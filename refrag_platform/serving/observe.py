"""What is known of every request: its id, a line in the log, and figures for Prometheus.

Labels come from routes, never from paths that clients make up: each value of a label is kept for ever.
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from refrag_platform.serving.errors import as_api_error, error_response

logger = logging.getLogger("refrag.serving")
HEADER = "x-request-id"
# What a client may call its request: it stands in logs.
GIVEN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
OTHER = "other"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
MOST_SHOWN = 200  # characters of a path, in the log
GONE = 499  # the client closed the connection


class Metrics:
    """Requests by route, method and status: how many, how long, and how many at once."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        labels = ["endpoint", "method", "status"]
        self._total = Counter("refrag_requests", "Requests that were answered", labels, registry=own)
        self._seconds = Histogram(
            "refrag_request_duration_seconds",
            "Seconds to a response's last byte",
            labels,
            buckets=SECONDS,
            registry=own,
        )
        self._at_once = Gauge("refrag_requests_in_progress", "Requests being answered", ["endpoint"], registry=own)

    def begin(self, endpoint: str) -> None:
        """One request more at once."""
        self._at_once.labels(endpoint).inc()

    def end(self, endpoint: str, method: str, status: int, seconds: float) -> None:
        """It has been answered."""
        self._at_once.labels(endpoint).dec()
        self._total.labels(endpoint, method, status).inc()
        self._seconds.labels(endpoint, method, status).observe(seconds)

    async def page(self) -> Response:
        """All figures, as Prometheus reads them."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class Observe:
    """Gives every request an id (the client's own, if it is a sound one), counts it and logs its end.

    Outermost: what fails inside is answered and logged here, once, with the id.
    """

    def __init__(self, app: ASGIApp, site: Starlette, metrics: Metrics) -> None:
        self.app, self._site, self._metrics = app, site, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get(HEADER, "")
        name = given if GIVEN_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
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
            logger.exception("%s %s failed, request %s", method, _path(scope), name)
            if status == 0:
                await error_response(as_api_error(error), scope)(scope, receive, marked)
        finally:
            seconds = time.monotonic() - begun
            self._metrics.end(endpoint, method, status or GONE, seconds)
            logger.info(
                "%s %s: %d after %.0f ms, request %s", method, _path(scope), status or GONE, seconds * 1000, name
            )


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
