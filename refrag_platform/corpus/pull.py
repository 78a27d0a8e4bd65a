"""Objects of a bucket as source files: s3://BUCKET/KEY is copied to data/sources/NAME/BUCKET/KEY.

They are copied because whatever looks at sources (freshness, DVC, a bundle) reads files and needs no network. Which
object a file is a copy of is recorded by its ETag in BUCKET/.pulled/objects.jsonl, a line each as it arrives. A file
that isn't recorded, or was changed since, is the user's and stays.
"""

from __future__ import annotations

import filecmp
import json
import re
import threading
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from refrag_platform.corpus.bucket import Bucket, Stored, is_below
from refrag_platform.errors import RefragError
from refrag_platform.files import lock_file, whole, write_text
from refrag_platform.progress import Progress

URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]+)(?:/(?P<prefix>.*))?")
DOWNLOADS = 8  # at once
LONGEST_NAME = 240  # bytes; a file's name is a little longer while it is written


@dataclass(frozen=True)
class Copy:
    """The file that an object became: the object's ETag; the file's bytes and time of change in ns."""

    etag: str
    size: int
    mtime_ns: int


@dataclass
class Pulled:
    """What became of the objects, by their keys, sorted.

    kept: a file is there that was not pulled, or was changed since. left_out: sources read no file of this name.
    gone: pulled earlier, and no longer in the bucket.
    """

    folder: Path
    fetched: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)


def pull(sources: Path, url: str, delete: bool = False) -> Pulled:
    """Copy the object `url`, or all below it, into the folder `sources`; what is there unchanged is not read again.

    Args:
        delete: remove files whose objects are gone.

    Raises:
        RefragError: `url` is none, nothing lies there, it can't be read, or another pull of the bucket runs.
    """
    if (match := URL.fullmatch(url)) is None:
        raise RefragError(
            "the URL must be s3://BUCKET or s3://BUCKET/PREFIX; who may read it is said by AWS' variables, ~/.aws or "
            "the machine's role, never by the URL"
        )
    bucket, prefix = Bucket(match["bucket"]), match["prefix"] or ""
    objects = bucket.objects(prefix)
    if not objects:
        raise RefragError(f"there are no objects in {url}")
    pulled = Pulled(sources / bucket.name)
    records = pulled.folder / ".pulled" / "objects.jsonl"
    try:
        lock = lock_file(records.with_name("lock"), wait=False)
    except BlockingIOError:
        raise RefragError(f"another pull into {pulled.folder} is running; wait for it, or stop it") from None
    with lock:
        copies = _unchanged(records, pulled.folder)
        pulled.gone = sorted(key for key in copies if is_below(key, prefix) and key not in objects)
        for key in pulled.gone if delete else ():
            (pulled.folder / key).unlink()
            del copies[key]
        write_text(records, "".join(_line(*item) for item in copies.items()))
        names = {key for key in objects if _is_file_name(key)}
        names -= {str(folder) for key in names for folder in PurePosixPath(key).parents}
        pulled.left_out = sorted(objects.keys() - names)
        pulled.unchanged = sorted(key for key in names if key in copies and copies[key].etag == objects[key].etag)
        wanted = {key: objects[key] for key in sorted(names.difference(pulled.unchanged))}
        _fetch(bucket, wanted, copies.keys(), records, pulled)
    return pulled


def _is_file_name(key: str) -> bool:
    """Whether a source would read a file of this name: hidden ones it doesn't, and `..` would lead elsewhere."""
    return all(part[:1] not in ("", ".") and len(part.encode()) <= LONGEST_NAME for part in key.split("/"))


def _fetch(bucket: Bucket, wanted: dict[str, Stored], ours: Container[str], records: Path, pulled: Pulled) -> None:
    """Fetch several objects at once and record each as soon as it is there; what stops one stops all.

    Args:
        ours: keys of files that may be replaced.
    """
    counting, stopped = threading.Lock(), threading.Event()

    def advance(count: int) -> None:
        if stopped.is_set():
            raise InterruptedError
        with counting:
            progress.update(count)

    def copied(key: str) -> Copy | None:
        path, etag = pulled.folder / key, wanted[key].etag
        if path.is_dir():
            return None
        try:
            with whole(path) as partial:
                bucket.download(key, etag, partial, advance)
                # A pull that was killed before it recorded the file left it equal to the object.
                if path.exists() and key not in ours and not filecmp.cmp(path, partial, shallow=False):
                    raise FileExistsError
        except (FileExistsError, NotADirectoryError):  # or a file stands where a folder has to be
            return None
        facts = path.stat()
        return Copy(etag, facts.st_size, facts.st_mtime_ns)

    size = sum(stored.size for stored in wanted.values())
    with (
        Progress(f"s3://{bucket.name}", size, "bytes", shown=bool(wanted)) as progress,
        records.open("a", encoding="utf-8") as log,
        ThreadPoolExecutor(DOWNLOADS) as pool,
    ):
        futures = {pool.submit(copied, key): key for key in wanted}
        try:
            for future in as_completed(futures):
                key, copy = futures[future], future.result()
                (pulled.kept if copy is None else pulled.fetched).append(key)
                if copy is not None:
                    log.write(_line(key, copy))
                    log.flush()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    pulled.kept.sort()
    pulled.fetched.sort()


def _line(key: str, copy: Copy) -> str:
    return json.dumps({"key": key, **asdict(copy)}) + "\n"


def _unchanged(records: Path, folder: Path) -> dict[str, Copy]:
    """The files that are as they were pulled, by key. A line that a killed pull left unfinished counts for none."""
    copies = {}
    for line in records.read_text(encoding="utf-8").splitlines() if records.is_file() else ():
        with suppress(json.JSONDecodeError):
            values = json.loads(line)
            copies[values["key"]] = Copy(values["etag"], values["size"], values["mtime_ns"])
    return {key: copy for key, copy in copies.items() if _is_at(folder / key, copy)}


def _is_at(path: Path, copy: Copy) -> bool:
    try:
        facts = path.stat()
    except OSError:
        return False
    return (facts.st_size, facts.st_mtime_ns) == (copy.size, copy.mtime_ns)
