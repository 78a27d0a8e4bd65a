"""Bodies that no client should send, each well-formed HTTP: what `refrag bench faults` and tests put to the service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel

CHAT, RETRIEVE, DOCUMENTS = "/v1/chat/completions", "/v1/retrieve", "/v1/documents"
COMPLETIONS, RESPONSES, EMBEDDINGS = "/v1/completions", "/v1/responses", "/v1/embeddings"
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
# What is wrong, the path, the body.
HostileBody = tuple[str, str, bytes]


def sound_bodies(model: str) -> dict[str, tuple[type[BaseModel], dict[str, Any]]]:
    """For each path that takes a body: the fields that it knows, and a body that it answers."""
    # The service's packages are not there where other benchmarks run.
    from refrag_platform.serving.chat import ChatRequest
    from refrag_platform.serving.completions import CompletionRequest
    from refrag_platform.serving.documents import DocumentsRequest
    from refrag_platform.serving.embeddings import EmbeddingRequest
    from refrag_platform.serving.responses import ResponseRequest
    from refrag_platform.serving.schema import RetrieveRequest

    chat = {"model": model, "messages": [{"role": "user", "content": "Capital of Peru?"}], "max_tokens": 2}
    return {
        CHAT: (ChatRequest, chat),
        RETRIEVE: (RetrieveRequest, {"query": "Peru"}),
        COMPLETIONS: (CompletionRequest, {"model": model, "prompt": "Lima is", "max_tokens": 2}),
        RESPONSES: (ResponseRequest, {"model": model, "input": "Peru?", "max_output_tokens": 2}),
        EMBEDDINGS: (EmbeddingRequest, {"model": model, "input": "Peru"}),
        DOCUMENTS: (DocumentsRequest, {"documents": [{"id": "oman", "text": "Oman lies in Arabia."}]}),
    }


def each_field_with_each_value(model: str) -> Iterator[HostileBody]:
    for path, (fields, sound) in sound_bodies(model).items():
        for field in fields.model_fields:
            for name, value in VALUES.items():
                yield f"{field}: {name}", path, json.dumps(sound | {field: value}).encode()


def each_part_of_a_message(model: str) -> Iterator[HostileBody]:
    asked = sound_bodies(model)[CHAT][1]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    sound: list[dict[str, Any]] = [
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
                yield f"messages.{place}.{field}: {name}", CHAT, json.dumps(asked | {"messages": messages}).encode()
    for field in ("title", "text"):
        for name, value in VALUES.items():
            body = asked | {"passages": [{"title": "t", "text": "x"} | {field: value}]}
            yield f"passages.0.{field}: {name}", CHAT, json.dumps(body).encode()


def each_part_of_a_document() -> Iterator[HostileBody]:
    for field in ("id", "title", "text"):
        for name, value in VALUES.items():
            document = {"id": "oman", "title": "Oman", "text": "Oman lies in Arabia."} | {field: value}
            yield f"documents.0.{field}: {name}", DOCUMENTS, json.dumps({"documents": [document]}).encode()


def each_body(model: str) -> Iterator[HostileBody]:
    """What is wrong with a body as a whole, sent to two routes."""
    asked = sound_bodies(model)[CHAT][1]
    opened = json.dumps({"model": model})[:-1].encode()
    parts = [{"role": "user", "content": [{"type": "text"}] * 80_000}]
    bodies = {
        "empty": b"",
        "no object": b"[1, 2]",
        "null": b"null",
        "half": opened,
        "not UTF-8": b'{"model": "\xff\xfe"}',
        "nested deep": opened + b', "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "nested as deep as the reader goes": json.dumps(asked)[:-1].encode()
        + b', "tools": '
        + b"[" * 900
        + b"]" * 900
        + b"}",
        "a number of 5,000 digits": opened + b', "seed": ' + b"9" * 5000 + b"}",
        "NaN": json.dumps(asked | {"temperature": float("nan")}).encode(),
        "infinity": json.dumps(asked | {"top_p": float("inf")}).encode(),
        "two million words": json.dumps({"query": "x " * 2_000_000}).encode(),
        "300,000 unknown fields": json.dumps({f"k{number}": 1 for number in range(300_000)}).encode(),
        "100,000 messages": json.dumps(asked | {"messages": asked["messages"] * 100_000}).encode(),
        "80,000 parts": json.dumps(asked | {"messages": parts}).encode(),
        "a name of a megabyte": json.dumps(asked | {"x" * 2**20: 1}).encode(),
    }
    for name, body in bodies.items():
        for path in (CHAT, RETRIEVE):
            yield name, path, body
