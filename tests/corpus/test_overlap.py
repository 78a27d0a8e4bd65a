"""`refrag questions overlap`: what of judged questions stands in training text."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from refrag_platform.corpus import overlap
from refrag_platform.corpus.overlap import overlaps
from refrag_platform.corpus.question import Question
from tests.command import refrag

WORDS = [f"word{number}" for number in range(400)]


def text(seed: int, count: int = 40) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def question(number: int, *texts: str, gold: tuple[int, ...] = (0,)) -> Question:
    return Question(str(number), f"What is {number}?", ("it",), tuple(("", one) for one in texts), gold)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def passage(words: str, **more: str) -> dict[str, str]:
    return {"title": "", "text": words, **more}


def test_twelve_words_in_a_row_count_and_eleven_do_not(tmp_path: Path) -> None:
    own = text(1).split()
    for count, runs in ((12, 1), (11, 0), (20, 9)):
        shown = f"{text(2)}, {' '.join(own[5 : 5 + count]).upper()} - {text(3)}"
        (found,) = overlaps([question(1, text(1))], [write(tmp_path / "train.jsonl", passage(shown))])
        assert found.share == pytest.approx(runs / 29) and found.seen is bool(runs)


def test_a_run_does_not_go_on_in_the_next_passage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = text(1).split()
    halves = [passage(" ".join(own[:11])), passage(" ".join(own[11:22]))]
    for at_once in (1, 1 << 20):
        monkeypatch.setattr(overlap, "READ_AT_ONCE", at_once)
        assert not overlaps([question(1, text(1))], [write(tmp_path / "train.jsonl", *halves)])[0].seen
        whole = write(tmp_path / "train.jsonl", passage(text(1)), *halves, passage(text(7)))
        assert [one.share for one in overlaps([question(1, text(1)), question(2, text(2))], [whole])] == [1.0, 0.0]


def test_a_shorter_passage_counts_where_it_is_the_same(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", passage("Lima is by the sea."), passage(f"Oslo is cold. {text(4)}"))
    asked = [question(1, "Lima is by the sea"), question(2, "Lima is by the"), question(3, "Oslo is cold.")]
    assert [one.seen for one in overlaps(asked, [train])] == [True, False, False]


def test_passages_that_hold_the_answer_count(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", passage(text(1)), passage(f"{text(2)} it"))
    found = overlaps(
        [
            question(1, text(5), text(1)),
            question(2, text(5), text(1), gold=()),
            question(3, text(5), f"{text(2)} it", gold=()),
            question(4, text(5), text(1), gold=(1,)),
        ],
        [train],
    )
    assert [one.seen for one in found] == [False, False, True, True]


def test_every_form_of_training_text_is_read_and_held_out_rows_are_not(tmp_path: Path) -> None:
    asked = [question(number, text(number)) for number in range(6)]
    rows = [{"id": "a", "question": "what is 0", "answers": ["x"], "passages": [passage(text(9)), passage(text(1))]}]
    columns = {"title": ["", ""], "text": [text(2), text(3)], "split": ["train", "test"]}
    parquet.write_table(pa.table(columns), tmp_path / "passages.parquet")
    files = [
        write(tmp_path / "questions.jsonl", *rows),
        tmp_path / "passages.parquet",
        write(tmp_path / "passages.jsonl", passage(text(4)), passage(text(5), split="validation")),
    ]
    found = overlaps(asked, files)
    assert [one.seen for one in found] == [True, True, True, False, True, False]
    assert found[0].same_question and found[0].share == 0 and not found[1].same_question


def run(*arguments: str | Path, code: int = 0) -> str:
    return " ".join(refrag("questions", "overlap", *arguments, status=code).output.split())


def test_the_command_counts_and_writes_what_was_not_seen(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", passage(text(1)), passage(" ".join(text(2).split()[:14])))
    rows = [
        {
            "id": str(number),
            "question": f"q{number}",
            "answers": ["a"],
            "passages": [passage(text(number))],
            "gold": [0],
        }
        | {"kept": number}
        for number in (1, 2, 3)
    ]
    judged, out = write(tmp_path / "judged.jsonl", *rows), tmp_path / "rest.jsonl"
    printed = run("--train", train, "--judged", judged, "--out", out, "--json", tmp_path / "counts.json")
    assert "| 3 | 0 | 2 | 1 | 2 |" in printed and "1 questions that were not seen" in printed
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == [rows[2]]
    counts = json.loads((tmp_path / "counts.json").read_text(encoding="utf-8"))["judged"]
    assert next(iter(counts.values()))["seen"] == 2
    assert "is there already" in run("--train", train, "--judged", judged, "--out", out, code=2)
    assert "name training text" in run("--judged", judged, code=2)
    assert "no file" in run("--judged", judged, "--train", tmp_path / "none.jsonl", code=2)
    both = ("--judged", judged, "--judged", train, "--train", train, "--out", tmp_path / "more.jsonl")
    assert "give one at a time" in run(*both, code=2)
    seen = write(tmp_path / "seen.jsonl", rows[0])
    assert "every question" in run("--train", train, "--judged", seen, "--out", tmp_path / "none.jsonl", code=2)
    assert not (tmp_path / "none.jsonl").exists()
