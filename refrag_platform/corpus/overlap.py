"""Which judged questions training text has shown already: `refrag questions overlap`.

Figures of such questions flatter: what is in the weights need not be read. Memory is that of the judged passages and of
a few training passages, however many there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refrag_platform.corpus.question import Question, mention
from refrag_platform.corpus.question_files import read_passage_rows
from refrag_platform.corpus.question_rows import passage_texts, question_of
from refrag_platform.progress import Progress

# Words in a row that two texts must share; a shorter text must be the same.
RUN = 12
# Characters of training text that are looked through at once.
READ_AT_ONCE = 1 << 20
_WORD = re.compile(r"\w+")
# What fills a text shorter than a run. No word is empty.
_FILL = ""
_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Overlap:
    """What training has shown of a question: itself, and the largest share of one passage's runs of RUN words.

    Of its passages count those that hold the answer: the gold ones or, where none is known, those that say an answer.
    """

    same_question: bool
    share: float

    @property
    def seen(self) -> bool:
        """Whether the question, or a run of a passage, stands in the training text."""
        return self.same_question or self.share > 0


def overlaps(judged: Sequence[Question], training: Sequence[Path]) -> list[Overlap]:
    """The overlap of each question with training files, whose text is read once, from start to end.

    Args:
        training: files of questions with passages, of passages (title, text), or a corpus' passages.parquet. Rows that
            name another split than train are passed over.

    Raises:
        RefragError: a file can't be read, or a row is wrong; it names file, row and fault.
    """
    known = _Judged(judged)
    sizes = [path.stat().st_size if path.is_file() else 0 for path in training]
    with Progress("training text", sum(sizes), "bytes") as progress:
        for path, size in zip(training, sizes, strict=True):
            left = size
            texts: list[str] = []
            waiting = 0
            for question, passages in _training_rows(path):
                known.mark_question(question)
                texts += passages
                waiting += sum(map(len, passages))
                if waiting >= READ_AT_ONCE:
                    known.mark_passages(texts)
                    # Escapes and other fields take bytes as well, and Parquet is compressed.
                    progress.update(min(waiting, left), path.name)
                    left -= min(waiting, left)
                    texts, waiting = [], 0
            known.mark_passages(texts)
            progress.update(left, path.name)
    return known.overlaps()


def overlap_row(questions: Sequence[Overlap]) -> dict[str, int]:
    """How many questions, and how many of them in which way stand in the training text."""
    return {
        "questions": len(questions),
        "same_question": sum(one.same_question for one in questions),
        "run_of_words": sum(one.share > 0 for one in questions),
        "half_a_passage": sum(one.share >= 0.5 for one in questions),
        "seen": sum(one.seen for one in questions),
    }


class _Judged:
    """The runs of the judged passages, each as a number, and which of them have been met."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._questions = [" ".join(_words(one.question)) for one in questions]
        self._met_questions: set[str] = set()
        self._asked = {one for one in self._questions if one}
        texts, self._owners = list[str](), list[int]()
        for number, one in enumerate(questions):
            says = mention(one.answers)
            saying = (place for place, (_, text) in enumerate(one.passages) if says.search(text))
            answering = [one.passages[place][1] for place in one.needed or saying]
            texts += answering
            self._owners += [number] * len(answering)
        # Words that no judged passage has are 0: a run with one of them can't be met.
        self._vocabulary = {word: number for number, word in enumerate(_vocabulary(texts), 1)}
        self._codes = np.random.default_rng(0).integers(1 << 63, size=len(self._vocabulary) + 1, dtype=np.uint64)
        runs, self._texts = self._runs(texts)
        self._numbers, self._places = np.unique(runs, return_inverse=True)
        self._met = np.zeros(len(self._numbers), bool)

    def mark_question(self, question: str) -> None:
        if question and (words := " ".join(_words(question))) in self._asked:
            self._met_questions.add(words)

    def mark_passages(self, texts: Sequence[str]) -> None:
        runs, _ = self._runs(texts)
        if len(runs) and len(self._numbers):
            places = np.searchsorted(self._numbers, runs).clip(max=len(self._numbers) - 1)
            self._met[places[self._numbers[places] == runs]] = True

    def overlaps(self) -> list[Overlap]:
        met = self._met[self._places]
        count = len(self._owners)
        shares = np.bincount(self._texts, met, count) / np.bincount(self._texts, minlength=count).clip(min=1)
        largest = np.zeros(len(self._questions))
        np.maximum.at(largest, np.array(self._owners, np.int64), shares)
        return [
            Overlap(question in self._met_questions, float(share))
            for question, share in zip(self._questions, largest, strict=True)
        ]

    def _runs(self, texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The runs of known words of these texts, each as a number, and the number of the text that each is of."""
        numbers, starts = list[int](), list[int]()
        for text in texts:
            starts.append(len(numbers))
            words = _words(text)
            numbers += map(self._vocabulary.get, words, repeat(0))
            numbers += repeat(self._vocabulary.get(_FILL, 0), RUN - len(words) if words else 0)
            # Ends the text, so that no run goes on in the next one.
            numbers.append(0)
        ids = np.array(numbers, np.int64)
        known = np.concatenate([[0], np.cumsum(ids != 0)])
        begins = np.flatnonzero(known[RUN:] - known[:-RUN] == RUN)
        runs = np.zeros(len(begins), np.uint64)
        for offset in range(RUN):
            runs = runs * _BASE + self._codes[ids[begins + offset]]
        return runs, np.searchsorted(np.array(starts, np.int64), begins, side="right") - 1


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _vocabulary(texts: Iterable[str]) -> dict[str, None]:
    """Every word once, in a fixed order."""
    return {_FILL: None} | {word: None for text in texts for word in _words(text)}


def _training_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """What each row shows: its question, if it has one, and the texts of its passages."""
    for number, (where, row) in enumerate(read_passage_rows(path), 1):
        if row.get("split") not in (None, "", "train"):
            continue
        if row.keys() & {"question", "targets", "summaries"}:
            question = question_of(row, where, str(number))
            yield question.question, [text for _, text in question.passages]
        else:
            yield "", [text for _, text in passage_texts(row.get("passages", [row]), where, "passages")]
