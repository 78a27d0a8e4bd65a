"""Clients of the service in a process of their own, each with a request after the other (bench/service.py).

It reads a `Load` as JSON from standard input and writes what was seen to standard output: {"answers": [{"status",
"first_ms", "tokens"}], "seconds"}. Its own interpreter, so that clients take no time of the server's.
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
class Load:
    """clients: at once. seconds: after which none begins anew. requests: of each client at most; 0: any number.

    bodies: what is sent to `url`, in turns.
    """

    url: str
    clients: int
    seconds: float
    requests: int
    bodies: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Seen:
    """One answer: its status, milliseconds from sending to the first text (None: no text), and its tokens."""

    status: int
    first_ms: float | None
    tokens: int


async def ask_all(load: Load) -> tuple[list[Seen], float]:
    """Every answer that was asked for, and the seconds until the last one had ended."""
    import httpx

    limits = httpx.Limits(max_connections=load.clients, max_keepalive_connections=load.clients)
    answers: list[Seen] = []
    begun = time.monotonic()
    async with httpx.AsyncClient(timeout=httpx.Timeout(30.0, read=600.0), limits=limits, trust_env=False) as client:

        async def asks(number: int) -> None:
            made = 0
            while time.monotonic() - begun < load.seconds and (not load.requests or made < load.requests):
                body = load.bodies[(number + made * load.clients) % len(load.bodies)]
                answers.append(await ask(client, load.url, body))
                made += 1

        await asyncio.gather(*(asks(number) for number in range(load.clients)))
    return answers, time.monotonic() - begun


async def ask(client: Any, url: str, body: dict[str, Any]) -> Seen:
    """One streamed answer. Who is refused for now waits as long as is said, and counts."""
    import httpx

    begun, first, tokens, last = time.monotonic(), None, 0, ""
    try:
        async with client.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                await response.aread()
                if response.status_code == 429:
                    await asyncio.sleep(min(float(response.headers.get("Retry-After", 1)), LONGEST_WAIT))
                return Seen(response.status_code, None, 0)
            async for line in response.aiter_lines():
                if first is None and line.startswith("data: {") and _text(json.loads(line[6:])):
                    first = (time.monotonic() - begun) * 1000
                if line.startswith("data: {"):
                    # All but the last are read no further: clients are to be quicker than the server.
                    last = line
            tokens = (json.loads(last[6:]).get("usage") or {}).get("completion_tokens", 0) if last else 0
            if "error" in last[:12]:
                return Seen(NO_ANSWER, first, 0)
    except httpx.TransportError:
        return Seen(NO_ANSWER, first, 0)
    return Seen(200, first, tokens)


def _text(event: dict[str, Any]) -> str:
    return "".join(choice.get("text") or "" for choice in event.get("choices", []))


def main() -> None:
    """The process: a load in, what was seen out."""
    answers, seconds = asyncio.run(ask_all(Load(**json.load(sys.stdin))))
    json.dump({"answers": [asdict(one) for one in answers], "seconds": seconds}, sys.stdout)


if __name__ == "__main__":
    main()
