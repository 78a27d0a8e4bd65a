"""Documents out of files: .txt and .md (one document a file), .jsonl and .parquet (one a row), .zst of these.

Read as a stream, so memory is that of the longest row, or of a part of a long text file.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from refrag_platform.corpus.bad_input import BadInput
from refrag_platform.corpus.documents import Document, plain_document
from refrag_platform.corpus.encodings import encoding_of, likely, not_text, unmarked
from refrag_platform.corpus.listing import why_not
from refrag_platform.corpus.rows import Fault, Row, keys_said, read_json_rows, read_parquet_rows
from refrag_platform.corpus.text import NOT_UNICODE, is_noise, is_unicode, is_visible, normalize
from refrag_platform.recipes import SourceRecipe

FORMATS = (".txt", ".md", ".jsonl", ".parquet")
# Longer text files become several documents of about this many characters.
PART_CHARACTERS = 4_000_000
_BLOCK = 1 << 20
_PACKED_BLOCK = 1 << 10


def read_file(
    path: Path, name: str, recipe: SourceRecipe, bad: BadInput, advance: Callable[[int], None]
) -> Iterator[Document]:
    """The documents of one file.

    What can't be used is reported: a file that has gone or can't be opened, too.

    Args:
        name: the file as ids and messages show it, independent of where the folder lies.
        advance: called with the bytes read from disk since the last call.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes[-1:] == [".zst"]
    suffix = (suffixes[:-1] if compressed else suffixes)[-1:]
    if not suffix or suffix[0] not in FORMATS:
        bad.report("unknown_format", name, f"not one of {' '.join(FORMATS)} (or .zst of these)")
        return
    reader = {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(suffix[0], _read_text)
    try:
        raw = path.open("rb")
    except OSError as error:
        bad.report("unreadable_file", name, why_not(error))
        return
    with raw:
        size = os.fstat(raw.fileno()).st_size
        if size == 0:
            bad.report("empty_file", name, "the file is empty")
            return
        told = 0
        stream: BufferedReader[Any] = BufferedReader(_Unpacked(raw), _BLOCK) if compressed else raw
        for document in _guarded(reader(stream, name, recipe, bad), name, bad):
            yield document
            position = raw.tell()
            advance(position - told)
            told = position
        advance(size - told)


class _Unpacked(io.RawIOBase):
    """The bytes inside a .zst file. Unlike zstandard's own reader it notices a file that was cut short."""

    def __init__(self, raw: BinaryIO) -> None:
        self._pieces = self._decompressed(raw)
        self._piece = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._piece:
            try:
                self._piece = memoryview(next(self._pieces))
            except StopIteration:
                return 0
        count = min(len(buffer), len(self._piece))
        buffer[:count], self._piece = self._piece[:count], self._piece[count:]
        return count

    @staticmethod
    def _decompressed(raw: BinaryIO) -> Iterator[bytes]:
        import zstandard

        frame = None
        # In small pieces: what a piece unpacks to, up to 32,000 times as much, is held at once.
        while data := raw.read(_PACKED_BLOCK):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                frame, data = (None, frame.unused_data) if frame.eof else (frame, b"")
        if frame is not None:
            raise zstandard.ZstdError("it ends in the middle")


def _guarded(documents: Iterator[Document], name: str, bad: BadInput) -> Iterator[Document]:
    """The same documents; a file that is damaged in the middle ends there, with a report."""
    import pyarrow as pa
    import zstandard

    try:
        yield from documents
    except (zstandard.ZstdError, pa.ArrowException, OSError) as error:
        bad.report("damaged_file", name, f"can't be read on: {(str(error) or type(error).__name__).splitlines()[0]}")


def _read_text(stream: BufferedReader[Any], name: str, recipe: SourceRecipe, bad: BadInput) -> Iterator[Document]:
    inner = name[: -len(".zst")] if name.lower().endswith(".zst") else name
    title = PurePosixPath(inner).stem
    head = stream.read(_BLOCK)
    codec = encoding_of(head)
    unlike = not_text(head)
    if unlike is None and codec == "utf-8-sig" and (guess := unmarked(head)):
        unlike = f"{guess} without a byte-order mark; write it in UTF-8"
    if unlike is not None:
        bad.report("not_text", name, f"not text: by its first bytes it is {unlike}")
        return
    number, guess = 0, likely(head) if codec == "utf-8-sig" else None
    looks = f"; it looks like {guess} without a byte-order mark: write it in UTF-8" if guess else ""

    def rest() -> str:
        return "" if number == 0 else f", the file is skipped from part {number + 1} on"

    try:
        for part in _parts(head, stream, codec):
            if is_noise(part):
                bad.report("not_text", name, f"not text: full of control characters{looks}{rest()}")
                return
            number += 1
            text = normalize(part)
            if number == 1 and inner.lower().endswith(".md") and text.startswith("# "):
                title = text.splitlines()[0].removeprefix("# ").strip()
            if not is_visible(text):
                bad.report("empty_text", name, "no text in it")
            elif number == 1:
                yield plain_document(name, title, name, text)
            else:
                yield plain_document(f"{name}#{number}", f"{title} ({number})", name, text, group=name)
    except UnicodeDecodeError as error:
        marked = "" if codec == "utf-8-sig" else f", and broken {codec.upper()}, as its byte-order mark names it"
        bad.report("broken_utf8", name, f"broken UTF-8{marked} ({error.reason}){looks}{rest()}")


def _parts(head: bytes, stream: BufferedReader[Any], codec: str) -> Iterator[str]:
    """The text of `head` and of what follows it, cut at blank lines (else at any white space) where it is very long."""
    decoder = codecs.getincrementaldecoder(codec)()
    text, block = "", head
    while block:
        text += decoder.decode(block)
        while len(text) >= PART_CHARACTERS:
            cuts = (text.rfind(mark, 0, PART_CHARACTERS) for mark in ("\n\n", "\n", " "))
            cut = next((cut for cut in cuts if cut > 0), PART_CHARACTERS)
            yield text[:cut]
            text = text[cut:]
        block = stream.read(_BLOCK)
    yield text + decoder.decode(b"", final=True)


def _read_jsonl(stream: BufferedReader[Any], name: str, recipe: SourceRecipe, bad: BadInput) -> Iterator[Document]:
    return _documents(read_json_rows(stream), name, recipe, bad)


def _read_parquet(stream: BufferedReader[Any], name: str, recipe: SourceRecipe, bad: BadInput) -> Iterator[Document]:
    columns = (recipe.text_column, recipe.title_column)
    return _documents(read_parquet_rows(stream, columns, "corpus.sources.text_column"), name, recipe, bad)


def _documents(read: Iterator[Row | Fault], name: str, recipe: SourceRecipe, bad: BadInput) -> Iterator[Document]:
    rows = 0
    for row in read:
        rows += 1
        if isinstance(row, Fault):
            bad.report(row.kind, name, row.message, row.row)
        else:
            yield from row_document(row.values, name, row.number, recipe, bad)
    if not rows:
        bad.report("empty_file", name, "no rows in it")


def row_document(
    values: dict[str, Any], name: str, row: int, recipe: SourceRecipe, bad: BadInput
) -> Iterator[Document]:
    """The document of one row, or none and a report. Its id holds a hash of the text, not the row's number,
    so that rows added before it do not move it to another split."""
    text, title = values.get(recipe.text_column), values.get(recipe.title_column)
    if recipe.text_column not in values:
        said = f"no column {recipe.text_column!r} (corpus.sources.text_column); it has: {keys_said(values)}"
        bad.report("missing_column", name, said, row)
        return
    if not isinstance(text, str):
        bad.report("wrong_type", name, f"{recipe.text_column!r} is {type(text).__name__}, not text", row)
        return
    # Tables hold titles that are numbers, and NaN where there is none.
    if isinstance(title, int | float) and not isinstance(title, bool):
        title = None if title != title else str(title)
    if title is not None and not isinstance(title, str):
        bad.report("wrong_type", name, f"{recipe.title_column!r} is {type(title).__name__}, not text", row)
        return
    for column, value in ((recipe.text_column, text), (recipe.title_column, title)):
        if value is not None and not is_unicode(value):
            bad.report("broken_utf8", name, f"{column!r} is {NOT_UNICODE}", row)
            return
    if is_noise(text):
        bad.report("not_text", name, f"{recipe.text_column!r} is not text: full of control characters", row)
        return
    text = normalize(text)
    if not is_visible(text):
        bad.report("empty_text", name, f"{recipe.text_column!r} is empty", row)
        return
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    heading = normalize(title).replace("\n", " ") if title else ""
    yield plain_document(f"{name}#{digest}", heading or PurePosixPath(name).name.split(".")[0], name, text)
