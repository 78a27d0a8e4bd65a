"""A stage that Dagster runs on another machine, for which a bare folder stands: cancelled, resumed, recorded."""

import signal
from pathlib import Path

import pytest
from dagster import AssetKey, DagsterInstance

from assets.materialize import materialize_all
from assets.settings import elsewhere_settings
from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.bundle.elsewhere import run_elsewhere
from refrag_platform.errors import RefragError
from refrag_platform.history import dvc
from refrag_platform.project import Project
from refrag_platform.runner import run_stage
from tests.assets.conftest import FIRST_TWO, MODEL, plant_stage, start_pipeline
from tests.processes import wait_for

PATIENCE = 200  # seconds; far more than anything takes
CHECKPOINT = Path("state", "checkpoints", "step-00000001", "complete.json")
# Saves, and does not end; started again from what it saved, it is done.
SLOW_STAGE = """
import os, time
saved = context.work / "checkpoints" / "step-00000001"
if not saved.exists():
    saved.mkdir(parents=True)
    (saved / "complete.json").write_text("{}")
    time.sleep(600)
(context.beside / "where").write_text(os.getcwd())
return make(context)
"""


def command(project: Project, there: Path, seconds: int = 500) -> str:
    """Another machine that is a folder; what makes the planted artifacts is not in a bundle."""
    return (
        f"rm -rf {there} {there}.results; PYTHONPATH={project.root} {{python}} {{bundle}}/unbundle.py {there} "
        f"--run {seconds}; status=$?; [ ! -d {there}.results ] || mv {there}.results {{results}}; exit $status"
    )


@pytest.mark.slow
def test_a_cancelled_run_goes_on_from_what_the_other_machine_saved(
    planted: Project, instance: DagsterInstance, tmp_path: Path
) -> None:
    plant_stage(planted, "reconstruction", SLOW_STAGE)
    there = tmp_path / "there"
    with (planted.root / "params.yaml").open("a") as dials:
        dials.write(f"\nelsewhere:\n  stages: [reconstruction]\n  command: '{command(planted, there)}'\n")
    pipeline = start_pipeline(planted)
    mark = Project(there).work_dir("reconstruction", MODEL) / CHECKPOINT
    wait_for(lambda: mark.is_file() or pipeline.poll() is not None, PATIENCE)
    pipeline.send_signal(signal.SIGTERM)
    output, _ = pipeline.communicate(timeout=PATIENCE)
    assert pipeline.returncode != 0, output
    assert (planted.work_dir("reconstruction", MODEL) / CHECKPOINT).is_file(), output
    assert instance.get_latest_materialization_event(AssetKey("reconstruction")) is None

    assert materialize_all(MODEL, FIRST_TWO)
    folder = planted.stage_dir("reconstruction", MODEL)
    assert (folder / "where").read_text() == str(there)
    event = instance.get_latest_materialization_event(AssetKey("reconstruction"))
    assert event is not None and event.asset_materialization is not None
    assert event.asset_materialization.tags
    assert event.asset_materialization.tags["dagster/data_version"] == Manifest.read(folder).hash
    assert dvc.is_recorded(planted, "reconstruction", MODEL)


def test_a_command_that_brings_nothing_back_is_named(planted_project: Project, tmp_path: Path) -> None:
    run_stage(planted_project, "corpus", "tiny")
    with pytest.raises(RefragError, match=r"reconstruction of tiny: the command .* ended with status 7 .*: exit 7"):
        run_elsewhere(planted_project, "reconstruction", "tiny", "exit 7")
    with pytest.raises(RefragError, match="before cpt of tiny these are to be made: reconstruction"):
        run_elsewhere(planted_project, "cpt", "tiny", "exit 7")


def test_the_setting_is_checked(planted: Project) -> None:
    assert elsewhere_settings(planted) is None
    dials = planted.root / "params.yaml"
    before = dials.read_text()
    dials.write_text(f"{before}\nelsewhere: {{command: 'run {{bundle}}'}}\n")
    settings = elsewhere_settings(planted)
    assert settings is not None and settings.stages == ("reconstruction", "cpt", "finetuned", "policy")
    dials.write_text(f"{before}\nelsewhere: {{command: 'run', stages: [package]}}\n")
    with pytest.raises(RefragError, match=r"(?s)params\.yaml:.*elsewhere\.stages"):
        elsewhere_settings(planted)
