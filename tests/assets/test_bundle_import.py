"""What another machine made is recorded in DVC and in Dagster as if it had been made here."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dagster import AssetKey, DagsterInstance

from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.history import dvc
from refrag_platform.history.freshness import is_current
from refrag_platform.history.git import git_commit
from refrag_platform.history.status import status
from refrag_platform.project import Project
from tests.assets.conftest import FIRST_TWO, MODEL
from tests.planted import run


def refrag(project: Project, *arguments: str) -> str:
    """What a command in the project, of its own code, says."""
    return run(project.root, "env", f"REFRAG_ROOT={project.root}", sys.executable, "-m", "refrag_platform", *arguments)


@pytest.mark.slow
def test_what_lands_is_recorded_and_materialized_with_its_lineage(
    made_copy: Project, instance: DagsterInstance, tmp_path: Path
) -> None:
    out, results, there = (tmp_path / name for name in ("out", "results", "there"))
    control = f"{MODEL}--full"
    with made_copy.recipe_path(MODEL).open("a") as recipe:
        recipe.write("controls: {full: {}}\n")
    both = ("--model", MODEL, "--model", control)
    refrag(made_copy, "bundle", "export", *both, "--until", "cpt", "--out", str(out))
    subprocess.run([sys.executable, out / "unbundle.py", there], check=True)
    shutil.copy(made_copy.root / "planted.py", there)  # what makes the artifacts of these projects
    for model in (MODEL, control):
        refrag(Project(there), "run", "cpt", "--model", model)
    refrag(Project(there), "bundle", "export", "--results", "--out", str(results))
    said = refrag(made_copy, "bundle", "import", str(results))

    manifest = Manifest.read(made_copy.stage_dir("cpt", MODEL))
    assert f"cpt of {MODEL}: made in" in said and manifest.hash in said
    assert manifest.commit == git_commit(made_copy.root)
    rows = {row.stage: row for row in status(made_copy, MODEL)}
    assert {rows[stage].state for stage in (*FIRST_TWO, "cpt")} == {"current"} and rows["cpt"].recorded
    assert dvc.is_recorded(made_copy, "cpt", MODEL)
    assert is_current(made_copy, "cpt", control), "DVC and Dagster know models alone"
    event = instance.get_latest_materialization_event(AssetKey("cpt"))
    assert event is not None and event.asset_materialization is not None
    made = event.asset_materialization
    assert made.tags and made.tags["dagster/data_version"] == manifest.hash
    inputs = [row.data for row in made.metadata["lineage"].records]  # type: ignore[attr-defined]
    assert {row["input"]: row["hash"] for row in inputs} == {
        stage: dvc.recorded_hash(made_copy, stage, MODEL) for stage in FIRST_TWO
    }
    assert made.metadata["hardware"].value == manifest.hardware
    assert (made_copy.stage_dir("cpt", MODEL) / "checks" / "index.html").is_file()
