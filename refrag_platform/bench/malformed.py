"""Hostile requests of every kind, drawn at random, as the bytes that go through a socket (bench/faults.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from refrag_platform.bench.hostile import (
    CHAT,
    COMPLETIONS,
    DOCUMENTS,
    EMBEDDINGS,
    RESPONSES,
    RETRIEVE,
    HostileBody,
    each_body,
    each_field_with_each_value,
    each_part_of_a_document,
    each_part_of_a_message,
    sound_bodies,
)
from refrag_platform.serving.settings import ApiSettings

JSON = "application/json"
MOST = ApiSettings.max_body
# Fields that hold numbers, and what they can't hold.
NUMBERS = {
    CHAT: (
        "temperature", "top_p", "n", "max_tokens", "max_completion_tokens", "seed", "retrieve", "share_kept",
        "top_logprobs", "presence_penalty", "frequency_penalty",
    ),
    COMPLETIONS: ("max_tokens", "logprobs", "best_of", "n", "temperature", "retrieve"),
    RESPONSES: ("max_output_tokens", "top_logprobs", "temperature", "share_kept"),
    EMBEDDINGS: ("dimensions",),
    RETRIEVE: ("k",),
}  # fmt: skip
ABSURD = (
    "NaN",
    "Infinity",
    "-Infinity",
    "-1",
    "-0.5",
    "1e308",
    "1e400",
    "1" + "0" * 30,
    "9" * 5000,
    "2.5",
    "true",
    '"1"',
)
# The field of a text in each body.
TEXTS = {CHAT: "messages", RETRIEVE: "query", COMPLETIONS: "prompt", RESPONSES: "input", EMBEDDINGS: "input"}
SCALARS = (
    "\ud800",
    "\udfff",
    "\ud83d",
    "\0",
    "\u2028",
    "\u202e",
    "\ufeff",
    "\x7f",
    "\U0010ffff",
    "<|im_end|>",
    "é",
    " ",
)
ROUTES = (
    ("GET", "/v1"), ("GET", "/v1/nothing"), ("POST", "/v1/images"), ("PUT", CHAT), ("GET", CHAT), ("OPTIONS", CHAT),
    ("PATCH", RETRIEVE), ("TRACE", "/v1/models"), ("DELETE", "/v1/models/tiny"), ("POST", f"{CHAT}/"),
    ("POST", "/metrics"), ("GET", "/../../etc/passwd"), ("GET", "/v1/models/%ff%00"), ("GET", "//v1//models"),
    ("GET", "/v1/models/" + "x" * 5000), ("GET", "/static_content/index.css"), ("POST", "/v1/chat/completions%00"),
    ("GET", "/v1/documents?limit=-1"), ("GET", "/v1/documents?after=%ff&limit=1e9"), ("BREW", "/v1/models"),
)  # fmt: skip
HEADERS = (
    ("Content-Type", "text/plain"), ("Content-Type", "multipart/form-data"), ("Content-Type", "application/xml"),
    ("Content-Type", ""), ("Content-Type", f"{JSON}; charset=utf-32"), ("Content-Encoding", "gzip"),
    ("Host", "example.org"), ("Host", ""), ("Host", "[::1"), ("Origin", "https://example.org"), ("Origin", "null"),
    ("X-Forwarded-For", "127.0.0.1"), ("Forwarded", "for=_x"), ("Authorization", "Bearer"),
    ("Authorization", "Basic é"), ("X-Request-Id", "x" * 5000), ("X-Request-Id", "a b\tc"), ("Accept", "x" * 50_000),
    ("Cookie", "=;" * 10_000), ("Range", "bytes=9-1"), ("Upgrade", "websocket"), ("Transfer-Encoding", "gzip"),
)  # fmt: skip
IDS = ("resp_0", "chatcmpl-0", "oman", "' OR '1'='1", "%00'--", "..%2f..%2fetc", "%ff%fe", "0", "-1", "x" * 5000, "*")
MODELS: tuple[Any, ...] = (
    "gpt-4o", "", " ", "../tiny", "TINY", "tiny\0", "x" * 100_000, "\ud83d", None, 1, True, [], {"name": "tiny"},
)  # fmt: skip
BROKEN = (
    b"GARBAGE\r\n\r\n", b"GET\r\n\r\n", b"GET /v1/models HTTP/9.9\r\n\r\n", b"GET /v1/mo dels HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /\0 HTTP/1.1\r\n\r\n",
)  # fmt: skip
BROKEN_HEADERS = (
    b"no colon", b"Name : x", b"X: a\0b", b": x", b"\xff\xfe: x", b"Content-Length: -5", b"Content-Length: abc",
    b"Content-Length: 5\r\nContent-Length: 6", b"Content-Length: 99999999999999999999999",
    b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nzz\r\n",
    b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\n",
)  # fmt: skip


@dataclass(frozen=True)
class HostileRequest:
    """The bytes that are `sent`, and what is wrong with them (`kind`, `name`).

    leaves: the client closes the connection once they are sent. due: an answer is; not where it left, nor to what is no
    HTTP.
    """

    kind: str
    name: str
    sent: bytes
    leaves: bool = False
    due: bool = True


def hostile_requests(model: str, count: int, seed: int) -> Iterator[HostileRequest]:
    """`count` requests, of each kind in turn, the same for a seed."""
    chance = Random(seed)
    kinds = list(KINDS.items())
    for number in range(count):
        kind, drawn = kinds[number % len(kinds)]
        leaves = drawn is _leaving
        yield HostileRequest(kind, *drawn(chance, model), leaves, due=not leaves and drawn is not _broken_http)


def request_bytes(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """A request over a connection of its own. `headers`: written Content_Type; they replace those that it has."""
    given = {"Host": "localhost", "Connection": "close", "Content-Type": JSON, "Content-Length": str(len(body))}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join([*head, "", ""]).encode() + body


Drawn = tuple[str, bytes]


@lru_cache(maxsize=3)
def _bodies(model: str, kind: str) -> list[HostileBody]:
    """The fixed lists, written once a model: some are of megabytes."""
    if kind == "whole":
        return list(each_body(model))
    if kind == "fields":
        return list(each_field_with_each_value(model))
    return [*each_part_of_a_message(model), *each_part_of_a_document()]


def _listed(kind: str) -> Callable[[Random, str], Drawn]:
    def drawn(chance: Random, model: str) -> Drawn:
        name, path, body = chance.choice(_bodies(model, kind))
        return f"{path}, {name}", request_bytes("POST", path, body)

    return drawn


def _sound(chance: Random, model: str) -> tuple[str, dict[str, Any]]:
    path = chance.choice(list(TEXTS))
    return path, sound_bodies(model)[path][1]


def _broken_json(chance: Random, model: str) -> Drawn:
    path, body = _sound(chance, model)
    text = bytearray(json.dumps(body).encode())
    if chance.random() < 0.5:
        del text[chance.randrange(len(text)) :]
        return f"{path}, JSON cut after {len(text)} bytes", request_bytes("POST", path, bytes(text))
    place = chance.randrange(len(text))
    text[place] = chance.randrange(256)
    return f"{path}, byte {place} is {text[place]}", request_bytes("POST", path, bytes(text))


def _absurd_number(chance: Random, model: str) -> Drawn:
    path = chance.choice(list(NUMBERS))
    field, value = chance.choice(NUMBERS[path]), chance.choice(ABSURD)
    body = json.dumps(sound_bodies(model)[path][1])[:-1] + f', "{field}": {value}}}'
    return f"{path}, {field} is {value[:20]}", request_bytes("POST", path, body.encode())


def _odd_text(chance: Random, model: str) -> Drawn:
    path, body = _sound(chance, model)
    text = "".join(chance.choices(SCALARS, k=chance.randint(1, 40)))
    body |= {TEXTS[path]: [{"role": "user", "content": text}] if path == CHAT else text}
    if chance.random() < 0.3:
        # Not escaped: surrogates as bytes, which are no UTF-8.
        sent = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
        return f"{path}, {text[:9]!a} as bytes", request_bytes("POST", path, sent)
    return f"{path}, {text[:9]!a}", request_bytes("POST", path, json.dumps(body).encode())


def _deep_nesting(chance: Random, model: str) -> Drawn:
    path, body = _sound(chance, model)
    depth = int(10 ** chance.uniform(1, 5))
    opened, closed = chance.choice([("[", "]"), ('{"a":', "}")])
    field = chance.choice([TEXTS[path], "tools", "unknown"])
    nested = opened * depth + "1" + closed * depth
    text = json.dumps(body)[:-1] + f', "{field}": {nested}}}'
    return f"{path}, {field} is {depth:,} deep", request_bytes("POST", path, text.encode())


def _oversized(chance: Random, model: str) -> Drawn:
    path, body = _sound(chance, model)
    size = MOST + chance.randint(1, MOST)
    way = chance.choice(["declared", "declared and not sent", "in chunks"])
    padded = json.dumps(body).encode() + b" " * size
    if way == "declared":
        return f"{path}, {size:,} bytes", request_bytes("POST", path, padded)
    if way == "declared and not sent":
        size *= 10 ** chance.randint(0, 12)
        return f"{path}, {size:,} bytes, {way}", request_bytes("POST", path, Content_Length=str(size))
    parts = [padded[place : place + 65536] for place in range(0, len(padded), 65536)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    return f"{path}, {size:,} bytes {way}", _chunked(path) + chunks


def _chunked(path: str) -> bytes:
    head = ["Host: localhost", "Connection: close", f"Content-Type: {JSON}", "Transfer-Encoding: chunked"]
    return "\r\n".join([f"POST {path} HTTP/1.1", *head, "", ""]).encode()


def _wrong_route(chance: Random, model: str) -> Drawn:
    method, path = chance.choice(ROUTES)
    return f"{method} {path[:40]}", request_bytes(method, path)


def _wrong_header(chance: Random, model: str) -> Drawn:
    path, body = _sound(chance, model)
    name, value = chance.choice(HEADERS)
    sent = request_bytes("POST", path, json.dumps(body).encode(), **{name: value})
    return f"{path}, {name}: {value[:20]}", sent


def _wrong_model(chance: Random, model: str) -> Drawn:
    if chance.random() < 0.3:
        path = "/v1/models/" + chance.choice(["gpt-4o", "%ff", "..%2f..", "a/b/c", "%00", "x" * 5000])
        return f"GET {path[:40]}", request_bytes("GET", path)
    path, body = _sound(chance, model)
    # The look-up takes no model: there it is a field that isn't known.
    name = chance.choice(MODELS)
    return f"{path}, model {str(name)[:20]!a}", request_bytes("POST", path, json.dumps(body | {"model": name}).encode())


def _guessed_id(chance: Random, model: str) -> Drawn:
    name = chance.choice([*IDS, f"resp_{chance.getrandbits(128):032x}", f"{chance.getrandbits(32)}"])
    method, path = chance.choice(
        [
            ("GET", f"/v1/responses/{name}"), ("DELETE", f"/v1/responses/{name}"),
            ("POST", f"/v1/responses/{name}/cancel"),
            ("GET", f"{DOCUMENTS}/{name}"), ("DELETE", f"{DOCUMENTS}/{name}"),
        ]
    )  # fmt: skip
    return f"{method} {path[:40]}", request_bytes(method, path.replace(" ", "%20"))


def _broken_http(chance: Random, model: str) -> Drawn:
    way = chance.choice(["line", "header", "bytes"])
    if way == "bytes":
        return "random bytes", chance.randbytes(chance.randint(1, 2000)) + b"\r\n\r\n"
    if way == "line":
        sent = chance.choice(BROKEN)
        return repr(sent)[:40], sent
    header = chance.choice(BROKEN_HEADERS)
    return repr(header)[:40], f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode() + header + b"\r\n\r\n{}"


def _leaving(chance: Random, model: str) -> Drawn:
    body = json.dumps(sound_bodies(model)[CHAT][1] | {"max_tokens": 200, "stream": chance.random() < 0.5}).encode()
    whole = request_bytes("POST", CHAT, body)
    way = chance.choice(["in the head", "in the body", "in a chunk", "before the answer"])
    if way == "in the head":
        return way, whole[: chance.randint(1, len(whole) - len(body) - 1)]
    if way == "in the body":
        return way, whole[: -chance.randint(1, len(body))]
    if way == "in a chunk":
        return way, _chunked(CHAT) + b"%x\r\n" % (2 * len(body)) + body[: chance.randint(0, len(body))]
    return way, whole


KINDS: dict[str, Callable[[Random, str], Drawn]] = {
    "broken JSON": _broken_json,
    "wrong body": _listed("whole"),
    "wrong field": _listed("fields"),
    "wrong message or document": _listed("parts"),
    "absurd number": _absurd_number,
    "odd text": _odd_text,
    "deep nesting": _deep_nesting,
    "body too large": _oversized,
    "wrong method or route": _wrong_route,
    "wrong header": _wrong_header,
    "wrong model": _wrong_model,
    "guessed id": _guessed_id,
    "broken HTTP": _broken_http,
    "client that leaves": _leaving,
}
