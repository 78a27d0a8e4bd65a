"""Dagster as `make ui` starts it, for scripts and tests that start, watch, cancel and kill runs in it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Literal
from urllib.request import urlopen

import psutil
from dagster import DagsterInstance, DagsterRunStatus
from dagster_graphql import DagsterGraphQLClient

from refrag_platform.processes import free_port
from refrag_platform.project import Project

Role = Literal["trainer", "daemon", "tree"]
FINISHED = {DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED}
# Seconds; far more than anything takes here.
PATIENCE = 1200.0
POLL = 0.5


class Deployment:
    """Webserver, daemon and code location of a project, and a client of its GraphQL. Use it in a `with`."""

    def __init__(self, project: Project) -> None:
        self.project, self.log = project, project.root / "dagster.log"
        homes = {"DAGSTER_HOME": ".dagster_home", "BENTOML_HOME": ".bentoml", "REFRAG_ROOT": "", "PYTHONPATH": ""}
        quiet = {"DAGSTER_DISABLE_TELEMETRY": "1", "DVC_NO_ANALYTICS": "1", "GX_ANALYTICS_ENABLED": "false"}
        paths = {name: str(project.root / path) for name, path in homes.items()}
        self.environment = {**os.environ, **paths, **quiet}
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Deployment:
        self.instance = DagsterInstance.from_config(self.environment["DAGSTER_HOME"])
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill("tree")
        self.instance.dispose()

    def start(self) -> None:
        """Start it, and wait until it takes runs."""
        port = free_port()
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dagster", "dev", "-h", "127.0.0.1", "-p", str(port)],
                cwd=self.project.root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.until(lambda: self._answers(port), "Dagster's webserver answers")

    def _answers(self, port: int) -> bool:
        with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/server_info", timeout=10):
            self.client = DagsterGraphQLClient("127.0.0.1", port_number=port)
            return True
        return False

    def launch(self, model: str, job: str = "retraining", assets: Sequence[str] | None = None) -> str:
        """Put a run of a model, or some assets of it, into the queue as the UI does; returns its id."""
        return self.client.submit_job_execution(job, tags={"dagster/partition": model}, asset_selection=assets)

    def cancel(self, run_id: str) -> None:
        """What *Terminate* does."""
        self.client.terminate_run(run_id)

    def status(self, run_id: str) -> DagsterRunStatus:
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        return run.status

    def slots_taken(self) -> int:
        """Slots of the pool of devices that a run, gone or not, holds."""
        return self.instance.event_log_storage.get_concurrency_info("gpu").active_slot_count

    def finish(self, run_id: str) -> DagsterRunStatus:
        """Wait until a run has ended and the device is free; returns how it ended."""
        self.until(lambda: self.status(run_id) in FINISHED, f"run {run_id} ends")
        self.until(lambda: self.slots_taken() == 0, "the device's slot is free")
        return self.status(run_id)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something holds.

        Raises:
            TimeoutError: it never did.
        """
        ends = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > ends:
                raise TimeoutError(f"not within {PATIENCE:.0f} s: {what}; {self.log} may say why")
            time.sleep(POLL)

    def processes(self) -> list[psutil.Process]:
        """All that it started, itself included."""
        assert self.process is not None
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def find(self, word: str) -> list[psutil.Process]:
        """Those of its processes whose command line has `word`."""
        processes = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if word in process.cmdline():
                    processes.append(process)
        return processes

    def kill(self, role: Role) -> list[psutil.Process]:
        """SIGKILL to a part of it, in one blow; returns the killed. It is down afterwards, unless a trainer died."""
        everything = self.processes()
        words = {"trainer": "assets.child", "daemon": "dagster._daemon"}
        chosen = self.find(words[role]) if role in words else everything
        for process in chosen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)  # nobody sees the others die
        for process in chosen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if role != "trainer" and self.process is not None:
            self.process.wait(PATIENCE)
            psutil.wait_procs(everything, timeout=PATIENCE)
        return chosen
