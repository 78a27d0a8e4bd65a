"""Hundreds of requests that no client should send: each gets an error that it can read, and the server goes on."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from refrag_platform.bench.hostile import (
    CHAT,
    HALF,
    RETRIEVE,
    each_body,
    each_field_with_each_value,
    each_part_of_a_document,
    each_part_of_a_message,
    sound_bodies,
)
from refrag_platform.project import Project
from refrag_platform.serving.api import create_app
from refrag_platform.serving.engine import Engine

LOCAL = ("127.0.0.1", 50000)
ASKED = sound_bodies("tiny")[CHAT][1]
HOSTILE = [
    *each_field_with_each_value("tiny"),
    *each_part_of_a_message("tiny"),
    *each_part_of_a_document(),
    *each_body("tiny"),
]


@pytest.fixture(scope="module")
def client(packaged_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    engine = Engine.load(packaged_project, "tiny", tmp_path_factory.mktemp("hostile") / "live")
    app = create_app("tiny")
    app.state.engine = engine
    yield TestClient(app, "http://localhost", client=LOCAL)
    engine.close()


def require_sound(response: httpx.Response) -> None:
    """An answer, or an error of the client's own that says why; the body is ASCII, so any reader can take it."""
    assert response.status_code < 500, response.text[:500]
    assert response.content.isascii() and len(response.content) < 100_000
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["code"]
        assert len(error["message"]) < 2000
        assert response.json()["request_id"] == response.headers["x-request-id"]


def test_the_list_is_long() -> None:
    assert len(HOSTILE) > 300


# In groups: a test of its own for each would cost more than the request.
@pytest.mark.parametrize("part", range(10))
def test_no_request_brings_the_server_down(client: TestClient, part: int) -> None:
    for name, path, body in HOSTILE[part::10]:
        response = client.post(path, content=body, headers={"Content-Type": "application/json"})
        try:
            require_sound(response)
        except AssertionError as error:
            raise AssertionError(f"{path}, {name}: {error}") from error
    assert client.post(CHAT, json=ASKED).json()["choices"][0]["message"]["content"] is not None


@pytest.mark.parametrize("field", ["messages", "passages", "stop", "model", "user", "query"])
def test_half_an_emoji_is_refused_wherever_it_stands(client: TestClient, field: str) -> None:
    value: Any = {
        "messages": [{"role": "user", "content": HALF}],
        "passages": [{"title": HALF, "text": "x"}],
        "stop": [HALF],
    }.get(field, HALF)
    path, body = (RETRIEVE, {}) if field == "query" else (CHAT, ASKED)
    response = client.post(
        path, content=json.dumps(body | {field: value}), headers={"Content-Type": "application/json"}
    )
    error = response.json()["error"]
    assert (response.status_code, error["param"].split(".")[0]) == (400, field)
    assert "\\ud83d, half of a surrogate pair" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1", 404), ("GET", "/v1/nothing", 404), ("GET", "/v1/models/%ff%00", 404), ("PUT", CHAT, 405),
        ("GET", "/schema.json", 404), ("GET", "/docs.json", 404), ("GET", "/static_content/index.css", 404),
        ("GET", "/../../etc/passwd", 404), ("GET", "/v1/models/" + "x" * 5000, 404), ("POST", "/v1/images", 404),
        ("DELETE", "/v1/models/tiny", 405), ("POST", f"{CHAT}/", 404),
        ("GET", "/v1/documents/%00'--", 404), ("DELETE", "/v1/documents/' OR '1'='1", 404),
        ("POST", "/metrics", 405), ("OPTIONS", CHAT, 405),
    ],
)  # fmt: skip
def test_paths_that_are_not_there(client: TestClient, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    require_sound(response)
