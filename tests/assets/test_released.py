"""The gate as an asset: a better model is released, a worse one is refused and seen to be; artifacts are planted."""

from pathlib import Path
from typing import Any

import pytest
from dagster import AssetKey, DagsterEventType, DagsterInstance, EventRecordsFilter, RunConfig, materialize

from assets.definitions import defs
from assets.jobs import run_config
from assets.released import Promotion, released
from assets.settings import RetrainingSettings
from refrag_platform.evaluation.items import FILE_NAME
from refrag_platform.history.versions import released as released_now
from refrag_platform.project import Project
from refrag_platform.stages import STAGES
from tests.assets.conftest import MODEL, copy_planted, plant_stage, planted_project, use
from tests.candidates import held_out, make_candidate
from tests.planted import record_all, run

RELEASED = AssetKey("released")


@pytest.fixture(scope="module")
def first_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a first release, v1.0.0, of quality 0.5, released by the asset."""
    project = planted_project(tmp_path_factory.mktemp("first"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(project, monkeypatch)
        make_candidate(project, monkeypatch, 50, held_out(0.5), MODEL)
        record_all(project, model=MODEL)
        with DagsterInstance.get() as instance:
            judge(instance)
    return project


@pytest.fixture
def first(first_once: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy of its own of that project, which is in use."""
    project = copy_planted(first_once, tmp_path / "copy")
    use(project, monkeypatch)
    return project


def judge(instance: DagsterInstance, promote: bool = True) -> None:
    config = RunConfig(ops={"released": Promotion(promote=promote)})
    assert materialize([released], instance=instance, partition_key=MODEL, run_config=config).success


def materializations(instance: DagsterInstance) -> list[dict[str, Any]]:
    """Metadata of all of them, newest first."""
    records = instance.fetch_materializations(RELEASED, limit=10).records
    found = [record.asset_materialization for record in records]
    return [{name: value.value for name, value in event.metadata.items()} for event in found if event]


def gate(instance: DagsterInstance) -> tuple[bool, str]:
    """Whether the newest evaluation of the gate's check passed, and what it says."""
    filters = EventRecordsFilter(DagsterEventType.ASSET_CHECK_EVALUATION)
    event = instance.get_event_records(filters, limit=1)[0].event_log_entry.dagster_event
    assert event is not None
    evaluation = event.asset_check_evaluation_data
    assert evaluation.severity.value == "WARN"
    return evaluation.passed, evaluation.description or ""


def tags(project: Project) -> list[str]:
    return run(project.root, "git", "tag", "--list").split()


def test_the_first_model_is_released_and_the_asset_says_why(first: Project, instance: DagsterInstance) -> None:
    release = released_now(first, MODEL)
    assert release is not None and release.version == "v1.0.0"
    (shown,) = materializations(instance)
    assert (shown["version"], shown["commit"], shown["decision"]) == (f"{MODEL}@v1.0.0", release.commit, "promoted")
    assert "first release" in shown["reason"]
    assert gate(instance)[0]
    judge(instance)
    assert len(tags(first)) == 2, "nothing new to release"
    assert "is released already" in materializations(instance)[0]["outcome"]


def test_a_worse_model_is_refused_and_the_released_one_stays(
    first: Project, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tags(first)
    make_candidate(first, monkeypatch, 40, held_out(0.3), MODEL)
    record_all(first, model=MODEL)
    judge(instance)  # the run succeeds: that a candidate is worse is an outcome, no fault
    assert tags(first) == before
    assert len(materializations(instance)) == 1, "the released model is as old as it was"
    passed, said = gate(instance)
    assert not passed
    assert said.startswith("refused: P32 worse") and f"{MODEL}@v1.0.0 stays the released one" in said
    (observed,) = instance.fetch_observations(RELEASED, limit=10).records
    assert observed.asset_observation
    figures = {name: value.value for name, value in observed.asset_observation.metadata.items()}
    assert figures["decision"] == "refused" and figures["gain.P32"] == pytest.approx(-0.2)
    assert {row["metric"] for row in figures["figures"]["verdicts"]} == {"P32", "exact_match", "f1"}


def test_a_figure_that_is_missing_refuses(
    first: Project, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_candidate(first, monkeypatch, 60, held_out(0.6, metrics=("P32", "f1")), MODEL)
    record_all(first, model=MODEL)
    judge(instance)
    passed, said = gate(instance)
    assert not passed and "exact_match is missing from the candidate's evaluation" in said


def test_a_better_model_is_judged_and_then_released(
    first: Project, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_candidate(first, monkeypatch, 60, held_out(0.6), MODEL)
    record_all(first, model=MODEL)
    judge(instance, promote=False)
    passed, said = gate(instance)
    assert passed and said.startswith("judged only: the gate would have promoted")
    assert len(tags(first)) == 2 and len(materializations(instance)) == 1
    judge(instance)
    release = released_now(first, MODEL)
    assert release is not None and release.version == "v1.1.0"
    shown = materializations(instance)[0]
    assert shown["version"] == f"{MODEL}@v1.1.0" and shown["gain.f1"] == pytest.approx(0.1)


def test_a_chain_with_a_gap_fails_the_run(first: Project, instance: DagsterInstance) -> None:
    manifest: Path = first.stage_dir("chunks", MODEL) / "manifest.json"
    manifest.unlink()
    result = materialize([released], instance=instance, partition_key=MODEL, raise_on_error=False)
    assert not result.success
    (failure,) = result.filter_events(lambda event: event.is_step_failure)
    said = failure.step_failure_data.user_failure_data
    assert said and "chunk-embedding store" in str(said.description)


@pytest.mark.slow
def test_the_retraining_job_goes_from_the_sources_to_a_release(planted: Project, instance: DagsterInstance) -> None:
    items = held_out(0.5).model_dump_json()
    body = f"figures = make(context)\n(context.out / {FILE_NAME!r}).write_text({items!r})\nreturn figures"
    plant_stage(planted, "evaluation", body)
    config = run_config(RetrainingSettings(mode="continue"))
    job = defs.resolve_job_def("retraining")
    assert job.execute_in_process(instance=instance, partition_key=MODEL, run_config=config).success
    release = released_now(planted, MODEL)
    assert release is not None and set(release.manifests) == set(STAGES)
    (found,) = instance.get_runs()
    said = "\n".join(entry.user_message for entry in instance.all_logs(found.run_id))
    assert f"no version of {MODEL} is released yet, so this run is a full one" in said
    assert materializations(instance)[0]["version"] == f"{MODEL}@v1.0.0"
