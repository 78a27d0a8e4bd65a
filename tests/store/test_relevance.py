"""How near a retriever finds passages: what is told, and what it costs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from refrag_platform.corpus.question import Passage
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.recipes import read_recipe
from refrag_platform.store.relevance import DECIMALS, PassageRelevance, relevance, relevance_for
from refrag_platform.store.retriever import HashedWords
from tests.store.conftest import Made, text_of

PASSAGES = [
    ("Peru", "Its capital is Lima."),
    ("Malta", "Its capital is Valletta."),
    ("Zinc", "It melts at 420 degrees."),
]
TINY = Path(__file__).parents[2] / "models" / "tiny" / "recipe.yaml"


class Counting(HashedWords):
    def __init__(self) -> None:
        self.calls: list[int] = []

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.calls.append(len(texts))
        return super().encode(texts)


class Other(Counting):
    digest = "another"


def expected(passages: Sequence[Passage]) -> list[float]:
    return PassageRelevance(HashedWords()).of("Which country has the capital Town417?", passages)


def test_the_passage_that_is_asked_about_is_nearest() -> None:
    found = PassageRelevance(HashedWords()).of("What is the capital of Peru?", PASSAGES)
    assert found[0] > found[1] > found[2] and max(map(abs, found)) <= 1
    assert found == [round(value, DECIMALS) for value in found]


def test_a_text_is_embedded_once_and_what_is_known_ahead_together() -> None:
    retriever = Counting()
    told = PassageRelevance(retriever)
    told.learn(["Peru?", "Malta?"], [*PASSAGES, *PASSAGES])
    first = told.of("Peru?", PASSAGES)
    assert told.of("Peru?", PASSAGES) == first and retriever.calls == [5]
    told.of("Zinc?", PASSAGES)
    assert retriever.calls == [5, 1]
    vectors = told.encode(["Peru?", "Lima?"])
    assert retriever.calls == [5, 1, 1] and np.array_equal(vectors, HashedWords().encode(["Peru?", "Lima?"]))


def test_vectors_are_taken_from_a_store_of_the_same_retriever(made: Made) -> None:
    hits = [(f"Country{number}", text_of(number)) for number in (417, 99)]
    for retriever, embedded in ((Counting(), [1]), (Other(), [3])):
        told = PassageRelevance(retriever)
        told.take_stored(made.content)
        assert told.of("Which country has the capital Town417?", hits) == expected(hits)
        assert retriever.calls == embedded


@pytest.mark.parametrize("reads", [False, True])
def test_only_a_policy_that_reads_it_is_told(reads: bool) -> None:
    policy = PolicyNetwork(8, 16, 1, 2, 0.25, "question", reads)
    found = relevance_for(policy, read_recipe(TINY), TINY.parent, "cpu")
    assert isinstance(found, PassageRelevance) == reads
    assert relevance_for(None, read_recipe(TINY), TINY.parent, "cpu") is None


def test_it_is_a_dot_product() -> None:
    assert relevance(np.array([0.6, 0.8], np.float32), np.array([1, 0], np.float32)) == pytest.approx(0.6)
