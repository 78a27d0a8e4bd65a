"""A client of the service: one question by streaming HTTP, what its answer cost, and `answer_once` for the demo.

    answer_once(project, "tiny", "What is the capital of Peru?")

starts the Bento on a free port, asks, and stops it.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from refrag_platform.corpus.text import require_unicode
from refrag_platform.errors import RefragError
from refrag_platform.project import Project
from refrag_platform.serving import bento

if TYPE_CHECKING:
    import httpx

SECONDS_PER_READ = 300.0


@dataclass
class StreamedAnswer:
    """A streamed answer: iterate for its text; then `usage`, `refrag` and `ttft_ms` are known.

    ttft_ms is measured here, from sending the request to the first text.
    """

    events: Iterator[dict[str, Any]]
    usage: dict[str, int] = field(default_factory=dict)
    refrag: dict[str, Any] = field(default_factory=dict)
    ttft_ms: float | None = None
    begun: float = field(default_factory=time.monotonic)

    def __iter__(self) -> Iterator[str]:
        for event in self.events:
            if "error" in event:
                raise RefragError(f"the server failed while answering: {event['error']['message']}")
            self.usage = event.get("usage") or self.usage
            self.refrag = event.get("refrag") or self.refrag
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    if self.ttft_ms is None:
                        self.ttft_ms = round((time.monotonic() - self.begun) * 1000, 3)
                    yield text


def ask(url: str, question: str, model: str | None = None, key: str | None = None, **extra: Any) -> StreamedAnswer:
    """Ask a running server; the request is sent when the answer is iterated.

    Args:
        url: the server, e.g. http://127.0.0.1:3000. model: default the one it serves.
        extra: further fields of the request, e.g. retrieve=4, share_kept=0.1.

    Raises:
        RefragError: the address has no scheme, the question is not valid Unicode, the key can't be sent; while
            iterating: the server can't be reached, refuses, with its message, or is another program's.
    """
    require_unicode(question, "the question")
    if not url.startswith(("http://", "https://")):
        raise RefragError(f"the server's address is {url!r}; give it with its scheme, e.g. http://127.0.0.1:3000")
    require_unicode(url, "the server's address")
    if key and not (key.isascii() and key.isprintable()):
        raise RefragError("the key ($REFRAG_API_KEY) has characters that no header can hold; give it in plain ASCII")
    return StreamedAnswer(_events(url.rstrip("/"), question, model, key, extra))


def answer_once(project: Project, model: str, question: str, **extra: Any) -> dict[str, Any]:
    """Serve a model's Bento, ask it one question by streaming HTTP, and stop it; its output is in work/NAME/serve.log.

    Returns: question, answer, citations, ttft_ms (at the client), usage, refrag (the response's own field),
    model_tag, bento_tag.

    Raises:
        RefragError: there is no Bento, or it fails; the message shows the end of its log.
    """
    package = bento.Package.of(project, model)
    log = project.root / "work" / model / "serve.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # Nobody else asks this server: it has a key of its own, whatever the environment names, and it leaves alone the
    # folder that another server may hold, and the object store, where it would publish a candidate's tables.
    key = secrets.token_urlsafe(32)
    others = ("API_KEYS", "API_KEYS_FILE", "STORE", "TABLES")
    closed = {"REFRAG_API_KEY": key} | {f"REFRAG_{name}": "" for name in others}
    with bento.running(project, model, log, variables=closed) as url:
        streamed = ask(url, question, model, key, **extra)
        answer = "".join(streamed)
    return {
        "question": question,
        "answer": answer,
        "citations": streamed.refrag.get("citations", []),
        "ttft_ms": streamed.ttft_ms,
        "usage": streamed.usage,
        "refrag": streamed.refrag,
        "model_tag": package.model_tag,
        "bento_tag": package.bento_tag,
    }


def cost(refrag: Mapping[str, Any]) -> str:
    """An answer's `refrag` field in words: what was read, and how much it would have been without compression."""
    return (
        f"{refrag['chunks_expanded']} of {refrag['chunks']} chunks expanded, compression "
        f"{refrag['compression_rate']:.2f}x: {refrag['prompt_positions']} positions instead of "
        f"{refrag['plain_prompt_tokens']} tokens"
    )


def api_key() -> str | None:
    """The key of the environment, the same variable that the server reads."""
    return os.environ.get("REFRAG_API_KEY") or None


def _events(
    url: str, question: str, model: str | None, key: str | None, extra: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = httpx.Timeout(10.0, read=SECONDS_PER_READ)
    # No proxy of the environment: the server is on this machine or named outright.
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False) as client:
            name = model or _first_model(_checked(client.get("/v1/models")))
            asked = {"stream": True, "stream_options": {"include_usage": True}}
            body = {"model": name, "messages": [{"role": "user", "content": question}], **asked, **extra}
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                for line in _checked(response).iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield _event(line.removeprefix("data: "), url)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise RefragError(f"no answer from {url}: {error}; is the server running (`make serve`)?") from None


def _first_model(response: httpx.Response) -> str:
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise RefragError(
            f"{response.url} lists no model: another program serves there ({response.text[:80]!r})"
        ) from None


def _event(text: str, url: str) -> dict[str, Any]:
    try:
        event = json.loads(text)
    except ValueError:
        event = None
    if not isinstance(event, dict) or not {"error", "choices"} & event.keys():
        raise RefragError(f"{url} sent {text[:80]!r}, which is no part of an answer: another program serves there")
    return event


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    body = response.read().decode("utf-8", "replace")
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body[:500]
    raise RefragError(f"{response.url} answered {response.status_code}: {message}")
