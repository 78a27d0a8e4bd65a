"""Contexts to read: pieces of a region of a document as passages, in random order.

Neighbours speak of the same things, as passages do that a retriever finds. Every position of a corpus is equally
likely, and pieces are cut anew each time, so that in a large corpus no passage comes twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from refrag_platform.corpus.passages import sentences
from refrag_platform.corpus.shards import TokenShards
from refrag_platform.errors import RefragError
from refrag_platform.model.prompts import contents_ids, passage_text
from refrag_platform.training.reading.blanks import QuestionAnswer
from refrag_platform.training.reading.renaming import names_in

# Characters of a passage; a sentence may run over.
SHORTEST, LONGEST = 120, 950
# Tokens of a region, in those of a context.
LEAST_REGION, MOST_REGION = 1.1, 5.0
# Regions that are looked through for names.
NAMED_REGIONS = 500
# Regions that are drawn for one context: of short documents it takes several.
REGION_DRAWS = 24


class TokenizedPassage(NamedTuple):
    """A passage of a context: its text and its tokens."""

    text: str
    token_ids: list[int]


class ReadingContext(NamedTuple):
    """Passages, and what is known to be asked about them."""

    passages: list[TokenizedPassage]
    questions: list[QuestionAnswer]


class DocumentContexts:
    """Draws contexts of whole chunks from the training split of a corpus."""

    def __init__(self, corpus: Path, tokenizer: PreTrainedTokenizerFast, chunks: int, chunk_size: int) -> None:
        """
        Args: chunks: of a context, at most. chunk_size: k.

        Raises:
            RefragError: the corpus has no text to read.
        """
        self._shards, self._tokenizer = TokenShards(corpus, "train"), tokenizer
        self._chunks, self._chunk_size = chunks, chunk_size
        if not self._shards.total or not self.draw(np.random.default_rng(0)).passages:
            raise RefragError(
                f"the train split of {corpus} has no sentences to ask about, as cpt.reading does, or contexts of "
                f"{chunks * chunk_size} tokens are too short for a passage; add documents, raise cpt.context_tokens, "
                "or leave cpt.reading out"
            )

    def draw(self, chance: np.random.Generator, rate: int = 1) -> ReadingContext:
        """Passages that fill a context as far as they do; none where nothing that is drawn fits.

        Args: rate: how many chunks are read as one.
        """
        drawn: list[TokenizedPassage] = []
        room, k = self._chunks // rate, self._chunk_size * rate
        for _ in range(REGION_DRAWS):
            pieces = list(self._pieces(chance))
            for piece, token_ids in zip(pieces, contents_ids(self._tokenizer, pieces), strict=True):
                if (size := -(-len(token_ids) // k)) <= room:
                    drawn.append(TokenizedPassage(piece, token_ids))
                    room -= size
            if room * k * 2 < SHORTEST:
                break
        return ReadingContext(drawn, [])

    def names(self, count: int, seed: int) -> set[str]:
        """Names that the corpus speaks of, so many if a look at some of its regions finds them."""
        chance, names = np.random.default_rng([seed, 7]), set[str]()
        for _ in range(NAMED_REGIONS):
            names.update(*(names_in(piece) for piece in self._pieces(chance)))
            if len(names) >= count:
                break
        return names

    def _pieces(self, chance: np.random.Generator) -> Iterator[str]:
        """The texts of the passages of one region, in random order."""
        context = self._chunks * self._chunk_size
        starts, lengths = self._shards.documents
        at = int(chance.integers(self._shards.total))
        document = int(np.searchsorted(starts, at, side="right")) - 1
        first, length = int(starts[document]), int(lengths[document])
        size = min(length, int(context * chance.uniform(LEAST_REGION, MOST_REGION)))
        begin = max(first, min(at - size // 2, first + length - size))
        said = sentences(str(self._tokenizer.decode(self._shards.tokens(begin, size).tolist())))
        # A region begins and ends within sentences, a document doesn't.
        said = said[begin > first : len(said) - (begin + size < first + length)]
        pieces: list[str] = []
        while said:
            wanted, taken = int(chance.integers(SHORTEST, LONGEST)), 0
            while taken < len(said) and sum(map(len, said[:taken])) < wanted:
                taken += 1
            pieces.append(passage_text("", " ".join(said[:taken])))
            said = said[taken:]
        for number in chance.permutation(len(pieces)):
            yield pieces[number]
