"""Clients of the service in a process of their own, each with a request after the other (bench/service.py).

It reads a `Load` as JSON from standard input and writes what was seen to standard output: {"answers": [{"status",
"first_ms", "tokens"}], "begun", "ended"}. Its own interpreter, so that clients take no time of the server's.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Of a request that got no status.
NO_ANSWER = 0
LONGEST_WAIT = 5.0


@dataclass(frozen=True)
class ClientLoad:
    """clients: at once. seconds: after which none begins anew. requests: of each client at most; 0: any number.

    bodies: what is sent to `url`, in turns of all `stride` clients, of whom these are number `first` and on.
    """

    url: str
    clients: int
    seconds: float
    requests: int
    bodies: Sequence[dict[str, Any]]
    first: int
    stride: int


@dataclass(frozen=True)
class Reply:
    """One answer: its status, milliseconds from sending to the first text (None: no text), and its tokens."""

    status: int
    first_ms: float | None
    tokens: int


async def ask_all(load: ClientLoad) -> tuple[list[Reply], float, float]:
    """Every answer that was asked for, and when the first began and the last had ended, of the machine's clock."""
    import httpx

    limits = httpx.Limits(max_connections=load.clients, max_keepalive_connections=load.clients)
    answers: list[Reply] = []
    begun = time.monotonic()
    async with httpx.AsyncClient(timeout=httpx.Timeout(30.0, read=600.0), limits=limits, trust_env=False) as client:

        async def asks(number: int) -> None:
            sent = 0
            while time.monotonic() - begun < load.seconds and (not load.requests or sent < load.requests):
                turn = load.first + number + sent * load.stride
                body = load.bodies[turn % len(load.bodies)]
                answers.append(await ask(client, load.url, body))
                sent += 1

        await asyncio.gather(*(asks(number) for number in range(load.clients)))
    return answers, begun, time.monotonic()


async def ask(client: Any, url: str, body: dict[str, Any]) -> Reply:
    """One streamed answer. Who is refused for now waits as long as is said, and counts."""
    import httpx

    begun, first, tokens, last = time.monotonic(), None, 0, ""
    try:
        async with client.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                await response.aread()
                if response.status_code == 429:
                    await asyncio.sleep(min(float(response.headers.get("Retry-After", 1)), LONGEST_WAIT))
                return Reply(response.status_code, None, 0)
            async for line in response.aiter_lines():
                if first is None and line.startswith("data: {") and _text(json.loads(line[6:])):
                    first = (time.monotonic() - begun) * 1000
                if line.startswith("data: {"):
                    # All but the last are read no further: clients are to be quicker than the server.
                    last = line
            # An answer that fails after its status line ends in an error, or without its usage.
            usage = json.loads(last[6:]).get("usage") if last else None
            if not usage:
                return Reply(NO_ANSWER, None, 0)
            tokens = usage["completion_tokens"]
    except httpx.TransportError:
        return Reply(NO_ANSWER, first, 0)
    return Reply(200, first, tokens)


def _text(event: dict[str, Any]) -> str:
    return "".join(choice.get("text") or "" for choice in event.get("choices", []))


def main() -> None:
    """The process: a load in, what was seen out."""
    answers, begun, ended = asyncio.run(ask_all(ClientLoad(**json.load(sys.stdin))))
    json.dump({"answers": [asdict(one) for one in answers], "begun": begun, "ended": ended}, sys.stdout)


if __name__ == "__main__":
    main()
