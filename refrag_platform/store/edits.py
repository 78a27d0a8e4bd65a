"""What was added to a served store, replaced in it and deleted from it: an SQLite file, durable before it is answered.

    edits = Edits(Path("live/edits.sqlite"))
    edits.record([Edit("policy", "Leave", "Thirty days.")]); edits.documents(); edits.deleted()

It says all that search tables are made from beside the store, so that they can be made anew, for another model too.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from refrag_platform.errors import RefragError

EDITS_FILE = "edits.sqlite"
SCHEMA = """
CREATE TABLE IF NOT EXISTS edits (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    title TEXT NOT NULL,
    text TEXT
)"""


@dataclass(frozen=True)
class Edit:
    """A document as it is to be; text: None = deleted. number: the order of edits, given when it is recorded."""

    id: str
    title: str
    text: str | None
    number: int = 0


class Edits:
    """The last edit of every document. Threads may share it."""

    def __init__(self, path: Path, read_only: bool = False) -> None:
        """Open the file, or make it.

        Raises:
            RefragError: it is no such file, or can't be written.
        """
        self._lock = threading.Lock()
        try:
            mode = "ro" if read_only else "rwc"
            uri = f"{path.resolve().as_uri()}?mode={mode}"
            self._database = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
            # On the disk before it is answered; what is deleted is overwritten.
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.execute("PRAGMA secure_delete = ON")
            if not read_only:
                self._database.execute(SCHEMA)
            self._database.execute("SELECT number FROM edits LIMIT 1")
        except sqlite3.Error as error:
            raise RefragError(f"{path} can't be used as a file of edits: {error}") from None

    def record(self, edits: Sequence[Edit]) -> int:
        """Write all of them or none; returns the number of the last one."""
        with self._transaction() as database:
            for edit in edits:
                database.execute(
                    "INSERT OR REPLACE INTO edits (id, title, text) VALUES (?, ?, ?)", (edit.id, edit.title, edit.text)
                )
            return int(database.execute("SELECT max(number) FROM edits").fetchone()[0])

    def restore(self, before: Sequence[Edit], ids: Sequence[str]) -> None:
        """Put the edits of some documents back as they were before."""
        with self._transaction() as database:
            database.executemany("DELETE FROM edits WHERE id = ?", [(name,) for name in ids])
            database.executemany(
                "INSERT INTO edits (number, id, title, text) VALUES (?, ?, ?, ?)",
                [(edit.number, edit.id, edit.title, edit.text) for edit in before],
            )

    def of(self, ids: Sequence[str]) -> list[Edit]:
        """The edits of some documents, of those that have one."""
        return [edit for name in ids for edit in self._read("WHERE id = ?", name)]

    def since(self, number: int) -> list[Edit]:
        """Edits after that one, in their order."""
        return self._read("WHERE number > ? ORDER BY number", number)

    def documents(self) -> list[Edit]:
        """Documents that were added or replaced, by id."""
        return self._read("WHERE text IS NOT NULL ORDER BY id")

    def deleted(self) -> list[str]:
        """Ids of documents that were deleted."""
        return [edit.id for edit in self._read("WHERE text IS NULL ORDER BY id")]

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _read(self, where: str, *values: str | int) -> list[Edit]:
        with self._lock:
            rows = self._database.execute(f"SELECT id, title, text, number FROM edits {where}", values).fetchall()
        return [Edit(*row) for row in rows]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
