"""Controls of a recipe: the evaluation takes those that would be trained so now, and leaves others out by name."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.artifacts.manifest import InputRecord, Manifest
from refrag_platform.errors import RecipeError
from refrag_platform.evaluation.decoders import declared_controls
from refrag_platform.evaluation.scoring import PLAIN_SYSTEMS
from refrag_platform.evaluation.stage import evaluate_stage
from refrag_platform.evaluation.systems import CONTROL_KINDS
from refrag_platform.history.outside import outside_files
from refrag_platform.model.refrag import RefragModel
from refrag_platform.project import Project
from refrag_platform.runner import run_stage
from refrag_platform.stages import STAGES, settings_of
from tests.candidates import manifest_of
from tests.command import refrag
from tests.evaluation.conftest import context
from tests.planted import override


@pytest.fixture
def with_controls(evaluation_project: Project, model: RefragModel, tmp_path: Path) -> Project:
    """The project, and full and none among tiny's controls: trained, and silent; plain isn't."""
    project = Project(tmp_path / "project")
    shutil.copytree(evaluation_project.root, project.root)
    recipe = project.recipe_path("tiny")
    recipe.write_text(f"{recipe.read_text()}controls: {{full: {{}}, none: {{}}, plain: {{}}}}\n")
    corpus = manifest_of("corpus", hash=folder_digest(project.content("corpus", "tiny")))
    corpus.write(project.stage_dir("corpus", "tiny"))
    mute = copy.deepcopy(model)
    mute.decoder.get_output_embeddings().weight.data.zero_()
    for kind in ("full", "none"):
        name = f"tiny--{kind}"
        inputs = {"corpus": InputRecord(path="data/tiny/corpus/content", hash=corpus.hash)}
        for stage in ("cpt", "finetuned"):
            content = project.content(stage, name)
            content.mkdir(parents=True)
            mute.save(content)
            settings = settings_of(STAGES[stage], project.recipe(name))
            manifest = manifest_of(stage, name, hash=folder_digest(content), inputs=inputs, settings=settings)
            manifest.write(content.parent)
            inputs = inputs | {stage: InputRecord(path="", hash=manifest.hash)}
    return project


def test_controls_that_the_recipe_declares_are_used_where_they_are_trained(
    with_controls: Project, tmp_path: Path
) -> None:
    made = context(with_controls, tmp_path / "run")
    evaluate_stage(made)
    rows = json.loads((made.out / "perplexity.json").read_text())["rows"]
    for system in ("full", "none"):
        assert [row["tuned"] for row in rows if row["system"] == system] == [False, True]
    assert [row["tuned"] for row in rows if row["system"] == "truncated"] == [False]
    decoders = {row["system"]: row["decoder"] for row in json.loads((made.out / "rag.json").read_text())["rows"]}
    assert (decoders["full"], decoders["none"], decoders["refrag"]) == ("tuned", "tuned", "own decoder")
    # Its own control is declared and not trained.
    assert decoders["plain"] == "tuned for full"
    assert "truncated" not in decoders, "the last tokens are the farthest text, and no control reads them"


def test_trained_controls_are_watched(with_controls: Project) -> None:
    recipe = with_controls.recipe("tiny")
    assert [record.path for record in outside_files(with_controls, "evaluation", recipe)] == [
        f"models/tiny--{kind}/{stage}/content" for kind in ("full", "none") for stage in ("cpt", "finetuned")
    ]


def of_another_corpus(project: Project) -> str:
    folder = project.stage_dir("corpus", "tiny")
    Manifest.read(folder).model_copy(update={"hash": "another.dir"}).write(folder)
    return "its tokenized corpus is another now"


def of_other_steps(project: Project) -> str:
    override(project, "cpt", {"steps": 4})
    override(project, "finetuned", {"steps": 4})
    return "its settings or its seed are others now"


def of_a_model_that_is_taken_over(project: Project) -> str:
    override(project, "reconstruction", {"continue_from": "release"})
    return "whose reconstruction.continue_from is 'release'"


@pytest.mark.parametrize("change", [of_another_corpus, of_other_steps, of_a_model_that_is_taken_over])
def test_a_control_that_would_be_another_now_is_left_out_and_named(
    with_controls: Project, change: Callable[[Project], str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = with_controls.recipe("tiny")
    assert set(declared_controls(with_controls, before, "finetuned", CONTROL_KINDS)) == {"full", "none"}
    reason = change(with_controls)
    recipe = with_controls.recipe("tiny")
    assert not declared_controls(with_controls, recipe, "cpt", PLAIN_SYSTEMS)
    assert not declared_controls(with_controls, recipe, "finetuned", CONTROL_KINDS)
    assert not outside_files(with_controls, "evaluation", recipe)
    said = capsys.readouterr().err
    assert said.count(reason) == 4 and "`refrag run all --model tiny--full` trains it again" in said


def test_a_control_of_a_model_that_is_taken_over_is_not_trained(with_controls: Project) -> None:
    of_a_model_that_is_taken_over(with_controls)
    with pytest.raises(RecipeError, match="would be trained for fewer steps than tiny"):
        run_stage(with_controls, "cpt", "tiny--full")


def test_a_control_that_starts_elsewhere_than_its_model_is_not_trained(with_controls: Project) -> None:
    """From the release it would have had the steps before, which its model starts without."""
    override(with_controls, "controls", {"full": {"start": "release"}})
    with pytest.raises(RecipeError, match=r"would be trained for more steps than tiny: controls\.full\.start"):
        run_stage(with_controls, "cpt", "tiny--full")


def test_the_commands_take_the_controls_that_the_recipe_declares(
    with_controls: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(with_controls.root)
    asked, out = with_controls.content("corpus", "tiny") / "questions" / "test.jsonl", tmp_path / "rag.json"
    command = ["evaluate", "rag", "--model", "tiny", "--questions", str(asked), "--passages", "1", "--json", str(out)]
    refrag(*command, "--systems", "full,plain,refrag", "--limit", "2")
    decoders = {row["system"]: row["decoder"] for row in json.loads(out.read_text())["rows"]}
    assert decoders == {"full": "tuned", "plain": "tuned for full", "refrag": "own decoder"}
