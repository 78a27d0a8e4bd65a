"""Files written as a bundle: one archive, cut into pieces of a size, and bundle.json with the hash of each."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from refrag_platform.artifacts.digest import file_digest
from refrag_platform.bundle.unbundle import FORMAT, INDEX
from refrag_platform.errors import RefragError
from refrag_platform.files import whole, write_json
from refrag_platform.progress import Progress

MIB = 1 << 20
# Higher ones take three times as long, and save a hundredth of weights, a tenth of token shards.
LEVEL = 1
# Bytes from which it counts that a file is the same as another.
LARGE = 1 << 16

# What a bundle holds: a file, or bytes, by the path that it has once unpacked.
Members = Mapping[str, Path | bytes]


class Pieces(io.RawIOBase):
    """A stream that is cut into `folder`/piece-0001 and so on, each of at most `size` bytes.

    `kept`: numbers from 0 of the pieces that are written; the others are only hashed. None: all.
    `pieces`: name, bytes and sha256 of each, complete once the stream is closed.
    """

    def __init__(self, folder: Path, size: int, kept: range | None = None) -> None:
        self.pieces: list[dict[str, Any]] = []
        self._folder, self._size, self._kept = folder, size, kept
        self._file: BinaryIO | None = None
        self._digest, self._room = hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        begin = 0
        while begin < len(view):
            if not self._room:
                self._begin_piece()
            block = view[begin : begin + self._room]
            self._digest.update(block)
            if self._file is not None:
                self._file.write(block)
            begin += len(block)
            self._room -= len(block)
        return len(view)

    def close(self) -> None:
        if not self.closed:
            self._end_piece()
        super().close()

    def _begin_piece(self) -> None:
        self._end_piece()
        name = f"piece-{len(self.pieces) + 1:04d}"
        if self._kept is None or len(self.pieces) in self._kept:
            self._file = (self._folder / name).open("wb")
        self.pieces.append({"name": name})
        self._digest, self._room = hashlib.sha256(), self._size

    def _end_piece(self) -> None:
        if self.pieces and "sha256" not in self.pieces[-1]:
            self.pieces[-1] |= {"bytes": self._size - self._room, "sha256": self._digest.hexdigest()}
        if self._file is not None:
            self._file.close()
            self._file = None


def write_bundle(
    members: Members,
    facts: dict[str, Any],
    out: Path,
    piece_mib: int,
    files: int | None = None,
    part: int | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> dict[str, Any]:
    """Write `members` as a bundle into the folder `out`, which appears whole; returns bundle.json.

    Args:
        facts: further keys of bundle.json. files: at most so many files in `out`, bundle.json among them.
        part: with `files`, only this set of pieces, from 1: a bundle that is carried in several goes.
        beside: further files that lie beside the pieces.

    Raises:
        RefragError: `out` is there already and not empty, the bundle needs more files, or there is no such part.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RefragError(f"--out {out} is there already and not empty; give another, or remove it")
    beside = beside or {}
    room = None if files is None else files - 1 - len(beside)
    if room is not None and room < 1:
        raise RefragError(f"--files is {files}, which leaves none for pieces beside {', '.join([INDEX, *beside])}")
    with whole(out) as partial:
        partial.mkdir()
        kept = None if room is None else range(((part or 1) - 1) * room, (part or 1) * room)
        stream = Pieces(partial, piece_mib * MIB, kept)
        with stream:
            _write_archive(members, stream)
        if room is not None:
            _require_part(stream.pieces, room, piece_mib, part)
        index = {
            "format": FORMAT,
            **facts,
            "holds": _held(members),
            "bytes": sum(piece["bytes"] for piece in stream.pieces),
            "pieces": stream.pieces,
        }
        for name, content in beside.items():
            (partial / name).write_bytes(content)
        write_json(partial / INDEX, index)
    return index


def _write_archive(members: Members, stream: io.RawIOBase) -> None:
    """The same files make the same bytes, so that parts of two exports fit together.

    A file whose bytes another one has, as a frozen encoder in two checkpoints, is a link to that one.
    """
    twins = _twins(members)
    with (
        Progress("bundle", sum(_size(source) for source in members.values()) // MIB, "MiB") as progress,
        io.BufferedWriter(stream, MIB) as buffer,
        gzip.GzipFile("", "wb", LEVEL, buffer, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        done = 0
        for name, source in sorted(members.items()):
            entry, size = tarfile.TarInfo(name), _size(source)
            if name in twins:
                entry.type, entry.linkname = tarfile.LNKTYPE, twins[name]
                archive.addfile(entry)
            else:
                entry.size = size
                with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as content:
                    archive.addfile(entry, content)
            progress.update((done + size) // MIB - done // MIB)
            done += size


def _twins(members: Members) -> dict[str, str]:
    """The names of large files whose bytes another file has, and that file, which comes first in the archive."""
    by_size: dict[int, list[tuple[str, Path]]] = {}
    for name, source in sorted(members.items()):
        if isinstance(source, Path) and _size(source) >= LARGE:
            by_size.setdefault(_size(source), []).append((name, source))
    firsts: dict[str, str] = {}
    twins = {}
    for alike in by_size.values():
        for name, file in alike if len(alike) > 1 else []:
            if (first := firsts.setdefault(file_digest(file), name)) != name:
                twins[name] = first
    return twins


def _require_part(pieces: list[dict[str, Any]], room: int, piece_mib: int, part: int | None) -> None:
    parts = -(-len(pieces) // room)
    size = f"{sum(piece['bytes'] for piece in pieces) / MIB:,.1f} MiB in {len(pieces)} pieces of {piece_mib} MiB"
    if part is None and parts > 1:
        raise TooLarge(
            f"the bundle has {size}, but {room} pieces and {INDEX} are all that --files allows; raise --files "
            f"or --piece-mib, or carry it in {parts} goes: --part 1 to --part {parts}, each with another --out"
        )
    if part is not None and part > parts:
        raise RefragError(f"--part is {part}, but the bundle has {size}, which is {parts} part(s)")


class TooLarge(RefragError):
    """A bundle doesn't fit into the files that were allowed."""


def _held(members: Members) -> dict[str, int]:
    """Bytes by what they belong to: an artifact's folder, a file beside the recipe, all of the code."""
    sizes: Counter[str] = Counter()
    for name, source in members.items():
        parts = name.split("/")
        sizes["/".join(parts[: 3 if parts[0] in ("data", "models", "work") else 1])] += _size(source)
    return dict(sorted(sizes.items()))


def _size(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size
