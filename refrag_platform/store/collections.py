"""The working copies of one store, one for each collection: nothing that enters one can be told from another.

REFRAG_STORE/                       the common collection's (store/live.py)
REFRAG_STORE/collections/NAME/      that of the collection NAME, laid out alike

Each has tables, indexes and edits of its own, so that neither ids nor scores nor errors say what others hold.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refrag_platform.store.live import LiveStore

COMMON = ""
FOLDER = "collections"


class Collections:
    """Working copies by the name of their collection. Safe to share between threads."""

    def __init__(self, folder: Path, open_store: Callable[[Path, LiveStore | None], LiveStore]) -> None:
        """Open the common one and those that are there: after a release their tables are made anew, before any request.

        Args: open_store: opens the working copy in a folder, or makes it; like the common one, for the others.

        Raises:
            RefragError: as `open_store`.
        """
        self._folder, self._open = folder, open_store
        self._opening = threading.Lock()
        self._stores: dict[str, LiveStore] = {}
        try:
            for name in (COMMON, *names(folder)):
                self.of(name)
        except BaseException:
            self.close()
            raise

    def of(self, name: str) -> LiveStore:
        """The working copy of a collection, made at its first use."""
        if name not in self._stores:  # asked without the lock: nobody waits while another's is made
            with self._opening:
                if name not in self._stores:
                    place = self._folder / FOLDER / name if name else self._folder
                    self._stores[name] = self._open(place, self._stores.get(COMMON))
        return self._stores[name]

    def close(self) -> None:
        """Let another process have the folder."""
        for store in self._stores.values():
            store.close()


def names(folder: Path) -> list[str]:
    """The collections that have a working copy in this folder, beside the common one."""
    return sorted(path.name for path in (folder / FOLDER).glob("[!.]*") if path.is_dir())
