"""uvicorn that takes a listening socket over once its application is ready, and leaves it without breaking an answer.

As a program it serves a Bento on the socket that it is given, as a child of `refrag serve` (releases/served.py):

    python -P worker.py TAG --socket FD --patience SECONDS [--told FD]

It imports nothing of this package: a Bento brings the package along as it was when the Bento was built.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import socket
import time
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLOSE = (b"connection", b"close")
# What the kernel had accepted when the socket was closed is known to the loop by then.
SECONDS_TO_ARRIVE = 1.0


class DrainingServer(uvicorn.Server):
    """After SIGTERM it lets nobody in, and ends when those inside have their answers; a second one is uvicorn's own.

    No idle connection is closed while a client may just be sending a request through it: such a request is answered,
    with `Connection: close`. So a client, or the proxy before it, finds no connection broken.
    """

    def __init__(self, config: uvicorn.Config, patience: float, delay: float = 0.0) -> None:
        """Args, in seconds: patience: what is not answered by then is cut off. delay: from SIGTERM on it lets clients
        in for so long yet; `leaving` holds already."""
        super().__init__(config)
        config.timeout_graceful_shutdown = math.ceil(patience)
        self._patience, self._delay = patience, delay
        self._closes: float | None = None  # when it lets nobody in any more
        self._busy = 0.0  # when a request was last running after that

    @property
    def leaving(self) -> bool:
        return self._closes is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGTERM and self.started and not self.leaving:
            self._closes = self._busy = time.monotonic() + self._delay
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if await super().on_tick(counter) or self._closes is None:
            return self.should_exit
        if CLOSE not in self.server_state.default_headers:
            self.server_state.default_headers = [*self.server_state.default_headers, CLOSE]
        now = time.monotonic()
        if now < self._closes:
            return False
        for server in self.servers:
            server.close()
        if self.server_state.tasks:
            self._busy = now
        # An idle connection is closed by its own time limit; one that never asked has none.
        quiet = now - self._busy
        most = SECONDS_TO_ARRIVE + (self.config.timeout_keep_alive if self.server_state.connections else 0)
        if quiet > most or now > self._closes + self._patience:
            self.config.timeout_graceful_shutdown = max(1, math.ceil(self._closes + self._patience - now))
            super().handle_exit(signal.SIGTERM, None)
        return self.should_exit


def only_ready(app: ASGIApp, told: int) -> ASGIApp:
    """The application, which a server starts to serve only once /readyz says 200; then a byte is written to `told`.

    Where /livez says 503 it can't be served, and the server ends.
    """
    import httpx

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_when_ready(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                transport = httpx.ASGITransport(app)
                async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                    while (await client.get("/readyz")).status_code != 200:
                        if (await client.get("/livez")).status_code == 503:
                            return await send({"type": "lifespan.startup.failed", "message": "it can't be served"})
                        await asyncio.sleep(0.2)
                os.write(told, b"1")
                os.close(told)
            await send(message)

        await app(scope, receive, send_when_ready if scope["type"] == "lifespan" else send)

    return wrapped


def main() -> None:
    """Serve a Bento until a signal comes; the listening socket stays open in the parent."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("tag", help="of a Bento in BentoML's store")
    parser.add_argument("--socket", type=int, required=True, help="file descriptor of a listening socket")
    parser.add_argument("--patience", type=float, required=True, help="seconds for running answers after SIGTERM")
    parser.add_argument("--told", type=int, help="serve only once it is ready; file descriptor to say so")
    asked = parser.parse_args()

    from _bentoml_impl.loader import load
    from bentoml._internal.context import server_context
    from bentoml._internal.log import configure_server_logging

    configure_server_logging()
    service = load(asked.tag, standalone_load=True)
    server_context.service_type, server_context.service_name = "entry_service", service.name
    app = service.to_asgi()
    if asked.told is not None:
        app = only_ready(app, asked.told)
    config = uvicorn.Config(app, lifespan="on", log_config=None, server_header=False)
    DrainingServer(config, asked.patience).run([socket.socket(fileno=asked.socket)])


if __name__ == "__main__":
    main()
