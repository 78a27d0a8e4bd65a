"""What was added to a served store, replaced in it and deleted from it: an SQLite file, durable before it is answered.

    edits = Edits(Path("live/edits.sqlite"))
    edits.record([Edit("policy", "Leave", "Thirty days.")]); edits.all()

It says all that search tables are made from beside the store, so that they can be made anew, for another model too.
Of passages that were replaced or deleted it keeps the hashes: a later store may hold what was exported of them.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from refrag_platform.errors import RefragError

EDITS_FILE = "edits.sqlite"
SCHEMA = """
CREATE TABLE IF NOT EXISTS former (digest TEXT PRIMARY KEY) WITHOUT ROWID;
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
            if not read_only:
                path.touch(mode=0o600)
            uri = f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rw'}"
            self._database = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
            # On the disk before it is answered, its folder's entries too; what is deleted is overwritten.
            self._database.execute("PRAGMA synchronous = EXTRA")
            self._database.execute("PRAGMA secure_delete = ON")
            if not read_only:
                self._database.executescript(SCHEMA)
            self._database.execute("SELECT number FROM edits LIMIT 1")
        except (sqlite3.Error, OSError) as error:
            half = read_only and getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_READONLY
            fix = "; its server was killed while it wrote: start it once, which takes that back" if half else ""
            raise RefragError(f"{path} can't be used as a file of edits: {error}{fix}") from None

    def record(self, edits: Sequence[Edit], former: Iterable[str] = ()) -> int:
        """Write all of them or none; returns the number of the last one.

        Args: former: digests of passages that they replace or delete.
        """
        with self._transaction() as database:
            database.executemany("INSERT OR IGNORE INTO former VALUES (?)", [(digest,) for digest in former])
            for edit in edits:
                database.execute(
                    "INSERT OR REPLACE INTO edits (id, title, text) VALUES (?, ?, ?)", (edit.id, edit.title, edit.text)
                )
            return self._last(database)

    def last(self) -> int:
        """The number of the last edit; 0: there is none."""
        with self._lock:
            return self._last(self._database)

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

    def since(self, number: int, size: int) -> Iterator[list[Edit]]:
        """Edits after that one, in their order, `size` at a time."""
        while edits := self._read("WHERE number > ? ORDER BY number LIMIT ?", number, size):
            yield edits
            number = edits[-1].number

    def count_since(self, number: int) -> int:
        """How many edits come after that one."""
        with self._lock:
            return int(self._database.execute("SELECT count(*) FROM edits WHERE number > ?", (number,)).fetchone()[0])

    def all(self) -> list[Edit]:
        """Every edit as of one moment, by id."""
        return self._read("ORDER BY id")

    def titles(self, after: str, limit: int) -> list[tuple[str, str]]:
        """(id, title) of documents that were added or replaced, by id; their texts are not read."""
        wanted = "SELECT id, title FROM edits WHERE text IS NOT NULL AND id > ? ORDER BY id LIMIT ?"
        with self._lock:
            return self._database.execute(wanted, (after, limit)).fetchall()

    def former(self) -> set[str]:
        """Digests of passages that live documents once had."""
        with self._lock:
            return {digest for (digest,) in self._database.execute("SELECT digest FROM former")}

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _read(self, where: str, *values: str | int) -> list[Edit]:
        with self._lock:
            rows = self._database.execute(f"SELECT id, title, text, number FROM edits {where}", values).fetchall()
        return [Edit(*row) for row in rows]

    @staticmethod
    def _last(database: sqlite3.Connection) -> int:
        return int(database.execute("SELECT coalesce(max(number), 0) FROM edits").fetchone()[0])

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


def digest_of(text: str) -> str:
    """What is kept of a former passage."""
    return hashlib.sha256(text.encode()).hexdigest()
