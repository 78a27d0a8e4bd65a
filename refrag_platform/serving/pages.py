"""What a browser sees: a page at the root, and the API's description. No page loads anything from elsewhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, HTMLResponse, Response

from refrag_platform.serving.errors import Json

# Browsers keep to it, whatever a page says.
CLOSED = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'"
}
SCRIPT, STYLE = "swagger-ui-bundle.js", "swagger-ui.css"
ROOT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>refrag-platform</title><link rel="icon" href="data:,"></head>
<body><h1>refrag-platform</h1>
<p>A decoder that reads retrieved passages as chunk vectors, behind an API in OpenAI's shape.</p>
<ul>
<li>POST /v1/chat/completions, /v1/completions, /v1/responses, /v1/embeddings, /v1/retrieve;
<a href="v1/models">/v1/models</a></li>
<li><a href="docs">/docs</a>, <a href="openapi.json">/openapi.json</a>: fields, limits, errors</li>
<li><a href="livez">/livez</a>, <a href="readyz">/readyz</a>, <a href="metrics">/metrics</a></li>
</ul></body></html>
"""


def add_pages(app: FastAPI, key_needed: bool) -> None:
    """The root, /docs and /openapi.json; the latter two below /v1 as well."""
    app.openapi = lambda: _description(app, key_needed)  # type: ignore[method-assign]
    app.add_api_route("/", _root, include_in_schema=False)
    app.add_api_route(f"/docs/{SCRIPT}", _script, include_in_schema=False)
    app.add_api_route(f"/docs/{STYLE}", _style, include_in_schema=False)

    async def description() -> Response:
        return Json(app.openapi())

    for prefix, up in (("", ""), ("/v1", "../")):
        page = get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url=f"{up}docs/{SCRIPT}",
            swagger_css_url=f"{up}docs/{STYLE}",
            swagger_favicon_url="data:,",
            # Else the page asks a validator of swagger.io about this server.
            swagger_ui_parameters={"validatorUrl": None},
        )
        # FastAPI's page is the same at each call.
        app.add_api_route(f"{prefix}/docs", _page(bytes(page.body)), include_in_schema=False)
        app.add_api_route(f"{prefix}/openapi.json", description, include_in_schema=False)


async def _root() -> Response:
    return HTMLResponse(ROOT, headers=CLOSED)


async def _script() -> Response:
    return FileResponse(_swagger() / SCRIPT, media_type="text/javascript")


async def _style() -> Response:
    return FileResponse(_swagger() / STYLE, media_type="text/css")


def _page(body: bytes) -> Any:
    async def page() -> Response:
        return HTMLResponse(body, headers=CLOSED)

    return page


def _swagger() -> Path:
    """BentoML's own copy of Swagger UI."""
    found = importlib.util.find_spec("bentoml")
    if found is None or found.origin is None:
        raise FileNotFoundError("Swagger UI comes with BentoML, which is not installed")
    return Path(found.origin).parent / "_internal" / "server" / "static_content"


def _description(app: FastAPI, key_needed: bool) -> dict[str, Any]:
    """OpenAPI's description of what the routes do; made once."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = made["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        # Without a key in the server's environment none is asked for.
        made["security"] = [{"key": []}] if key_needed else [{"key": []}, {}]
        header = {"description": "the request's id, of the client or made here", "schema": {"type": "string"}}
        for path in made["paths"].values():
            for operation in path.values():
                # The framework's own status for a wrong body, which is 400 here.
                operation["responses"].pop("422", None)
                for response in operation["responses"].values():
                    response.setdefault("headers", {})["x-request-id"] = header
        app.openapi_schema = made
    return app.openapi_schema
