"""What stands before the routes: the API key and the largest body, as plain ASGI middleware.

Both answer before a body is parsed, in the OpenAI error shape.
"""

from __future__ import annotations

import asyncio
import hmac

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from refrag_platform.serving.errors import ApiError, error_response


class RequireKey:
    """401 unless the request bears `Authorization: Bearer KEY`; compared in constant time."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            # The scheme's case doesn't matter (RFC 9110); the key's does.
            scheme, _, credentials = given.partition(b" ")
            if not hmac.compare_digest(scheme.capitalize() + b" " + credentials.strip(), self._expected):
                what = "an incorrect API key" if given else "no API key"
                error = ApiError(
                    401,
                    f"the request bears {what}; send `Authorization: Bearer KEY`, KEY being the server's",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                return await error_response(error, scope)(scope, receive, send)
        await self.app(scope, receive, send)


class OnlyHealth:
    """Leaves health to the server it stands in; whatever else is asked for is the site's."""

    PATHS = frozenset({"/healthz", "/livez", "/readyz"})

    def __init__(self, app: ASGIApp, site: ASGIApp) -> None:
        self.app, self.site = app, site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        mine = scope["type"] == "http" and scope["path"] not in self.PATHS
        await (self.site if mine else self.app)(scope, receive, send)


# A body that is not sent holds a connection.
SECONDS_TO_SEND = 60.0


class LimitBody:
    """413 for a body above `most` bytes, whether its length is declared or only found out while reading; 408 for one
    that doesn't come."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app = app
        self.most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > self.most:
            return await error_response(self._error(int(declared)), scope)(scope, receive, send)
        seen, whole = 0, False
        ends = asyncio.get_running_loop().time() + SECONDS_TO_SEND

        async def counted() -> Message:
            nonlocal seen, whole
            try:
                async with asyncio.timeout_at(None if whole else ends):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not come within {SECONDS_TO_SEND:g} s") from None
            if message["type"] == "http.request":
                whole = not message.get("more_body", False)
                seen += len(message.get("body", b""))
                if seen > self.most:
                    # The framework lets an HTTPException from reading a body pass; others become a 400.
                    raise HTTPException(413, self._error(seen).message)
            return message

        await self.app(scope, counted, send)

    def _error(self, size: int) -> ApiError:
        return ApiError(
            413,
            f"the body has at least {size:,} bytes, the limit is {self.most:,}; send less",
            code="request_too_large",
        )
