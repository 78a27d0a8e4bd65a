"""Rows of JSON Lines and Parquet, for every reader of them: each is an object, or the reason why it can't be one.

Memory is that of the longest row, or of a few hundred of Parquet's.
"""

from __future__ import annotations

import codecs
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader, TextIOWrapper
from typing import IO, Any, Literal

from refrag_platform.corpus.encodings import encoding_of, not_text, unmarked
from refrag_platform.corpus.text import NOT_UNICODE, not_unicode
from refrag_platform.names import printable

# Bytes of one row: more is no row, but a file without ends of lines.
LONGEST_ROW = 1 << 28
SHOWN_KEYS = 20
ROWS_AT_ONCE = 256
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Fault:
    """Why a row (or, where `row` is None, the file) can't be used; `kind` is a `BadInputKind` of `bad_input`."""

    row: int | None
    kind: Literal["broken_utf8", "bad_json", "missing_column", "column_twice", "wrong_type", "not_text"]
    message: str


@dataclass(frozen=True)
class Row:
    """An object; `number` counts lines from 1."""

    number: int
    values: dict[str, Any]


def read_json_rows(stream: BufferedReader[Any]) -> Iterator[Row | Fault]:
    """The rows of a stream of bytes: UTF-8, or UTF-16 or UTF-32 that begin with their mark. Blank lines are none.

    After a fault of the whole file nothing follows.
    """
    head = stream.peek(4096)
    codec, unlike = encoding_of(head), not_text(head)
    if unlike is None and codec == "utf-8-sig" and (guess := unmarked(head)):
        unlike = f"{guess} without a byte-order mark; write it in UTF-8"
    if unlike is not None:
        yield Fault(None, "not_text", f"not JSON Lines: by its first bytes it is {unlike}")
        return
    number = 0
    try:
        for number, line in enumerate(_lines(stream, codec), start=1):
            if isinstance(line, int):
                yield Fault(number, "bad_json", f"longer than the {LONGEST_ROW:,} bytes of a row")
            elif (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip():
                yield _row(number, line)
    except UnicodeDecodeError as error:
        yield Fault(None, "broken_utf8", f"broken {error.encoding.upper()} ({error.reason}) after row {number}")


def _lines(stream: BufferedReader[Any], codec: str) -> Iterator[bytes | int]:
    """Lines as UTF-8, whatever ends them; for one that is too long its length."""
    if codec != "utf-8-sig":
        text = TextIOWrapper(stream, encoding=codec)
        try:
            yield from (line.encode() for line in iter(lambda: text.readline(LONGEST_ROW), ""))
        finally:
            # Else the stream is closed with it, if it is not already.
            with suppress(ValueError):
                text.detach()
        return
    for line in iter(lambda: stream.readline(LONGEST_ROW), b""):
        if len(line) == LONGEST_ROW and not line.endswith(b"\n"):
            length = len(line)
            while line and not line.endswith(b"\n"):
                line = stream.readline(LONGEST_ROW)
                length += len(line)
            yield length
        elif b"\r" in line[:-2]:
            yield from line.rstrip(b"\r\n").split(b"\r")
        else:
            yield line


def _row(number: int, line: bytes) -> Row | Fault:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return Fault(number, "broken_utf8", f"broken UTF-8 at byte {error.start} ({error.reason})")
    try:
        values = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        return Fault(number, "bad_json", "not JSON that can be read: nested too deeply")
    except json.JSONDecodeError as error:
        return Fault(number, "bad_json", f"not JSON: {error}")
    except ValueError as error:
        # Python's own limit on the digits of an integer, or a key that stands twice.
        return Fault(number, "bad_json", f"not JSON that can be read: {str(error).split(';')[0]}")
    if not isinstance(values, dict):
        return Fault(number, "bad_json", f"{type(values).__name__} instead of an object")
    if _SURROGATE.search(text) and (place := not_unicode(values)) is not None:
        return Fault(number, "broken_utf8", f"{place} is {NOT_UNICODE}")
    return Row(number, values)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {printable(twice)!r} stands twice")
    return values


def read_parquet_rows(
    stream: BufferedReader[Any], columns: Sequence[str], recipe_key: str = ""
) -> Iterator[Row | Fault]:
    """The rows of a Parquet file, as far as these columns go.

    After a fault of the whole file nothing follows.

    Args:
        columns: the first must be there. recipe_key: what names it, for the message.

    Raises:
        pyarrow.ArrowException, OSError: the file is damaged.
    """
    try:
        yield from _parquet_rows(stream, columns, recipe_key)
    except UnicodeDecodeError as error:  # names of columns
        yield Fault(None, "broken_utf8", f"broken UTF-8 in the description of its columns ({error.reason})")


def _parquet_rows(stream: BufferedReader[Any], columns: Sequence[str], recipe_key: str) -> Iterator[Row | Fault]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.ParquetFile(stream if stream.seekable() else _seekable(stream))
    there = table.schema_arrow.names
    read = [column for column in columns if column in there]
    if columns[0] not in read:
        key = f" ({recipe_key})" if recipe_key else ""
        yield Fault(None, "missing_column", f"no column {columns[0]!r}{key}; it has: {keys_said(there)}")
        return
    if twice := next((column for column in read if there.count(column) > 1), None):
        yield Fault(None, "column_twice", f"the column {twice!r} stands {there.count(twice)} times; rename the others")
        return
    number = 0
    for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=read):
        for index in range(batch.num_rows):
            number += 1
            try:
                yield Row(number, {column: batch.column(column)[index].as_py() for column in read})
            except UnicodeDecodeError as error:
                yield Fault(number, "broken_utf8", f"broken UTF-8 ({error.reason})")
            except (ValueError, TypeError, ArithmeticError, NotImplementedError, pa.ArrowException) as error:
                yield Fault(number, "wrong_type", f"a value that can't be read ({str(error).splitlines()[0]})")


def _seekable(stream: BufferedReader[Any]) -> IO[bytes]:
    """A temporary copy: Parquet is read from its end, which a compressed stream can't jump to."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the reader
    while block := stream.read(1 << 20):
        copy.write(block)
    return copy


def keys_said(keys: Iterable[object]) -> str:
    """Names of keys or columns for a message."""
    names = [printable(str(key))[:60] for key in keys]
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return (", ".join(names[:SHOWN_KEYS]) or "nothing") + more
