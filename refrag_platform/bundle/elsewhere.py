"""Run a stage on another machine by a command of the user's: export, the command, import, until the artifact is here.

The command takes the bundle there, runs `python unbundle.py FOLDER --run SECONDS`, and brings the results back. Each
time that it stops, saved, what it saved lands here and it is started again: a machine may be lost, or the run be
cancelled, and no more is lost than such a slice of time.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from refrag_platform.artifacts import publication
from refrag_platform.bundle import unbundle
from refrag_platform.bundle.landing import import_results
from refrag_platform.bundle.pieces import write_bundle
from refrag_platform.bundle.work import work_to_do
from refrag_platform.errors import Paused, RefragError
from refrag_platform.history.freshness import is_current
from refrag_platform.progress import say
from refrag_platform.project import Project

PIECE_MIB = 256
# The shell outlives the signal that stops what it runs, to bring back what that saved.
OUTLIVES = "trap : TERM INT; "


def run_elsewhere(project: Project, stage: str, model: str, command: str, wheels: Path | None = None) -> None:
    """Make the artifact `stage`, whose inputs must be current, by `command`; it lands checked, and is not recorded.

    Args:
        command: for a shell; {bundle} is the folder to take there, {results} the one to bring back into, which
            doesn't exist yet; also {stage}, {model} and {python}, this Python.
        wheels: a folder of wheels to take along.

    Raises:
        Paused: a signal came, which the command gets as well; what it saved and brought back is here.
        RefragError: the command failed or brought nothing back, or an input is not current. Or as the import.
    """
    scratch = project.root / "work" / ".elsewhere" / f"{model}-{stage}"
    with publication.only_runner(scratch):
        while not is_current(project, stage, model):
            _one_slice(project, stage, model, command, wheels, scratch)


def _one_slice(project: Project, stage: str, model: str, command: str, wheels: Path | None, scratch: Path) -> None:
    """Export, run the command once, and take in what it brought back."""
    bundle, results = scratch / "bundle", scratch / "results"
    for folder in (bundle, results):
        shutil.rmtree(folder, ignore_errors=True)
    script = Path(unbundle.__file__).read_bytes()
    with _noted_signals() as signals, work_to_do(project, [model], stage, wheels) as work:
        if (stages := work.facts["models"][model]) != [stage]:
            raise RefragError(f"before {stage} of {model} these are to be made: {', '.join(stages[:-1])}")
        write_bundle(work.members, work.facts, bundle, PIECE_MIB, beside={"unbundle.py": script})
        told: dict[str, str | Path] = {
            "bundle": bundle,
            "results": results,
            "stage": stage,
            "model": model,
            "python": sys.executable,
        }
        if signals:
            raise Paused(f"{stage} of {model}: stopped by signal {signals[0]}; run it again to continue")
        status = subprocess.run(
            ["sh", "-c", OUTLIVES + _filled(command, told)], cwd=project.root, check=False
        ).returncode
    landed = import_results(project, [results])[0] if (results / unbundle.INDEX).is_file() else None
    if signals:
        raise Paused(f"{stage} of {model}: stopped by signal {signals[0]}; run it again to continue")
    if landed is None or stage not in (*landed.artifacts, *landed.unfinished):
        raise RefragError(
            f"{stage} of {model}: the command for another machine ended with status {status} and brought nothing new "
            f"to {results}: {command}"
        )
    for folder in (bundle, results):
        shutil.rmtree(folder)
    say(f"{stage} of {model}: {'brought here' if landed.artifacts else 'stopped there, saved here; it goes on'}")


def _filled(command: str, told: dict[str, str | Path]) -> str:
    """The command with the values of the names that it has in braces; other braces are the shell's."""
    for name, value in told.items():
        command = command.replace(f"{{{name}}}", shlex.quote(str(value)))
    return command


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT are noted. The command gets them too, being of this process group, and ends when it can."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
