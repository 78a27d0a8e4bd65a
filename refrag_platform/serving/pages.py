"""What a browser sees: the page at /, and the API's description. No page loads anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, Response

from refrag_platform.serving.errors import ApiError, Json

# Browsers keep to it, whatever a page says.
CLOSED = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'"
}
SCRIPT, STYLE = "swagger-ui-bundle.js", "swagger-ui.css"
PAGE, PAGE_SCRIPT = "page.html", "page.js"
# They hold no data, so they ask for no key: without them there is nowhere to type one.
OPEN = frozenset({"/", f"/{PAGE_SCRIPT}"})


def add_pages(app: FastAPI, key_needed: bool) -> None:
    """The page, /docs and /openapi.json; the latter two below /v1 as well."""
    app.openapi = lambda: _description(app, key_needed)  # type: ignore[method-assign]
    page, script = (resources.files(__package__).joinpath(name).read_bytes() for name in (PAGE, PAGE_SCRIPT))
    app.add_api_route("/", _file(page, "text/html", own_style(page)), include_in_schema=False)
    app.add_api_route(f"/{PAGE_SCRIPT}", _file(script, "text/javascript", {}), include_in_schema=False)
    app.add_api_route(f"/docs/{SCRIPT}", _script, include_in_schema=False)
    app.add_api_route(f"/docs/{STYLE}", _style, include_in_schema=False)

    async def description() -> Response:
        return Json(app.openapi())

    for prefix, up in (("", ""), ("/v1", "../")):
        swagger = get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url=f"{up}docs/{SCRIPT}",
            swagger_css_url=f"{up}docs/{STYLE}",
            swagger_favicon_url="data:,",
            # Else the page asks a validator of swagger.io about this server.
            swagger_ui_parameters={"validatorUrl": None},
        )
        # FastAPI's page is the same at each call.
        app.add_api_route(f"{prefix}/docs", _docs(bytes(swagger.body)), include_in_schema=False)
        app.add_api_route(f"{prefix}/openapi.json", description, include_in_schema=False)


def own_style(page: bytes) -> dict[str, str]:
    """What a browser lets our page do: run its one script, ask this server, and look as its style sheet says."""
    style = page.split(b"<style>")[1].split(b"</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style).digest()).decode()
    return {
        "Content-Security-Policy": f"default-src 'none'; script-src 'self'; style-src 'sha256-{digest}'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


async def _script() -> Response:
    return FileResponse(_swagger() / SCRIPT, media_type="text/javascript")


async def _style() -> Response:
    return FileResponse(_swagger() / STYLE, media_type="text/css")


def _file(body: bytes, media_type: str, headers: dict[str, str]) -> Any:
    async def file() -> Response:
        return Response(body, headers={**headers, "Cache-Control": "no-cache"}, media_type=media_type)

    return file


def _docs(body: bytes) -> Any:
    page = _file(body, "text/html", CLOSED)

    async def docs() -> Response:
        _swagger()
        return await page()

    return docs


def _swagger() -> Path:
    """BentoML's own copy of Swagger UI.

    Raises:
        ApiError: 404, it isn't here.
    """
    spec = importlib.util.find_spec("bentoml")
    folder = Path(spec.origin or "").parent / "_internal" / "server" / "static_content" if spec else None
    if folder is None or not folder.is_dir():
        raise ApiError(
            404,
            "this page needs Swagger UI, which comes with BentoML, and that is not installed here; /openapi.json "
            "describes the API to any viewer",
            code="docs_not_installed",
        )
    return folder


def _description(app: FastAPI, key_needed: bool) -> dict[str, Any]:
    """OpenAPI's description of what the routes do; made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = document["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        # Without a key in the server's environment none is asked for.
        document["security"] = [{"key": []}] if key_needed else [{"key": []}, {}]
        header = {"description": "the request's id, of the client or made here", "schema": {"type": "string"}}
        for path in document["paths"].values():
            for operation in path.values():
                # The framework's own status for a wrong body, which is 400 here.
                operation["responses"].pop("422", None)
                for response in operation["responses"].values():
                    response.setdefault("headers", {})["x-request-id"] = header
        app.openapi_schema = document
    return app.openapi_schema
