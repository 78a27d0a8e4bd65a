"""What the service refuses whatever is asked, and what becomes of clients that leave and of failures."""

import asyncio
import json
import socket
import threading
from collections.abc import MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch

from refrag_platform.project import Project
from refrag_platform.serving import answering, api, guard
from refrag_platform.serving import engine as engine_module
from refrag_platform.serving.engine import Engine
from refrag_platform.serving.settings import ApiSettings
from tests.processes import wait_for
from tests.serving.conftest import ASKED, Server, client_of, error_of, post


def test_a_key_is_asked_for_on_every_route(server: Server) -> None:
    with server(ApiSettings(api_key="sécret")) as url:
        routes = [("GET", "/models"), ("POST", "/chat/completions"), ("POST", "/retrieve"), ("GET", "/openapi.json")]
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sécret".encode()}):
            for method, path in routes:
                refused = httpx.request(method, f"{url}/v1{path}", headers=headers)
                assert error_of(refused, 401)["code"] == "invalid_api_key"
                assert refused.headers["www-authenticate"] == "Bearer"
        with pytest.raises(openai.AuthenticationError):
            client_of(url, "wrong").models.list()
        for scheme in ("Bearer", "bearer"):
            assert httpx.get(f"{url}/v1/models", headers={"Authorization": f"{scheme} sécret".encode()}).is_success


def test_a_body_above_the_limit_is_refused_declared_or_not(server: Server) -> None:
    with server(ApiSettings(max_body=1000)) as url:
        body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x" * 2000}]}).encode()
        assert "the limit is 1,000" in error_of(httpx.post(f"{url}/v1/chat/completions", content=body), 413)["message"]
        unsized = httpx.post(f"{url}/v1/chat/completions", content=iter([body[:500], body[500:]]))
        assert "the limit is 1,000" in error_of(unsized, 413)["message"]
        assert post(url).is_success


def test_a_body_that_does_not_come_is_not_waited_for(
    server: Server, monkeypatch: pytest.MonkeyPatch, slow_decoder: None
) -> None:
    monkeypatch.setattr(guard, "SECONDS_TO_SEND", 1.0)
    with server() as url:
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port or 0), timeout=20) as connection:
            head = [
                "POST /v1/retrieve HTTP/1.1",
                "Host: localhost",
                "Content-Type: application/json",
                "Content-Length: 9",
            ]
            connection.sendall("\r\n".join([*head, "", "{"]).encode())
            assert connection.recv(65536).startswith(b"HTTP/1.1 408")
        # An answer may take longer than a body.
        assert post(url, max_tokens=30, retrieve=0).is_success


def test_a_model_that_is_not_loaded_yet_answers_503(server: Server) -> None:
    with server(loaded=False) as url:
        refused = post(url)
        assert error_of(refused, 503)["code"] == "model_loading"
        assert int(refused.headers["retry-after"]) > 0
        assert httpx.get(f"{url}/v1/models").is_success


# Greedy, the random model falls into a loop and never ends by itself.
LONG = {"max_tokens": 1500, "retrieve": 0}


def test_a_full_queue_answers_429_with_retry_after(
    server: Server, engine: Engine, held_decoder: threading.Event
) -> None:
    slots = engine.settings.slots
    with server(ApiSettings(max_waiting=1)) as url, ThreadPoolExecutor(2 * slots) as pool:
        asked = [pool.submit(post, url, retrieve=0) for _ in range(slots + 5)]
        wait_for(lambda: sum(one.done() for one in asked) == 4, 60)
        held_decoder.set()
        responses = [one.result() for one in asked]
        refused = [response for response in responses if response.status_code == 429]
        assert len(refused) == 4 and sum(response.is_success for response in responses) == slots + 1
        assert error_of(refused[0], 429)["code"] == "rate_limit_exceeded"
        assert int(refused[0].headers["retry-after"]) >= 1
        assert post(url).is_success


def test_the_deadline_answers_504_and_frees_the_model(server: Server, engine: Engine, slow_decoder: None) -> None:
    with server(ApiSettings(deadline=0.5)) as url:
        assert error_of(post(url, **LONG), 504)["code"] == "deadline_exceeded"
        wait_for(lambda: engine.decoder_load().running == 0, 20)
        # On a machine that is too busy for the first token, this is an answer 504 as well.
        with pytest.raises(openai.APIError, match=r"not answered within 0\.5 s"):
            list(
                client_of(url).chat.completions.create(
                    model="tiny", messages=ASKED, stream=True, max_tokens=1500, extra_body={"retrieve": 0}
                )
            )
        wait_for(lambda: engine.decoder_load().running == 0, 20)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_model(server: Server, engine: Engine, slow_decoder: None, stream: bool) -> None:
    with server() as url:
        body = {"model": "tiny", "messages": ASKED, "stream": stream} | LONG
        if stream:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.3)
        wait_for(lambda: engine.decoder_load().running == 0, 20)
        assert post(url).is_success


def test_a_client_that_does_not_read_is_left_after_the_deadline(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, slow_decoder: None
) -> None:
    monkeypatch.setattr(answering, "SECONDS_TO_READ", 0.1)
    app = api.create_app("tiny", ApiSettings(deadline=2), "refrag-tiny:0123")
    app.state.engine = engine
    body = json.dumps({"model": "tiny", "messages": ASKED, "stream": True} | LONG).encode()
    requests = [{"type": "http.request", "body": body}]
    sent = []

    async def receive() -> dict[str, Any]:
        return requests.pop() if requests else await asyncio.Future()

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message["type"])
        if sent[-1] == "http.response.body":
            await asyncio.Future()

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": headers}
    scope |= {"client": ("127.0.0.1", 50000)}
    asyncio.run(asyncio.wait_for(app(scope, receive, send), timeout=20))
    assert sent == ["http.response.start", "http.response.body"]
    wait_for(lambda: engine.decoder_load().running == 0, 20)


def test_a_failure_of_the_decoder_is_a_500_and_a_stream_s_last_event(server: Server, failing_decoder: None) -> None:
    with server() as url:
        assert error_of(post(url, **LONG), 500)["code"] == "internal_error"
        stream = client_of(url).chat.completions.create(
            model="tiny", messages=ASKED, stream=True, max_tokens=200, extra_body={"retrieve": 0}
        )
        with pytest.raises(openai.APIError, match="its log says why"):
            list(stream)
        assert post(url, max_tokens=1, retrieve=0).is_success


def test_after_a_fault_of_the_device_the_service_asks_to_be_started_anew(
    packaged_project: Project, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faults(*given: object) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    engine = Engine.load(packaged_project, "tiny")
    monkeypatch.setattr(engine_module, "prompt_input", faults)
    with server(engine=engine) as url:
        assert engine.alive
        assert error_of(post(url), 500)["code"] == "internal_error"
        assert not engine.alive
        assert error_of(post(url), 503)["code"] == "model_failed"
    engine.close()
