"""What is served is what is judged: questions looked up in a real store, answered over that, and held by the gate."""

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refrag_platform.corpus.held_out import looked_up_questions
from refrag_platform.corpus.question import Question
from refrag_platform.corpus.question_files import read_questions
from refrag_platform.evaluation.items import Items
from refrag_platform.evaluation.served import ServedEvaluation, evaluate_served
from refrag_platform.model.loading import load_bundle
from refrag_platform.project import Project
from refrag_platform.recipes import Recipe, ReleaseRecipe
from refrag_platform.releases.gate import Decision, decide
from refrag_platform.serving.contract import Message
from refrag_platform.serving.engine import Engine
from refrag_platform.stages import StageContext
from refrag_platform.store.build import build_chunks
from refrag_platform.store.relevance import recipe_relevance

RULES = ReleaseRecipe(tolerances={"retrieval_hit_5": 0.02, "retrieval_f1": 0.02})


@pytest.fixture(scope="module")
def recipe(evaluation_project: Project) -> Recipe:
    recipe = evaluation_project.recipe("tiny")
    short = recipe.evaluation.model_copy(update={"max_new_tokens": 4})
    # Three of the four passages that name a country.
    serving = recipe.serving.model_copy(update={"passages": 3})
    return recipe.model_copy(update={"evaluation": short, "serving": serving})


def evaluated(project: Project, recipe: Recipe, questions: list[Question], chunks: Path) -> ServedEvaluation:
    base, bundle = project.recipe_path("tiny").parent, load_bundle(str(project.content("finetuned", "tiny")))
    return evaluate_served(bundle, questions, chunks, recipe, base, recipe_relevance(recipe, base, "cpu"))


@pytest.fixture(scope="module")
def served(evaluation_project: Project, recipe: Recipe, questions: list[Question]) -> ServedEvaluation:
    return evaluated(evaluation_project, recipe, questions, evaluation_project.content("chunks", "tiny"))


def gate(candidate: ServedEvaluation, released: ServedEvaluation) -> Decision:
    return decide(Items(retrieval=candidate.items), Items(retrieval=released.items), RULES)


def test_answers_are_over_the_passages_that_the_service_sends_and_rates_reach_as_far_as_the_store(
    evaluation_project: Project, recipe: Recipe, questions: list[Question], served: ServedEvaluation
) -> None:
    (lookups,) = served.report["lookups"]
    assert (lookups["kind"], lookups["questions"]) == ("in the store", 9)
    # Of twelve passages there are no first twenty.
    rates = [lookups[f"hit_{cut}"] for cut in (1, 5, 10)]
    assert "hit_20" not in lookups and rates == sorted(rates) and rates[0] < rates[1] == 1.0
    assert [(row["system"], row["passages"]) for row in served.report["rows"]] == [
        ("full", 3), ("first", 3), ("plain", 3), ("sentences", 3), ("refrag", 3),
    ]  # fmt: skip
    model, chunks = (evaluation_project.content(stage, "tiny") for stage in ("finetuned", "chunks"))
    all_answered = recipe.serving.model_copy(update={"least_similarity": None, "max_new_tokens": 4})
    engine = Engine.open("tiny", model, chunks, all_answered)
    asked = [engine.ask([Message("user", question.question)], 3) for question in questions]
    given = [("".join(generation), generation.usage) for generation in asked]
    engine.close()
    (refrag,) = [row for row in served.report["rows"] if row["system"] == "refrag"]
    positions = sum(usage.prompt_positions for _, usage in given)
    assert positions / len(given) == pytest.approx(refrag["decoder_tokens"], abs=1e-4)
    answers = [row["answer"] for row in served.answers if row["system"] == "refrag"]
    assert [text.strip().split("\n")[0].strip() for text, _ in given] == answers


def test_what_the_store_does_not_hold_is_counted_apart_and_what_would_be_refused_is_a_share(
    evaluation_project: Project, recipe: Recipe, questions: list[Question]
) -> None:
    elsewhere = Question("x", "Who wrote Faust?", ("Goethe",), (("Goethe", "He wrote Faust."),), (0,))
    unknown = replace(questions[0], id="y", question="What is said of Land1?", gold=())
    strict = recipe.serving.model_copy(update={"least_similarity": 0.99})
    found = evaluated(
        evaluation_project,
        recipe.model_copy(update={"serving": strict}),
        [*questions[:2], elsewhere, unknown],
        evaluation_project.content("chunks", "tiny"),
    )
    rows = {row["kind"]: row for row in found.report["lookups"]}
    assert {kind: row["questions"] for kind, row in rows.items()} == {
        "in the store": 2, "not in the store": 1, "gold unknown": 1,
    }  # fmt: skip
    assert rows["in the store"]["answered"] == 0.0 and rows["not in the store"]["hit_1"] is None
    assert {answer["id"] for answer in found.answers} == {question.id for question in questions[:2]}
    assert found.items.values["retrieval_in_store"] == [1.0, 1.0, 0.0]
    alone = evaluated(evaluation_project, recipe, [elsewhere], evaluation_project.content("chunks", "tiny"))
    assert alone.report["rows"] == [] and alone.items.groups == []


def test_a_question_of_the_corpus_and_of_a_file_is_looked_up_once(evaluation_project: Project, recipe: Recipe) -> None:
    corpus = evaluation_project.content("corpus", "tiny")
    own = read_questions(corpus / "questions" / "test.jsonl", recipe.evaluation.questions)
    other = Question("x", "Who?", ("I",), (("A", "B"),))
    assert looked_up_questions([other, replace(own[0], id="again")], recipe.evaluation, corpus) == [*own, other]


def test_the_same_store_passes_the_gate(
    evaluation_project: Project, recipe: Recipe, questions: list[Question], served: ServedEvaluation
) -> None:
    again = evaluated(evaluation_project, recipe, questions, evaluation_project.content("chunks", "tiny"))
    assert again.items == served.items and gate(again, served).promoted


def test_a_store_that_ranks_worse_is_refused_with_the_same_model(
    evaluation_project: Project, recipe: Recipe, questions: list[Question], served: ServedEvaluation, tmp_path: Path
) -> None:
    """Every passage has the retrieval vector of another country's; words alone find the right ones."""
    chunks = tmp_path / "data" / "chunks" / "content"
    shutil.copytree(evaluation_project.content("chunks", "tiny"), chunks)
    table = pq.read_table(chunks / "passages.parquet")
    rows = table.to_pylist()
    moved = [
        row | {"retrieval_vector": other["retrieval_vector"]}
        for row, other in zip(rows, rows[4:] + rows[:4], strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(moved, table.schema), chunks / "passages.parquet")
    worse = evaluated(evaluation_project, recipe, questions, chunks)
    assert len(worse.items.groups) == len(served.items.groups)
    decision = gate(worse, served)
    assert not decision.promoted and decision.reason.startswith("refused: retrieval_hit_5 ")
    assert decision.verdicts[0].gain is not None and decision.verdicts[0].gain < 0


def test_a_store_without_some_passages_is_refused_with_the_same_model(
    evaluation_project: Project, recipe: Recipe, questions: list[Question], served: ServedEvaluation, tmp_path: Path
) -> None:
    chunks, corpus = tmp_path / "data" / "chunks" / "content", tmp_path / "corpus"
    shutil.copytree(evaluation_project.content("corpus", "tiny"), corpus)
    passages = pq.read_table(corpus / "passages.parquet")
    pq.write_table(passages.filter(pa.compute.field("title") != "Land2"), corpus / "passages.parquet")
    for folder in (chunks, chunks.parent / "state"):
        folder.mkdir(parents=True)
    inputs = {"corpus": corpus, "finetuned": evaluation_project.content("finetuned", "tiny")}
    context = StageContext(evaluation_project, recipe, "chunks", inputs, chunks, chunks.parent / "state", chunks.parent)
    build_chunks(context)
    fewer = evaluated(evaluation_project, recipe, questions, chunks)
    # What is there is found as well as before.
    assert {row["kind"]: (row["questions"], row["hit_5"]) for row in fewer.report["lookups"]} == {
        "in the store": (6, 1.0), "not in the store": (3, None),
    }  # fmt: skip
    decision = gate(fewer, served)
    assert not decision.promoted and "retrieval_hit_5 " in decision.reason
