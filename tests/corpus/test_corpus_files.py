"""Files of every format become documents; what can't be used is told with file and row, and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from refrag_platform.corpus import files
from refrag_platform.corpus.bad_input import BadInput
from refrag_platform.corpus.documents import Document
from refrag_platform.corpus.files import read_file
from refrag_platform.corpus.listing import find_files
from refrag_platform.errors import RefragError
from refrag_platform.recipes import SourceRecipe

Read = Callable[..., list[Document]]
ROWS = [{"title": "A", "text": "Alpha  one."}, {"title": "B", "text": "Beta two."}]


@pytest.fixture
def bad(tmp_path: Path) -> BadInput:
    return BadInput("skip", tmp_path / "bad_input.jsonl")


@pytest.fixture
def read(tmp_path: Path, bad: BadInput) -> Read:
    def run(name: str, data: bytes, bad: BadInput = bad) -> list[Document]:
        path = tmp_path / name
        path.write_bytes(data)
        return list(read_file(path, f"files/{name}", SourceRecipe(kind="files"), bad, lambda count: None))

    return run


def jsonl(rows: list[dict[str, str]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(tmp_path: Path, table: pa.Table) -> bytes:
    pq.write_table(table, tmp_path / "made.parquet")
    return (tmp_path / "made.parquet").read_bytes()


def pack(data: bytes) -> bytes:
    return zstandard.compress(data)


def log(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "bad_input.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("packed", [False, True])
def test_every_format_is_read_and_normalized(read: Read, tmp_path: Path, bad: BadInput, packed: bool) -> None:
    made = {
        "one.txt": "Alpha  one.\r\n".encode("utf-8-sig"),
        "two.md": b"# Heading\n\nBody.",
        "rows.jsonl": jsonl(ROWS) + b"\n",
        "rows.parquet": parquet(tmp_path, pa.Table.from_pylist(ROWS)),
    }
    found = {
        name: [(document.title, document.text) for document in documents]
        for name, data in made.items()
        for documents in [read(name + ".zst", pack(data)) if packed else read(name, data)]
    }
    rows = [("A", "Alpha one."), ("B", "Beta two.")]
    assert found == {
        "one.txt": [("one", "Alpha one.")],
        "two.md": [("Heading", "# Heading\n\nBody.")],
        "rows.jsonl": rows,
        "rows.parquet": rows,
    }
    assert not bad.counts


def test_two_compressed_frames_are_one_file(read: Read) -> None:
    assert len(read("rows.jsonl.zst", pack(jsonl(ROWS[:1])) + pack(jsonl(ROWS[1:])))) == 2


def test_a_row_keeps_its_id_when_rows_come_before_it(read: Read) -> None:
    alone = read("rows.jsonl", jsonl(ROWS[1:]))
    assert alone[0].id == read("rows.jsonl", jsonl(ROWS))[1].id


@pytest.mark.parametrize(
    ("name", "data", "kind", "row", "kept"),
    [
        ("latin.txt", "Caf\u00e9".encode("latin-1"), "broken_utf8", None, 0),
        ("empty.txt", b"", "empty_file", None, 0),
        ("blank.md", b" \n\t\n", "empty_text", None, 0),
        ("empty.jsonl.zst", pack(b"\n\n"), "empty_file", None, 0),
        ("rows.jsonl", jsonl(ROWS) + b'{"text": "\xff"}\n' + jsonl(ROWS), "broken_utf8", 3, 4),
        ("rows.jsonl", b'{"text": "\\ud800"}\n' + jsonl(ROWS), "broken_utf8", 1, 2),
        ("rows.jsonl", jsonl(ROWS) + b'{"text": \n', "bad_json", 3, 2),
        ("rows.jsonl", b"[1]\n" + jsonl(ROWS), "bad_json", 1, 2),
        ("rows.jsonl", jsonl([ROWS[0], {"body": "no text"}, ROWS[1]]), "missing_column", 2, 2),
        ("rows.jsonl", b'{"text": 5}\n', "wrong_type", 1, 0),
        ("rows.jsonl", b'{"text": "  "}\n', "empty_text", 1, 0),
        ("rows.jsonl.zst", pack(jsonl(ROWS) * 2000)[:-40], "damaged_file", None, None),
        ("not.jsonl.zst", b"no frame at all", "damaged_file", None, 0),
        ("not.parquet", b"PAR1 no table", "damaged_file", None, 0),
        ("picture.pdf", b"%PDF", "unknown_format", None, 0),
    ],
)
def test_bad_input_is_told_counted_and_skipped(
    read: Read, bad: BadInput, tmp_path: Path, name: str, data: bytes, kind: str, row: int | None, kept: int | None
) -> None:
    documents = read(name, data)
    assert dict(bad.counts) == {kind: 1}
    assert [(entry["kind"], entry["file"], entry["row"]) for entry in log(tmp_path)] == [(kind, f"files/{name}", row)]
    assert kept is None or len(documents) == kept


def test_bad_parquet_columns_and_rows_are_told(read: Read, bad: BadInput, tmp_path: Path) -> None:
    assert not read("columns.parquet", parquet(tmp_path, pa.table({"body": ["text"]})))
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"\xff\xfeok"))
    assert [d.text for d in read("rows.parquet", parquet(tmp_path, pa.table({"text": broken})))] == ["ok"]
    assert [(entry["kind"], entry["row"]) for entry in log(tmp_path)] == [("missing_column", None), ("broken_utf8", 1)]
    assert "text_column" in str(log(tmp_path)[0]["message"]) and "body" in str(log(tmp_path)[0]["message"])


def test_stop_ends_the_run_and_names_file_and_row(read: Read, tmp_path: Path) -> None:
    with pytest.raises(RefragError, match=r"files/rows.jsonl, row 3: .*on_bad_input"):
        read("rows.jsonl", jsonl(ROWS) + b"{\n", BadInput("stop", tmp_path / "log"))


def test_a_long_text_comes_in_parts_of_one_split_group(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PART_CHARACTERS", 1000)
    text = "\n\n".join(f"Paragraph {number} of a long book." for number in range(200))
    parts = read("book.txt", text.encode())
    assert "\n\n".join(part.text for part in parts) == text
    assert len({part.id for part in parts}) == len(parts) > 5
    assert {part.group for part in parts} == {"files/book.txt"}
    assert max(len(part.text) for part in parts) <= 1000


def test_hidden_files_are_left_out_and_the_order_is_fixed(tmp_path: Path) -> None:
    for name in ("b/x.txt", "a.txt", ".hidden/y.txt", ".gitkeep", "b/a.txt"):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_text("text")
    found = find_files(tmp_path / "source").files
    assert [file.relative_to(tmp_path / "source").as_posix() for file in found] == ["a.txt", "b/a.txt", "b/x.txt"]
