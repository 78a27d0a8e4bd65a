"""The course of a training in the run's log: a line whenever the trainer has written one to metrics.jsonl.

It reads the file instead of the trainer's output: several ranks write one file, and its every line is a figure.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS_BETWEEN_LOOKS = 2.0


@contextmanager
def reported(paths: Sequence[Path], steps: int | None, report: Callable[[str], None]) -> Iterator[None]:
    """Report every line that appears meanwhile in the first of `paths` that is there.

    Args:
        paths: the trainer's own file, then the one of the published artifact: a short training is over at once.
        steps: of the whole training; None: nothing trains.
    """
    if steps is None:
        yield
        return
    course = Course(paths, steps)
    course.new_lines()  # those of an earlier run that was stopped
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            for line in course.new_lines():
                report(line)

    thread = threading.Thread(target=watch, name="training-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for line in course.new_lines():
            report(line)


class Course:
    """The lines of a metrics file that is being written, each told once, with the time that is left."""

    def __init__(self, paths: Sequence[Path], steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.paths, self.steps, self.clock = paths, steps, clock
        self._told = 0
        self._first: tuple[int, float] | None = None

    def new_lines(self) -> list[str]:
        """What was written since the last look, in words; a line cut off by a kill is left out."""
        rows = _rows(next((path for path in self.paths if path.is_file()), None))
        # A training that starts anew, or goes on from an earlier checkpoint, has fewer.
        self._told = min(self._told, rows[-1]["step"]) if rows else self._told
        new = [row for row in rows if row["step"] > self._told]
        said = [_words(row, self.steps) for row in new]
        if new:
            self._told = new[-1]["step"]
            said[-1] += self._left(self._told)
        return said

    def _left(self, step: int) -> str:
        """The time that is left, by the speed since the first look that found a line."""
        now = self.clock()
        if self._first is None:
            self._first = (step, now)
        begun, at = self._first
        if step <= begun or now <= at:
            return ""
        return f", {_duration((self.steps - step) * (now - at) / (step - begun))} left"


def _words(row: Mapping[str, Any], steps: int) -> str:
    rate = f", {row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else ""
    return f"step {row['step']:,} of {steps:,}: loss {row['loss']:.4f}{rate}"


def _rows(path: Path | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        text = "" if path is None else path.read_text(encoding="utf-8")
    except FileNotFoundError:  # published or discarded this very moment
        return rows
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # still being written
            break
    return rows


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
