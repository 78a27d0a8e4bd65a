"""The run launcher of dagster.yaml: Dagster's own, which can also tell whether a run's process still lives.

Dagster's monitoring asks it. A run that was killed together with its code location (a lost machine, SIGKILL to all)
would else look alive for ever, and hold its model and the device.
"""

import json
import os
import socket

import dagster as dg
import psutil
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG
from dagster._grpc.client import DagsterGrpcClient
from dagster._grpc.types import CanCancelExecutionRequest, CanCancelExecutionResult
from dagster._serdes import deserialize_value

# Of runs that no code location started: number, start and machine of their process.
PROCESS_TAG = "refrag/process"
THIS_MACHINE = frozenset({"localhost", "127.0.0.1"})


class WatchedRunLauncher(dg.DefaultRunLauncher):
    """Starts runs in the code location's processes and says whether they are still there."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        if is_alive(self._instance, run):
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(WorkerStatus.FAILED, "the process of this run was killed")


def is_alive(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether the process of a started run is there; True when this machine can't tell."""
    if PROCESS_TAG in run.tags:
        number, started, *machine = run.tags[PROCESS_TAG].split("@")
        return machine not in ([], [socket.gethostname()]) or _runs(int(number), float(started))
    server = json.loads(run.tags.get(GRPC_INFO_TAG, "{}"))
    if not server:
        return True
    if server.get("socket") or server["host"] in THIS_MACHINE:
        return _started_here(instance, run)
    return _known_to(DagsterGrpcClient(host=server["host"], port=server["port"], use_ssl=server.get("use_ssl")), run)


def this_process() -> str:
    """The value of PROCESS_TAG for this process."""
    return f"{os.getpid()}@{psutil.Process().create_time():.2f}@{socket.gethostname()}"


def _started_here(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Its first words in the event log hold its number. A later process may have been given that number again."""
    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        number = entry.get_dagster_event().engine_event_data.metadata.get("pid")
        if number is not None:
            return _runs(int(str(number.value)), entry.timestamp)
    return True


def _runs(number: int, latest_start: float) -> bool:
    """Whether the process of that number runs and began no later than `latest_start`, in seconds since 1970."""
    try:
        process = psutil.Process(number)
        return process.create_time() <= latest_start + 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _known_to(server: DagsterGrpcClient, run: dg.DagsterRun) -> bool:
    """Whether a code location on another machine, restarted perhaps, still has the run."""
    try:
        answer = server.can_cancel_execution(CanCancelExecutionRequest(run_id=run.run_id))
    except DagsterUserCodeUnreachableError:
        return True
    return deserialize_value(answer, CanCancelExecutionResult).can_cancel
