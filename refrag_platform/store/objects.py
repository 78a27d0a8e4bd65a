"""Search tables in an object store, where many servers read the same ones: `refrag store publish`, REFRAG_TABLES.

s3://BUCKET/PREFIX/HASH/published.lance     names the folder of the tables that were complete first
                        ID/passages.lance, chunks.lance

Objects can't be renamed, so tables are built in a folder of their own, and Lance's first version of `published`, put
only if there is none, says which folder is the store's. What a killed build leaves is named nowhere.

Access is Lance's: credentials, region and endpoint come from AWS' own variables, ~/.aws or the machine's role, and
nowhere else. Requests that fail on the way are repeated.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from refrag_platform.errors import RefragError
from refrag_platform.progress import say
from refrag_platform.store.connection import connect_url

if TYPE_CHECKING:
    import lancedb

PUBLISHED, FIRST = "published", 1
# Characters of an error that no store answered: Lance shows its own insides.
MOST_SAID = 600
URL = re.compile(r"s3://[a-z0-9][a-z0-9.-]+(/[\w.=-]+)*")


def object_url(text: str, what: str) -> str:
    """A place in an object store, without a slash at its end.

    Raises:
        RefragError: it is none; the message says `what` was to be one, and not the text, which may hold a key.
    """
    url = text.rstrip("/")
    if not URL.fullmatch(url):
        raise RefragError(
            f"{what} must be s3://BUCKET or s3://BUCKET/PREFIX; who may read it is said by AWS' variables, ~/.aws or "
            "the machine's role, never by the URL"
        )
    return url


def open_or_build(url: str, build: Callable[[lancedb.DBConnection], None]) -> lancedb.DBConnection:
    """The tables that are published at `url`; built and published there if there are none.

    Several may build at once: the first one's are published, the others' are removed.

    Raises:
        RefragError: the object store can't be reached, or refuses.
    """
    try:
        return _open_or_build(url, build)
    # Lance's errors are RuntimeError, ValueError or OSError, by no rule that it states.
    except (RuntimeError, ValueError, OSError) as error:
        raise RefragError(
            f"the search tables of {url} can't be read or built; look at AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and the "
            f"credentials: {': '.join(_reason(str(error)))}"
        ) from None  # its text may hold a key


@contextmanager
def searched(place: str) -> Iterator[None]:
    """Of an error of a search in an object store, which is logged, its kind and the store's code; a folder's as it is.

    Raises:
        RefragError: the object store can't be reached, or refuses.
    """
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        if not place.startswith("s3://"):
            raise
        kind, (said, *_) = type(error).__name__, _reason(str(error))
        raise RefragError(f"the search tables of {place} can't be read: {kind}, {said}") from None


def _reason(text: str) -> list[str]:
    """What an error of Lance's says: of a store's answer code, or status, and message, beside which keys may stand."""
    if said := re.search(r"<Code>(.*?)</Code>(?:.*?<Message>(.*?)</Message>)?", text, re.DOTALL):
        return [part for part in said.groups() if part]
    # `status code: 403 Forbidden: ...` or `status: 403, body: ...`
    status = re.search(r"status\D{1,9}(\d{3}\b[\w -]*)", text)
    return [status[1] if status else text[:MOST_SAID]]


def _open_or_build(url: str, build: Callable[[lancedb.DBConnection], None]) -> lancedb.DBConnection:
    store = _connect(url)
    if (folder := _published(store)) is not None:
        return _connect(f"{url}/{folder}")
    say(f"building search tables in {url}")
    built = uuid.uuid4().hex
    tables = _connect(f"{url}/{built}")
    build(tables)
    try:
        store.create_table(PUBLISHED, data=[{"folder": built}])
    except (RuntimeError, ValueError, OSError):
        # Another was first; or a repeated request met what its own first try had put there.
        if _published(store) is None:
            raise
    folder = _published(store)
    if folder == built:
        return tables
    tables.drop_all_tables()
    return _connect(f"{url}/{folder}")


def _published(store: lancedb.DBConnection) -> str | None:
    if PUBLISHED not in store.list_tables().tables:
        return None
    table = store.open_table(PUBLISHED)
    # Who lost the race for this version may have made another: Lance takes a table that came up meanwhile for replaced.
    table.checkout(FIRST)
    return str(table.to_arrow()["folder"][0])


def _connect(url: str) -> lancedb.DBConnection:
    plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")  # a store of one's own, MinIO say
    return connect_url(url, {"allow_http": "true"} if plain else {})
