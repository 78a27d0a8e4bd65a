"""Fine-tuning examples: what is drawn, and what is refused."""

import json
from pathlib import Path

import pytest

from refrag_platform.corpus.question_files import read_questions, read_rows
from refrag_platform.errors import RefragError
from refrag_platform.model.prompts import NO_ANSWER
from refrag_platform.recipes import FinetunedRecipe, Recipe
from refrag_platform.training.examples import Example, Examples


def write_questions(folder: Path, count: int = 12) -> Path:
    rows = [
        {
            "id": str(n),
            "question": f"What is number {n}?",
            "answers": [f"answer {n}"],
            "passages": [{"title": f"t{n}", "text": f"answer {n}"}, {"title": "o", "text": f"other {n}"}],
            "gold": [0],
            "document_id": str(n // 3),
        }
        for n in range(count)
    ]
    (folder / "questions").mkdir(parents=True)
    (folder / "questions" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(recipe: Recipe, **changes: object) -> FinetunedRecipe:
    return recipe.finetuned.model_copy(update={"max_passages": 4, **changes})


def texts(examples: Examples, example: Example) -> list[str]:
    return [examples.passages[number][1] for number in example.passages]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    folder = write_questions(tmp_path / "corpus")
    rows = [{"title": "a", "text": "First one. Second one. Third one.", "split": "train"}]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "passages.parquet")
    return folder


def test_a_draw_is_decided_by_seed_step_and_row(recipe: Recipe, corpus: Path) -> None:
    examples = Examples(corpus, settings(recipe), seed=0)
    assert examples.draw(1, 2) == examples.draw(1, 2)
    assert len({repr(examples.draw(0, row)) for row in range(20)}) > 10


def test_ranked_passages_stand_as_listed_and_strangers_come_last(recipe: Recipe, corpus: Path) -> None:
    rows = [
        {
            "question": "What is it?",
            "answers": ["gold"],
            "passages": [{"title": "t", "text": text} for text in ("first", "it is gold", "third", "fourth")],
            "gold": [1],
        }
    ]
    (corpus / "questions" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (corpus / "more.jsonl").write_text(json.dumps({"title": "s", "text": "a stranger"}) + "\n")
    wanted = {
        "tasks": {"rag": 1.0},
        "no_answer_share": 0.0,
        "max_passages": 5,
        "distractors": [str(corpus / "more.jsonl")],
    }
    listed = ["first", "it is gold", "third", "fourth", "a stranger"]
    ranked = Examples(corpus, settings(recipe, **wanted, ranked_share=1.0), seed=0)
    found = {tuple(texts(ranked, ranked.draw(step, 0))) for step in range(40)}
    # The gold passage and the best of the others, whatever their number.
    assert found == {("it is gold",), *(tuple(listed[:count]) for count in range(2, 6))}
    shuffled = Examples(corpus, settings(recipe, **wanted), seed=0)
    assert len({tuple(texts(shuffled, shuffled.draw(step, 0))) for step in range(40)}) > len(found)


def test_where_gold_alone_is_listed_it_stands_anywhere_among_strangers(recipe: Recipe, corpus: Path) -> None:
    rows = [
        {"question": f"{n}?", "answers": [f"gold {n}"], "passages": [{"title": "t", "text": f"gold {n}"}], "gold": [0]}
        for n in range(4)
    ]
    (corpus / "questions" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = settings(recipe, tasks={"rag": 1.0}, no_answer_share=0.0, max_passages=3, ranked_share=1.0)
    examples = Examples(corpus, wanted, seed=0)
    drawn = [examples.draw(step, 0) for step in range(40)]
    assert {texts(examples, example).index(example.answer) for example in drawn} == {0, 1, 2}


def test_without_an_answer_passages_stand_anywhere_too(recipe: Recipe, corpus: Path) -> None:
    texts_listed = ["it is gold", "own"]
    row = {
        "question": "What is it?",
        "answers": ["gold"],
        "passages": [{"title": "t", "text": text} for text in texts_listed],
        "gold": [0],
    }
    (corpus / "questions" / "train.jsonl").write_text(json.dumps(row) + "\n")
    (corpus / "more.jsonl").write_text("".join(json.dumps({"title": "s", "text": f"s{n}"}) + "\n" for n in range(3)))
    wanted = {"tasks": {"rag": 1.0}, "no_answer_share": 0.99, "distractors": [str(corpus / "more.jsonl")]}
    examples = Examples(corpus, settings(recipe, **wanted, max_passages=3), seed=0)
    drawn = [examples.draw(step, 0) for step in range(60)]
    silent = [texts(examples, example) for example in drawn if example.answer == NO_ANSWER]
    assert {given.index("own") for given in silent} == {0, 1, 2}


def test_the_answer_is_in_the_passages_or_is_that_there_is_none(recipe: Recipe, corpus: Path) -> None:
    examples = Examples(corpus, settings(recipe, tasks={"rag": 1.0}, no_answer_share=0.5), seed=0)
    drawn = [examples.draw(0, row) for row in range(60)]
    for example in drawn:
        given = texts(examples, example)
        assert (example.answer == NO_ANSWER) or (example.answer in given)
        assert 1 <= len(given) <= 4
    assert 15 < sum(example.answer == NO_ANSWER for example in drawn) < 45


def test_a_conversation_is_of_one_document_and_ends_with_its_question(recipe: Recipe, corpus: Path) -> None:
    examples = Examples(corpus, settings(recipe, tasks={"multi_turn": 1.0}, no_answer_share=0.0), seed=0)
    example = examples.draw(0, 0)
    assert [turn["role"] for turn in example.history][:2] == ["user", "assistant"]
    asked = [int(turn["content"].split()[-1].rstrip("?")) for turn in example.history if turn["role"] == "user"]
    assert {n // 3 for n in asked} == {int(example.question.split()[-1].rstrip("?")) // 3}


def test_a_summary_s_sentence_stands_in_its_document(recipe: Recipe, corpus: Path) -> None:
    examples = Examples(corpus, settings(recipe, tasks={"summarization": 1.0}), seed=0)
    example = examples.draw(0, 0)
    assert example.answer == "First one." and "First one" in texts(examples, example)[0] and example.question == ""


def test_a_task_with_nothing_to_learn_from_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "train.jsonl").write_text("")
    with pytest.raises(RefragError, match=r"'rag' has weight 1.0 and nothing to learn from"):
        Examples(tmp_path, settings(recipe, tasks={"rag": 1.0}, summaries=[]), seed=0)


def test_questions_without_any_passage_to_show_are_refused(recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "?", "answers": [], "passages": []}))
    asked = settings(recipe, tasks={"rag": 1.0}, questions=[str(path)])
    # Without an answer there is none to make up; but something must be shown.
    assert Examples(corpus, asked, seed=0).draw(0, 0).passages
    (corpus / "questions" / "train.jsonl").unlink()
    with pytest.raises(RefragError, match=r"rows\.jsonl, row 1: none of these questions lists a passage"):
        Examples(corpus, asked, seed=0)


def test_one_text_is_one_answer_and_no_answers_are_answered_so(recipe: Recipe, tmp_path: Path) -> None:
    rows = [
        {"id": "a", "question": "?", "answers": "Paris", "passages": [{"text": "Paris"}], "gold": [0]},
        {"id": "b", "question": "?", "answers": [], "passages": [{"text": "none"}], "gold": []},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_questions(path)
    assert first.answers == ("Paris",) and first.passages == (("", "Paris"),)
    corpus = tmp_path / "corpus"
    (corpus / "questions").mkdir(parents=True)
    (corpus / "questions" / "train.jsonl").write_text(json.dumps(rows[1]) + "\n")
    drawn = Examples(corpus, settings(recipe, tasks={"rag": 1.0}), seed=0).draw(0, 0)
    assert (drawn.question, drawn.answer) == (second.question, NO_ANSWER)


def test_an_example_without_an_answer_never_holds_it(recipe: Recipe, tmp_path: Path) -> None:
    corpus = write_questions(tmp_path / "corpus", count=1)
    examples = Examples(corpus, settings(recipe, tasks={"rag": 1.0}, no_answer_share=0.9, max_passages=8), seed=0)
    drawn = [examples.draw(0, row) for row in range(40)]
    without = [example for example in drawn if example.answer == NO_ANSWER]
    assert without and not any("answer 0" in text for example in without for text in texts(examples, example))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}\nnot json\n", "row 1: field 'id' is missing"), ('{"id": 1}\n{', "row 2: not JSON")],
)
def test_bad_rows_are_named_by_file_and_row(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(RefragError, match=message):
        list(read_rows(path, ("id",)))
    with pytest.raises(RefragError, match="no file"):
        list(read_rows(tmp_path / "absent.jsonl"))


def test_a_swapped_answer_is_asked_for_but_is_no_turn_of_a_conversation(recipe: Recipe, corpus: Path) -> None:
    """What was said before would contradict the passages that are shown."""
    file = corpus / "questions" / "train.jsonl"
    swapped = [row | {"id": f"{row['id']}/swapped-1", "answers": ["swapped"]} for _, row in read_rows(file)]
    file.write_text(file.read_text() + "".join(json.dumps(row) + "\n" for row in swapped))
    drawn = {}
    for task in ("rag", "multi_turn"):
        examples = Examples(corpus, settings(recipe, tasks={task: 1.0}, no_answer_share=0.0), seed=0)
        drawn[task] = [examples.draw(0, row) for row in range(60)]
    assert any(example.answer == "swapped" for example in drawn["rag"])
    said = [turn["content"] for example in drawn["multi_turn"] for turn in example.history]
    assert said and "swapped" not in [*said, *(example.answer for example in drawn["multi_turn"])]


def _closed(folder: Path, count: int, **changes: object) -> Path:
    passages = [{"title": f"land {n}", "text": f"Land {n} has {n} rivers."} for n in range(count)]
    row = {"id": "c", "question": "Which has most?", "answers": [f"land {count - 1}"], "passages": passages}
    row |= {"gold": [0, count - 1], "closed": True, "kind": "extreme", **changes}
    path = folder / f"closed-{count}.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path


def test_a_closed_question_shows_all_of_its_passages_and_they_are_shown_with_no_other(
    recipe: Recipe, corpus: Path, tmp_path: Path
) -> None:
    changes = {"tasks": {"rag": 1.0}, "no_answer_share": 0.5, "questions": [str(_closed(tmp_path, 4))]}
    examples = Examples(corpus, settings(recipe, **changes), seed=0)
    drawn = [examples.draw(step, row) for step in range(40) for row in range(8)]
    closed = [example for example in drawn if example.question == "Which has most?"]
    assert len(closed) > 5 and {example.answer for example in closed} == {"land 3"}
    assert all(sorted(texts(examples, one)) == [f"Land {n} has {n} rivers." for n in range(4)] for one in closed)
    assert len({tuple(one.passages) for one in closed}) > 3
    others = [text for one in drawn if one.question != "Which has most?" for text in texts(examples, one)]
    assert others and not any("rivers" in text for text in others)


def test_closed_questions_of_more_passages_than_are_shown_are_left_out_and_counted(
    recipe: Recipe, corpus: Path, tmp_path: Path
) -> None:
    changes = {"tasks": {"rag": 1.0}, "questions": [str(_closed(tmp_path, 4)), str(_closed(tmp_path, 5))]}
    examples = Examples(corpus, settings(recipe, **changes), seed=0)
    assert str(examples.left_out) == "1 about more than 4 passages at once"


def test_questions_that_say_they_are_held_out_are_refused(recipe: Recipe, corpus: Path, tmp_path: Path) -> None:
    changes = {"questions": [str(_closed(tmp_path, 4, split="test"))]}
    with pytest.raises(RefragError, match=r"closed-4\.jsonl, row 1: the question is of the split 'test'"):
        Examples(corpus, settings(recipe, **changes), seed=0)
