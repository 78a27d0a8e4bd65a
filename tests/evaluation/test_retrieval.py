"""The measure of a store's search: hits alone and in conversations, what is refused, and the threshold it suggests."""

import json
from pathlib import Path

import pytest

from refrag_platform.corpus.factbook import read_factbook_facts
from refrag_platform.corpus.facts import FIELDS
from refrag_platform.corpus.question import Question
from refrag_platform.errors import RefragError
from refrag_platform.evaluation.retrieval import (
    Looked,
    LookupQuestion,
    best_threshold,
    factbook_cases,
    file_cases,
    look_up,
    retrieval_report,
)
from refrag_platform.store.table import ChunkStore
from tests.command import refrag
from tests.store.conftest import Made, made, text_of

__all__ = ["made"]
GOLD = frozenset({("Peru", "Lima")})


def looked(kind: str, group: str, ranks: tuple[int, int], similarity: float, there: bool = True) -> Looked:
    return Looked(LookupQuestion(kind, "?", "", GOLD if there else frozenset(), group, there), *ranks, similarity)


# Of either half, by the hash of the group.
FOUND = [
    *(looked("in", group, ranks, 0.7) for group in "abcdefgh" for ranks in ((1, 1), (0, 3))),
    *(looked("out", group, (0, 0), 0.4, there=False) for group in "abcdefgh"),
]


def test_rates_are_by_kind_and_the_threshold_lies_between_them() -> None:
    report = retrieval_report(FOUND, 0.5)
    there, missing = report["rows"]
    assert (there["alone"], there["together"]) == (
        {"1": 0.5, "5": 0.5, "10": 0.5, "20": 0.5},
        {"1": 0.5, "5": 1.0, "10": 1.0, "20": 1.0},
    )
    assert (missing["alone"], missing["together"]) == (None, None)
    assert (there["answered"], missing["answered"]) == (1.0, 0.0)
    assert (there["answered_other_half"], missing["answered_other_half"]) == (1.0, 0.0)
    assert 0.4 < report["best"] <= 0.7


def test_without_a_threshold_or_a_choice_there_is_none() -> None:
    report = retrieval_report(FOUND[:4], None)
    assert report["best"] is None and best_threshold(FOUND[-2:]) is None
    assert report["rows"][0]["answered"] is None


def test_a_question_whose_gold_is_unknown_is_there_all_the_same() -> None:
    unknown = [Looked(LookupQuestion("in", "?", "", frozenset(), group), 0, 0, 0.7) for group in "abcdefgh"]
    report = retrieval_report([*unknown, *FOUND], 0.5)
    there, missing = report["rows"]
    assert there["questions"] == 24 and there["alone"] == {"1": 0.5, "5": 0.5, "10": 0.5, "20": 0.5}
    assert (there["answered"], missing["answered"]) == (1.0, 0.0) and 0.4 < report["best"] <= 0.7
    # Without any gold there is nothing to rank, and still something to answer.
    alone, _ = retrieval_report([*unknown, *FOUND[-8:]], 0.5)["rows"]
    assert alone["alone"] is None and alone["answered"] == 1.0


def test_a_store_is_searched_as_served(made: Made) -> None:
    passage = ("Country340", text_of(340))
    question = Question("1", "And of Country340?", ("Town340",), (passage,), (0,), history=(("user", "Town12?"),))
    absent = Question("2", "Who wrote Hamlet?", (), (passage,), (0,), answerable=False)
    elsewhere = Question("3", "Who wrote Faust?", ("Goethe",), (("Goethe", "He wrote Faust."),), (0,))
    unknown = Question("4", "And of Country12?", ("Town12",), (passage,))
    cases = file_cases([question, absent, elsewhere, unknown], made.content, "mine")
    store = ChunkStore.open(made.content)
    found, sent = zip(*look_up(store, cases, 3), strict=True)
    assert [(one.case.kind, one.case.answerable, one.alone, one.together) for one in found] == [
        ("mine, in the store", True, 1, 1), ("mine, not in the store", False, 0, 0),
        ("mine, not in the store", False, 0, 0), ("mine, gold unknown", True, 0, 0),
    ]  # fmt: skip
    served = store.search("And of Country340?", 3, "Town12?")
    assert [hit.id for hit in sent[0]] == [hit.id for hit in served]
    assert found[0].similarity == max(hit.score or 0.0 for hit in served)
    assert found[0].similarity > found[1].similarity
    assert found[0].case.before == "Town12?"


def write_questions(content: Path, documents: int) -> None:
    (content / "questions").mkdir(parents=True)
    names = {field.name for field in FIELDS}
    rows = [
        {
            "id": f"{document}/{fact.field}", "question": fact.question, "answers": list(fact.answers), "gold": [0],
            "passages": [{"title": f"{country} - {fact.field}", "text": fact.answers[0]}], "document_id": document,
        }
        for document, country, facts in list(read_factbook_facts())[:documents]
        for fact in facts
        if fact.field in names
    ]  # fmt: skip
    (content / "questions" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_questions_of_the_factbook_are_put_in_conversations(tmp_path: Path) -> None:
    write_questions(tmp_path, 4)
    cases = factbook_cases(tmp_path, 20)
    kinds = {case.kind: case for case in cases}
    assert set(kinds) == {
        "alone", "another country", "the same country", "another subject", "another subject, third turn",
        "not in the store", "not in the store, follow-up", "not in the store, another subject",
    }  # fmt: skip
    assert not kinds["alone"].before and kinds["another subject, third turn"].before.count("\n") == 2
    present = {case.group for case in cases if case.gold}
    assert len(present) <= 4 and not present & {case.group for case in cases if not case.gold}
    assert cases == factbook_cases(tmp_path, 20)


def test_a_corpus_without_such_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefragError, match="fewer than two countries"):
        factbook_cases(tmp_path, 20)


def test_the_command_prints_rates_of_a_question_file(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {
            "id": str(number), "question": question, "answers": ["x"], "gold": [0], "answerable": number != 2,
            "passages": [{"title": f"Country{number}", "text": text_of(number)}],
        }
        for number, question in ((1, "Has Country1 the capital Town1?"), (2, "Who wrote Hamlet?"))
    ]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(made.project.root)
    command = ["evaluate", "retrieval", "--model", "tiny", "--questions", str(tmp_path / "mine.jsonl")]
    result = refrag(*command, "--json", tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["kind"] for row in report["rows"]] == ["mine, in the store", "mine, not in the store"]
    assert report["rows"][0]["answered"] == 1.0 and report["rows"][1]["together"] is None
    assert report["rows"][0]["together"]["1"] == 1.0
    assert "serving.least_similarity is 0.1" in result.output
