"""Waiting for what other processes and threads do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import httpx


def wait_for(condition: Callable[[], bool], seconds: float, log: Path | None = None) -> None:
    """Wait until something holds; a log says why if it never does."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, log.read_text() if log else f"it did not happen within {seconds:g} s"
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
