"""A corpus' passages are the same where pyarrow is installed and, by their copy, where it isn't."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from refrag_platform.corpus.passage_rows import COPY, TABLE, copy_path, passage_rows, write_copy
from refrag_platform.errors import RefragError

ROWS = [("Öl", "It floats.\nOn water.", "train"), ("", "Held out.", "test")]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    content = tmp_path / "content"
    content.mkdir()
    rows = [dict(zip(("title", "text", "split"), row, strict=True)) for row in ROWS]
    parquet.write_table(pa.Table.from_pylist(rows), content / TABLE)
    return content


def test_the_copy_says_what_the_table_says(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(passage_rows(corpus)) == ROWS
    write_copy(corpus, copy_path(corpus))
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    assert list(passage_rows(corpus)) == ROWS


def test_without_both_what_to_do_is_said(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RefragError, match=f"install pyarrow .*, or .*`refrag bundle export`, which puts {COPY}"):
        list(passage_rows(corpus))
    (corpus / TABLE).unlink()
    assert list(passage_rows(corpus)) == []
