"""A bucket of S3, or of what speaks its protocol: which objects are in it, and their bytes.

Access is botocore's: credentials, region and endpoint come from AWS' own variables, ~/.aws or the machine's role, and
nowhere else; requests that fail on the way are repeated by it. Of an error its code alone is told: what a store says
beside it may hold a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from refrag_platform.errors import RefragError

ACCESS = "look at AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and the credentials"
ATTEMPTS = 3  # at an object whose bytes stop coming, or are not what its checksum says
_BLOCK = 1 << 20


class Stored(NamedTuple):
    """An object's identity, as the store says it, and its bytes."""

    etag: str
    size: int


class Bucket:
    """A bucket that is read.

    Raises:
        RefragError: botocore is not installed, or its settings are wrong.
    """

    def __init__(self, name: str) -> None:
        try:
            from botocore.session import get_session
        except ModuleNotFoundError:
            raise RefragError("buckets are read by botocore; run `pip install '.[s3]'` in the checkout") from None
        self.name = name
        with _told(f"s3://{name}", ACCESS):
            self._client = get_session().create_client("s3")

    def objects(self, prefix: str) -> dict[str, Stored]:
        """The object `prefix` and all below it, by key, sorted; what stands for a folder is none.

        Raises:
            RefragError: the bucket can't be listed.
        """
        with _told(f"s3://{self.name}", ACCESS):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
            listed = {
                item["Key"]: Stored(item["ETag"], item["Size"]) for page in pages for item in page.get("Contents", [])
            }
        return {key: listed[key] for key in sorted(listed) if is_below(key, prefix) and not key.endswith("/")}

    def download(self, key: str, etag: str, file: Path, advance: Callable[[int], None]) -> None:
        """Write the bytes of the object that `etag` names.

        Args:
            advance: called with the bytes written since the last call; fewer than none where it begins anew.

        Raises:
            RefragError: it can't be read, or is another by now.
        """
        from botocore.exceptions import BotoCoreError

        with _told(f"s3://{self.name}/{key}", "pull again, which goes on from here"):
            for attempt in range(1, ATTEMPTS + 1):
                with file.open("wb") as out:
                    try:
                        body = self._client.get_object(Bucket=self.name, Key=key, IfMatch=etag)["Body"]
                        for block in body.iter_chunks(_BLOCK):
                            out.write(block)
                            advance(len(block))
                        return
                    except BotoCoreError:
                        if attempt == ATTEMPTS:
                            raise
                        advance(-out.tell())


def is_below(key: str, prefix: str) -> bool:
    """Whether the object is the one that `prefix` names, or lies in the folder of this name."""
    return not prefix or key == prefix or key.startswith(prefix.rstrip("/") + "/")


@contextmanager
def _told(place: str, fix: str) -> Iterator[None]:
    """Tell of an error of botocore's or the store's the place, its code, or kind, and what to do.

    Raises:
        RefragError: there was one.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError, ValueError) as error:  # ValueError: an endpoint that is no URL
        code = error.response["Error"]["Code"] if isinstance(error, ClientError) else type(error).__name__
        raise RefragError(f"{place} can't be read: {code}; {fix}") from None
