"""`refrag diff A B`: two versions side by side, from what is in place, from Git and from DVC's cache."""

import json

import pytest

from refrag_platform import runner
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.history.runs import commit_run
from refrag_platform.lineage.difference import Difference, compare, side
from refrag_platform.project import Project
from refrag_platform.stages import STAGES, StageContext
from tests.command import refrag
from tests.conftest import copy_project, init_repository
from tests.planted import MODEL, make_all, override, plant, planted, record_all

SOURCE = f"data/sources/{MODEL}/notes.txt"


def evaluated(context: StageContext) -> dict[str, object]:
    """A planted stage whose evaluation has a figure that follows from the source's text."""
    metrics = planted(context)
    if context.stage == "evaluation":
        loss = len((context.inputs["corpus"] / "train" / "tokens-00000.bin").read_text()) / 100
        rows = [{"system": "refrag", "tuned": True, "share_kept": 0.25, "P32": loss, "P128": None}]
        (context.out / "perplexity.json").write_text(json.dumps({"rows": rows}))
        looked_up = {"kind": "in the store", "questions": 3, "hit_1": loss, "answered": None}
        retrieval = {"lookups": [looked_up], "rows": [{"system": "refrag", "passages": 4, "f1": loss}]}
        (context.out / "rag.json").write_text(json.dumps({"rows": [], "retrieval": retrieval}))
        metrics["P32_refrag"] = loss
    return metrics


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two committed runs that differ in a source, a setting and the evaluation; only to be read."""
    project = init_repository(copy_project(tmp_path_factory.mktemp("two") / "project"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        plant(monkeypatch)
        monkeypatch.setattr(runner, "stage_function", lambda stage: evaluated)
        for text, setting in (("The river rises in the west.", 0.25), ("It rises in the east.", 0.5)):
            (project.root / SOURCE).write_text(text)
            override(project, "cpt", {"decoder_learning_rate": setting})
            make_all(project)
            record_all(project)
            commit_run(project, MODEL)
    return project


@pytest.fixture
def two_runs(made: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(made.root)
    return made


def differing(project: Project, a: str, b: str) -> dict[str, dict[str, Difference]]:
    found: dict[str, dict[str, Difference]] = {}
    for row in compare(project, side(project, a), side(project, b)):
        if row.differs:
            found.setdefault(row.part, {})[row.name] = row
    return found


def test_two_runs_differ_in_what_was_changed_and_in_what_followed(two_runs: Project) -> None:
    found = differing(two_runs, f"runs/{MODEL}~1", f"runs/{MODEL}")
    assert set(found) == {"artifacts", "settings", "data", "metrics", "evaluation"}
    assert set(found["artifacts"]) == set(STAGES)
    (setting,) = found["settings"].values()
    assert (setting.name, setting.a, setting.b) == ("cpt.decoder_learning_rate", 0.25, 0.5)
    assert set(found["data"]) == {SOURCE}
    assert set(found["metrics"]) == {"evaluation.P32_refrag"}
    figure = found["evaluation"].pop("perplexity refrag tuned=True share_kept=0.25 P32")
    assert set(found["evaluation"]) == {"retrieval in the store hit_1", "retrieval refrag passages=4 f1"}
    assert figure.a == found["metrics"]["evaluation.P32_refrag"].a, "read from DVC's cache: it is no longer in place"


def test_a_commit_and_what_is_in_place_are_the_same_run(two_runs: Project) -> None:
    found = differing(two_runs, MODEL, f"models/{MODEL}/evaluation")
    assert set(found["artifacts"]) == {"package"}, "which no evaluation was made from"
    rows = [row for part in found.values() for row in part.values()]
    assert all(row.b is None and row.name.startswith(("package", "serving.")) for row in rows)


def test_an_artifacts_side_holds_its_chain_and_the_evaluation_of_just_that(planted_project: Project) -> None:
    make_all(planted_project)
    folder = planted_project.stage_dir("finetuned", MODEL)
    found = side(planted_project, str(folder)).manifests
    assert set(found) == {"corpus", "reconstruction", "cpt", "finetuned", "evaluation"}
    assert set(side(planted_project, str(folder.parent / "cpt")).manifests) == {"corpus", "reconstruction", "cpt"}
    (planted_project.root / SOURCE).write_text("It rises in the south.")
    for stage in ("corpus", "reconstruction", "cpt", "finetuned"):
        runner.run_stage(planted_project, stage, MODEL)
    assert "evaluation" not in side(planted_project, str(folder)).manifests


def test_the_command_shows_differing_rows_and_all_of_them_when_asked(two_runs: Project) -> None:
    def diff(*arguments: str) -> str:
        return refrag("diff", f"runs/{MODEL}~1", f"runs/{MODEL}", *arguments).stdout

    text = diff()
    (line,) = [line for line in text.splitlines() if line.startswith("cpt.decoder_learning_rate")]
    assert line.split() == ["cpt.decoder_learning_rate", "0.25", "0.5", "+0.25"]
    assert "cpt.steps" not in text and "cpt.steps" in diff("--all")
    rows = json.loads(diff("--json"))["rows"]
    assert {"part": "settings", "name": "cpt.decoder_learning_rate", "a": 0.25, "b": 0.5} in rows
    assert refrag("diff", f"runs/{MODEL}", f"runs/{MODEL}").stdout == f"runs/{MODEL} and runs/{MODEL} are the same\n"


def test_names_that_stand_for_nothing_say_what_is_wanted(two_runs: Project) -> None:
    with pytest.raises(RefragError, match="neither an artifact's folder nor a commit"):
        side(two_runs, "nonsense")
    with pytest.raises(RefragError, match="holds no artifact; `refrag commit`"):
        side(two_runs, "main")
    with pytest.raises(ArtifactError, match="refrag run all --model smollm2-135m"):
        side(two_runs, "smollm2-135m")
    with pytest.raises(ArtifactError, match="holds no artifact of smollm2-135m, only of tiny"):
        side(two_runs, f"runs/{MODEL}", "smollm2-135m")
