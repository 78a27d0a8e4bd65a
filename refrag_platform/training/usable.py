"""What of legal rows is not trained on: left out and counted, or refused, before training begins."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from refrag_platform.corpus.passage_rows import passage_rows
from refrag_platform.corpus.question import Passage, Question
from refrag_platform.corpus.question_files import named_files, question_files_of, read_questions
from refrag_platform.corpus.splits import Split
from refrag_platform.errors import RefragError
from refrag_platform.training.core.ranks import is_main


class LeftOut:
    """Counts what a stage leaves out, by reason."""

    def __init__(self, section: str) -> None:
        """Args: section: the recipe's section of the stage."""
        self.section = section
        self.reasons: Counter[str] = Counter()

    def add(self, reason: str, count: int) -> None:
        """Count so many more; a reason that leaves nothing out isn't told."""
        if count:
            self.reasons[reason] += count

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.items())

    def say(self, things: str, kept: int) -> None:
        """One line on stderr, if anything was left out; of several processes the main one says it."""
        if self.reasons and is_main():
            left = self.reasons.total()
            said = f"{self.section}: {left:,} of {left + kept:,} {things} left out: {self}"
            print(said, file=sys.stderr, flush=True)


def training_questions(
    corpus: Path, files: Sequence[str], root: Path, left_out: LeftOut, split: Split = "train"
) -> list[Question]:
    """The corpus' own questions of a split, if it has any, and those of the files that a recipe names.

    Of training questions those that show a passage of the corpus' validation or test documents are left out.

    Args: corpus: its content folder.

    Raises:
        RefragError: a file is missing or wrong, or says that a question is of another split. Or as `passage_rows`.
    """
    paths = [*question_files_of(corpus, split), *named_files(root, files)]
    questions = [one for path in paths for one in read_questions(path)]
    if split != "train":
        return questions
    if others := [one for one in questions if one.split not in ("", "train")]:
        raise RefragError(
            f"{others[0].where}: the question is of the split {others[0].split!r}, as are {len(others):,} in all; "
            "train on questions of the split 'train'"
        )
    held_out = held_out_passages({passage for question in questions for passage in question.passages}, corpus)
    kept = [question for question in questions if held_out.isdisjoint(question.passages)]
    left_out.add("that show a passage which the corpus holds out", len(questions) - len(kept))
    return kept


def usable(questions: Sequence[Question], passages: int, left_out: LeftOut) -> list[Question]:
    """The questions from which an answer can be learned.

    One without any answer is answered by saying so. One with an answer but no passage would teach to invent, and so
    would a part of the passages that a closed one is about.

    Args: passages: that are shown at most.
    """
    kept = [question for question in questions if question.passages or not question.answers]
    left_out.add("without passages", len(questions) - len(kept))
    whole = [question for question in kept if not question.closed or len(question.passages) <= passages]
    left_out.add(f"about more than {passages} passages at once", len(kept) - len(whole))
    return whole


def held_out_passages(passages: Collection[Passage], corpus: Path) -> set[Passage]:
    """Those of these passages that are of the corpus' validation or test documents alone.

    Args: passages: quickly looked through. corpus: its content folder.

    Raises:
        RefragError: as `passage_rows`.
    """
    splits: dict[Passage, set[str]] = {}
    for title, text, split in passage_rows(corpus) if passages else ():
        if (title, text) in passages:
            splits.setdefault((title, text), set()).add(split)
    # A page that stands in the training split as well is no secret.
    return {passage for passage, names in splits.items() if "train" not in names}
