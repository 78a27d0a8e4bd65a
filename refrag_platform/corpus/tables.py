"""Parquet written row by row in row groups of bounded size; the same rows give the same bytes."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from refrag_platform.files import whole

ROWS_PER_GROUP = 8192
DOCUMENTS = pa.schema(
    [
        ("id", pa.string()),
        ("title", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("shard", pa.int32()),
        ("start", pa.int64()),
        ("tokens", pa.int64()),
        ("characters", pa.int64()),
        ("sha256", pa.string()),
    ]
)
PASSAGES = pa.schema([(name, pa.string()) for name in ("id", "document_id", "title", "text", "split")])


class TableWriter:
    """Collects rows and writes a row group at a time; the file has its name only once it is whole."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.rows = 0
        self._schema = schema
        self._waiting: list[dict[str, Any]] = []
        with ExitStack() as stack:
            partial = stack.enter_context(whole(path))
            self._writer = stack.enter_context(pq.ParquetWriter(partial, schema, compression="zstd"))
            self._file = stack.pop_all()

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._file.__exit__(kind, value, trace)
            return
        with self._file:
            self._flush()

    def add(self, row: dict[str, Any]) -> None:
        self._waiting.append(row)
        self.rows += 1
        if len(self._waiting) == ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_pylist(self._waiting, schema=self._schema))
            self._waiting = []
