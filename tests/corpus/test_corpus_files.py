"""Files of every format become documents; what can't be used is told with file and row, and counted."""

import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from refrag_platform.corpus import files, rows
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
        ("digits.jsonl", jsonl(ROWS) + b'{"text": "x", "id": ' + b"9" * 5000 + b"}\n" + jsonl(ROWS), "bad_json", 3, 4),
        ("deep.jsonl", jsonl(ROWS) + b'{"m": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "bad_json", 3, 2),
        ("deep.jsonl", b"[" * 100_000 + b"\n" + jsonl(ROWS), "bad_json", 1, 2),
        ("twice.jsonl", b'{"text": "a", "text": "b"}\n' + jsonl(ROWS), "bad_json", 1, 2),
        ("rows.jsonl", jsonl(ROWS) + b'{"text": "x", "title": "\\udc00"}\n', "broken_utf8", 3, 2),
        ("rows.jsonl", jsonl(ROWS) + b'{"text": "x", "m": [{"\\uD83D": 1}]}\n', "broken_utf8", 3, 2),
        ("rows.jsonl", b'{"text": "x", "title": ["a"]}\n' + jsonl(ROWS), "wrong_type", 1, 2),
        ("rows.jsonl", b'{"text": NaN}\n{"text": "x", "title": NaN}\n', "wrong_type", 1, 1),
        ("rows.jsonl", b'{"text": "\\u200e\\u3164\\ufe0f"}\n', "empty_text", 1, 0),
        ("rows.jsonl", json.dumps({"text": "M\0u\0s\0c\0a\0t\0 \0i\0s\0"}).encode(), "not_text", 1, 0),
        ("mark.txt", b"\xef\xbb\xbf", "empty_text", None, 0),
        ("rows.jsonl", jsonl([ROWS[0], {"body": "no text"}, ROWS[1]]), "missing_column", 2, 2),
        ("rows.jsonl", b'{"text": 5}\n', "wrong_type", 1, 0),
        ("rows.jsonl", b'{"text": "  "}\n', "empty_text", 1, 0),
        ("rows.jsonl.zst", pack(jsonl(ROWS) * 2000)[:-40], "damaged_file", None, None),
        ("not.jsonl.zst", b"no frame at all", "damaged_file", None, 0),
        ("not.parquet", b"PAR1 no table", "damaged_file", None, 0),
        ("picture.pdf", b"%PDF", "unknown_format", None, 0),
        ("really.jsonl.zst", b"\x1f\x8b\x08 gzip", "damaged_file", None, 0),
        ("cut.parquet", b"PAR1PAR1", "damaged_file", None, 0),
    ],
)
def test_bad_input_is_told_counted_and_skipped(
    read: Read, bad: BadInput, tmp_path: Path, name: str, data: bytes, kind: str, row: int | None, kept: int | None
) -> None:
    documents = read(name, data)
    assert dict(bad.counts) == {kind: 1}
    assert [(entry["kind"], entry["file"], entry["row"]) for entry in log(tmp_path)] == [(kind, f"files/{name}", row)]
    assert kept is None or len(documents) == kept


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("code", ["utf-16", "utf-32"])
def test_other_encodings_are_read_by_their_mark(read: Read, bad: BadInput, code: str, packed: bool) -> None:
    text = "Привет, мир. Столица — 東京. " * 8
    made = {"text.txt": text.encode(code), "rows.jsonl": (json.dumps({"text": text}, ensure_ascii=False)).encode(code)}
    for name, data in made.items():
        (document,) = read(name + ".zst", pack(data)) if packed else read(name, data)
        assert document.text == text.strip()
    assert not bad.counts


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("code", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize(
    "text", ["Muscat is the capital of Oman. ", "Привет, мир. Столица — Москва. ", "Москва", "देवनागरी"]
)
def test_other_encodings_without_a_mark_are_named_and_never_indexed(
    read: Read, bad: BadInput, tmp_path: Path, suffix: str, code: str, text: str
) -> None:
    data = (json.dumps({"text": text * 8}, ensure_ascii=False) if suffix == ".jsonl" else text * 8).encode(code)
    assert not read(f"text{suffix}", data)
    (told,) = log(tmp_path)
    assert told["kind"] == "not_text" and "UTF-" in str(told["message"])
    if text.isascii():
        order = "little" if code.endswith("le") else "big"
        assert f"{code[:6].upper()} ({order}-endian) without a byte-order mark" in str(told["message"])


def test_no_other_encoding_or_binary_data_in_the_middle_is_indexed(read: Read, tmp_path: Path) -> None:
    prose = "A line of prose.\n" * 40
    # As a shell appends to a file, and a log with colours, and one stray NUL.
    assert not read("mixed.txt", prose.encode() + "Москва\n".encode("utf-16-le"))
    assert len(read("log.txt", ("\x1b[31mred\x1b[0m\n" * 40).encode())) == 1
    assert len(read("stray.txt", (prose + "\0" + prose).encode())) == 1
    assert [entry["kind"] for entry in log(tmp_path)] == ["not_text"]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n", "a PDF"),
        ("a.md", b"PK\x03\x04\x14\0", "a ZIP archive"),
        ("a.jsonl", b"PAR1\x15", "Parquet, whose files end in .parquet"),
        ("a.txt", pack(b"packed twice"), "Zstandard"),
        ("a.txt", b"{\\rtf1\\ansi Muscat}", "RTF"),
    ],
)
def test_other_formats_are_known_by_their_first_bytes(
    read: Read, tmp_path: Path, name: str, data: bytes, said: str
) -> None:
    assert not read(name, data) and not read(f"{name}.zst", pack(data))
    told = log(tmp_path)
    assert [entry["kind"] for entry in told] == ["not_text"] * 2 and all(said in str(one["message"]) for one in told)


def test_names_say_the_format_whatever_their_case(read: Read) -> None:
    (document,) = read("UPPER.MD", b"# Title\n\ntext")
    assert (document.title, document.text) == ("Title", "# Title\n\ntext")
    assert [document.title for document in read("PACKED.MD.ZST", pack(b"# Title\n\ntext"))] == ["Title"]


def test_any_end_of_a_line_ends_a_row(read: Read, bad: BadInput) -> None:
    for end in (b"\r", b"\r\n", b"\n"):
        assert len(read("rows.jsonl", jsonl(ROWS).replace(b"\n", end))) == 2
    assert not bad.counts


def test_a_row_without_an_end_is_not_held(
    read: Read, bad: BadInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "LONGEST_ROW", 1000)
    assert len(read("rows.jsonl", b'{"text": "' + b"x" * 5000 + b'"}\n' + jsonl(ROWS))) == 2
    assert [(entry["kind"], entry["row"]) for entry in log(tmp_path)] == [("bad_json", 1)]


def test_what_unpacks_to_very_much_is_not_held(read: Read, bad: BadInput) -> None:
    """256 MiB in a few kilobytes, 32,000 times as much as is read of it at once."""
    bomb = zstandard.ZstdCompressor(level=19).compress(b"\0" * (1 << 28))
    assert len(bomb) < 1 << 16
    tracemalloc.start()
    stream = files._Unpacked(io.BytesIO(bomb))
    block, count = bytearray(1 << 20), 0
    while length := stream.readinto(block):
        count += length
    assert count == 1 << 28 and tracemalloc.get_traced_memory()[1] < 1 << 27
    tracemalloc.stop()


def test_titles_that_are_numbers_are_read(read: Read, bad: BadInput) -> None:
    rows = b'{"text": "a", "title": 1984}\n{"text": "b", "title": null}\n{"text": "c", "title": NaN}\n'
    assert [document.title for document in read("rows.jsonl", rows)] == ["1984", "rows", "rows"]
    assert not bad.counts


@pytest.mark.parametrize(
    ("table", "kinds", "kept"),
    [
        (pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), {"column_twice": 1}, 0),
        (pa.Table.from_arrays([pa.array(["a"])] * 3, names=["text", "x", "x"]), {}, 1),
        (pa.table({"text": pa.array(["a", "b"]).dictionary_encode()}), {}, 2),
        (pa.table({"text": pa.array(["a", None], pa.large_string())}), {"wrong_type": 1}, 1),
        (pa.table({"text": pa.array([b"a"])}), {"wrong_type": 1}, 0),
        (pa.table({"text": pa.array([["a"]])}), {"wrong_type": 1}, 0),
        (pa.table({"text": pa.nulls(2)}), {"wrong_type": 2}, 0),
        (pa.table({"text": pa.array([], pa.string())}), {"empty_file": 1}, 0),
        (pa.table({"text": ["a"], "title": pa.array([1 << 50], pa.timestamp("s"))}), {"wrong_type": 1}, 0),
        (pa.table({"text": ["a"], "title": pa.array([1984])}), {}, 1),
    ],
)
def test_odd_parquet_is_read_or_counted_by_kind(
    read: Read, bad: BadInput, tmp_path: Path, table: pa.Table, kinds: dict[str, int], kept: int
) -> None:
    assert len(read("rows.parquet", parquet(tmp_path, table))) == kept
    assert dict(bad.counts) == kinds


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
