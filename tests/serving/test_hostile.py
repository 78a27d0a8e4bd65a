"""Hundreds of requests that no client should send: each gets an error that it can read, and the server goes on."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from refrag_platform.project import Project
from refrag_platform.serving.api import create_app
from refrag_platform.serving.chat import ChatRequest
from refrag_platform.serving.completions import CompletionRequest
from refrag_platform.serving.documents import DocumentsRequest
from refrag_platform.serving.embeddings import EmbeddingRequest
from refrag_platform.serving.engine import Engine
from refrag_platform.serving.responses import ResponseRequest
from refrag_platform.serving.schema import RetrieveRequest

LOCAL = ("127.0.0.1", 50000)
CHAT, RETRIEVE = "/v1/chat/completions", "/v1/retrieve"
ASKED: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Capital of Peru?"}],
    "max_tokens": 2,
}
QUERY: dict[str, Any] = {"query": "Peru"}
HALF = "hi \ud83d"
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "minus": -1,
    "huge": 10**30,
    "fraction": 0.5,
    "text": "x",
    "half an emoji": HALF,
    "odd text": "\0\u2028\u0085\u202e\ufeff <|im_end|>\r\n",
    "long": "ab " * 100_000,
    "list": [],
    "list of lists": [[[]], [None]],
    "object": {},
    "object of anything": {"type": HALF, "\ud83d": [1e308, None]},
}
BODIES: dict[str, bytes] = {
    "empty": b"",
    "no object": b"[1, 2]",
    "null": b"null",
    "half": b'{"model": "tiny"',
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "nested deep": b'{"model": "tiny", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested as deep as the reader goes": json.dumps(ASKED)[:-1].encode()
    + b', "tools": '
    + b"[" * 900
    + b"]" * 900
    + b"}",
    "a number of 5,000 digits": b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}",
    "NaN": json.dumps(ASKED | {"temperature": float("nan")}).encode(),
    "infinity": json.dumps(ASKED | {"top_p": float("inf")}).encode(),
    "two million words": json.dumps({"query": "x " * 2_000_000}).encode(),
    "300,000 unknown fields": json.dumps({f"k{number}": 1 for number in range(300_000)}).encode(),
    "100,000 messages": json.dumps(ASKED | {"messages": ASKED["messages"] * 100_000}).encode(),
    "80,000 parts": json.dumps(
        ASKED | {"messages": [{"role": "user", "content": [{"type": "text"}] * 80_000}]}
    ).encode(),
    "a name of a megabyte": json.dumps(ASKED | {"x" * 2**20: 1}).encode(),
}


def each_field_with_each_value() -> Iterator[tuple[str, str, bytes]]:
    for path, model, sound in (
        (CHAT, ChatRequest, ASKED),
        (RETRIEVE, RetrieveRequest, QUERY),
        ("/v1/completions", CompletionRequest, {"model": "tiny", "prompt": "Lima is", "max_tokens": 2}),
        ("/v1/responses", ResponseRequest, {"model": "tiny", "input": "Peru?", "max_output_tokens": 2}),
        ("/v1/embeddings", EmbeddingRequest, {"model": "tiny", "input": "Peru"}),
        ("/v1/documents", DocumentsRequest, {"documents": [{"id": "oman", "text": "Oman lies in Arabia."}]}),
    ):
        for field in model.model_fields:
            for name, value in VALUES.items():
                yield f"{field}: {name}", path, json.dumps(sound | {field: value}).encode()


def each_part_of_a_message() -> Iterator[tuple[str, str, bytes]]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    sound = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}], "name": "Ana"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
        {"role": "user", "content": "So?"},
    ]
    for place, message in enumerate(sound):
        for field in [*message, "unknown"]:
            for name, value in VALUES.items():
                messages = [*sound[:place], message | {field: value}, *sound[place + 1 :]]
                yield f"messages.{place}.{field}: {name}", CHAT, json.dumps(ASKED | {"messages": messages}).encode()
    for field in ("title", "text"):
        for name, value in VALUES.items():
            body = ASKED | {"passages": [{"title": "t", "text": "x"} | {field: value}]}
            yield f"passages.0.{field}: {name}", CHAT, json.dumps(body).encode()


def each_part_of_a_document() -> Iterator[tuple[str, str, bytes]]:
    for field in ("id", "title", "text"):
        for name, value in VALUES.items():
            document = {"id": "oman", "title": "Oman", "text": "Oman lies in Arabia."} | {field: value}
            yield f"documents.0.{field}: {name}", "/v1/documents", json.dumps({"documents": [document]}).encode()


def each_body() -> Iterator[tuple[str, str, bytes]]:
    for name, body in BODIES.items():
        for path in (CHAT, RETRIEVE):
            yield name, path, body


HOSTILE = [*each_field_with_each_value(), *each_part_of_a_message(), *each_part_of_a_document(), *each_body()]


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
