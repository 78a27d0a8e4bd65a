"""Documents to titled passages of a bounded number of tokens, cut where sentences end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from refrag_platform.corpus.documents import Document
from refrag_platform.corpus.tokens import Tokens

# Where a passage may end, best first: after a sentence or line, after a clause; failing these, after a word.
SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*\s+(?=["'“‘(\[]*[A-Z0-9])|\n+""")
_CLAUSE_END = re.compile(r"[;:,]\s+|\s+[-–—]+\s+")
# A boundary is taken only if the passage is then at least this full; else a worse kind is.
_FULL_ENOUGH = 0.4
# Tokens are counted inside the document; a passage of its own may need a few more for its first word.
_SPARE = 4


@dataclass(frozen=True)
class CorpusPassage:
    """What is retrieved: some sentences under a title. `section` is the index of the section it is cut from."""

    id: str
    document_id: str
    title: str
    text: str
    section: int


def cut_passages(document: Document, tokens: Tokens, passage_tokens: int) -> Iterator[CorpusPassage]:
    """Passages of at most `passage_tokens` tokens that together hold every word of the document's sections."""
    cutter = _Cutter(document.text, tokens.ends, passage_tokens - _SPARE)
    number = 0
    for index, section in enumerate(document.sections):
        for start, end in cutter.spans(section.start, section.end):
            if text := document.text[start:end].strip():
                yield CorpusPassage(f"{document.id}:{number}", document.id, section.title, text, index)
                number += 1


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return [part for start, end in pairwise([0, *ends, len(text)]) if (part := text[start:end].strip())]


class _Cutter:
    """Cuts stretches of one text into spans of at most `limit` tokens, `ends` being where its tokens end."""

    def __init__(self, text: str, ends: np.ndarray, limit: int) -> None:
        self._text, self._ends, self._limit = text, ends, limit
        self._boundaries = [
            np.fromiter((match.end() for match in pattern.finditer(text)), dtype=np.int64)
            for pattern in (SENTENCE_END, _CLAUSE_END)
        ]

    def spans(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Cut [start, end) greedily: each span as long as the limit lets it be, ended at the best boundary."""
        while start < end:
            after = int(np.searchsorted(self._ends, start, side="right")) + self._limit
            furthest = int(self._ends[after - 1]) if after <= len(self._ends) else end
            cut = end if furthest >= end else self._best_cut(start, furthest)
            yield start, cut
            start = cut

    def _best_cut(self, start: int, furthest: int) -> int:
        """The last boundary up to `furthest` of the best kind that leaves the passage full enough."""
        enough = start + _FULL_ENOUGH * (furthest - start)
        for positions in self._boundaries:
            index = int(np.searchsorted(positions, furthest, side="right")) - 1
            if index >= 0 and positions[index] >= enough:
                return int(positions[index])
        space = max(self._text.rfind(mark, start, furthest) for mark in " \n")
        # A word longer than a passage is cut inside, past at least one character.
        return space + 1 if space >= start else max(furthest, start + 1)
