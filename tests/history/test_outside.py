"""Files that no stage made, wherever they lie: an edit makes what was made from them stale."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from refrag_platform import runner
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.history.freshness import dependencies, is_current
from refrag_platform.project import Project
from refrag_platform.stages import STAGES
from tests.planted import MODEL, make_all, override

QUESTION = '{"id": "1", "question": "Where?", "answers": ["North"], "passages": [], "gold": []}\n'


def stale(project: Project) -> set[str]:
    """Stages whose artifact a run now would not start from the same facts; what follows from them left out."""
    return {stage for stage in STAGES if not is_current(project, stage, MODEL)}


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def same_size(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


@pytest.mark.parametrize("edit", [append, same_size, Path.unlink])
def test_sources_elsewhere_are_watched_through_environment_variables(
    planted_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[Path], None]
) -> None:
    (tmp_path / "texts").mkdir()
    text = tmp_path / "texts" / "a.txt"
    text.write_text("The river rises in the north.")
    monkeypatch.setenv("MY_TEXTS", str(tmp_path / "texts"))
    override(planted_project, "corpus", {"sources": [{"kind": "files", "path": "$MY_TEXTS"}]})
    make_all(planted_project)
    assert stale(planted_project) == set()
    edit(text)
    assert stale(planted_project) == {"corpus"}
    assert not runner.run_stage(planted_project, "corpus", MODEL).cached


def test_sources_that_are_gone_leave_a_stale_corpus_and_no_error(planted_project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("The river rises in the north.")
    override(planted_project, "corpus", {"sources": [{"kind": "files", "path": str(folder)}]})
    make_all(planted_project)
    shutil.rmtree(folder)
    assert stale(planted_project) == {"corpus"}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_the_tokenizers_files_are_watched_where_they_are_read(planted_project: Project, name: str) -> None:
    hashes = make_all(planted_project)
    append(planted_project.recipe_path(MODEL).parent / name)
    assert stale(planted_project) == {"corpus", "reconstruction"}
    changed = make_all(planted_project)
    assert [stage for stage in hashes if hashes[stage] == changed[stage]] == []


@pytest.mark.parametrize(
    ("stage", "override_of"),
    [
        ("cpt", "{{curriculum: null, reading: {{questions_share: 0.5, questions: {files}}}}}"),
        ("policy", "{{question_share: 0.5, questions: {files}}}"),
        ("finetuned", "{{questions: {files}}}"),
        ("finetuned", "{{summaries: {files}}}"),
    ],
)
def test_question_and_summary_files_are_watched_and_recorded(
    planted_project: Project, tmp_path: Path, stage: str, override_of: str
) -> None:
    further, inside = tmp_path / "further.jsonl", planted_project.root / "more.jsonl"
    for file in (further, inside):
        file.write_text(QUESTION)
    override(planted_project, stage, yaml.safe_load(override_of.format(files=f"[{further}, more.jsonl]")))
    make_all(planted_project)
    manifest = Manifest.read(planted_project.stage_dir(stage, MODEL))
    assert [source.path for source in manifest.sources] == [str(further), "more.jsonl"]
    assert stale(planted_project) == set()
    for file in (further, inside):
        same_size(file)
        assert stale(planted_project) == {stage}
        make_all(planted_project)


def test_controls_are_trained_from_the_model_s_corpus_and_make_its_evaluation_stale(planted_project: Project) -> None:
    recipe = planted_project.recipe_path(MODEL)
    recipe.write_text(f"{recipe.read_text()}controls: {{full: {{}}}}\n")
    made = make_all(planted_project)
    assert stale(planted_project) == set()
    control = f"{MODEL}--full"
    for stage in ("cpt", "finetuned"):
        found = runner.run_stage(planted_project, stage, control).manifest
        assert found.inputs["corpus"].hash == made["corpus"] and found.hash != made[stage]
        assert found.settings["system"] == "full"
        assert stale(planted_project) == {"evaluation"}
        make_all(planted_project)
    assert runner.run_stage(planted_project, "cpt", control).cached
    override(planted_project, "reconstruction", {"steps": 2})
    assert is_current(planted_project, "cpt", control), "it starts from the untrained decoder"
    override(planted_project, "finetuned", {"steps": 2})
    assert not is_current(planted_project, "finetuned", control), "trained as the model is"
    with pytest.raises(RefragError, match=r"tiny--full is a control and has cpt and finetuned alone.*--model tiny`"):
        runner.run_stage(planted_project, "evaluation", control)
    with pytest.raises(RecipeError, match=r"system is 'none', and controls names full; declare it there"):
        planted_project.recipe(f"{MODEL}--none")


def test_the_questions_of_the_evaluation_are_watched(planted_project: Project) -> None:
    questions = planted_project.recipe_path(MODEL).parent / "asked.jsonl"
    questions.write_text(QUESTION)
    override(planted_project, "evaluation", {"question_file": "asked.jsonl"})
    make_all(planted_project, MODEL)
    assert stale(planted_project) == set()
    append(questions)
    assert stale(planted_project) == {"evaluation"}


def test_the_files_that_a_stage_is_launched_with_are_watched(planted_project: Project) -> None:
    make_all(planted_project)
    override(planted_project, "cpt", {"accelerate_config": "../accelerate/zero3-node.yaml"})
    assert stale(planted_project) == {"cpt"}
    paths = [f"models/accelerate/zero3-node.{kind}" for kind in ("yaml", "json")]
    recipe = planted_project.recipe(MODEL)
    for path in paths:
        before = dependencies(planted_project, "cpt", recipe)
        assert [record.path for record in before.sources] == paths
        append(planted_project.root / path)
        assert dependencies(planted_project, "cpt", recipe).fingerprint != before.fingerprint
