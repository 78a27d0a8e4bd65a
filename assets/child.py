"""The process that a Dagster step starts: `refrag run STAGE`, its log lines sent on to Dagster's event log.

    python -m assets.child STAGE MODEL

It leads a process group of its own. When the step's process dies without a word (SIGKILL), the whole
group goes too: an orphan would hold the stage's lock and the GPU.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import TextIO

from dagster_pipes import open_dagster_pipes

from assets.progress import reported

SECONDS_BETWEEN_LOOKS = 0.5
METRICS = "metrics.jsonl"


class LineTap:
    """A text stream that passes everything on and reports each completed line.

    A progress bar redraws its line with carriage returns: only its last state is reported.
    """

    def __init__(self, stream: TextIO, report: Callable[[str], None]) -> None:
        self._stream, self._report = stream, report
        self._line = ""

    def write(self, text: str) -> int:
        *complete, self._line = (self._line + text).split("\n")
        for line in complete:
            shown = line.rsplit("\r", 1)[-1].replace("\x1b[2K", "").strip()
            if shown:
                self._report(shown)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return self._stream.encoding


def die_with(parent: int) -> None:
    """Kill this process group as soon as `parent` is no longer the parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()


def main(stage: str, model: str) -> int:
    """Run the stage; returns the exit status of `refrag run`."""
    from refrag_platform.cli import app
    from refrag_platform.project import Project

    project = Project.find()
    steps = getattr(getattr(project.recipe(model), stage, None), "steps", None)
    courses = [project.work_dir(stage, model) / "state" / METRICS, project.stage_dir(stage, model) / METRICS]
    with (
        open_dagster_pipes() as pipes,
        redirect_stderr(LineTap(sys.stderr, pipes.log.info)),
        reported(courses, steps, pipes.log.info),
    ):
        try:
            app(["run", stage, "--model", model])
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    die_with(int(os.environ["REFRAG_STEP_PID"]))
    sys.exit(main(*sys.argv[1:]))
