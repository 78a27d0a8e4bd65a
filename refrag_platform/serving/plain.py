"""The service under uvicorn alone, without BentoML: the same application, with health beside it.

refrag serve --server uvicorn --model tiny
refrag serve --packaged .bentoml/models/refrag-tiny/0123456789abcdef
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.project import Project
from refrag_platform.serving.bento import MODEL_FILE, read_description
from refrag_platform.serving.guard import OnlyHealth
from refrag_platform.serving.package import load_packaged, model_name
from refrag_platform.serving.settings import ApiSettings
from refrag_platform.serving.site import Site
from refrag_platform.serving.worker import DrainingServer

if TYPE_CHECKING:
    from refrag_platform.serving.engine import Engine

logger = logging.getLogger("refrag.serving")


def serve_packaged(folder: Path, host: str, port: int) -> None:
    """Serve a packaged model until a signal comes.

    Args: folder: of a model in BentoML's store, or a copy of it.

    Raises:
        ArtifactError: the folder is no such model.
        RefragError: a setting of the environment is wrong.
    """
    description = read_description(folder / MODEL_FILE)
    if description is None:
        raise ArtifactError(
            f"{folder} holds no packaged model (no {MODEL_FILE} of one); give .bentoml/models/refrag-NAME/VERSION"
        )
    tag = f"{description['name']}:{description['version']}"
    site = Site(model_name(tag), tag)
    site.load(lambda settings: load_packaged(folder, settings.store, settings.tables, settings.vllm))
    _run(site, host, port)


def serve_in_place(project: Project, model: str, host: str, port: int) -> None:
    """Serve a project's artifacts as they are in place, packaged or not, until a signal comes.

    Raises:
        RefragError: there is no such model, or a setting of the environment is wrong.
    """

    def open_engine(settings: ApiSettings) -> Engine:
        from refrag_platform.serving.engine import Engine

        return Engine.load(project, model, settings.store, settings.tables, settings.vllm)

    project.recipe(model)
    site = Site(model)
    site.load(open_engine)
    _run(site, host, port)


def with_health(site: Site, leaving: Callable[[], bool] = lambda: False) -> ASGIApp:
    """The application, and /healthz, /livez and /readyz as BentoML has them; it isn't ready while it is `leaving`."""

    def health(well: bool) -> Response:
        return PlainTextResponse("\n", 200 if well else 503)

    async def alive(request: Request) -> Response:
        return health(site.alive)

    async def ready(request: Request) -> Response:
        return health(site.ready and not leaving())

    routes = [Route("/healthz", alive), Route("/livez", alive), Route("/readyz", ready)]
    return OnlyHealth(Starlette(routes=routes), site.app)


@contextmanager
def on_thread(app: ASGIApp) -> Iterator[str]:
    """The URL of an application, under uvicorn on a free port of this machine and a thread of this process.

    Raises:
        RefragError: it ended before it began.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        # That it began and ended is said by whoever runs it.
        server = uvicorn.Server(
            uvicorn.Config(
                app, lifespan="off", log_config=None, log_level="warning", access_log=False, server_header=False
            )
        )
        thread = threading.Thread(target=server.run, args=([listener],), name="uvicorn", daemon=True)
        thread.start()
        while not server.started:
            if not thread.is_alive():
                raise RefragError("the server ended before it began; its log says why")
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


def _run(site: Site, host: str, port: int) -> None:
    logger.info("uvicorn listens on %s, port %d", host, port)
    config = uvicorn.Config(
        with_health(site, lambda: server.leaving),
        host=host,
        port=port,
        # One process has the model, whatever WEB_CONCURRENCY says; who asks is for the guard to judge.
        workers=1,
        proxy_headers=False,
        lifespan="off",
        # The application has its own lines.
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = DrainingServer(config, site.settings.longest, site.settings.unready)
    with suppress(KeyboardInterrupt):
        server.run()
