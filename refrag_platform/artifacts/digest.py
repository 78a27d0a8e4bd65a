"""The one hash of a file or folder, computed as DVC does, so that dvc.lock and manifests agree."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

BLOCK = 1 << 20


def file_digest(path: Path) -> str:
    """MD5 of a file's bytes, read block by block."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """DVC's hash of a folder: MD5 over its files as JSON, in the order of their paths, ending in `.dir`.

    Empty folders and modes do not count; a linked file counts as its target; a folder that is missing
    hashes as an empty one.
    """
    entries = [{"md5": file_digest(folder / name), "relpath": name} for name in sorted(_files(folder))]
    listing = json.dumps(entries, sort_keys=True).encode()
    return hashlib.md5(listing, usedforsecurity=False).hexdigest() + ".dir"


def path_digest(path: Path) -> str:
    """The hash of a file or a folder."""
    return folder_digest(path) if path.is_dir() else file_digest(path)


def code_digest(root: Path, paths: tuple[str, ...]) -> str:
    """One hash over source files and folders (their .py files), given relative to `root`."""
    digest = hashlib.md5(usedforsecurity=False)
    for entry in sorted(paths):
        path = root / entry
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(root).as_posix()} {file_digest(file)}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[str]:
    """Paths of all files below `folder`, relative to it, with slashes; linked folders are not entered."""
    for base, _, names in os.walk(folder):
        for name in names:
            yield (Path(base) / name).relative_to(folder).as_posix()
