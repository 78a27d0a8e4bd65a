"""`refrag forget` names exactly what must be rebuilt once a document goes, and the next runs rebuild just that."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from refrag_platform import runner
from refrag_platform.errors import RefragError
from refrag_platform.history.runs import commit_run
from refrag_platform.history.status import status
from refrag_platform.lineage.impact import forget
from refrag_platform.project import Project
from refrag_platform.stages import STAGES, StageContext
from tests.command import refrag
from tests.planted import MODEL, make_all, override, planted

OTHER = "other"
SOURCE = f"data/sources/{MODEL}/notes.txt"


@pytest.fixture
def two_models(planted_project: Project) -> Project:
    """Two models with a document each; every stage of both is made."""
    project = planted_project
    shutil.copytree(project.root / "models" / MODEL, project.root / "models" / OTHER)
    recipe = project.recipe_path(OTHER)
    recipe.write_text(recipe.read_text().replace(f"name: {MODEL}", f"name: {OTHER}", 1))
    project.source_dir(OTHER).mkdir()
    (project.source_dir(OTHER) / "hills.txt").write_text("The hills are low.")
    for model in (MODEL, OTHER):
        make_all(project, model)
    return project


def stale(project: Project) -> set[str]:
    return {entry.path for model in (MODEL, OTHER) for entry in status(project, model) if entry.state != "current"}


def named(found: object) -> set[str]:
    return {version.name for versions in found.rebuild.values() for version in versions}  # type: ignore[attr-defined]


def test_what_is_listed_is_what_goes_stale_and_what_the_next_run_rebuilds(two_models: Project) -> None:
    found = forget(two_models, SOURCE)
    assert list(found.rebuild) == [MODEL] and not found.unclear
    assert stale(two_models) == set(), "nothing is deleted"
    (two_models.root / SOURCE).unlink()
    (two_models.source_dir(MODEL) / "rest.txt").write_text("What is left.")
    assert two_models.stage_dir("corpus", MODEL).relative_to(two_models.root).as_posix() in stale(two_models)
    assert stale(two_models) == named(found)
    rebuilt = set()
    for model in (MODEL, OTHER):
        for stage in STAGES:
            result = runner.run_stage(two_models, stage, model)
            if not result.cached:
                rebuilt.add(result.path.relative_to(two_models.root).as_posix())
    assert rebuilt == named(found)
    assert stale(two_models) == set()
    with pytest.raises(RefragError, match="no artifact was made from"):
        forget(two_models, SOURCE)


def test_a_file_that_two_models_read_concerns_both(two_models: Project, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "notes.txt").write_text("The river rises in the north.")
    dials = two_models.root / "params.yaml"
    values = yaml.safe_load(dials.read_text())
    for model in (MODEL, OTHER):
        sources = [{"kind": "files", "path": str(tmp_path / "shared")}]
        values["overrides"][model] = {**values["overrides"].get(model, {}), "corpus": {"sources": sources}}
    dials.write_text(yaml.safe_dump(values))
    record_shared = {str(tmp_path / "shared")}

    def reads_shared(context: StageContext) -> dict[str, object]:
        metrics = planted(context)
        if context.stage == "corpus":
            from refrag_platform.corpus.sources import source_records

            context.sources[:] = source_records(context.project, context.recipe)
        return metrics

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(runner, "stage_function", lambda stage: reads_shared)
        for model in (MODEL, OTHER):
            make_all(two_models, model)
    found = forget(two_models, record_shared.pop())
    assert set(found.rebuild) == {MODEL, OTHER} and all(len(made) == len(STAGES) for made in found.rebuild.values())
    assert set(forget(two_models, str(tmp_path / "shared" / "notes.txt"), OTHER).rebuild) == {OTHER}


def test_controls_are_trained_again_too(planted_project: Project) -> None:
    recipe = planted_project.recipe_path(MODEL)
    recipe.write_text(f"{recipe.read_text()}controls: {{full: {{}}}}\n")
    make_all(planted_project)
    for stage in ("cpt", "finetuned"):
        runner.run_stage(planted_project, stage, f"{MODEL}--full")
    make_all(planted_project)
    assert {state.state for state in status(planted_project, f"{MODEL}--full")} == {"current"}
    found = forget(planted_project, SOURCE).rebuild
    assert [version.name for version in found[f"{MODEL}--full"]] == [
        f"models/{MODEL}--full/{stage}" for stage in ("cpt", "finetuned")
    ]


def test_a_file_that_only_fine_tuning_read_leaves_what_came_before(planted_project: Project) -> None:
    (planted_project.root / "more.jsonl").write_text(
        '{"id": "1", "question": "Where?", "answers": ["North"], "passages": [], "gold": []}\n'
    )
    override(planted_project, "finetuned", {"questions": ["more.jsonl"]})
    make_all(planted_project)
    expected = {f"models/{MODEL}/{stage}" for stage in ("finetuned", "policy", "evaluation", "package")}
    assert named(forget(planted_project, "more.jsonl")) == expected | {f"data/{MODEL}/chunks"}


def test_the_same_bytes_under_another_name_are_the_same_document(two_models: Project) -> None:
    copy = two_models.source_dir(OTHER) / "copy.txt"
    copy.write_bytes((two_models.root / SOURCE).read_bytes())
    make_all(two_models, OTHER)
    found = forget(two_models, SOURCE)
    assert set(found.rebuild) == {MODEL, OTHER} and "copy.txt" in found.remove


def test_documents_are_found_by_id_and_rows_are_not_their_file(planted_project: Project) -> None:
    make_all(planted_project)
    (planted_project.source_dir(MODEL) / "rows.jsonl").write_text('{"text": "One."}\n{"text": "Two."}\n')

    def with_documents(context: StageContext) -> dict[str, object]:
        metrics = planted(context)
        if context.stage == "corpus":
            from refrag_platform.corpus.sources import source_records

            context.sources[:] = source_records(context.project, context.recipe)
            ids = ["files/notes.txt", "files/rows.jsonl#ab12", "factbook/malta"]
            sources = ["files/notes.txt", "files/rows.jsonl", "factbook/malta.json"]
            pq.write_table(pa.table({"id": ids, "source": sources}), context.out / "documents.parquet")
        return metrics

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(runner, "stage_function", lambda stage: with_documents)
        make_all(planted_project)
    assert forget(planted_project, "files/notes.txt").remove == f"remove {SOURCE}"
    row = forget(planted_project, "files/rows.jsonl#ab12")
    assert row.remove.startswith("take the row of document files/rows.jsonl#ab12 out of ")
    packaged = forget(planted_project, "factbook/malta")
    assert "corpus.sources" in packaged.remove
    assert len(named(row)) == len(named(packaged)) == len(STAGES)


def test_what_was_made_from_a_lost_version_is_called_unclear(planted_project: Project) -> None:
    make_all(planted_project)
    (planted_project.source_dir(MODEL) / "more.txt").write_text("Another river.")
    runner.run_stage(planted_project, "corpus", MODEL)
    found = forget(planted_project, SOURCE)
    assert named(found) == {f"data/{MODEL}/corpus"}
    assert {version.name.rsplit("/", 1)[1] for version, _ in found.unclear} == set(STAGES) - {"corpus"}
    assert {missing.name for _, missing in found.unclear} == {f"data/{MODEL}/corpus"}


def test_versions_in_git_are_said_to_hold_it_still(recorded: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = commit_run(recorded, MODEL)
    (recorded.root / SOURCE).write_text("The river was moved.")
    make_all(recorded)
    found = forget(recorded, SOURCE)
    assert {place for _, places in found.elsewhere for place in places} == {f"commit {commit[:10]}"}
    assert len(found.elsewhere) == len(STAGES)
    monkeypatch.chdir(recorded.root)
    result = refrag("forget", SOURCE)
    assert f"1. remove {SOURCE}" in result.stdout and f"2. refrag run all --model {MODEL}" in result.stdout
    assert result.stdout.count("holds it") == len(STAGES)
