"""Other processes: starting them, ending them, waiting for what they do."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx


@contextmanager
def running(command: Sequence[str], log: Path, folder: Path, **environment: str) -> Iterator[None]:
    """A process in a session of its own, its words in `log`; at the end all of the session is killed."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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
