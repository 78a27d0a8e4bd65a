"""An object store on loopback: moto's server, which is a mock of S3. What S3 itself does isn't tested by it.

It speaks S3's protocol over real HTTP, conditional puts included; here it also notes what was asked and fails at will.
"""

import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

BUCKET = "refrag"
KEY, SECRET = "AKIATESTTESTTESTTEST", "a-secret-that-is-nowhere-else"


@dataclass
class Request:
    """A request as it came. only_new: it puts only what isn't there."""

    method: str
    path: str
    only_new: bool


@dataclass
class ObjectStore:
    """The running server. requests: all that came, in their order."""

    url: str = ""
    requests: list[Request] = field(default_factory=list)
    refusal: str = ""
    _faults: dict[tuple[str, str], tuple[int, bool]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, pattern: str, times: int = 1, done: bool = False, method: str = "PUT") -> None:
        """Answer 503 to the next requests whose path matches; done: after they have been carried out."""
        self._faults[method, pattern] = (times, done)

    def cut(self, pattern: str, times: int = 1) -> None:
        """Break off in the middle of the next objects whose path matches."""
        self._faults["GET", pattern] = (times, True)

    def refuse(self, body: str) -> None:
        """Answer 403 with this body from now on."""
        self.refusal = body

    def puts(self, pattern: str) -> list[Request]:
        return [one for one in self.requests if one.method == "PUT" and re.search(pattern, one.path)]

    def gets(self, pattern: str) -> list[Request]:
        return [one for one in self.requests if one.method == "GET" and re.search(pattern, one.path)]

    def objects(self) -> dict[str, bytes]:
        """All that lies in the bucket."""
        import boto3

        bucket = boto3.resource("s3").Bucket(BUCKET)
        return {one.key: one.get()["Body"].read() for one in bucket.objects.all()}

    def take_fault(self, request: Request) -> bool | None:
        """Whether a request that is to fail is carried out first; None: it isn't to fail."""
        with self._lock:
            for (method, pattern), (times, done) in self._faults.items():
                if times and request.method == method and re.search(pattern, request.path):
                    self._faults[method, pattern] = (times - 1, done)
                    return done
        return None


@contextmanager
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A store with one empty bucket, and AWS' variables, for this process and those that it starts, that lead to it."""
    server = pytest.importorskip("moto.server", reason="the extra `dev` is not installed")
    import boto3
    from moto.backends import get_backend
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store, one_at_a_time = ObjectStore(), threading.Lock()
    mock = server.DomainDispatcherApplication(server.create_backend_app)

    def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        condition = environ.get("HTTP_IF_NONE_MATCH")
        request = Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], condition == "*")
        store.requests.append(request)
        if store.refusal:
            start("403 Forbidden", [("Content-Type", "application/xml")])
            return [store.refusal.encode()]
        carried_out = store.take_fault(request)
        # The mock looks whether an object is there and then puts it, which S3 does as one.
        with one_at_a_time:
            if carried_out is None:
                return mock(environ, start)
            if carried_out and request.method == "GET":
                body = b"".join(mock(environ, start))
                return [body[: len(body) // 2]]
            if carried_out:
                mock(environ, lambda *answer: lambda data: None)
        start("503 Slow Down", [("Content-Type", "application/xml")])
        return [b"<Error><Code>SlowDown</Code></Error>"]

    running = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    store.url = f"http://127.0.0.1:{running.server_port}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": store.url,
        "AWS_CONFIG_FILE": "/nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    store.requests.clear()
    try:
        yield store
    finally:
        running.shutdown()
        running.server_close()
        thread.join()
        get_backend("s3").reset()
