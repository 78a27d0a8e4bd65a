"""A run of the assets: cached when nothing changed, versioned as DVC has it, stopped by a fault."""

from typing import Any

import pytest
from dagster import AssetCheckKey, AssetKey, DagsterEventType, DagsterInstance, DagsterRunStatus

from assets.materialize import materialize_all
from assets.metadata import DOCS_URL, Published, docs_links, side_by_side
from assets.samples import FILE_NAME, SAMPLES, samples, write_samples
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.errors import RefragError
from refrag_platform.history import dvc, freshness
from refrag_platform.project import Project
from refrag_platform.quality.suites import SUITES
from refrag_platform.recipes import Recipe
from refrag_platform.stages import STAGES
from tests.assets.conftest import FIRST_TWO, MODEL, accept, plant_stage

LEAKED = """
import pyarrow as pa, pyarrow.parquet as pq
figures = make(context)
rows = pq.read_table(context.out / "documents.parquet").to_pylist()
rows[-1]["sha256"] = rows[0]["sha256"]
pq.write_table(pa.Table.from_pylist(rows), context.out / "documents.parquet")
return figures
"""
LATE = """
figures = make(context)
folder = context.project.source_dir(context.recipe.name)
folder.mkdir(parents=True, exist_ok=True)
(folder / "late.txt").write_text("A page that came while the corpus was made.")
return figures
"""
NO_BETTER = """
figures = make(context)
values = json.loads((context.out / "training.json").read_text()) | {"last_loss": 5.0}
write_json(context.out / "training.json", values)
return figures
"""


def metadata(instance: DagsterInstance, stage: str) -> dict[str, Any] | None:
    event = instance.get_latest_materialization_event(AssetKey(stage))
    found = event.asset_materialization if event else None
    return {name: value.value for name, value in found.metadata.items()} if found else None


def data_version(instance: DagsterInstance, stage: str) -> str:
    event = instance.get_latest_materialization_event(AssetKey(stage))
    assert event and event.asset_materialization and event.asset_materialization.tags
    return event.asset_materialization.tags["dagster/data_version"]


def check_outcomes(instance: DagsterInstance, stage: str) -> dict[str, tuple[bool, str]]:
    """Passed or not, and severity, of each check's latest evaluation."""
    outcomes = {}
    for check in SUITES[stage]:
        key = AssetCheckKey(AssetKey(stage), check.name)
        record = instance.event_log_storage.get_latest_asset_check_execution_by_key([key]).get(key)
        event = record.event.dagster_event if record and record.event else None
        if event and event.event_type is DagsterEventType.ASSET_CHECK_EVALUATION:
            evaluation = event.asset_check_evaluation_data
            outcomes[check.name] = (evaluation.passed, evaluation.severity.value)
    return outcomes


def test_a_run_makes_checks_and_records_each_artifact(made: Project, instance: DagsterInstance) -> None:
    for stage in FIRST_TWO:
        assert dvc.is_recorded(made, stage, MODEL)
        outcomes = check_outcomes(instance, stage)
        assert set(outcomes) == {check.name for check in SUITES[stage]}
        assert all(passed for passed, _ in outcomes.values())
        assert (made.stage_dir(stage, MODEL) / "checks" / "index.html").is_file()


def test_the_data_version_is_the_hash_in_dvc_lock(made: Project, instance: DagsterInstance) -> None:
    for stage in FIRST_TWO:
        assert data_version(instance, stage) == dvc.recorded_hash(made, stage, MODEL)


def test_metadata_holds_numbers_picture_tables_paths_and_lineage(made: Project, instance: DagsterInstance) -> None:
    shown = metadata(instance, "reconstruction")
    assert shown is not None
    assert shown["last_loss"] == 3.0 and shown["nested.share"] == 0.5
    assert shown["loss_curve"].startswith("![loss](data:image/png;base64,")
    assert shown["path"] == str(made.content("reconstruction", MODEL))
    event = instance.get_latest_materialization_event(AssetKey("reconstruction"))
    assert event and event.asset_materialization
    lineage = event.asset_materialization.metadata["lineage"]
    rows = [row.data for row in lineage.records]  # type: ignore[attr-defined]
    assert [row["hash"] for row in rows if row["input"] == "corpus"] == [dvc.recorded_hash(made, "corpus", MODEL)]
    assert {row["path"] for row in rows if row["input"] == "source"} >= {f"models/{MODEL}/tokenizer.json"}
    found = event.asset_materialization.metadata.items()
    links = {name: value for name, value in found if name.startswith(("made_from.", "goes_into."))}
    assert {name: value.asset_key.path for name, value in links.items()} == {  # type: ignore[attr-defined]
        "made_from.corpus": ["corpus"],
        "goes_into.cpt": ["cpt"],
    }


def test_metadata_begin_with_the_result_and_end_with_the_settings(made: Project, instance: DagsterInstance) -> None:
    names = list(metadata(instance, "reconstruction") or {})
    results = ("loss_curve", "samples", "last_loss", "nested.share")
    assert max(map(names.index, results)) < min(map(names.index, ("cached", "made", "path", "hash", "lineage")))
    assert names[-1] == "settings"


def test_each_check_leads_to_its_data_docs(
    made: Project, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = made.stage_dir("corpus", MODEL) / "checks" / "index.html"
    for check in SUITES["corpus"]:
        key = AssetCheckKey(AssetKey("corpus"), check.name)
        record = instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
        assert record.event and record.event.dagster_event
        shown = record.event.dagster_event.asset_check_evaluation_data.metadata
        assert shown["data_docs"].value == f"http://127.0.0.1:3002/data/{MODEL}/corpus/checks/index.html"
        assert shown["data_docs_file"].value == str(page)
    assert page.is_file()
    monkeypatch.setenv(DOCS_URL, "https://docs.example/refrag/")
    link = docs_links(made, page.parent.parent)["data_docs"].value
    assert link == f"https://docs.example/refrag/data/{MODEL}/corpus/checks/index.html"


def test_models_stand_side_by_side(made: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Project, "models", lambda project: [MODEL, "not-made-yet"])
    (row,) = side_by_side(Published.read(made, "reconstruction", MODEL))["models"].records  # type: ignore[attr-defined]
    assert row.data["model"] == MODEL and row.data["last_loss"] == 3.0


def test_the_log_of_a_run_tells_the_course(made: Project, instance: DagsterInstance) -> None:
    first = instance.get_runs()[-1]
    said = "\n".join(entry.user_message for entry in instance.all_logs(first.run_id))
    assert f"step 10 of {made.recipe(MODEL).reconstruction.steps}: loss 3.0000" in said


def test_the_ui_shows_text_that_was_written_from_vectors(made: Project, instance: DagsterInstance) -> None:
    event = instance.get_latest_materialization_event(AssetKey("reconstruction"))
    assert event and event.asset_materialization
    shown = str(event.asset_materialization.metadata["samples"].value).splitlines()
    assert shown[0] == "| text of 4 chunks | written from their vectors |"
    assert len(shown) == 2 + SAMPLES
    assert all(len(line.replace("\\|", "").split("|")) == 4 for line in shown[2:])


def test_samples_are_written_once_and_cells_hold_no_markup(made: Project) -> None:
    published = Published.read(made, "reconstruction", MODEL)
    path = published.folder / FILE_NAME
    before = path.read_text()
    path.write_text('[{"text": "a | b\\n<script>", "written": "*c*"}]')
    try:
        write_samples(made, "reconstruction", MODEL)
        assert str(samples(published)["samples"].value).splitlines()[2] == r"| a \| b &lt;script> | \*c\* |"
    finally:
        path.write_text(before)


def test_what_is_up_to_date_is_cached_and_not_made_again(
    made: Project, instance: DagsterInstance, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {stage: Manifest.read(made.stage_dir(stage, MODEL)) for stage in FIRST_TWO}
    assert materialize_all(MODEL, FIRST_TWO)
    output = capfd.readouterr().out
    for stage in FIRST_TWO:
        assert (metadata(instance, stage) or {})["cached"] is True
        assert Manifest.read(made.stage_dir(stage, MODEL)) == before[stage]
        assert f"{stage} of {MODEL}: cached, {before[stage].hash}" in output


def test_what_an_artifact_is_made_from_is_hashed_once_where_no_run_came_between(
    made_copy: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to date, and not in dvc.lock: recorded from what was found out to know that it is up to date."""
    (made_copy.root / "dvc.lock").unlink()
    hashed: list[str] = []
    compute = freshness.dependencies

    def counted(project: Project, name: str, recipe: Recipe) -> freshness.Dependencies:
        hashed.append(name)
        return compute(project, name, recipe)

    monkeypatch.setattr(freshness, "dependencies", counted)
    assert materialize_all(MODEL, FIRST_TWO)
    assert tuple(hashed) == FIRST_TWO
    assert all(dvc.is_recorded(made_copy, stage, MODEL) for stage in FIRST_TWO)


def test_what_changed_while_a_stage_ran_is_not_recorded_as_what_it_was_made_from(
    planted: Project, capfd: pytest.CaptureFixture[str]
) -> None:
    plant_stage(planted, "corpus", LATE)
    assert not materialize_all(MODEL, ["corpus"])
    assert "inputs, settings or code of corpus changed since" in capfd.readouterr().err
    assert dvc.recorded_hash(planted, "corpus", MODEL) is None


@pytest.mark.slow
def test_a_planted_fault_turns_its_check_red_and_stops_what_is_downstream(
    planted: Project, instance: DagsterInstance
) -> None:
    plant_stage(planted, "corpus", LEAKED)
    assert not materialize_all(MODEL, FIRST_TWO)
    failed = {name for name, (passed, _) in check_outcomes(instance, "corpus").items() if not passed}
    assert failed == {"split_leakage"}
    assert metadata(instance, "corpus") is None and metadata(instance, "reconstruction") is None
    assert not planted.stage_dir("corpus", MODEL).exists()
    # Mended, it runs through; a quality threshold of an undertrained recipe only warns.
    plant_stage(planted, "corpus")
    plant_stage(planted, "reconstruction", NO_BETTER)
    assert materialize_all(MODEL, FIRST_TWO)
    assert check_outcomes(instance, "corpus")["split_leakage"] == (True, "ERROR")
    assert check_outcomes(instance, "reconstruction")["loss_falls"] == (False, "WARN")


def test_a_fault_in_a_recorded_artifact_stops_what_is_downstream(made_copy: Project, instance: DagsterInstance) -> None:
    """Bytes that DVC and the manifest agree on are still checked."""
    before = instance.get_latest_materialization_event(AssetKey("reconstruction"))
    facts = made_copy.content("corpus", MODEL) / "corpus.json"
    facts.write_text(facts.read_text().replace('"test": 360', '"test": 359'))
    accept(made_copy, "corpus")
    assert not materialize_all(MODEL, FIRST_TWO)
    assert check_outcomes(instance, "corpus")["counts"] == (False, "ERROR")
    assert instance.get_latest_materialization_event(AssetKey("reconstruction")) == before


def test_a_failing_stage_fails_its_run_and_says_why(
    planted: Project, instance: DagsterInstance, capfd: pytest.CaptureFixture[str]
) -> None:
    plant_stage(planted, "corpus", "raise ValueError('no such text')")
    assert not materialize_all(MODEL, FIRST_TWO)
    assert [run.status for run in instance.get_runs()] == [DagsterRunStatus.FAILURE]
    assert check_outcomes(instance, "corpus") == {}
    shown = capfd.readouterr().err
    assert "ValueError: no such text" in shown
    assert f"corpus of {MODEL} ended with status 1" in shown
    assert "dagster/_core" not in shown


def test_a_model_that_params_yaml_does_not_name_is_refused() -> None:
    with pytest.raises(RefragError, match=r"models names .*, not 'unknown'.*refrag recipes add unknown"):
        materialize_all("unknown")


@pytest.mark.slow
def test_the_whole_pipeline_runs_and_is_cached_the_second_time(planted: Project, instance: DagsterInstance) -> None:
    for cached in (False, True):
        assert materialize_all(MODEL)
        assert {stage: (metadata(instance, stage) or {})["cached"] for stage in STAGES} == dict.fromkeys(STAGES, cached)
    assert all(data_version(instance, stage) == dvc.recorded_hash(planted, stage, MODEL) for stage in STAGES)
