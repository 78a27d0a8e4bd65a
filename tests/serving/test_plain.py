"""The service under uvicorn alone: without BentoML, ready only with its own store, drained when it is to end."""

import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from refrag_platform.processes import free_port
from refrag_platform.project import Project
from refrag_platform.serving.engine import Engine
from refrag_platform.serving.plain import on_thread, with_health
from refrag_platform.serving.settings import ApiSettings
from refrag_platform.serving.site import Site
from tests.command import refused
from tests.processes import wait_for
from tests.serving.conftest import plain_server

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

    served, url = site
    served.load(open_engine)
    assert health(url) == [200, 503]
    loaded.set()
    wait_for(lambda: health(url) == [200, 200], 60)


def test_weights_with_another_encoder_s_store_are_never_ready(
    site: tuple[Site, str], packaged_project: Project, engine: Engine, tmp_path: Path
) -> None:
    chunks = shutil.copytree(packaged_project.content("chunks", "tiny"), tmp_path / "chunks")
    digest = engine.bundle.model.encoder_digest()
    (chunks / "store.json").write_text((chunks / "store.json").read_text().replace(digest, "0" * len(digest)))
    served, url = site
    served.load(
        lambda settings: Engine.open("tiny", packaged_project.content("finetuned", "tiny"), chunks, engine.settings)
    )
    wait_for(lambda: health(url) == [503, 503], 60)
    assert digest in httpx.post(f"{url}/v1/chat/completions", json=ASKED).json()["error"]["message"]


def test_only_a_packaged_model_is_served_from_a_folder_and_not_in_place(tmp_path: Path) -> None:
    assert "holds no packaged model" in refused("serve", "--packaged", tmp_path, "--port", free_port())
    assert "give one of them" in refused("serve", "--packaged", tmp_path, "--in-place")
