"""Errors of the service in OpenAI's shape: `{"error": {"message", "type", "param", "code"}, "request_id"}`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import Scope

from refrag_platform.decoding.grammar import SchemaError
from refrag_platform.errors import QueryTooLong
from refrag_platform.serving.contract import BadRequest, ClientGone
from refrag_platform.serving.fields import shown

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
CODES = {404: "unknown_url", 405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large"}
# Of our own kinds of faults and pydantic's; others are `invalid_value`.
FAULT_CODES = {
    "missing": "missing_required_parameter",
    "missing_required_parameter": "missing_required_parameter",
    "unknown_parameter": "unknown_parameter",
    "unsupported_value": "unsupported_value",
}
MOST_FAULTS = 3  # in one message


class Json(JSONResponse):
    """JSON in ASCII: whatever a text holds, half a surrogate pair or a line end of Unicode, the body is sound."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class ApiError(Exception):
    """An answer other than 200. `headers` bears Retry-After where trying again helps."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        """The JSON that the client gets."""
        kind = TYPES.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error, "request_id": request_id}


def request_id(scope: Scope) -> str | None:
    """The id of a request, once it has one (`observe`)."""
    return scope.get("state", {}).get("request_id")


def error_response(error: ApiError, scope: Scope) -> Json:
    """`error` as a response to a request."""
    return Json(error.body(request_id(scope)), status_code=error.status, headers=error.headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error; of what isn't its own fault no more than that the server failed."""
    match error:
        case ApiError():
            return error
        case ClientGone():
            return ApiError(499, "the client closed the connection")
        case BadRequest():
            return ApiError(400, str(error), code=error.code or "invalid_value", param=error.param)
        case SchemaError():
            return ApiError(400, str(error), code="invalid_schema")
        case QueryTooLong():
            return ApiError(400, str(error), code="query_too_long", param="messages")
        case RequestValidationError():
            return _validation_error(error)
        case HTTPException(status_code=400, __cause__=ValueError() | RecursionError() as cause):
            return ApiError(400, f"the body is not valid JSON: {_unread(cause)}", code="invalid_json")
        case HTTPException():
            headers = dict(error.headers or {})
            detail = "there is nothing at this URL; see /docs" if error.status_code == 404 else error.detail
            return ApiError(error.status_code, detail, code=CODES.get(error.status_code), headers=headers)
        case _:
            return ApiError(500, "the server failed at this request; its log says why", code="internal_error")


def _unread(error: ValueError | RecursionError) -> str:
    """Why a body that may be JSON by its rules was not read."""
    match error:
        case UnicodeDecodeError():
            return f"it is not {error.encoding.upper()}"
        case RecursionError():
            return "it is nested too deep"
        case _:
            return "a number has too many digits"


def _validation_error(error: RequestValidationError) -> ApiError:
    faults = error.errors()
    if any(fault["type"] == "json_invalid" for fault in faults):
        reason = faults[0].get("ctx", {}).get("error", faults[0]["msg"])
        return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
    if not isinstance(error.body, dict) and any(tuple(fault["loc"]) == ("body",) for fault in faults):
        return ApiError(
            400, "the body is no JSON object; send one, with Content-Type: application/json", code="invalid_json"
        )
    told = [(_place(fault, error.body), _reason(fault)) for fault in faults[:MOST_FAULTS]]
    message = "; ".join(f"{where}: {reason}" if where else reason for where, reason in told)
    if len(faults) > MOST_FAULTS:
        message += f"; and {len(faults) - MOST_FAULTS:,} more"
    return ApiError(400, message, code=FAULT_CODES.get(faults[0]["type"], "invalid_value"), param=told[0][0])


def _place(fault: Mapping[str, Any], body: Any) -> str | None:
    """The faulty field by its path in the body, e.g. messages.0.content."""
    path: list[str] = []
    location: Sequence[int | str] = fault["loc"]
    if location[:1] == ("query",):
        return ".".join(map(str, location[1:]))
    for place, part in enumerate(location[1:] if location[:1] == ("body",) else location, start=1):
        try:
            body = body[part]
        except (LookupError, TypeError):
            # Which form of a field was tried isn't a part of its path; a field that is missing is.
            if not (fault["type"] == "missing" and place == len(location) - 1):
                continue
        path.append(str(part))
    if below := (fault.get("ctx") or {}).get("field"):
        path.append(below)
    return ".".join(path) or None


def _reason(fault: Mapping[str, Any]) -> str:
    message, value = fault["msg"], fault.get("input")
    if fault["type"] == "string_too_long" and isinstance(value, str):
        return f"{message}, not {len(value):,}"
    if (fault.get("ctx") or {}).get("message") or not isinstance(value, str | int | float | None):
        return str(message)
    return f"{message}, not {shown(value)}" if fault["type"] not in {"missing", "too_long"} else str(message)
