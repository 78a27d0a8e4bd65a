"""A corpus' passages for training, which runs without pyarrow too: a plain copy then takes the table's place.

`refrag bundle export` writes the copy, beside content/: what an artifact is does not depend on where it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from refrag_platform.errors import RefragError

TABLE, COPY = "passages.parquet", "passages.jsonl"
COLUMNS = ("title", "text", "split")


def passage_rows(corpus: Path) -> Iterator[tuple[str, str, str]]:
    """Title, text and split of each passage; none where the corpus has no table of them.

    Args: corpus: its content folder.

    Raises:
        RefragError: pyarrow is not installed, and there is no copy.
    """
    if not (corpus / TABLE).is_file():
        return
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        yield from _copied_rows(corpus)
        return
    with parquet.ParquetFile(corpus / TABLE) as table:
        for batch in table.iter_batches(columns=list(COLUMNS)):
            yield from zip(*(batch.column(name).to_pylist() for name in COLUMNS), strict=True)


def write_copy(corpus: Path, path: Path) -> None:
    """Write the copy of the passages of the content folder `corpus` into the file `path`."""
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in passage_rows(corpus))


def copy_path(corpus: Path) -> Path:
    """Where the copy lies."""
    return corpus.parent / COPY


def _copied_rows(corpus: Path) -> Iterator[tuple[str, str, str]]:
    path = copy_path(corpus)
    if not path.is_file():
        raise RefragError(
            f"{corpus / TABLE} says which passages are held out; to read it, install pyarrow (pip install pyarrow), or "
            f"bring the corpus here by `refrag bundle export`, which puts {COPY} beside it"
        )
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            title, text, split = json.loads(line)
            yield title, text, split
