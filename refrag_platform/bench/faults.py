"""The service under requests that no client should send: `refrag bench faults`.

Each goes over a connection of its own as the bytes that it is, so that nothing mends it on the way. Ordinary questions
before, in between and after show that the service goes on.
"""

from __future__ import annotations

import http.client
import json
import logging
import socket
from collections import Counter, defaultdict
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from refrag_platform.bench.clients import NO_ANSWER
from refrag_platform.bench.hostile import CHAT
from refrag_platform.bench.machine import runs_on
from refrag_platform.bench.malformed import hostile_requests, request_bytes
from refrag_platform.bench.service import served
from refrag_platform.progress import Progress
from refrag_platform.serving.settings import SECONDS_TO_READ, ApiSettings

if TYPE_CHECKING:
    from refrag_platform.serving.engine import Engine

# Seconds: of one answer; what is waited for where none is due; and how long a client stays that leaves.
DEADLINE, NOT_DUE, MOMENT = 60.0, 2.0, 0.2
# After so many hostile requests comes an ordinary question.
BETWEEN = 20
# What says that something isn't to be had here, or not now; any other 5xx is a fault of the service.
MEANT = frozenset({501, 503, 504})
# The error of a stream whose status line, a 200, is gone.
FAILED_LATER = b'"code": "internal_error"'
MOST_TOLD = 3


def bench_faults(engine: Engine, count: int, seed: int = 0) -> dict[str, Any]:
    """A row for each kind of `count` hostile requests: how many, and the statuses of their answers (0: no answer).

    `failed` names each that had a 5xx which isn't meant, or no answer where one was due, and an ordinary question that
    was not answered, after which no more is sent.
    """
    tally: dict[str, Counter[int]] = defaultdict(Counter)
    failed: list[str] = []
    asked = answered = 0
    with (
        served(engine, ApiSettings(deadline=DEADLINE)) as url,
        Progress("hostile requests", count, "requests") as progress,
    ):
        # It warns of each request that is no HTTP.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        address = (str(urlsplit(url).hostname), int(urlsplit(url).port or 0))
        for number, request in enumerate(hostile_requests(engine.name, count, seed)):
            if number % BETWEEN == 0:
                asked, answered = asked + 1, answered + _answers(address, engine.name)
                if answered < asked:
                    break
            status, _ = exchange(address, request.sent, request.due, request.leaves)
            tally[request.kind][status] += 1
            if (status >= 500 and status not in MEANT) or (status == NO_ANSWER and request.due):
                failed.append(f"{status or 'no answer'} to {request.kind} ({request.name})")
            progress.update()
        else:
            asked, answered = asked + 1, answered + _answers(address, engine.name)
    if answered < asked:
        failed.append(f"no answer to an ordinary question after {sum(map(Counter.total, tally.values())):,} requests")
    rows = [
        {"kind": kind, "requests": seen.total(), "statuses": {str(status): seen[status] for status in sorted(seen)}}
        for kind, seen in tally.items()
    ]
    return {
        "benchmark": "faults",
        "model": engine.name,
        **runs_on(engine.bundle.model.decoder),
        "store": engine.store is not None,
        "documents": engine.live is not None,
        "seed": seed,
        "requests": sum(row["requests"] for row in rows),
        "between": BETWEEN,
        "ordinary": {"asked": asked, "answered": answered},
        "rows": rows,
        "failed": failed,
    }


def told(failed: list[str]) -> str:
    """The failed requests of a result, the first of them by name."""
    more = f"; and {len(failed) - MOST_TOLD:,} more" if len(failed) > MOST_TOLD else ""
    return f"the service failed at {len(failed):,} requests, and its log above says why: " + (
        "; ".join(failed[:MOST_TOLD]) + more
    )


def exchange(address: tuple[str, int], sent: bytes, due: bool = True, leaves: bool = False) -> tuple[int, bytes]:
    """Status and body of the answer to these bytes over a connection of their own; no status: `NO_ANSWER`.

    Args:
        due: wait as long as an answer may take.
        leaves: close the connection at the answer's first byte, or a moment later.
    """
    seconds = DEADLINE + 2 * SECONDS_TO_READ if due else NOT_DUE
    try:
        connection = socket.create_connection(address, timeout=seconds)
    except OSError:
        return NO_ANSWER, b""
    with connection:
        # One that is refused before all of it is sent may have its answer.
        with suppress(OSError):
            connection.sendall(sent)
        if leaves:
            connection.settimeout(MOMENT)
            with suppress(OSError):
                connection.recv(1)
            return NO_ANSWER, b""
        response = HTTPResponse(connection)
        try:
            response.begin()
            body = response.read()
        except (HTTPException, OSError):
            return NO_ANSWER, b""
        finally:
            response.close()
    failed = response.status == http.client.OK and FAILED_LATER in body
    return http.client.INTERNAL_SERVER_ERROR if failed else response.status, body


def _answers(address: tuple[str, int], model: str) -> bool:
    """Whether an ordinary question over a passage is answered in full."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Where does Oman lie?"}],
        "passages": [{"title": "Oman", "text": "Oman lies in Arabia. Its capital is Muscat."}],
        "max_tokens": 8,
    }
    status, answer = exchange(address, request_bytes("POST", CHAT, json.dumps(body).encode()))
    return status == http.client.OK and bool(json.loads(answer)["choices"][0]["finish_reason"])
