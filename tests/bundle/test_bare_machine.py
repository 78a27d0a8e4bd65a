"""Real trainings with no more than Python, torch and what the bundle brings: stopped, carried on, brought home."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from refrag_platform import runner
from refrag_platform.bundle.landing import import_results
from refrag_platform.bundle.pieces import write_bundle
from refrag_platform.bundle.unbundle import unpack
from refrag_platform.bundle.work import work_to_do
from refrag_platform.cli import PAUSED
from refrag_platform.history.status import status
from refrag_platform.project import Project
from refrag_platform.training.core import checkpoint
from tests.processes import wait_for

pytestmark = pytest.mark.slow

MODEL, TRAINED = "tiny", ("reconstruction", "cpt", "finetuned", "policy")
CONTROL = "tiny--full"
PATIENCE = 200  # seconds; far more than anything takes on a busy machine
# What the library's core does not depend on (pyproject.toml) can't be imported there.
BARE = """
import runpy, sys
for name in ("bentoml", "dagster", "datasets", "deepspeed", "dvc", "fastapi", "great_expectations", "httpx", "lance",
             "lancedb", "matplotlib", "pandas", "pyarrow", "zstandard"):
    sys.modules[name] = None
runpy.run_module("refrag_platform", run_name="__main__", alter_sys=True)
"""


def start(there: Path, *arguments: str) -> subprocess.Popen[str]:
    """A command on the other machine, which has no Git either."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "REFRAG_ROOT")}
    return subprocess.Popen(
        [sys.executable, "-c", BARE, *arguments],
        cwd=there,
        env={**environment, "PATH": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def send_out(home: Project, folder: Path) -> Path:
    with work_to_do(home, [MODEL, CONTROL], "policy") as work:
        write_bundle(work.members, work.facts, folder.with_suffix(".bundle"), 30)
    unpack([folder.with_suffix(".bundle")], folder)
    return folder


def bring_home(home: Project, there: Path) -> dict[str, tuple[list[str], list[str]]]:
    """By model, artifacts that landed, and stages that are unfinished."""
    export = start(there, "bundle", "export", "--results", "--out", str(there.with_suffix(".results")))
    output, _ = export.communicate(timeout=PATIENCE)
    assert export.returncode == 0, output
    landed = import_results(home, [there.with_suffix(".results")])
    return {each.model: (list(each.artifacts), each.unfinished) for each in landed}


def test_what_two_bare_machines_trained_is_what_is_trained_here(project: Project, tmp_path: Path) -> None:
    recipe = project.recipe_path(MODEL)
    # Saved at every step, so that the stop below comes between two of many.
    recipe.write_text(
        recipe.read_text().replace(
            "save_every: 20, curriculum: {max_factor: 8", "save_every: 1, curriculum: {max_factor: 8"
        )
        + "controls: {full: {}}\n"
    )
    runner.run_stage(project, "corpus", MODEL)

    first = send_out(project, tmp_path / "first")
    run = ("run", *TRAINED, "--model", MODEL, "--seconds", "500")
    training = start(first, *run)
    checkpoints = Project(first).work_dir("reconstruction", MODEL) / "state" / "checkpoints"
    wait_for(lambda: training.poll() is not None or bool(checkpoint.complete(checkpoints)), PATIENCE)
    training.send_signal(signal.SIGTERM)
    output, _ = training.communicate(timeout=PATIENCE)
    assert training.returncode == PAUSED, output
    assert bring_home(project, first) == {MODEL: ([], ["reconstruction"]), CONTROL: ([], [])}

    second = send_out(project, tmp_path / "second")
    for arguments in (run, ("run", "all", "--model", CONTROL)):
        training = start(second, *arguments)
        output, _ = training.communicate(timeout=PATIENCE)
        assert training.returncode == 0, output
    assert bring_home(project, second) == {MODEL: (list(TRAINED), []), CONTROL: (["cpt", "finetuned"], [])}
    for stage in ("cpt", "finetuned"):
        assert runner.run_stage(project, stage, CONTROL).cached
    states = {row.stage: row.state for row in status(project, MODEL)}
    assert {states[stage] for stage in TRAINED} == {"current"}
    for stage in TRAINED:
        landed = runner.run_stage(project, stage, MODEL)
        assert landed.cached and (landed.path / "checks" / "results.json").is_file()
        assert runner.run_stage(project, stage, MODEL, force=True).manifest.hash == landed.manifest.hash
