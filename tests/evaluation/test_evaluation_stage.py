"""The evaluation stage and `refrag evaluate`: files, reports, and what they refuse."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.corpus.held_out import held_out_questions
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.evaluation.items import Items
from refrag_platform.evaluation.report import perplexity_report, rag_report
from refrag_platform.evaluation.stage import evaluate_stage
from refrag_platform.evaluation.systems import EXPLAINED, RETRIEVAL_SYSTEMS, STAGE_SYSTEMS, TABLE_SYSTEMS
from refrag_platform.history.outside import outside_files
from refrag_platform.model.refrag import RefragModel
from refrag_platform.project import Project
from refrag_platform.quality.summaries import evaluation
from refrag_platform.releases.again import measure
from refrag_platform.store.content import StoreDescription
from tests.command import refrag, refused
from tests.evaluation.conftest import context, sentences

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def evaluated(evaluation_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    metrics = evaluate_stage(context(evaluation_project, folder))
    assert metrics["P32_refrag"] > 0
    assert metrics["refrag_decoder_tokens"] < metrics["full_decoder_tokens"]
    assert 0 < metrics["retrieval_hit_5"] <= 1 and metrics["retrieval_decoder_tokens"] > 0
    return folder


def test_content_holds_the_rows_without_times_and_is_the_same_again(
    evaluation_project: Project, evaluated: Path, tmp_path: Path
) -> None:
    assert {path.name for path in (evaluated / "content").iterdir()} == {
        "perplexity.json", "rag.json", "items.json",
    }  # fmt: skip
    rag = json.loads((evaluated / "content" / "rag.json").read_text())
    assert {row["decoder"] for row in rag["rows"]} == {"own decoder"}
    # What the checks ask for is what the stage answers by.
    assert {row["system"] for row in rag["rows"]} == set(STAGE_SYSTEMS) == set(evaluation.RAG_SYSTEMS)
    asked = {row["system"] for row in rag["retrieval"]["rows"]}
    assert asked == set(evaluation.RETRIEVAL_SYSTEMS) == set(RETRIEVAL_SYSTEMS)
    assert all("ttft_ms" not in row for row in rag["rows"])
    for seen in (rag["seen"], rag["retrieval"]["seen"]):
        assert seen["questions"] == 3 and seen["files"][0] == "data/tiny/corpus/content/passages.parquet"
        assert seen["missing"] == []
    assert rag["questions_seen"] == rag["seen"]["seen"]
    evaluate_stage(context(evaluation_project, tmp_path / "again"))
    assert folder_digest(tmp_path / "again" / "content") == folder_digest(evaluated / "content")


def test_perplexity_is_given_without_and_with_the_policy_s_budget(evaluated: Path) -> None:
    rows = json.loads((evaluated / "content" / "perplexity.json").read_text())["rows"]
    assert [row["share_kept"] for row in rows if row["system"] == "refrag"] == [0.0, 0.25]


def test_a_model_that_is_measured_again_has_the_same_figure_of_every_item(
    evaluation_project: Project, evaluated: Path, tmp_path: Path
) -> None:
    found = Items.read(evaluated / "content")
    assert set(found.windows.values) == {"P16", "P32"} and len(found.windows.groups) == 6
    assert set(found.questions.values) == {"exact_match", "f1"} and len(found.questions.groups) == 3
    row = json.loads((evaluated / "content" / "perplexity.json").read_text())["rows"][3]
    assert row["system"] == "refrag"
    assert np.mean(found.windows.values["P32"]) == pytest.approx(row["P32"], abs=2e-5)
    made = context(evaluation_project, tmp_path / "run")
    model = made.inputs["finetuned"]
    base = evaluation_project.recipe_path("tiny").parent
    assert measure(made.inputs, model, made.inputs["corpus"], made.recipe, base) == found
    other = tmp_path / "other" / "tokenizer"
    shutil.copytree(model / "tokenizer", other)
    values = json.loads((other / "tokenizer.json").read_text())
    values["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="another tokenizer"):
        measure(made.inputs, other.parent, made.inputs["corpus"], made.recipe, base)


def test_questions_of_a_file_take_the_place_of_the_corpus_own_and_are_a_source(
    evaluation_project: Project, tmp_path: Path
) -> None:
    """As a retriever ranked them: the first passages are read, whether gold or not."""
    made = context(evaluation_project, tmp_path / "run")
    passages = [{"title": "A", "text": f"The well of {name} is deep."} for name in ("Oz", "Id", "Ur")]
    row = {
        "id": "q",
        "question": "Which well?",
        "answers": ["Ur"],
        "passages": passages,
        "gold": [2],
        "document_id": "d",
    }
    file = evaluation_project.recipe_path("tiny").parent / "asked.jsonl"
    file.write_text(json.dumps(row) + "\n")
    settings = made.recipe.evaluation.model_copy(update={"question_file": file.name, "passages": [2]})
    made = replace(made, recipe=made.recipe.model_copy(update={"evaluation": settings}))
    evaluate_stage(made)
    items = Items.read(made.out).questions
    assert items.groups == ["d"]
    (asked,) = held_out_questions(settings, made.inputs["corpus"], file.parent)
    assert [text for _, text in asked.take(2)] == ["The well of Oz is deep.", "The well of Id is deep."]
    assert made.sources == outside_files(evaluation_project, "evaluation", made.recipe) != []
    model = made.inputs["finetuned"]
    assert measure(made.inputs, model, made.inputs["corpus"], made.recipe, file.parent).questions == items
    # The store holds nothing about that well; the corpus' own questions are looked up beside it.
    lookups = json.loads((made.out / "rag.json").read_text())["retrieval"]["lookups"]
    assert {row["kind"]: row["questions"] for row in lookups} == {"in the store": 3, "not in the store": 1}
    file.write_text(json.dumps(row | {"document_id": "trained"}))
    with pytest.raises(RefragError, match="q asks about trained, which this corpus has in its split train"):
        held_out_questions(settings, made.inputs["corpus"], file.parent)
    with pytest.raises(RefragError, match=r"documents\.parquet is missing"):
        held_out_questions(settings, tmp_path / "no corpus", file.parent)
    file.unlink()
    with pytest.raises(RefragError, match=r"no questions at .*asked\.jsonl"):
        evaluate_stage(replace(made, out=tmp_path))
    assert outside_files(evaluation_project, "evaluation", made.recipe) == []


def test_reports_lie_beside_the_content(evaluated: Path) -> None:
    report = (evaluated / "report.md").read_text()
    for row in ("first (own decoder)", "plain (own decoder), tokens of p = 0.25",
                "sentences (own decoder), tokens of p = 0.25", "refrag, p = 0.25"):  # fmt: skip
        assert report.count(f"| {row} | 4 |") == 2, "over the listed passages, and over those that search finds"
    assert "first token, ms" in report
    assert "## Looked up in the chunk store" in report and "| in the store | 3 |" in report
    for name in ("perplexity.png", "rag.png"):
        assert (evaluated / name).read_bytes().startswith(PNG)
    values = json.loads((evaluated / "report.json").read_text())
    assert all(row["ttft_ms"] > 0 for row in values["rag"]["rows"])
    assert values["perplexity"]["context_tokens"] == 64


def test_a_store_of_another_encoder_is_refused(evaluation_project: Project, tmp_path: Path) -> None:
    made = context(evaluation_project, tmp_path / "run")
    made.inputs["chunks"] = tmp_path / "chunks"
    made.inputs["chunks"].mkdir()
    with pytest.raises(ArtifactError, match="holds no chunk store"):
        evaluate_stage(made)
    store = StoreDescription.read(evaluation_project.content("chunks", "tiny"))
    replace(store, encoder_digest="abc").write(made.inputs["chunks"])
    with pytest.raises(ArtifactError, match=r"made by encoder abc.*refrag run chunks --model tiny"):
        evaluate_stage(made)


def test_a_report_shows_gaps_and_missing_figures() -> None:
    row = {"tuned": True, "k": 8, "share_kept": None, "P16": 3.0, "P32": 2.5, "P128": None, "P512": None, "windows": 4}
    recovered = {"P16": 0.27, "P32": 0.22, "P128": None, "P512": None}
    text = perplexity_report({"rows": [{"system": "none", **row}], "gap_recovered": recovered})
    assert "| none (tuned) | 3.000 | 2.500 | – | – | 4 |" in text
    assert "P16 27%, P32 22%" in text
    intervals = {"P16": [0.25, 0.3], "P32": None}
    text = perplexity_report({"rows": [], "gap_recovered": recovered, "gap_intervals": intervals})
    assert "P16 27% [25%, 30%], P32 22%" in text
    untimed = {"system": "full", "passages": 5, "share_kept": None, "exact_match": 0.5, "f1": None}
    assert "| full | 5 | 0.500 | – | 1,024 |" in rag_report({"rows": [{**untimed, "decoder_tokens": 1024.0}]})


def run(*arguments: str) -> str:
    return refrag("evaluate", *arguments).output


def test_the_command_scores_any_documents(
    evaluation_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(evaluation_project.root)
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": sentences(90 + n, 12)}) + "\n" for n in range(3)))
    report = tmp_path / "report"
    output = run(
        "perplexity", "--model", "tiny", "--documents", str(documents), "--context", "32", "--output", "16",
        "--windows", "4", "--share-kept", "0.5", "--json", str(tmp_path / "out.json"), "--report", str(report),
    )  # fmt: skip
    result = json.loads((tmp_path / "out.json").read_text())
    assert {row["system"] for row in result["rows"]} == {
        "full", "none", "truncated", "refrag", "refrag_shuffled", "refrag_zero", "refrag_none",
    }  # fmt: skip
    assert [row["share_kept"] for row in result["rows"] if row["system"] == "refrag"] == [0.5]
    assert all(row["windows"] == 4 for row in result["rows"])
    assert set(result["gap_recovered"]) == {"P16", "P32", "P128", "P512"}
    assert result["untuned_decoder"] == "random"
    assert "| refrag, p = 0.5 |" in output and "In brackets: 95% intervals" in output
    assert (report / "perplexity.png").read_bytes().startswith(PNG)


def test_the_command_takes_the_recipe_of_a_model_that_lies_elsewhere(
    evaluation_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, documents, recipe = tmp_path / "model", tmp_path / "documents.txt", tmp_path / "recipe.yaml"
    shutil.copytree(evaluation_project.content("finetuned", "tiny"), folder)
    documents.write_text(sentences(90, 24))
    other = yaml.safe_load(evaluation_project.recipe_path("tiny").read_text()) | {"seed": 1}
    recipe.write_text(yaml.safe_dump(other))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(evaluation_project.recipe_path("tiny").with_name(name), tmp_path)
    monkeypatch.chdir(tmp_path)
    found = []
    for more in ([], ["--recipe", str(recipe)]):
        output = run(
            "perplexity", "--model", str(folder), "--documents", str(documents), "--context", "32", "--output", "16",
            "--windows", "2", "--json", str(tmp_path / "out.json"), *more,
        )  # fmt: skip
        assert "Of one document there are no intervals" in output
        result = json.loads((tmp_path / "out.json").read_text())
        scores = {row["system"]: row["P16"] for row in result["rows"]}
        found.append((result["untuned_decoder"], scores))
    assert [source for source, _ in found] == ["the model's own, for want of its recipe", "random"]
    (_, own), (_, given) = found
    assert own["refrag"] == given["refrag"] and own["full"] != given["full"]


def test_the_command_answers_any_questions_with_a_model_folder(
    model: RefragModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # outside any project
    (tmp_path / "saved").mkdir()
    model.save(tmp_path / "saved")
    rows = [
        {"id": str(n), "question": "What?", "answers": ["x"], "passages": [{"title": "T", "text": sentences(n, 2)}]}
        for n in range(3)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["rag", "--model", str(tmp_path / "saved"), "--questions", "questions.jsonl", "--passages", "1,5"]
    said = run(*asked, "--limit", "2", "--max-new-tokens", "2", "--json", "deep/out.json")
    result = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert result["questions_used"] == 2
    assert [(row["system"], row["share_kept"]) for row in result["rows"] if row["passages"] == 5] == [
        ("full", None), ("first", None), ("plain", None), ("kept", None), ("kept+zero", None), ("kept+other", None),
        ("rule", None), ("refrag", 0.0),
    ]  # fmt: skip
    # Of a model folder alone no recipe is known, and so no retriever.
    assert set(result["left_out"]) == {"sentences", "untuned"} and result["order"] == "listed"
    assert "Left out: sentences: " in said and "as the question's file lists them" in said
    for more, fault in (
        (["--systems", "sentences,refrag"], "`sentences` needs a retriever"),
        (["--order", "best"], "'best' is not one of 'nearest'"),
        (["--systems", "frist"], "--systems names 'frist'"),
    ):
        assert fault in refused("evaluate", *asked, *more, "--json", "no.json")
        assert not (tmp_path / "no.json").exists()


def test_a_known_recipe_brings_every_system_and_the_order_of_its_retriever(
    evaluation_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(evaluation_project.root)
    questions = evaluation_project.content("corpus", "tiny") / "questions" / "test.jsonl"
    said = run(
        "rag", "--model", "tiny", "--questions", str(questions), "--passages", "3", "--limit", "3",
        "--max-new-tokens", "2", "--batch-size", "4", "--json", str(tmp_path / "out.json"),
        "--report", str(tmp_path / "report"),
    )  # fmt: skip
    result = json.loads((tmp_path / "out.json").read_text())
    assert {row["system"] for row in result["rows"]} == set(TABLE_SYSTEMS) and result["left_out"] == {}
    assert {row["order"] for row in result["rows"] if row["passages"]} == {result["order"]} == {"nearest"}
    assert {row["over"] for row in result["differences"]} == set(TABLE_SYSTEMS) - {"refrag"}
    for name in TABLE_SYSTEMS:
        assert f"- {name}: {EXPLAINED[name]}" in said
    assert "nearest to the question first" in said and (tmp_path / "report" / "rag.png").is_file()
    for row in ("| full (own decoder) | 3 |", "| untuned | 3 |", "| kept (own decoder), p = 0.25 | 3 |",
                "| plain (own decoder), tokens of p = 0.25 | 3 |", "| rule, p = 0.25 | 3 |"):  # fmt: skip
        assert row in said


def test_files_of_questions_are_judged_together_and_each_alone(
    model: RefragModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    model.save(tmp_path / "saved")
    for name, count in (("a", 1), ("b", 3)):
        # Longer passages in one file: its prompts are longer, too.
        passages = [{"title": name, "text": sentences(count, 4 * count)}]
        rows = [{"id": f"{name}{n}", "question": "?", "answers": ["x"], "passages": passages} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "rag", "--model", str(tmp_path / "saved"), "--passages", "1", "--systems", "plain,refrag", "--limit", "2",
        "--max-new-tokens", "2", "--json", "out.json", "--questions", "a.jsonl",
    ]  # fmt: skip
    output = run(*arguments, "--questions", "b.jsonl")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["questions_used"] == 3 and result["questions"] == "a.jsonl, b.jsonl"
    own = [(answer["set"], answer["id"]) for answer in result["answers"] if answer["system"] == "refrag"]
    assert own == [("a.jsonl", "a0"), ("b.jsonl", "b0"), ("b.jsonl", "b1")]
    parts = result["parts"]
    assert {name: part["questions_used"] for name, part in parts.items()} == {"a.jsonl": 1, "b.jsonl": 2}
    rows = zip(result["rows"], parts["a.jsonl"]["rows"], parts["b.jsonl"]["rows"], strict=True)
    for together, first, second in rows:
        assert first["decoder_tokens"] < second["decoder_tokens"]
        mean = (first["decoder_tokens"] + 2 * second["decoder_tokens"]) / 3
        assert together["decoder_tokens"] == pytest.approx(mean, abs=1e-4)
    assert "### Of these, a.jsonl: 1 questions" in output and "### Of these, b.jsonl: 2 questions" in output

    run(*arguments)
    assert json.loads((tmp_path / "out.json").read_text())["parts"] == {}
    assert "names a.jsonl twice" in refused("evaluate", *arguments, "--questions", "./a.jsonl")


def test_commands_name_what_is_wrong(
    evaluation_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(evaluation_project.root)
    out = ["--json", str(tmp_path / "out.json")]
    context_of_33 = ["perplexity", "--model", "tiny", "--documents", "params.yaml", "--context", "33", "--output", "16"]
    assert "--context is 33" in refused("evaluate", *context_of_33, *out)
    said = refused("evaluate", "rag", "--model", "tiny", "--questions", "q", "--passages", "0,x", *out)
    assert "--passages is '0,x'" in said
