"""What stands before the routes: API keys, their rates, and the largest body, as plain ASGI middleware.

They answer before a body is parsed, in the OpenAI error shape.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from refrag_platform.serving.errors import ApiError, error_response
from refrag_platform.serving.keys import Key, Keys
from refrag_platform.serving.rate import RateLimit

# Any of these says that a request came through a proxy.
FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")
HOST = re.compile(r"\[(?P<address>[^]]*)\](:\d+)?|(?P<name>[^:]*)(:\d+)?")  # RFC 9110: a name or an address, and a port


class RequireKey:
    """401 unless the request bears `Authorization: Bearer KEY`; without any keys, unless it comes from this machine.

    429 where its key has asked too often. What comes from this machine without keys counts as one key.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, per_minute: int | None = None, open_paths: Collection[str] = ()
    ) -> None:
        """per_minute: requests of a key without a number of its own; None: any. open_paths: need no key."""
        self.app, self._open_paths = app, open_paths
        self._keys, self._per_minute, self._rate = keys, per_minute, RateLimit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            try:
                key = self._require_key(scope)
                scope.setdefault("state", {})["key"] = key
                self._require_rate(key)
            except ApiError as error:
                return await error_response(error, scope)(scope, receive, send)
        await self.app(scope, receive, send)

    def _require_key(self, scope: Scope) -> Key | None:
        if not self._keys.needed:
            if _is_local(scope):
                return None
            raise _unauthorized(
                "this server has no keys, so it answers its own machine alone, as localhost; set REFRAG_API_KEY or "
                "REFRAG_API_KEYS_FILE (`refrag keys add NAME`) where it runs"
            )
        authorization = dict(scope["headers"]).get(b"authorization", b"")
        # The scheme's case doesn't matter (RFC 9110); the key's does.
        scheme, _, credentials = authorization.partition(b" ")
        key = self._keys.find(credentials.strip())
        if key is None or scheme.lower() != b"bearer":
            what = "an incorrect API key" if authorization else "no API key"
            raise _unauthorized(f"the request bears {what}; send `Authorization: Bearer KEY`")
        return key

    def _require_rate(self, key: Key | None) -> None:
        most = (key.per_minute if key else None) or self._per_minute
        wait = self._rate.take(key.digest if key else "", most) if most else 0
        if wait:
            raise ApiError(
                429,
                f"this key may ask {most} times a minute; try again in {wait} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(wait)},
            )


def key_digest(scope: Scope) -> str | None:
    """Which key a request bears, for its name may be another's too; None where none is needed."""
    key: Key | None = scope.get("state", {}).get("key")
    return key.digest if key else None


def collection_of(scope: Scope) -> str:
    """The collection whose documents a request reads and changes: its key's."""
    key: Key | None = scope.get("state", {}).get("key")
    return key.collection if key else ""


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _is_local(scope: Scope) -> bool:
    """Whether a request comes from this machine: not through a proxy that says so, nor from a stranger's page in a
    browser here.

    Such a page names itself in `Origin` whenever it could change something. It can lead its own host's name to this
    server (DNS rebinding), but then the name stands in `Host`. A proxy here that names no client can't be told apart.
    """
    headers = Headers(scope=scope)
    if any(name in headers for name in FORWARDED):
        return False
    hosts = [headers.get("host", "localhost"), *(origin.partition("://")[2] for origin in headers.getlist("origin"))]
    if not all(map(_is_this_machine, hosts)):
        return False
    if scope.get("client") is not None:
        return _is_loopback(scope["client"][0])
    # A Unix socket has an owner, and no port. A client that has hung up has no address either: it may be anyone.
    return scope.get("server") is not None and scope["server"][1] is None


def _is_this_machine(host: str) -> bool:
    """Whether a name or an address, perhaps with a port, is this machine's own."""
    parts = HOST.fullmatch(host)
    name = (parts["address"] or parts["name"] or "").lower() if parts else ""
    return name == "localhost" or _is_loopback(name)


def _is_loopback(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


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
