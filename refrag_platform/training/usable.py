"""What of legal rows can't be trained on: left out, counted and said before training begins."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from refrag_platform.corpus.question_files import Question
from refrag_platform.training.core.ranks import is_main


class LeftOut:
    """Counts what a stage leaves out, by reason."""

    def __init__(self, section: str) -> None:
        """Args: section: the recipe's section of the stage."""
        self.section = section
        self.reasons: Counter[str] = Counter()

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.items())

    def say(self, things: str, total: int) -> None:
        """One line on stderr, if anything was left out; of several processes the main one says it."""
        if self.reasons and is_main():
            left = self.reasons.total()
            print(f"{self.section}: {left:,} of {total:,} {things} left out: {self}", file=sys.stderr, flush=True)


def usable(questions: Sequence[Question], left_out: LeftOut) -> list[Question]:
    """The questions from which an answer can be learned.

    One without any answer is answered by saying so. One with an answer but no passage would teach to invent.
    """
    kept = [question for question in questions if question.passages or not question.answers]
    if kept_out := len(questions) - len(kept):
        left_out.reasons["without passages"] += kept_out
    return kept
