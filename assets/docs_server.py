"""Great Expectations' Data Docs over HTTP, so that a link in Dagster opens them; nothing else of the project.

python -m assets.docs_server [HOST [PORT]]    $REFRAG_DOCS_URL says where browsers find it; `make ui` starts both.
"""

import contextlib
import html
import http.server
import re
import signal
import sys
from functools import partial
from http import HTTPStatus
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

from assets.partitions import find_project
from refrag_platform.processes import ends_with_parent

HOST, PORT = "127.0.0.1", 3002
# Of artifacts in place, and of those that failed and were set aside.
SHOWN = re.compile(r"((models|data)/[^/]+/[^/]+|work/[^/]+/[^/]+/failed)/checks(/.*)?")


class DocsHandler(http.server.SimpleHTTPRequestHandler):
    """Serves checks/ folders, and at the root a list of them; all else is not there."""

    def do_GET(self) -> None:
        if self.path != "/":
            super().do_GET()
            return
        body = _listing(Path(self.directory)).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_head(self) -> BytesIO | object | None:  # type: ignore[override]
        root, path = Path(self.directory).resolve(), Path(self.translate_path(self.path)).resolve()
        if not (path.is_relative_to(root) and SHOWN.fullmatch(path.relative_to(root).as_posix())):
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: `make ui` shows Dagster's own log."""


def _listing(root: Path) -> str:
    pages = sorted(
        page.relative_to(root).as_posix()
        for pattern in ("models/*/*/checks", "data/*/*/checks", "work/*/*/failed/checks")
        for page in root.glob(f"{pattern}/index.html")
    )
    links = "".join(f'<li><a href="/{quote(page)}">{html.escape(page)}</a></li>' for page in pages)
    return f"<!doctype html><title>Data Docs</title><h1>Data Docs</h1><ul>{links or '<li>none yet</li>'}</ul>"


def server(root: Path, host: str = HOST, port: int = PORT) -> http.server.ThreadingHTTPServer:
    """The server of the project at `root`, not yet serving."""
    return http.server.ThreadingHTTPServer((host, port), partial(DocsHandler, directory=str(root)))


if __name__ == "__main__":
    # Started in the background by `make ui`, it must not outlive it.
    ends_with_parent(signal.SIGTERM)()
    host, port = (*sys.argv[1:3], *(HOST, str(PORT))[len(sys.argv) - 1 :])
    try:
        ready = server(find_project().root, host, int(port))
    except OSError as error:
        sys.exit(f"Data Docs can't listen on {host}:{port} ({error.strerror}); give another: make ui DOCS_PORT=4002")
    with contextlib.suppress(KeyboardInterrupt):
        ready.serve_forever()
