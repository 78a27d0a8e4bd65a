"""Make the next batches in a thread while the device works on this one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
AHEAD = 4


@contextmanager
def prefetch(items: Iterator[T]) -> Iterator[Iterator[T]]:
    """Iterate over `items`, made a few ahead in a thread that ends with the context."""
    ready: queue.Queue[Any] = queue.Queue(AHEAD)
    closing = threading.Event()
    end = object()

    def put(item: Any) -> bool:
        while not closing.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def fill() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    def drain() -> Iterator[T]:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item

    thread = threading.Thread(target=fill, name="prefetch", daemon=True)
    thread.start()
    try:
        yield drain()
    finally:
        closing.set()
        thread.join()
