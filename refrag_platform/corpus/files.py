"""Documents out of files: .txt and .md (one document a file), .jsonl and .parquet (one a row), .zst of these.

Read as a stream, so memory is that of the longest row, or of a part of a long text file.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from refrag_platform.corpus.bad_input import BadInput
from refrag_platform.corpus.documents import Document, plain_document
from refrag_platform.corpus.text import normalize
from refrag_platform.recipes import SourceRecipe

FORMATS = (".txt", ".md", ".jsonl", ".parquet")
# Longer text files become several documents of about this many characters.
PART_CHARACTERS = 4_000_000
_BLOCK = 1 << 20


def find_files(path: Path) -> list[Path]:
    """The files of a source in a fixed order: `path` itself, or every file under it that is not hidden."""
    if path.is_file():
        return [path]
    found = (file for file in path.rglob("*") if file.is_file())
    visible = (file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))
    return sorted(visible, key=lambda file: file.relative_to(path).parts)


def read_file(
    path: Path, name: str, recipe: SourceRecipe, bad: BadInput, advance: Callable[[int], None]
) -> Iterator[Document]:
    """The documents of one file.

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
    if path.stat().st_size == 0:
        bad.report("empty_file", name, "the file is empty")
        return
    reader = {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(suffix[0], _read_text)
    found = 0
    with path.open("rb") as raw:
        told = 0
        stream: BinaryIO = io.BufferedReader(_Unpacked(raw), _BLOCK) if compressed else raw
        for document in _guarded(reader(stream, name, recipe, bad), name, bad):
            yield document
            found += 1
            position = raw.tell()
            advance(position - told)
            told = position
        advance(path.stat().st_size - told)


class _Unpacked(io.RawIOBase):
    """The bytes inside a .zst file. Unlike zstandard's own reader it notices a file that was cut short."""

    def __init__(self, raw: BinaryIO) -> None:
        self._pieces = self._decompressed(raw)
        self._piece = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._piece:
            try:
                self._piece = next(self._pieces)
            except StopIteration:
                return 0
        count = min(len(buffer), len(self._piece))
        buffer[:count], self._piece = self._piece[:count], self._piece[count:]
        return count

    @staticmethod
    def _decompressed(raw: BinaryIO) -> Iterator[bytes]:
        import zstandard

        frame = None
        while data := raw.read(_BLOCK // 16):
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
        bad.report("damaged_file", name, f"can't be read on: {str(error).splitlines()[0]}")


def _read_text(stream: BinaryIO, name: str, recipe: SourceRecipe, bad: BadInput) -> Iterator[Document]:
    title = Path(name.removesuffix(".zst")).stem
    number = 0
    try:
        for number, part in enumerate(_parts(stream), start=1):
            text = normalize(part)
            if number == 1 and name.removesuffix(".zst").endswith(".md") and text.startswith("# "):
                title = text.splitlines()[0].removeprefix("# ").strip()
            if not text:
                bad.report("empty_text", name, "no text in it")
            elif number == 1:
                yield plain_document(name, title, name, text)
            else:
                yield plain_document(f"{name}#{number}", f"{title} ({number})", name, text, group=name)
    except UnicodeDecodeError as error:
        rest = "" if number == 0 else f", the file is skipped from part {number + 1} on"
        bad.report("broken_utf8", name, f"broken UTF-8 ({error.reason}){rest}")


def _parts(stream: BinaryIO) -> Iterator[str]:
    """The decoded text, cut at blank lines (else at any white space) where it is very long."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    text = ""
    while block := stream.read(_BLOCK):
        text += decoder.decode(block)
        while len(text) >= PART_CHARACTERS:
            cuts = (text.rfind(mark, 0, PART_CHARACTERS) for mark in ("\n\n", "\n", " "))
            cut = next((cut for cut in cuts if cut > 0), PART_CHARACTERS)
            yield text[:cut]
            text = text[cut:]
    yield text + decoder.decode(b"", final=True)


def _read_jsonl(stream: BinaryIO, name: str, recipe: SourceRecipe, bad: BadInput) -> Iterator[Document]:
    rows = 0
    for row, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        rows += 1
        try:
            values = json.loads(line.decode("utf-8-sig" if row == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            bad.report("broken_utf8", name, f"broken UTF-8 at byte {error.start} ({error.reason})", row)
            continue
        except json.JSONDecodeError as error:
            bad.report("bad_json", name, f"not JSON: {error}", row)
            continue
        if not isinstance(values, dict):
            bad.report("bad_json", name, f"a JSON object is wanted, not {type(values).__name__}", row)
            continue
        yield from row_document(values, name, row, recipe, bad)
    if not rows:
        bad.report("empty_file", name, "no rows in it")


def _read_parquet(stream: BinaryIO, name: str, recipe: SourceRecipe, bad: BadInput) -> Iterator[Document]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(stream if stream.seekable() else _unpacked(stream))
    columns = [column for column in (recipe.text_column, recipe.title_column) if column in table.schema_arrow.names]
    if recipe.text_column not in columns:
        bad.report("missing_column", name, _no_column(recipe, table.schema_arrow.names))
        return
    row = 0
    for batch in table.iter_batches(batch_size=256, columns=columns):
        for index in range(batch.num_rows):
            row += 1
            try:
                values = {column: batch.column(column)[index].as_py() for column in columns}
            except UnicodeDecodeError as error:
                bad.report("broken_utf8", name, f"broken UTF-8 ({error.reason})", row)
                continue
            yield from row_document(values, name, row, recipe, bad)
    if not row:
        bad.report("empty_file", name, "no rows in it")


def _unpacked(stream: BinaryIO) -> BinaryIO:
    """A temporary copy: Parquet is read from its end, which a compressed stream can't jump to."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the reader
    while block := stream.read(_BLOCK):
        copy.write(block)
    return copy


def _no_column(recipe: SourceRecipe, there: Iterable[str]) -> str:
    return f"no column {recipe.text_column!r} (corpus.sources.text_column); it has: {', '.join(map(str, there))}"


def row_document(
    values: dict[str, Any], name: str, row: int, recipe: SourceRecipe, bad: BadInput
) -> Iterator[Document]:
    """The document of one row, or none and a report. Its id holds a hash of the text, not the row's number,
    so that rows added before it do not move it to another split."""
    text, title = values.get(recipe.text_column), values.get(recipe.title_column)
    if recipe.text_column not in values:
        bad.report("missing_column", name, _no_column(recipe, values), row)
        return
    if not isinstance(text, str):
        bad.report("wrong_type", name, f"{recipe.text_column!r} is {type(text).__name__}, not text", row)
        return
    text = normalize(text)
    try:
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    except UnicodeEncodeError:
        bad.report("broken_utf8", name, "half a surrogate pair in the text", row)
        return
    if not text:
        bad.report("empty_text", name, f"{recipe.text_column!r} is empty", row)
        return
    heading = normalize(title).replace("\n", " ") if isinstance(title, str) else ""
    yield plain_document(f"{name}#{digest}", heading or Path(name).name.split(".")[0], name, text)
