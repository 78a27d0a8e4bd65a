"""Runs a stage outside Dagster's process: a Pipes client that owns the whole process group.

Dagster's own subprocess client signals only the direct child and kills nothing; ranks and data workers
would live on. Here an interruption sends SIGTERM to the group, the trainer saves, and what is still
there after the grace time is killed.
"""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import dagster as dg
import psutil
from pydantic import Field

from refrag_platform.processes import ends_with_parent

# Bytes; with fewer left, that is why a stage failed.
FULL = 64_000_000


class StageFailed(Exception):
    """The stage's process ended with another status than 0."""


class StageProcess(dg.ConfigurableResource):
    """Starts `refrag run STAGE --model MODEL` for an asset and waits for it."""

    grace_seconds: float = Field(
        default=120.0, description="After a cancellation the trainer has this long to save its checkpoint."
    )
    terminal: int | None = Field(
        default=None, description="File descriptor of a terminal for progress bars. Default: the step's stderr."
    )

    def run(self, context: dg.AssetExecutionContext, root: Path, stage: str, model: str) -> None:
        """Run one stage of the project at `root`; its output is forwarded as it comes.

        Raises:
            StageFailed: it ended with another status than 0.
        """
        _end_with_run()
        with _session(context) as session:
            process = subprocess.Popen(
                [sys.executable, "-m", "assets.child", stage, model],
                cwd=root,
                env={
                    **os.environ,
                    **session.get_bootstrap_env_vars(),
                    "REFRAG_ROOT": str(root),
                    "REFRAG_STEP_PID": str(os.getpid()),
                    "PYTHONUNBUFFERED": "1",
                },
                stdin=subprocess.DEVNULL,
                stderr=self.terminal,
                start_new_session=True,
            )
            try:
                status = process.wait()
            except BaseException:  # Dagster's interruption and KeyboardInterrupt are no Exceptions
                context.log.info(f"interrupted: {stage} has {self.grace_seconds:.0f} s to save")
                stop_group(process, self.grace_seconds)
                raise
            finally:
                _signal_group(process.pid, signal.SIGKILL)
        if status:
            raise StageFailed(f"{stage} of {model} ended with status {status}{_why(session)}{_full_disk(root)}")


def _why(session: dg.PipesSession) -> str:
    """What the stage said last; one that was killed has said nothing."""
    said = [message["reason"] for message in session.get_custom_messages() if message.get("reason")]
    return f": {said[-1]}" if said else "; the step's logs say why"


def _full_disk(root: Path) -> str:
    """Libraries that write checkpoints don't name this cause."""
    free = shutil.disk_usage(root).free
    return f"\nThe disk of {root} is full: {free / 1e6:.0f} MB are left" if free < FULL else ""


def _end_with_run() -> None:
    """A step whose run was killed must not train on, unseen: it ends with the run's process, and its stage with it."""
    run = multiprocessing.parent_process()
    if run is not None:
        ends_with_parent(signal.SIGKILL)()
        if os.getppid() != run.pid:  # it ended before we asked
            os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _session(context: dg.AssetExecutionContext) -> Iterator[dg.PipesSession]:
    """A Pipes session over temporary files."""
    with ExitStack() as stack:
        with warnings.catch_warnings():
            # Dagster warns of a preview function that its own session calls.
            warnings.simplefilter("ignore", dg.PreviewWarning)
            session = stack.enter_context(
                dg.open_pipes_session(context, dg.PipesTempFileContextInjector(), dg.PipesTempFileMessageReader())
            )
        yield session


def stop_group(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """SIGTERM to the group that `process` leads, then, at the latest after the grace time, SIGKILL."""
    deadline = time.monotonic() + grace_seconds
    try:
        _signal_group(process.pid, signal.SIGTERM)
        while group_alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:  # a second interruption ends the grace time
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()


def group_alive(group: int) -> bool:
    """Whether any process of the group still runs; the dead that nobody has reaped don't count."""
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return False


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)
