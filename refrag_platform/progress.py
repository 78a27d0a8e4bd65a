"""Progress of long work: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar with a rate and time left; in a log, one line every ten seconds and one at the end.

    Use as a context manager; `update` moves it on and sets the text behind it.
    """

    def __init__(self, description: str, total: int, unit: str = "it", start: int = 0, shown: bool = True) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = self.start = start
        self.note = ""
        self.shown = shown
        self._terminal = sys.stderr.isatty()
        self._begun = self._printed = time.monotonic()

    def __enter__(self) -> Progress:
        if self._terminal:
            self._print()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._print(last=True)

    def update(self, advance: int = 1, note: str | None = None) -> None:
        self.done += advance
        self.note = self.note if note is None else note
        if time.monotonic() - self._printed > (0.2 if self._terminal else SECONDS_BETWEEN_LINES):
            self._print()

    def _print(self, last: bool = False) -> None:
        if not self.shown:
            return
        self._printed = time.monotonic()
        seconds = self._printed - self._begun
        rate = (self.done - self.start) / seconds if seconds > 0 else 0.0
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate and not last and self.total else ""
        filled = int(24 * self.done / self.total) if self.total else 0
        bar = f"[{'#' * filled}{'.' * (24 - filled)}] " if self._terminal else ""
        text = (
            f"{self.description}: {bar}{self.done:,}/{self.total:,} {self.unit} "
            f"({rate:,.1f}/s, {seconds:.0f} s{left}) {self.note}"
        )
        if self._terminal:
            sys.stderr.write("\r\x1b[2K" + text + ("\n" if last else ""))
        else:
            sys.stderr.write(text.rstrip() + "\n")
        sys.stderr.flush()


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Say what is being waited for, while nothing can be counted: a moving line on a terminal, else one line."""
    if not sys.stderr.isatty():
        say(f"{text} ...")
        yield
        return
    from rich.console import Console
    from rich.markup import escape

    # Its thread shows that something happens; the line goes when it is over.
    with Console(stderr=True, highlight=False).status(f"{escape(text)} ..."):
        yield


def say(text: str) -> None:
    """A line for whoever watches the run."""
    print(text, file=sys.stderr, flush=True)
