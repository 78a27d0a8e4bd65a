"""Input that can't be used: told with file and row, counted by kind; the run stops or goes on as the recipe says."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Literal

from refrag_platform.errors import RefragError
from refrag_platform.names import printable

BadInputKind = Literal[
    "broken_utf8",
    "empty_file",
    "empty_text",
    "bad_json",
    "missing_column",
    "column_twice",
    "wrong_type",
    "not_text",
    "damaged_file",
    "unreadable_file",
    "unknown_format",
]
# More are only counted and logged, so that a broken corpus does not flood the terminal.
PRINTED = 20


class BadInput:
    """Collects faults; each goes to `log` (JSON lines: kind, place, message) and the first few to the screen."""

    def __init__(self, policy: Literal["skip", "stop"], log: Path) -> None:
        self.counts: Counter[BadInputKind] = Counter()
        self._policy = policy
        self._log = log

    def report(self, kind: BadInputKind, file: str, message: str, row: int | None = None) -> None:
        """Record one fault; `row` counts from 1. The message may quote the file: what a terminal would obey is escaped.

        Raises:
            RefragError: the recipe's corpus.on_bad_input is `stop`.
        """
        message = printable(message)
        place = file if row is None else f"{file}, row {row}"
        if self._policy == "stop":
            raise RefragError(f"{place}: {message}. Mend it, or set corpus.on_bad_input: skip")
        self.counts[kind] += 1
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"kind": kind, "file": file, "row": row, "message": message}) + "\n")
        total = self.counts.total()
        if total <= PRINTED:
            print(f"skipped {place}: {message}", file=sys.stderr)
        if total == PRINTED:
            print(f"further bad input is listed in {self._log.name} only", file=sys.stderr)
