"""Questions that are about all of their passages: figures of each kind, and never asked over a part."""

import json
from pathlib import Path

import pytest

from refrag_platform.corpus.question import Question, retrieved, with_distractors
from refrag_platform.corpus.question_files import read_questions
from refrag_platform.errors import RefragError
from refrag_platform.evaluation.metrics import set_match
from refrag_platform.evaluation.question_sets import ranked
from refrag_platform.evaluation.rag import evaluate_rag
from refrag_platform.evaluation.report import rag_report
from refrag_platform.evaluation.systems import System
from refrag_platform.model.refrag import RefragModel
from refrag_platform.store.relevance import PassageRelevance
from refrag_platform.store.retriever import HashedWords
from tests.evaluation.conftest import judged

SYSTEMS: list[System] = ["full", "first", "plain", "sentences", "kept", "refrag"]


def questions(count: int = 12) -> list[Question]:
    """Two questions of different kinds on each of three contexts."""
    found = []
    for context in range(3):
        lands = tuple(
            (f"Land {n}", f"Rivers: {(7 * n + context) % 31}\nMedian age: {30 + n} years") for n in range(count)
        )
        for kind, question, answer in (
            ("extreme", "Which has most rivers?", "Land 4"),
            ("list", "Which?", "Land 1, Land 2"),
        ):
            found.append(
                Question(
                    f"{context}/{kind}", question, (answer,), lands, gold=tuple(range(count)), document=str(context),
                    closed=True, category=kind,
                )
            )  # fmt: skip
    return found


def test_each_kind_has_figures_and_gains_over_every_plain_system_at_equal_tokens(model: RefragModel) -> None:
    found = judged(
        model,
        None,
        questions(),
        passages=[20],
        shares=[0.15],
        systems=SYSTEMS,
        relevance=PassageRelevance(HashedWords()),
        max_new_tokens=3,
        batch_size=4,
    )
    assert list(found.parts) == ["extreme", "list"]
    for part in found.parts.values():
        assert part["questions_used"] == 3
        plain = {(row["over"], row["share_kept"]) for row in part["differences"]}
        assert plain == {(system, share) for system in SYSTEMS[:-1] for share in (0.0, 0.15)}
        assert all(len(row[score]) == 3 for row in part["differences"] for score in ("exact_match", "set_match"))
        rows = {
            (row["system"], row["share_kept"] if row["system"] == "refrag" else row["tokens_of"]): row
            for row in part["rows"]
        }
        for share in (0.0, 0.15):
            budget = rows["refrag", share]["decoder_tokens"]
            assert rows["plain", share]["decoder_tokens"] == budget
            assert budget - 20 < rows["sentences", share]["decoder_tokens"] <= budget
        assert rows["refrag", 0.0]["compression"] > rows["refrag", 0.15]["compression"] > 1
    said = rag_report(vars(found))
    assert "| system | passages | extreme | list |" in said
    assert "### Of these, extreme: 3 questions" in said and "### Of these, list: 3 questions" in said


def test_a_list_is_right_in_any_order_and_with_nothing_more_or_less() -> None:
    assert set_match("the Gambia, Chad and Mali", ["Chad and Mali, Gambia"]) == 1
    assert set_match("Mali, Chad", ["Chad, Mali"]) == 1
    assert set_match("Chad", ["Chad, Mali"]) == set_match("Chad, Mali, Togo", ["Chad, Mali"]) == 0
    assert set_match("Chad, Chad, Mali", ["Chad, Mali"]) == 0
    assert set_match("12.", ["11", "12"]) == 1 and set_match("Chad", ["!"]) == set_match("", ["Chad"]) == 0


def test_the_report_shows_set_match_where_a_list_came_in_another_order(model: RefragModel) -> None:
    found = vars(judged(model, None, questions()[:2], passages=[12], systems=["full", "refrag"]))
    assert "set match" not in rag_report(found)
    found["rows"][0]["set_match"] = 0.5
    assert rag_report(found).count("| set match |") == 2


def test_no_question_is_asked_over_a_part_of_what_it_is_about(model: RefragModel) -> None:
    with pytest.raises(
        RefragError, match=r"all of its 12 passages, and only 5 .*\(as with 6 questions in all\); read 12"
    ):
        evaluate_rag(model, None, questions(), passages=[5, 20], share_kept=0.0, systems=["full"])
    (one, *_) = questions()
    assert retrieved(one, "strong").take(20) == one.passages
    assert set(retrieved(one, "weak").take(20)) == set(one.passages)
    assert with_distractors(one, [("Land 99", "Rivers: 99")], 20) == one
    with pytest.raises(RefragError, match="0/extreme is about just the passages that it lists"):
        list(ranked([one], [("Land 99", "Rivers: 99")], HashedWords(), 3))


def test_open_questions_of_several_gold_passages_pass_through_the_same_evaluation(
    model: RefragModel, tmp_path: Path
) -> None:
    """As multi-hop sets have them: twenty passages, two to four of them gold, no kinds."""
    row = {
        "question": "Who led the city of the tower?", "answers": ["Ada", "Ada L."], "gold": [3, 11],
        "passages": [{"title": f"T{n}", "text": f"Tower {n} is in a town. It is {n} years old."} for n in range(20)],
    }  # fmt: skip
    path = tmp_path / "hops.jsonl"
    path.write_text("".join(json.dumps(row | {"id": f"2hop__{n}"}) + "\n" for n in range(3)))
    found = judged(
        model,
        None,
        read_questions(path),
        passages=[10, 20],
        systems=SYSTEMS,
        relevance=PassageRelevance(HashedWords()),
        batch_size=4,
    )
    assert len(found.rows) == 2 * len(SYSTEMS) and not found.parts
    assert all(row["exact_match"] is not None for row in found.rows)
