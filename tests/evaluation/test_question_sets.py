"""Question files: what is ranked first, what a long document gives, and that it can be read again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from refrag_platform.corpus.question import Question
from refrag_platform.corpus.question_files import read_passages, read_questions
from refrag_platform.errors import RefragError
from refrag_platform.evaluation import question_sets
from refrag_platform.evaluation.question_sets import ranked, whole_documents, write_questions
from refrag_platform.project import Project
from refrag_platform.store.retriever import HashedWords
from tests.command import refrag, refused

GOLD = ("Coffee", "Coffee is grown in the hills of Ruritania.")
ASKED = Question("q", "Where in Ruritania is coffee grown?", ("hills",), (GOLD,), gold=(0,), document="d")


def test_the_nearest_passages_of_the_pool_come_first_and_gold_is_known_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = [("Trains", "Trains run every hour."), ("Tea", "Tea is grown in the hills."), ("Zinc", "Zinc melts.")]
    (found,) = ranked([ASKED], pool, HashedWords(), top=3)
    assert found.passages[0] == GOLD and found.gold == (0,) and len(found.passages) == 3
    assert found.passages[1] == pool[1]
    asked_else = replace(ASKED, question="When do trains run?")
    (lost,) = ranked([asked_else], pool, HashedWords(), top=1)
    assert lost.passages == (pool[0],) and lost.gold == ()
    # However few are read at once.
    monkeypatch.setattr(question_sets, "PASSAGES_AT_ONCE", 2)
    monkeypatch.setattr(question_sets, "SCORED_AT_ONCE", 1)
    again, other = ranked([ASKED, asked_else], pool, HashedWords(), top=3)
    assert again == found and other.passages[:1] == lost.passages


def test_questions_of_one_gold_passage_stay_together_even_where_it_is_not_found(tmp_path: Path) -> None:
    """Intervals resample them together."""
    coffee, tea = ({"title": name, "text": f"{name} is grown in the hills."} for name in ("Coffee", "Tea"))
    asked = [("a", [tea, coffee], [1]), ("b", [coffee], [0]), ("c", [tea], [0]), ("d", [tea], [])]
    rows = [{"id": n, "question": "Where?", "answers": ["hills"], "passages": p, "gold": g} for n, p, g in asked]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = read_questions(tmp_path / "rows.jsonl")
    a, b, c, d = (question.document for question in questions)
    assert a == b != c and d == "d"
    pool = [("Trains", "Where trains run.")]
    write_questions(tmp_path / "ranked.jsonl", ranked(questions, pool, HashedWords(), top=1))
    again = read_questions(tmp_path / "ranked.jsonl")
    assert not any(question.gold for question in again)
    assert [question.document for question in again] == [a, b, c, d]


def test_questions_whose_gold_is_not_found_can_be_left_out(tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    pool.write_text(json.dumps({"title": "Trains", "text": "Trains run every hour."}) + "\n")
    write_questions(tmp_path / "asked.jsonl", [ASKED, replace(ASKED, id="lost", question="When do trains run?")])
    rank = ["questions", "rank", "--questions", str(tmp_path / "asked.jsonl"), "--pool", str(pool), "--top", "1"]
    rank += ["--retriever", "hash", "--found-only", "--out", str(tmp_path / "out.jsonl")]
    assert "1 left out" in refrag(*rank).output
    assert [question.id for question in read_questions(tmp_path / "out.jsonl")] == ["q"]


def test_passages_of_a_pool_are_those_of_the_training_split_unless_another_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    planted = {"title": "Trains", "text": "Trains run every hour, says a page that is held out.", "split": "test"}
    train = {"title": "Trains", "text": "Trains run every hour.", "split": "train"}
    parquet.write_table(pa.Table.from_pylist([planted, train]), tmp_path / "passages.parquet")
    unnamed = {"title": "Trains", "text": "Trains run on Sundays, says a page of no split."}
    (tmp_path / "more.jsonl").write_text(json.dumps(unnamed) + "\n")
    write_questions(tmp_path / "asked.jsonl", [ASKED])

    rank = ["questions", "rank", "--questions", str(tmp_path / "asked.jsonl"), "--retriever", "hash"]
    rank += ["--pool", str(tmp_path / "passages.parquet"), "--out", str(tmp_path / "out.jsonl")]

    def texts(*options: str) -> set[str]:
        refrag(*rank, *options)
        rows = read_questions(tmp_path / "out.jsonl")
        (tmp_path / "out.jsonl").unlink()
        # Beside the question's own passages, which are ranked as well.
        return {text for row in rows for _, text in row.passages} - {text for _, text in ASKED.passages}

    assert texts() == texts("--split", "train") == {train["text"]}
    # To be judged by, a question may meet every page.
    assert texts("--split", "all") == {train["text"], planted["text"]}
    assert texts("--split", "test") == {planted["text"]}
    # A row that names no split is of all of them.
    more = ["--pool", str(tmp_path / "more.jsonl")]
    assert texts(*more) == {train["text"], unnamed["text"]}
    assert texts(*more, "--split", "test") == {planted["text"], unnamed["text"]}
    fault = refused(*rank, "--split", "validation")
    assert "no passages of the split 'validation' (1 of test, 1 of train); name another split" in fault
    assert read_passages(tmp_path / "passages.parquet", split="train") == [("Trains", train["text"])]
    with pytest.raises(RefragError, match=r"no passages of the split 'validation' \(1 of test, 1 of train\)"):
        read_passages(tmp_path / "passages.parquet", split="validation")


def test_a_corpus_passages_are_a_pool(evaluation_project: Project, tmp_path: Path) -> None:
    content = evaluation_project.content("corpus", "tiny")
    pool = read_passages(content / "passages.parquet")
    (found,) = ranked([ASKED], pool, HashedWords(), top=3)
    assert found.passages[0] == GOLD and set(found.passages[1:]) <= set(pool)
    (tmp_path / "passages.parquet").write_text("no parquet")
    with pytest.raises(RefragError, match=r"passages\.parquet can't be read as passages"):
        read_passages(tmp_path / "passages.parquet")


def test_a_question_reads_its_whole_document(evaluation_project: Project) -> None:
    content = evaluation_project.content("corpus", "tiny")
    questions = read_questions(content / "questions" / "test.jsonl")
    for question, whole in zip(questions, whole_documents(questions, content, 80), strict=True):
        assert len(whole.passages) == 4 and len({title for title, _ in whole.passages}) == 1
        assert [whole.passages[place] for place in whole.gold] == [question.passages[place] for place in question.gold]
    # Whose answer lies beyond the first passage is left out.
    assert {whole.gold for whole in whole_documents(questions, content, 1)} == {(0,)}
    with pytest.raises(RefragError, match="questions of this corpus"):
        list(whole_documents([ASKED], content, 80))


def test_a_summary_is_not_ranked() -> None:
    with pytest.raises(RefragError, match="q asks for a summary"):
        list(ranked([replace(ASKED, kind="summary")], [GOLD], HashedWords(), top=1))


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    later = replace(ASKED, id="p", history=(("user", "Where is coffee grown?"), ("assistant", "In Ruritania.")))
    closed = replace(ASKED, id="c", closed=True, category="list", split="test")
    written = [replace(ASKED, answerable=True), later, replace(later, answerable=False), closed]
    assert write_questions(tmp_path / "questions.jsonl", written) == 4
    assert read_questions(tmp_path / "questions.jsonl") == written


WRONG_TURNS = ([{"role": "system", "text": "?"}], [{"role": [], "text": "?"}], {"role": "user"})


@pytest.mark.parametrize(
    ("field", "value"), [*(("history", turns) for turns in WRONG_TURNS), ("answerable", "yes"), ("closed", "yes")]
)
def test_wrong_turns_and_verdicts_name_their_row(tmp_path: Path, field: str, value: object) -> None:
    row = {"id": "q", "question": "?", "answers": ["a"], "passages": [{"text": "a"}], field: value}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    with pytest.raises(RefragError, match=f"row 1: `{field}`"):
        read_questions(tmp_path / "questions.jsonl")
