"""API keys: who has one, and how often each may ask. Their hashes are kept, never the keys.

A file of keys has a line for each: NAME SHA256 [REQUESTS_PER_MINUTE] [collection=NAME]; `refrag keys` writes it. It is
read again when it changes, so that a key that is taken out of it is refused from the next request on. A key has 256
random bits, so its hash needs no salt and no slow function.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from refrag_platform.errors import RefragError
from refrag_platform.files import lock_file, whole

logger = logging.getLogger("refrag.serving")
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
# It names a folder, on disks too that don't tell cases apart.
COLLECTION = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
LINE = re.compile(
    rf"(?P<name>{NAME.pattern})\s+(?P<digest>[0-9a-fA-F]{{64}})(\s+(?P<rate>0*[1-9][0-9]{{0,8}}))?"
    rf"(\s+collection=(?P<collection>{COLLECTION.pattern}))?"
)
PREFIX = "refrag-"
# Of $REFRAG_API_KEY, which has no name of its own.
ENVIRONMENT = "REFRAG_API_KEY"


@dataclass(frozen=True)
class Key:
    """A key that is in force.

    digest: SHA-256 of it, in hex. per_minute: requests; None: the service's own limit. collection: whose documents it
    reads and changes; "": those of all keys without one.
    """

    name: str
    digest: str
    per_minute: int | None = None
    collection: str = ""

    def line(self) -> str:
        """The key's line in a file."""
        rate = "" if self.per_minute is None else f" {self.per_minute}"
        return f"{self.name} {self.digest}{rate}" + (f" collection={self.collection}" if self.collection else "")


class Keys:
    """The keys of the environment and of a file."""

    def __init__(self, plain: str | None = None, listed: str = "", file: Path | None = None) -> None:
        """Read them.

        Args:
            plain: a key itself. listed: lines of keys, separated by commas. file: lines of keys.

        Raises:
            RefragError: a line is no key's, or the file can't be read.
        """
        self._fixed = parse_keys([part.strip() for part in listed.split(",")], "REFRAG_API_KEYS")
        if plain:
            self._fixed = [*self._fixed, Key(ENVIRONMENT, digest_of(plain.encode()))]
        self._file, self._state = file, _state(file)
        self._listed = read_keys(file) if file else []

    @property
    def needed(self) -> bool:
        """Whether requests need a key: once keys are set, taking the last one away lets nobody in."""
        return bool(self._fixed) or self._file is not None

    def find(self, sent: bytes) -> Key | None:
        """The key that was given. All are compared, each in constant time: how long it takes tells nothing."""
        self._read_again()
        digest, match = digest_of(sent), None
        for key in [*self._fixed, *self._listed]:
            if hmac.compare_digest(digest, key.digest):
                match = key
        return match

    def _read_again(self) -> None:
        if self._file is None or (state := _state(self._file)) == self._state:
            return
        self._state = state
        try:
            self._listed = read_keys(self._file)
        except RefragError as error:
            # Whoever was to be shut out by the change must not stay in.
            self._listed = []
            logger.error("no key of the file is taken until it is mended: %s", error)


def digest_of(key: bytes) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key).hexdigest()


def new_key(name: str, per_minute: int | None = None, collection: str = "") -> tuple[str, Key]:
    """A new key, and what is kept of it.

    Raises:
        RefragError: the name, or the collection's, can't stand in a file of keys.
    """
    if not NAME.fullmatch(name):
        raise RefragError(f"{name!r} can't name a key; use at most 64 letters, digits, `.`, `_` and `-`")
    if collection and not COLLECTION.fullmatch(collection):
        raise RefragError(
            f"{collection!r} can't name a collection; use at most 64 small letters, digits, `.`, `_` and `-`, of which "
            "the first is a letter or a digit"
        )
    key = PREFIX + secrets.token_urlsafe(32)
    return key, Key(name, digest_of(key.encode()), per_minute, collection)


def read_keys(path: Path) -> list[Key]:
    """The keys of a file.

    Raises:
        RefragError: it can't be read, or a line is no key's.
    """
    return parse_keys(_read_lines(path), str(path))


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RefragError(f"the file of keys {path} can't be read: {error}") from None


def add_key(path: Path, key: Key) -> None:
    """Write a key into a file of keys, which is made if it isn't there.

    Raises:
        RefragError: its name is another key's, or the file can't be read.
    """
    with _lines(path) as lines:
        if any(one.name == key.name for one in parse_keys(lines, str(path))):
            raise RefragError(f"{path} has a key named {key.name}; revoke it first, or give another name")
        lines.append(key.line())


def revoke_key(path: Path, name: str) -> int:
    """Take a key out of a file of keys; returns how many it has left.

    Raises:
        RefragError: it has none with this name, or can't be read.
    """
    with _lines(path) as lines:
        names = [key.name for key in parse_keys(lines, str(path))]
        if name not in names:
            raise RefragError(f"{path} has no key named {name}; it has: {', '.join(names) or 'none'}")
        lines[:] = [line for line in lines if line.split()[:1] != [name]]
    return len(names) - 1


@contextmanager
def _lines(path: Path) -> Iterator[list[str]]:
    """The lines of a file of keys, to be changed by one process at a time; the file is replaced as a whole.

    It keeps its mode and, where root changes it, its owner: the server is to read it still. A new one is its owner's.
    """
    path = path.resolve()
    with lock_file(path.with_name(f".{path.name}.lock")):
        status = path.stat() if path.exists() else None
        lines = _read_lines(path) if status else []
        yield lines
        with whole(path) as partial:
            partial.touch(mode=0o600)
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            if status:
                if os.geteuid() == 0:
                    os.chown(partial, status.st_uid, status.st_gid)
                partial.chmod(stat.S_IMODE(status.st_mode))


def parse_keys(lines: Sequence[str], where: str) -> list[Key]:
    """The keys of lines; blank ones and those that begin with # are none.

    Raises:
        RefragError: a line is no key's, or a name stands twice.
    """
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        told = LINE.fullmatch(line.strip())
        if told is None:
            # Not the line itself: it may hold a key.
            raise RefragError(
                f"{where}, line {number}: not NAME SHA256 [REQUESTS_PER_MINUTE] [collection=NAME], as "
                "`refrag keys add` writes it"
            )
        rate = int(told["rate"]) if told["rate"] else None
        key = Key(told["name"], told["digest"].lower(), rate, told["collection"] or "")
        if key.name in keys:
            raise RefragError(f"{where}, line {number}: a key is named {key.name} already")
        keys[key.name] = key
    return list(keys.values())


def _state(file: Path | None) -> tuple[int, ...] | None:
    """What changes when a file does."""
    try:
        status = file.stat() if file else None
    except OSError:
        return ()
    return (status.st_mtime_ns, status.st_size, status.st_ino) if status else None
