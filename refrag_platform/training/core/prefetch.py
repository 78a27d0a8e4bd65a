"""Make the next batches while the device works on this one: in a thread, or in processes where a thread is too slow."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")
AHEAD = 4


class _Steps(Dataset[Any]):
    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __getitem__(self, step: int) -> Any:
        return self._make(step)


def made_by_workers(make: Callable[[int], T], steps: range, workers: int) -> Iterator[T]:
    """What `make` gives for each step, in order, made by forked processes; it touches no device."""
    return iter(
        DataLoader(
            _Steps(make),
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            collate_fn=_as_made,
            worker_init_fn=_begin_work,
            multiprocessing_context="fork",
        )
    )


def _as_made(item: T) -> T:
    return item


def _begin_work(number: int) -> None:
    # A signal to the training's group, Ctrl-C or a cancelled run, asks it to stop; it ends its workers then itself.
    os.setpgid(0, 0)
    # A tokenizer's threads don't survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


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
