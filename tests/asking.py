"""Clients that ask a service all the time, and note each request that fails."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Asked:
    """What came of the requests so far: how many were answered in full, and what went wrong with others."""

    answered: int = 0
    failed: list[str] = field(default_factory=list)


def ask(client: httpx.Client, url: str, stream: bool, **body: Any) -> None:
    """An answer, read to its end.

    Raises:
        AssertionError, ValueError: it is an error, or cut. httpx.TransportError: there is none.
    """
    body |= {"messages": [{"role": "user", "content": "Where does Oman lie?"}], "max_tokens": 24, "stream": stream}
    body |= {"retrieve": 0, "passages": [{"title": "Oman", "text": "Oman lies in Arabia. Its capital is Muscat."}]}
    with client.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=300) as response:
        text = response.read().decode()
    assert response.status_code == 200, text
    assert text.rstrip().endswith("data: [DONE]") if stream else response.json()["choices"][0]["finish_reason"], text


@contextmanager
def asking(url: str, model: str, threads: int = 4) -> Iterator[Asked]:
    """Ask from several threads, streamed and not, over connections that are kept and ones that aren't."""
    asked, ends, lock = Asked(), threading.Event(), threading.Lock()

    def run(number: int) -> None:
        kept = httpx.Client(trust_env=False) if number % 2 else None
        while not ends.is_set():
            for stream in (True, False):
                client = kept or httpx.Client(trust_env=False)
                try:
                    ask(client, url, stream, model=model)
                    with lock:
                        asked.answered += 1
                except (AssertionError, ValueError, httpx.TransportError) as error:
                    asked.failed.append(repr(error))
                    ends.wait(0.2)
                if client is not kept:
                    client.close()
        if kept:
            kept.close()

    running = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield asked
    finally:
        ends.set()
        for thread in running:
            thread.join(300)
