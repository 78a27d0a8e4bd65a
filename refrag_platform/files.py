"""Files and folders that appear whole or not at all, and locks; whenever the process is killed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to make the file or folder `path`, which has its name only after the block; folders above it are made.

    What is there already is replaced, and stays where the block or the replacing fails; behind a link the place that it
    leads to. One writer at a time.
    """
    path, partial = path.resolve(), partial_path(path)
    old = path.with_name(f".{path.name}.old")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)  # left by a killed process
    if old.exists() and not path.exists():  # a kill came between the two renames below
        old.rename(path)
    try:
        yield partial
        if path.is_dir():
            _remove(old)
            path.rename(old)
        partial.replace(path)
    finally:
        _remove(partial)
        if old.exists() and not path.exists():
            old.rename(path)
    _remove(old)


def partial_path(path: Path) -> Path:
    """Where `whole` has `path` made: for processes that make one folder together, of which one is in the block."""
    path = path.resolve()
    return path.with_name(f".{path.name}.partial")


@contextmanager
def whole_by_many(path: Path) -> Iterator[Path]:
    """Where to make the file `path` while others may make it, too; it has its name once its bytes are on the disk.

    Whoever ends last has written it. What a killed process left stays: nobody knows that it is nobody's.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole; what is there and no plain file, /dev/stdout say, is written to as it is."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any, **options: Any) -> None:
    """Write indented JSON as a whole; `options` are those of json.dumps.

    Raises:
        ValueError: a number is NaN or infinite, which JSON can't say; `allow_nan=True` writes it all the same.
    """
    write_text(path, json.dumps(values, **{"indent": 2, "allow_nan": False, **options}) + "\n")


def lock_file(path: Path, wait: bool = True) -> TextIO:
    """Make and lock a file: closing it unlocks it, and so does the process's end, however it ends.

    Raises:
        BlockingIOError: another process holds it, and `wait` is not set.
        OSError: it can't be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        lock.close()
        raise
    return lock


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
