"""What of legal rows can't be trained on: left out, counted and said before training begins."""

from __future__ import annotations

import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from refrag_platform.corpus.question_files import Question
from refrag_platform.training.core.ranks import is_main

# Separators, control and format characters; and letters and marks that are drawn as nothing.
INVISIBLE_KINDS = {"Cc", "Cf", "Cs", "Zs", "Zl", "Zp"}
INVISIBLE = set("\u034f\u115f\u1160\u2800\u3164\uffa0") | {chr(code) for code in range(0xFE00, 0xFE10)}


def visible(text: str) -> bool:
    """Whether a reader would see anything of a text."""
    return any(unicodedata.category(one) not in INVISIBLE_KINDS and one not in INVISIBLE for one in text)


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
    """The questions from which an answer can be learned, with their visible answers alone.

    One without any answer is answered by saying so. One with an answer but no passage would teach to invent.
    """
    kept = []
    for question in questions:
        answers = tuple(answer for answer in question.answers if visible(answer))
        if question.kind == "answer" and not visible(question.question):
            left_out.reasons["whose question is empty or invisible"] += 1
        elif question.answers and not answers:
            left_out.reasons["whose answers are empty or invisible"] += 1
        elif answers and not question.passages:
            left_out.reasons["without passages"] += 1
        else:
            kept.append(question if answers == question.answers else replace(question, answers=answers))
    return kept
