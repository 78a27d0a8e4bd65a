"""The bytes of earlier versions, read from DVC's cache: an artifact's hash names a listing, the listing its files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from refrag_platform.artifacts.publication import INPUTS_FILE
from refrag_platform.history import dvc
from refrag_platform.project import Project

FOLDER_MARK = ".dir"


@dataclass
class Cache:
    """DVC's cache folder. A hash that is not in it simply has no files."""

    folder: Path
    _listings: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, project: Project) -> Cache:
        """The cache of a project.

        Raises:
            RefragError: no DVC repository here.
        """
        return cls(dvc.cache_folder(project))

    def path(self, hash: str) -> Path:
        """Where the bytes of a hash lie, whether or not they are there."""
        return self.folder / "files" / "md5" / hash[:2] / hash[2:]

    def hashes(self) -> Iterator[str]:
        """Every hash in the cache: folders' listings (ending in .dir) and files."""
        for path in self.folder.glob("files/md5/??/*"):
            if path.suffix in {"", FOLDER_MARK}:  # others are DVC's temporary files
                yield path.parent.name + path.name

    def listing(self, hash: str) -> dict[str, str]:
        """Path and hash of every file of a folder; empty where the cache has no whole listing of it."""
        if hash not in self._listings:
            try:
                entries = json.loads(self.path(hash).read_bytes())
                self._listings[hash] = {entry["relpath"]: entry["md5"] for entry in entries}
            except (OSError, ValueError, KeyError, TypeError):
                self._listings[hash] = {}
        return self._listings[hash]

    def read(self, hash: str, name: str) -> bytes | None:
        """A file of the folder with that hash; None where the cache does not have it."""
        try:
            return self.path(self.listing(hash)[name]).read_bytes()
        except (KeyError, OSError):
            return None

    def ancestors(self, hashes: Iterable[str]) -> set[str]:
        """`hashes` and those of all that they were made from, as far as the cache knows.

        Every artifact holds its inputs' hashes, so this needs neither manifests nor Git.
        """
        known: set[str] = set()
        waiting = list(hashes)
        while waiting:
            hash = waiting.pop()
            if hash not in known:
                known.add(hash)
                inputs = json.loads(self.read(hash, INPUTS_FILE) or b"{}").get("inputs", {})
                waiting.extend(inputs.values())
        return known

    def size(self, hash: str) -> int:
        """Bytes of one object, 0 where it is not there."""
        path = self.path(hash)
        return path.stat().st_size if path.is_file() else 0
