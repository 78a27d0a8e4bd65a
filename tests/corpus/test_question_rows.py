"""Question files and pools: what can't be used is one error that names file, row, field and value."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refrag_platform.corpus.question_files import read_passages, read_questions
from refrag_platform.errors import RefragError

GOOD: dict[str, Any] = {
    "id": "1",
    "question": "Capital of Oman?",
    "answers": ["Muscat"],
    "passages": [{"title": "Oman", "text": "Muscat is the capital."}],
    "gold": [0],
}
LINE = json.dumps(GOOD) + "\n"


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_before_a_question_file_is_no_part_of_it(tmp_path: Path, encoding: str) -> None:
    (question,) = read_questions(write(tmp_path / "rows.jsonl", LINE, encoding))
    assert (question.question, question.gold) == ("Capital of Oman?", (0,))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": ' + "9" * 5000 + "}", "row 2: not JSON that can be read"),
        ("[" * 100_000 + "]" * 100_000, "row 2: not JSON that can be read: nested too deeply"),
        (LINE.replace("Capital", r"half \ud83d"), "row 2: question is not valid Unicode"),
        (LINE.replace("Muscat is", r"\ud83d is"), r"row 2: passages.0.text is not valid Unicode"),
        (LINE.replace('"id"', r'"\udc00"'), r"row 2: '\\udc00' is not valid Unicode"),
        (LINE.replace('"id": "1"', '"question": "Which?"'), "row 2: .*the key 'question' stands twice"),
    ],
)
def test_rows_that_break_a_parser_are_named(tmp_path: Path, line: str, said: str) -> None:
    for read in (read_questions, read_passages):
        with pytest.raises(RefragError, match=rf"rows\.jsonl, {said}"):
            read(write(tmp_path / "rows.jsonl", LINE + line + "\n"))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"gold": [True]}, "`gold` is \\[True\\]"),
        ({"gold": [0.0]}, "`gold` is"),
        ({"gold": True}, "`gold` is True"),
        ({"answers": [""]}, "`answers`\\[0\\] is '', which shows nothing"),
        ({"answers": ["Muscat", "\u200b\u3164"]}, "`answers`\\[1\\] is .*which shows nothing"),
        ({"answers": "\u200e"}, "`answers`\\[0\\]"),
        ({"answers": None}, "`answers` is None"),
        ({"question": "\u2060"}, "`question` is"),
        ({"passages": [{"title": " ", "text": "\u200d"}]}, "`passages`\\[0\\] has neither title nor text"),
        ({"passages": [{"title": ["a"], "text": "x"}]}, "a title of `passages` is \\['a'\\]"),
        ({"id": ["a"]}, "`id` is"),
        ({"document_id": {"a": 1}}, "`document_id` is"),
        ({"summaries": []}, "`document` is None"),
        ({"document": "x", "summaries": []}, "`summaries` is \\[\\]"),
        ({"document": "x", "summaries": ["\t"]}, "`summaries`\\[0\\]"),
    ],
)
def test_fields_that_are_not_what_they_must_be_are_named(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "rows.jsonl", LINE + json.dumps(GOOD | changed) + "\n")
    with pytest.raises(RefragError, match=rf"rows\.jsonl, row 2: {said}"):
        read_questions(path)


def test_numbers_and_nothing_are_taken_for_ids_and_titles(tmp_path: Path) -> None:
    row = GOOD | {"id": None, "passages": [{"title": 1984, "text": "x"}, {"title": None, "text": "y"}], "gold": [1, 1]}
    (question,) = read_questions(write(tmp_path / "rows.jsonl", json.dumps(row)))
    assert question.id == "1" and question.passages == (("1984", "x"), ("", "y")) and question.gold == (1,)


def test_other_files_are_said_to_be_what_they_are(tmp_path: Path) -> None:
    for data, said in ((b"%PDF-1.4\n", "a PDF"), (LINE.encode("utf-16-le"), "UTF-16 .little-endian. without")):
        (tmp_path / "rows.jsonl").write_bytes(data)
        with pytest.raises(RefragError, match=rf"rows\.jsonl: not JSON Lines: .*{said}"):
            read_questions(tmp_path / "rows.jsonl")
    with pytest.raises(RefragError, match=r"can't be read .*irectory"):
        read_passages(tmp_path)


def test_an_odd_parquet_pool_is_one_error(tmp_path: Path) -> None:
    one, bad = (
        pa.array(["a"]),
        pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")),
    )
    tables = {
        "row 1: broken UTF-8": pa.table({"title": ["t"], "text": bad}),
        "the column 'text' stands 2 times": pa.Table.from_arrays([one, one], names=["text", "text"]),
        "no column 'text'; it has: body": pa.table({"body": ["a"]}),
        "row 1: `passages` must be a list of objects": pa.table({"text": [5]}),
    }
    for said, table in tables.items():
        pq.write_table(table, tmp_path / "pool.PARQUET")
        with pytest.raises(RefragError, match=rf"pool\.PARQUET.*{said}"):
            read_passages(tmp_path / "pool.PARQUET")
    pq.write_table(pa.table({"text": pa.array(["a", "b"]).dictionary_encode()}), tmp_path / "pool.PARQUET")
    assert read_passages(tmp_path / "pool.PARQUET") == [("", "a"), ("", "b")]
