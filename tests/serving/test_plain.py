"""The service under uvicorn alone: without BentoML, ready only with its own store, drained when it is to end."""

import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import openai
import pytest

from refrag_platform.processes import free_port
from refrag_platform.project import Project
from refrag_platform.serving.engine import Engine
from refrag_platform.serving.plain import on_thread, with_health
from refrag_platform.serving.settings import ApiSettings
from refrag_platform.serving.site import Site
from tests.asking import asking
from tests.command import refused
from tests.processes import answers, wait_for
from tests.serving.conftest import plain_server
from tests.web import Silent, served

ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "What is the capital of Peru?"}]}


@pytest.mark.slow
def test_the_artifacts_in_place_are_served_without_bentoml_and_sigterm_drains(
    packaged_project: Project, tmp_path: Path
) -> None:
    root, log = str(packaged_project.root), tmp_path / "log"
    options = ("--server", "uvicorn", "--in-place", "--model", "tiny")
    with plain_server(log, *options, REFRAG_ROOT=root, REFRAG_MAX_BODY="5000", WEB_CONCURRENCY="2") as (url, process):
        assert [httpx.get(url + path).status_code for path in ("/healthz", "/livez", "/", "/openapi.json")] == [200] * 4
        docs = httpx.get(f"{url}/docs")
        assert docs.status_code == 404 and "comes with BentoML" in docs.json()["error"]["message"]
        assert httpx.get(f"{url}/v1/models", headers={"X-Forwarded-For": "10.0.0.7"}).status_code == 401
        assert httpx.post(f"{url}/v1/chat/completions", content=b"x" * 6000).status_code == 413
        assert "refrag_ready 1.0" in httpx.get(f"{url}/metrics").text
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
        stream = client.chat.completions.create(**ASKED, stream=True, max_tokens=600)
        chunks = [next(stream)]
        process.send_signal(signal.SIGTERM)
        chunks += stream
        assert chunks[-1].choices[0].finish_reason == "length"
        assert chunks[-1].model_extra["refrag"]["citations"]
        assert process.wait(60) == -signal.SIGTERM
    assert "no BentoML here" not in log.read_text()


class Balancer(Silent):
    """Sends each request on to a server that was ready when it was last probed, over connections that are kept."""

    ready: ClassVar[list[str]] = []
    client: ClassVar[httpx.Client]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        given = {"Content-Type": self.headers["Content-Type"]}
        server = random.choice(self.ready)
        with self.client.stream("POST", server + self.path, content=body, headers=given, timeout=120) as response:
            self.send_response(response.status_code)
            self.end_headers()
            for part in response.iter_raw():
                self.wfile.write(part)


@contextmanager
def balanced(servers: list[str]) -> Iterator[str]:
    """The URL of a proxy before these servers, which may change meanwhile."""
    ends = threading.Event()

    def probe() -> None:
        while not ends.wait(0.1):
            Balancer.ready = [url for url in tuple(servers) if answers(f"{url}/readyz")]

    thread = threading.Thread(target=probe, daemon=True)
    Balancer.ready = list(servers)
    with (
        httpx.Client(trust_env=False) as Balancer.client,
        served(ThreadingHTTPServer(("127.0.0.1", 0), Balancer)) as url,
    ):
        thread.start()
        try:
            yield url
        finally:
            ends.set()
            thread.join()


@pytest.mark.slow
def test_no_request_fails_while_servers_behind_a_proxy_are_restarted_in_turn(
    packaged_project: Project, tmp_path: Path
) -> None:
    options = ("--server", "uvicorn", "--in-place", "--model", "tiny")
    variables = {"REFRAG_ROOT": str(packaged_project.root), "REFRAG_UNREADY": "10"}
    with ExitStack() as stack:

        def start(name: str) -> tuple[str, subprocess.Popen[bytes]]:
            (tmp_path / name).mkdir()
            return stack.enter_context(plain_server(tmp_path / name / "log", *options, **variables))

        old = [start("first"), start("second")]
        urls = [url for url, _ in old]
        with balanced(urls) as proxy, asking(proxy, "tiny", threads=2) as asked:
            for number, (url, process) in enumerate(old):
                answered = asked.answered
                wait_for(lambda least=answered + 10: asked.answered > least, 120)
                process.send_signal(signal.SIGTERM)
                wait_for(lambda url=url: health(url) == [200, 503], 60)
                assert httpx.get(f"{url}/v1/models").status_code == 200, "a proxy that hasn't looked yet may still ask"
                assert process.wait(120) == -signal.SIGTERM
                urls.append(start(f"new-{number}")[0])
                urls.remove(url)
            answered = asked.answered
            wait_for(lambda: asked.answered > answered + 10, 120)
        assert not asked.failed


@pytest.fixture
def site() -> Iterator[tuple[Site, str]]:
    """A site without its model yet, under uvicorn on this machine."""
    site = Site("tiny")
    with on_thread(with_health(site)) as url:
        yield site, url


def health(url: str) -> list[int]:
    return [httpx.get(f"{url}/{name}").status_code for name in ("livez", "readyz")]


def test_it_is_ready_only_once_its_model_is_loaded(site: tuple[Site, str], engine: Engine) -> None:
    loaded = threading.Event()

    def open_engine(settings: ApiSettings) -> Engine:
        assert loaded.wait(60)
        return engine

    loading, url = site
    loading.load(open_engine)
    assert health(url) == [200, 503]
    loaded.set()
    wait_for(lambda: health(url) == [200, 200], 60)


def test_weights_with_another_encoder_s_store_are_never_ready(
    site: tuple[Site, str], packaged_project: Project, engine: Engine, tmp_path: Path
) -> None:
    chunks = shutil.copytree(packaged_project.content("chunks", "tiny"), tmp_path / "chunks")
    digest = engine.bundle.model.encoder_digest()
    (chunks / "store.json").write_text((chunks / "store.json").read_text().replace(digest, "0" * len(digest)))
    loading, url = site
    loading.load(
        lambda settings: Engine.open("tiny", packaged_project.content("finetuned", "tiny"), chunks, engine.settings)
    )
    wait_for(lambda: health(url) == [503, 503], 60)
    assert digest in httpx.post(f"{url}/v1/chat/completions", json=ASKED).json()["error"]["message"]


def test_only_a_packaged_model_is_served_from_a_folder_and_not_in_place(tmp_path: Path) -> None:
    assert "holds no packaged model" in refused("serve", "--packaged", tmp_path, "--port", free_port())
    assert "give one of them" in refused("serve", "--packaged", tmp_path, "--in-place")
