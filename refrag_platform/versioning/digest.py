"""The one hash of a file or folder, computed as DVC does, so that dvc.lock and manifests agree."""

from __future__ import annotations

import hashlib
import json
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
    """DVC's hash of a folder: MD5 over the sorted list of (file hash, relative path), ending in `.dir`."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    entries = [{"md5": file_digest(folder / name), "relpath": name} for name in sorted(files, key=lambda n: n.split("/"))]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def path_digest(path: Path) -> str:
    """The hash of a file or a folder."""
    return folder_digest(path) if path.is_dir() else file_digest(path)


def code_digest(root: Path, paths: tuple[str, ...]) -> str:
    """One hash over source files and folders (only .py files), given relative to `root`."""
    digest = hashlib.md5(usedforsecurity=False)
    for entry in sorted(paths):
        path = root / entry
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()
