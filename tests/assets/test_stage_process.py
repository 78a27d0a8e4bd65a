"""The process group of a stage: it gets its time to save, and nothing of it is left."""

import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from dagster import DagsterInstance, DagsterRunStatus
from dagster._core.events import EngineEventData
from dagster._core.launcher import WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG
from dagster._core.test_utils import create_run_for_test

from assets.child import LineTap, reason
from assets.launcher import PROCESS_TAG
from assets.materialize import close_dead_runs
from assets.pipes import group_alive, stop_group
from refrag_platform.project import Project
from tests.assets.conftest import MODEL, plant_stage, start_pipeline
from tests.processes import wait_for

# Seconds; far more than anything takes on a busy machine.
PATIENCE = 200
# A stage with a helper process, which saves when it is told to stop.
LONG_STAGE = """
import os, signal, subprocess, sys, time
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

def save(number, frame):
    time.sleep(1)
    (context.work / "checkpoint").write_text("saved")
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
(context.work / "group").write_text(str(os.getpgid(0)))
time.sleep(600)
"""


def state(project: Project) -> Path:
    return project.work_dir("corpus", MODEL) / "state"


def start_long_stage(project: Project) -> tuple[subprocess.Popen[str], int]:
    """Start the pipeline and wait until its first stage, and the stage's helper, run."""
    plant_stage(project, "corpus", LONG_STAGE)
    pipeline = start_pipeline(project)
    mark = state(project) / "group"
    wait_for(lambda: mark.is_file() and mark.read_text() != "", PATIENCE)
    return pipeline, int(mark.read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_cancelling_lets_the_stage_save_and_leaves_no_process(
    planted: Project, instance: DagsterInstance, number: signal.Signals
) -> None:
    pipeline, group = start_long_stage(planted)
    (run,) = instance.get_runs()
    instance.report_run_canceling(run)  # as the UI does before it sends the signal
    pipeline.send_signal(number)
    output, _ = pipeline.communicate(timeout=PATIENCE)
    assert pipeline.returncode != 0, output
    assert (state(planted) / "checkpoint").read_text() == "saved"
    assert not group_alive(group)
    assert [run.status for run in instance.get_runs()] == [DagsterRunStatus.CANCELED]


def test_a_killed_run_takes_its_stage_along_and_gives_its_place_back(
    planted: Project, instance: DagsterInstance
) -> None:
    pipeline, group = start_long_stage(planted)
    pipeline.kill()
    pipeline.wait()
    wait_for(lambda: not group_alive(group), PATIENCE)
    (run,) = instance.get_runs()
    assert run.status is DagsterRunStatus.STARTED
    assert close_dead_runs(instance) == [run.run_id]
    assert [run.status for run in instance.get_runs()] == [DagsterRunStatus.FAILURE]


def test_monitoring_tells_a_run_that_was_killed_with_its_code_location(
    planted: Project, instance: DagsterInstance
) -> None:
    """Nobody is left to report it; a later process may have its number."""
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        gone.wait()
    launched = {GRPC_INFO_TAG: '{"host": "localhost", "socket": "/tmp/gone"}'}
    found = {}
    for number in (os.getpid(), gone.pid):
        run = create_run_for_test(instance, status=DagsterRunStatus.STARTED, tags=launched)
        instance.report_engine_event("Started process for run.", run, EngineEventData.in_process(number))
        found[number] = instance.run_launcher.check_run_worker_health(run).status
    assert found == {os.getpid(): WorkerStatus.RUNNING, gone.pid: WorkerStatus.FAILED}
    elsewhere = create_run_for_test(instance, status=DagsterRunStatus.STARTED, tags={PROCESS_TAG: "1@0.00@elsewhere"})
    assert instance.run_launcher.check_run_worker_health(elsewhere).status is WorkerStatus.RUNNING
    assert len(close_dead_runs(instance)) == 1


def test_a_stage_that_failed_says_why_in_its_last_words() -> None:
    lines = ["step 3", "refrag: no text", "  in a.txt"]
    assert reason(lines) == "no text\n  in a.txt"
    assert reason(["Traceback", "OSError: [Errno 28] No space left on device"]).startswith("OSError")
    assert reason([]) == ""


def test_a_group_that_does_not_stop_is_killed_after_the_grace_time() -> None:
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == b"deaf\n"
    stop_group(process, grace_seconds=0.3)
    assert process.returncode == -signal.SIGKILL
    assert not group_alive(process.pid)


def test_lines_are_reported_once_they_are_complete_and_bars_by_their_last_state() -> None:
    stream, lines = StringIO(), list[str]()
    tap = LineTap(stream, lines.append)
    for text in ("step 1", "0\nloss ", "2.5\n\n", "\r\x1b[2K1/2", "\r\x1b[2K2/2\n", "unfinished"):
        tap.write(text)
    assert lines == ["step 10", "loss 2.5", "2/2"]
    assert stream.getvalue().endswith("2/2\nunfinished")
    assert not tap.isatty()
