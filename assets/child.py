"""The process that a Dagster step starts: `refrag run STAGE`, or `refrag bundle run STAGE` where params.yaml says that
it runs on another machine; its log lines are sent on to Dagster's event log.

    python -m assets.child STAGE MODEL

It leads a process group of its own. When the step's process dies without a word (SIGKILL), the whole
group goes too: an orphan would hold the stage's lock and the GPU.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import TextIO

from dagster_pipes import open_dagster_pipes

from assets.progress import reported
from assets.settings import elsewhere_settings
from refrag_platform.project import Project

SECONDS_BETWEEN_LOOKS = 0.5
METRICS = "metrics.jsonl"
# How `refrag` begins the message of an error of its own.
REFUSAL = "refrag: "
LINES_KEPT = 30


class LineTap:
    """A text stream that passes everything on and reports each completed line.

    A progress bar redraws its line with carriage returns: only its last state is reported.
    """

    def __init__(self, stream: TextIO, report: Callable[[str], None]) -> None:
        self._stream, self._report = stream, report
        self._line = ""
        self.last: deque[str] = deque(maxlen=LINES_KEPT)

    def write(self, text: str) -> int:
        *complete, self._line = (self._line + text).split("\n")
        for line in complete:
            shown = line.rsplit("\r", 1)[-1].replace("\x1b[2K", "").strip()
            if shown:
                self.last.append(shown)
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
    """Run the stage and let the model write samples; returns the exit status of `refrag run`."""
    from assets.samples import write_samples

    project = Project.find()
    steps = getattr(getattr(project.recipe(model), stage, None), "steps", None)
    courses = [project.work_dir(stage, model) / "state" / METRICS, project.stage_dir(stage, model) / METRICS]
    with open_dagster_pipes() as pipes:
        tap = LineTap(sys.stderr, pipes.log.info)
        with redirect_stderr(tap), reported(courses, steps, pipes.log.info):
            status = _run(project, stage, model)
        if status:
            pipes.report_custom_message({"reason": reason(tap.last)})
        else:
            try:
                write_samples(project, stage, model)
            except Exception as error:  # the artifact is whole without them
                pipes.log.warning(f"no samples: {error}")
    return status


def reason(lines: Sequence[str]) -> str:
    """Why a stage failed, by its last lines: the message of an error of refrag's own, else the last line."""
    said = [number for number, line in enumerate(lines) if line.startswith(REFUSAL)]
    return "\n".join(list(lines)[said[-1] if said else -1 :]).removeprefix(REFUSAL)


def _run(project: Project, stage: str, model: str) -> int:
    from refrag_platform.cli import app

    try:
        elsewhere = elsewhere_settings(project)
        if elsewhere is not None and stage in elsewhere.stages:
            wheels = [] if elsewhere.wheels is None else ["--wheels", str(project.root / elsewhere.wheels)]
            app(["bundle", "run", stage, "--model", model, "--command", elsewhere.command, *wheels])
        else:
            app(["run", stage, "--model", model])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        # Here, while the run's log still takes lines.
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    die_with(int(os.environ["REFRAG_STEP_PID"]))
    sys.exit(main(*sys.argv[1:]))
