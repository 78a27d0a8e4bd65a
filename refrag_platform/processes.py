"""Processes that this one starts: none of them outlives it."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import socket
from collections.abc import Callable

PR_SET_PDEATHSIG = 1


def ends_with_parent(number: signal.Signals) -> Callable[[], None]:
    """A `preexec_fn`: Linux sends the child `number` when its parent ends, even if that is killed."""
    # Looked up here: between fork and exec a child should do as little as it can.
    library = ctypes.CDLL(None)

    def ask() -> None:
        with contextlib.suppress(OSError, AttributeError):
            library.prctl(PR_SET_PDEATHSIG, number)

    return ask


def free_port() -> int:
    """A port of this machine's own address on which nobody listens just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
