"""Runs in Dagster as `make ui` starts it: they queue, a cancellation reaches every rank, and SIGKILL loses nothing."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from dagster import DagsterRunStatus

from refrag_platform.dials import add_model
from refrag_platform.project import Project
from refrag_platform.training.core import checkpoint, metrics
from scripts.deployment import Deployment
from tests.assets.conftest import FIRST_TWO, MODEL, plant_stage
from tests.conftest import ROOT, ZERO2, copy_project, init_repository

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
# A stage that says when it has the device.
TURN = """
import time
with (context.project.root / "turns").open("a") as log:
    print("begin", context.recipe.name, file=log, flush=True)
    time.sleep(3)
    print("end", context.recipe.name, file=log, flush=True)
return make(context)
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A repository with the real stages, and tiny as the only model."""
    project = copy_project(tmp_path / "project")
    (project.root / ".dagster_home").mkdir()
    shutil.copy(ROOT / ".dagster_home" / "dagster.yaml", project.root / ".dagster_home")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    configure(project)
    return init_repository(project)


def configure(project: Project, **sections: dict[str, Any]) -> None:
    """Set sections of tiny's recipe in params.yaml."""
    params = project.params()
    params["models"] = ["tiny"]
    params["overrides"]["tiny"] |= sections
    (project.root / "params.yaml").write_text(yaml.safe_dump(params))


def ranks(project: Project) -> Iterator[psutil.Process]:
    """Launched processes of the project that still run."""
    for process in psutil.process_iter(["cmdline", "status"]):
        ours = f"{project.root}/work/" in " ".join(process.info["cmdline"] or ())
        if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
            yield process


def test_runs_that_start_together_have_the_device_one_after_the_other(planted: Project) -> None:
    add_model(planted, "tiny")
    plant_stage(planted, "reconstruction", TURN)
    with Deployment(planted) as dagster:
        first, second, other = (dagster.launch(model, "refrag_pipeline", FIRST_TWO) for model in (MODEL, MODEL, "tiny"))
        assert {dagster.finish(run) for run in (first, second, other)} == {DagsterRunStatus.SUCCESS}
        times = {run: dagster.instance.get_run_record_by_id(run) for run in (first, second)}
    turns = [line.split() for line in (planted.root / "turns").read_text().splitlines()]
    assert [word for word, _ in turns] == ["begin", "end"] * 2
    assert turns[0][1] == turns[1][1] and {model for _, model in turns} == {MODEL, "tiny"}
    earlier, later = sorted(times.values(), key=lambda record: record.start_time)
    assert later.start_time >= earlier.end_time, "one run of a model at a time"


def test_cancelling_in_the_ui_reaches_every_rank_and_the_next_run_goes_on(
    tiny: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tiny.recipe_path("tiny").parent / "launch.yaml").write_text(yaml.safe_dump(ZERO2))
    endless = {"accelerate_config": "launch.yaml", "steps": 100_000, "log_every": 1, "save_every": 100_000}
    configure(tiny, reconstruction=endless)
    state = tiny.work_dir("reconstruction", "tiny") / "state"
    log = state / "metrics.jsonl"
    with Deployment(tiny) as dagster:
        run = dagster.launch("tiny", "refrag_pipeline", FIRST_TWO)
        dagster.until(lambda: len(metrics.read(log)) > 3, "both ranks train")
        assert len(list(ranks(tiny))) == 3  # the launcher and two ranks
        dagster.cancel(run)
        assert dagster.finish(run) is DagsterRunStatus.CANCELED
        assert not dagster.find("assets.child") and not list(ranks(tiny))
        (saved,) = checkpoint.complete(state / "checkpoints")
        before = metrics.read(log)
        assert int(saved.name.removeprefix("step-")) == before[-1]["step"] > 3
        dagster.launch("tiny", "refrag_pipeline", FIRST_TWO)
        dagster.until(lambda: len(metrics.read(log)) > len(before), "the next run trains")
        # Each line holds its speed, too: what was written anew would differ.
        assert metrics.read(log)[: len(before)] == before


def test_killed_runs_go_on_to_the_end_of_an_undisturbed_one(tiny: Project) -> None:
    training = {"steps": 60, "log_every": 1, "save_every": 5}
    configure(tiny, reconstruction=training, cpt=training)
    command = [sys.executable, str(ROOT / "scripts" / "kill_retraining.py"), str(tiny.root), "--kills", "3"]
    for stage in ("corpus", "reconstruction", "cpt"):
        command += ["--asset", stage]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "3 kills: every run went on" in found.stdout
