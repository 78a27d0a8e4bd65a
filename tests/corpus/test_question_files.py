"""Questions: how files of them are read, and in what order a retriever would serve their passages."""

import json
from collections import Counter
from pathlib import Path

import pytest

from refrag_platform.corpus.question import Question, retrieved, with_distractors
from refrag_platform.corpus.question_files import read_questions
from refrag_platform.errors import RefragError


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_question_takes_its_gold_passage_and_the_first_others() -> None:
    passages = tuple(("", text) for text in "abcd")
    assert Question("1", "?", ("c",), passages, gold=(2,)).take(1) == (("", "c"),)
    assert Question("1", "?", ("c",), passages, gold=(2,)).take(3) == (("", "a"), ("", "b"), ("", "c"))
    assert Question("1", "?", ("c",), passages).take(2) == (("", "a"), ("", "b"))
    assert Question("1", "?", ("c",), passages).take(9) == passages


def test_questions_are_read_and_a_limit_spreads_over_the_file(tmp_path: Path) -> None:
    rows = [{"id": n, "question": "?", "answers": ["x"], "passages": [{"text": "t"}]} for n in range(10)]
    path = write(tmp_path / "questions.jsonl", *rows, "")
    assert len(read_questions(path)) == 10
    assert [question.id for question in read_questions(path, limit=4)] == ["0", "2", "5", "7"]
    assert len(read_questions(path, limit=99)) == 10


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("{", "row 2: not JSON"),
        ([1], "row 2: list instead of an object"),
        ({"question": " ", "answers": [], "passages": []}, "row 2: `question` is ' '"),
        ({"question": "?", "answers": [1], "passages": []}, "row 2: `answers` is"),
        ({"question": "?", "answers": [], "passages": [{"title": "t"}]}, "row 2: `passages` must be"),
        ({"question": "?", "answers": [], "passages": [{"text": "t"}], "gold": [1]}, "row 2: `gold` is"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: object, fault: str) -> None:
    right = {"question": "?", "answers": "x", "passages": [{"text": "t"}]}
    with pytest.raises(RefragError, match=fault):
        read_questions(write(tmp_path / "questions.jsonl", right, row))


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RefragError, match="no questions at"):
        read_questions(tmp_path / "absent.jsonl")
    with pytest.raises(RefragError, match="has no questions"):
        read_questions(write(tmp_path / "empty.jsonl", ""))


def test_conversations_and_summaries_are_read_as_questions(tmp_path: Path) -> None:
    turns = [("user", "Who?"), ("agent", "Ada."), ("user", "When?")]
    rows = [
        {
            "task_id": "t",
            "conversation_id": "c",
            "input": [{"speaker": speaker, "text": text} for speaker, text in turns],
            "targets": [{"text": "I do not know."}],
            "contexts": [{"text": "x"}],
            "answerability": ["UNANSWERABLE"],
        },
        {"id": "s", "document": "long", "summaries": ["short", "brief"]},
    ]
    asked, summary = read_questions(write(tmp_path / "rows.jsonl", *rows))
    assert asked.question == "When?" and asked.history == (("user", "Who?"), ("assistant", "Ada."))
    assert (asked.id, asked.document, asked.answerable) == ("t", "c", False)
    assert (summary.kind, summary.question, summary.answers) == ("summary", "", ("short", "brief"))
    assert summary.take(1) == (("", "long"),)


def test_retrievers_rank_draw_and_fill_up() -> None:
    passages = tuple(("", f"text {number}") for number in range(6))
    question = Question("q", "?", ("text 4",), passages, gold=(4,))
    assert retrieved(question, "strong").take(2) == passages[:2]
    weak = retrieved(question, "weak")
    assert sorted(weak.passages) == sorted(passages) and weak.passages != passages
    assert weak.passages[weak.gold[0]] == passages[4] and passages[4] in weak.take(2)


def test_a_weak_retriever_s_gold_passage_stands_anywhere() -> None:
    passages = tuple((f"t{n}", "x") for n in range(100))
    places = Counter(
        retrieved(Question(str(n), "?", ("a",), passages, gold=(0,)), "weak").take(4).index(passages[0])
        for n in range(400)
    )
    # A quarter at each place, 100 of 400; three standard deviations are 26.
    assert set(places) == set(range(4)) and all(abs(count - 100) < 30 for count in places.values())
    pool = [("", "says TEXT 4 too"), ("", "a"), ("", "b"), ("", "c")]
    alone = Question("q", "?", ("text 4",), (passages[4],), gold=(0,))
    filled = with_distractors(alone, pool, 3)
    assert len(filled.passages) == 3 and filled.passages[filled.gold[0]] == passages[4]
    assert pool[0] not in filled.passages and with_distractors(alone, pool, 3) == filled
    assert with_distractors(alone, pool, 1) == alone
