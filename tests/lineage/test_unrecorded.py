"""`refrag forget` says which artifacts have weights in them whose documents nobody here can look up."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from refrag_platform.errors import RefragError
from refrag_platform.lineage.impact import forget
from refrag_platform.model.refrag import RefragModel
from refrag_platform.project import Project
from refrag_platform.runner import run_stage
from tests.command import refrag
from tests.training.test_start import MODEL, start_from_release, write_release

SOURCE = f"data/sources/{MODEL}/notes.txt"
MADE = [f"models/{MODEL}/reconstruction", f"models/{MODEL}/cpt"]


def make(project: Project) -> None:
    (project.source_dir(MODEL) / "notes.txt").write_text("The river rises in the north and flows south. " * 20)
    for stage in ("corpus", "reconstruction", "cpt"):
        run_stage(project, stage, MODEL)


@pytest.fixture
def started(project: Project) -> Project:
    """Reconstruction and CPT taken from a release that was trained elsewhere."""
    write_release(project, seed=1, data=["619 books of a library"])
    start_from_release(project, ("reconstruction", "cpt"))
    make(project)
    return project


def refrag_forget(project: Project, monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    monkeypatch.chdir(project.root)
    return refrag("forget", SOURCE, *options).stdout


def test_what_started_from_a_release_is_unclear_even_where_it_is_rebuilt(
    started: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = json.loads(refrag_forget(started, monkeypatch, "--json"))
    assert [entry["path"] for entry in found["rebuild"][MODEL]] == [f"data/{MODEL}/corpus", *MADE]
    release = f"models/{MODEL}/release"
    assert [entry["path"] for entry in found["unclear"]] == MADE
    assert {entry["why"] for entry in found["unclear"]} == {f"started from {release}"}
    (weights,) = found["weights"]
    assert weights["path"] == release and weights["data"] == ["619 books of a library"]
    said = refrag_forget(started, monkeypatch)
    assert said.count(f"started from {release}") == len(MADE)
    assert f"as {release}/manifest.json says:\n  - 619 books of a library\n" in said
    assert f"take continue_from: release out of overrides.{MODEL} in params.yaml" in said


def test_from_scratch_nothing_is_unclear_any_more(started: Project) -> None:
    params = started.params()
    short = {"steps": 2, "curriculum": {"max_factor": 2, "stages": 1}}
    params["overrides"][MODEL] |= {"reconstruction": short, "cpt": short}
    (started.root / "params.yaml").write_text(yaml.safe_dump(params))
    make(started)
    found = forget(started, SOURCE)
    assert not found.weights and not list(found.reasons())


def test_a_release_that_was_replaced_is_not_asked_about_the_one_before(started: Project) -> None:
    write_release(started, seed=2, data=["other books"])
    (weights,) = forget(started, SOURCE).weights
    assert weights.data is None and "an earlier manifest.json" in weights.training
    # Once it is taken over, it is.
    make(started)
    (weights,) = forget(started, SOURCE).weights
    assert weights.data == ["other books"]


def test_a_document_that_nobody_knows_may_still_be_behind_a_release(started: Project) -> None:
    with pytest.raises(RefragError, match=r"no artifact was made from 'a book'(.|\n)*619 books of a library"):
        forget(started, "a book")
    assert not forget(started, SOURCE, "other").weights


def test_what_learned_from_a_teacher_is_unclear(project: Project, tmp_path: Path) -> None:
    base = project.recipe_path(MODEL).parent
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    RefragModel.create(project.recipe(MODEL), base).save(teacher)
    short = {"steps": 2, "curriculum": {"max_factor": 2, "stages": 1}}
    params = project.params()
    params["overrides"][MODEL] |= {"reconstruction": short, "cpt": short | {"teacher": str(teacher)}}
    (project.root / "params.yaml").write_text(yaml.safe_dump(params))
    make(project)
    shutil.rmtree(teacher)  # that it is gone makes nothing clearer
    found = forget(project, SOURCE)
    assert [(version.name, why) for version, why in found.reasons()] == [(MADE[1], f"learned from {teacher}")]
    (weights,) = found.weights
    assert "is a teacher" in weights.training and f"take cpt.teacher out of overrides.{MODEL}" in weights.remedy
