"""How search tables are opened: with caches whose size doesn't grow with theirs."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lancedb

# Bytes of what searches read of indexes, and of the tables' own files; Lance's own are 6 GiB and 1 GiB a connection.
INDEX_CACHE, METADATA_CACHE = 2 << 30, 256 << 20


def connect(folder: str) -> lancedb.DBConnection:
    """The tables in a folder; all of a process, those of every collection say, share one cache."""
    import lancedb

    return lancedb.connect(folder, session=_shared())


def connect_url(url: str, storage_options: dict[str, str]) -> lancedb.DBConnection:
    """The tables in an object store; a cache of its own, since a session keeps to the endpoint it began with."""
    import lancedb

    return lancedb.connect(url, storage_options=storage_options, session=_session())


def _session() -> lancedb.Session:
    import lancedb

    return lancedb.Session(index_cache_size_bytes=INDEX_CACHE, metadata_cache_size_bytes=METADATA_CACHE)


_shared = cache(_session)
