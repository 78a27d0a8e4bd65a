"""The files of a source: everything below a folder that is not hidden, links followed, each folder once."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from refrag_platform.names import name_text

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class Listing(NamedTuple):
    """files: in a fixed order. unusable: what else is there, and why it can't be read."""

    files: list[Path]
    unusable: list[tuple[Path, str]]


def find_files(path: Path) -> Listing:
    """`path` itself, or what is under it; nothing if it is missing.

    A linked folder is read under the link's name unless it is also there under its own; cycles end.
    """
    if path.is_file():
        return Listing([path], [])
    listing = Listing([], [])
    seen: set[tuple[int, int]] = set()
    folders, linked = [path], list[Path]()
    while folders or linked:
        # Links last: what is there under a name of its own keeps that name, whatever points at it.
        folder = folders.pop() if folders else linked.pop(0)
        try:
            facts = folder.stat()
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        except OSError as error:
            if folder != path or not isinstance(error, FileNotFoundError):
                listing.unusable.append((folder, why_not(error)))
            continue
        for entry in entries:
            file = Path(entry.path)
            if said := no_file(file):
                listing.unusable.append((file, said))
            elif file.is_dir():
                (linked if entry.is_symlink() else folders).append(file)
            else:
                listing.files.append(file)
        linked.sort()
    listing.files.sort(key=lambda file: file.relative_to(path).parts)
    listing.unusable.sort()
    return listing


def no_file(path: Path) -> str | None:
    """Why what has a name is neither a file nor a folder; None if it is one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return _dangling(path) or why_not(error)
    if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
        return None
    return f"it is {next((kind for is_kind, kind in _KINDS if is_kind(mode)), 'something else')}, not a file"


def why_not(error: OSError) -> str:
    """Why a file can't be read, without its name."""
    return f"can't be read: {error.strerror or str(error) or type(error).__name__}"


def sizes(files: list[Path]) -> Iterator[int]:
    """Bytes of each file; none of one that has gone."""
    for file in files:
        try:
            yield file.stat().st_size
        except OSError:
            yield 0


def _dangling(file: Path) -> str | None:
    """What is to be said of a link that leads nowhere; None of anything else."""
    try:
        target = file.readlink()
    except OSError:
        return None
    return None if file.exists() else f"a link to {name_text(target)}, which is not there"
