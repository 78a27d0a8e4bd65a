"""Processes that this one starts, none of which outlives it, and how one ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from refrag_platform.errors import Paused, RefragError

PR_SET_PDEATHSIG = 1


def ends_with_parent(number: signal.Signals) -> Callable[[], None]:
    """A `preexec_fn`: Linux sends the child `number` when its parent ends, even if that is killed."""
    # Looked up here: between fork and exec a child should do as little as it can.
    library = ctypes.CDLL(None)

    def ask() -> None:
        with contextlib.suppress(OSError, AttributeError):
            library.prctl(PR_SET_PDEATHSIG, number)

    return ask


@contextmanager
def stopped_after(seconds: float | None) -> Iterator[None]:
    """SIGTERM comes to this process after that many seconds of the block, once; None: it doesn't.

    A training takes the signal itself, and saves. Anything else is left where it is, to go on from what it saved last.

    Raises:
        Paused: the block was left by SIGTERM.
    """
    if seconds is None:
        yield
        return

    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        # No Exception: what a library suppresses would let the run go on. Ray raises another in its place.
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    # No thread: a signal that one sends needn't reach the main thread while that waits.
    alarm = signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    earlier = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except KeyboardInterrupt:
        if not stopped:
            raise
        raise Paused(
            f"stopped by a signal, or after the {seconds:g} s it was given; run it again to continue"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        signal.setitimer(signal.ITIMER_REAL, *earlier)
        signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    """A port of this machine's own address on which nobody listens just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require_free(host: str, port: int) -> None:
    """Refuse a port that a server can't have.

    Raises:
        RefragError: another program listens there, or the address is not this machine's.
    """
    with _bound(host, port):
        pass


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, for servers that are started later.

    Raises:
        RefragError: as of `require_free`.
    """
    listener = _bound(host, port)
    listener.listen(2048)
    return listener


def _bound(host: str, port: int) -> socket.socket:
    probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # As servers do: a port whose last connections are still winding down is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
    except OSError as error:
        probe.close()
        raise RefragError(f"can't listen on {host}:{port} ({error.strerror}); give another by --port") from None
    return probe


def leave(status: int) -> NoReturn:
    """End this process at once, its words said, without taking the interpreter down; its files must be closed by now.

    A thread of gloo's may still hold tensors of the last reductions and needs the interpreter to let go of them. While
    that is taken down, as on a busy machine it is before the thread's turn comes, asking for it aborts the process, and
    a training that went well counts as failed.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a pipe that nobody reads any more
            stream.flush()
    os._exit(status)
