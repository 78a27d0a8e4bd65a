"""How a search ranks passages: by cosine similarity to what is asked, its words adding a little.

A question may come with what was said before it ("What is the capital of Oman?", then "And of Nepal?"). It is asked
twice then: by itself, in case the subject has changed, and together with that. A passage counts as the better of the
two finds it. docs/operations.md has what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refrag_platform.store.relevance import DECIMALS, relevance

# What the best match by words adds to a similarity; others add less, as their BM25 score is lower. A convex
# combination of scores (Bruch, Gai and Ingber, 2023): ranks alone, fused, lose how much nearer the nearest passage is.
WORDS_BONUS = 0.1
# The mean of two texts' vectors is nearer to nothing in particular, which is allowed for.
MEAN_ALLOWANCE = 0.05
# Of what was said before, and the longest question that may need it to be understood.
MOST_CHARACTERS_BEFORE = 512

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class SearchQuery:
    """One way to ask.

    words: each passage's share of the best BM25 score, 0 to 1, by id. allowance: added to the similarity.
    """

    vector: Vector
    words: Mapping[str, float]
    allowance: float = 0.0

    def similarity(self, passage: Vector) -> float:
        """Cosine similarity, -1 to 1; 0 where the question has no known word."""
        return min(relevance(self.vector, passage) + self.allowance, 1.0)


@dataclass(frozen=True)
class Ranked:
    """A passage found: its id, its similarity, and whether what was said before the question makes it nearer."""

    id: str
    similarity: float | None
    follows: bool


def texts_to_ask(question: str, before: str = "") -> list[str]:
    """The question, and with what was said before it, if that is any help.

    Of `before` the end is read; a question longer than that speaks for itself.
    """
    before = _end(before.strip())
    if not before or not question.strip() or len(question) > MOST_CHARACTERS_BEFORE:
        return [question]
    return [question, f"{before}\n{question}"]


def _end(text: str) -> str:
    """The last words of a text."""
    if len(text) <= MOST_CHARACTERS_BEFORE:
        return text
    return text[-MOST_CHARACTERS_BEFORE:].split(maxsplit=1)[-1]


def ways_to_ask(vectors: Sequence[Vector], words: Sequence[Mapping[str, float]]) -> list[SearchQuery]:
    """The ways to ask `texts_to_ask`, by their vectors and the passages found by their words."""
    alone = SearchQuery(vectors[0], words[0])
    if len(vectors) == 1:
        return [alone]
    mean = vectors[0] + vectors[1]
    length = float(np.linalg.norm(mean))
    both = {name: (words[0].get(name, 0.0) + words[1].get(name, 0.0)) / 2 for name in {*words[0], *words[1]}}
    return [alone, SearchQuery(mean / length, both, MEAN_ALLOWANCE) if length else SearchQuery(mean, both)]


def rank(ways: Sequence[SearchQuery], passages: Mapping[str, Vector]) -> list[Ranked]:
    """Passages by id, best first, ties by id."""
    ranked = []
    for name, vector in passages.items():
        similarities = [way.similarity(vector) for way in ways]
        value = max(
            similarity + WORDS_BONUS * way.words.get(name, 0.0)
            for way, similarity in zip(ways, similarities, strict=True)
        )
        # Without the allowance: taken off again, it would leave the difference of a rounding.
        follows = relevance(ways[-1].vector, vector) > relevance(ways[0].vector, vector)
        ranked.append((-value, Ranked(name, round(max(similarities), DECIMALS), follows)))
    ranked.sort(key=lambda item: (item[0], item[1].id))
    return [one for _, one in ranked]
