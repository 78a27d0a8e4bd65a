"""Held-out documents are decided by their id alone; duplicates are dropped in little memory."""

import hashlib
from collections import Counter

from refrag_platform.corpus.dedup import FingerprintSet
from refrag_platform.corpus.splits import split_of
from refrag_platform.recipes import CorpusRecipe

RECIPE = CorpusRecipe.model_validate({"sources": [{"kind": "factbook"}]})
IDS = [f"document-{number}" for number in range(4000)]


def test_shares_are_those_of_the_recipe() -> None:
    counts = Counter(split_of(name, RECIPE) for name in IDS)
    assert 150 < counts["validation"] < 250
    assert 340 < counts["test"] < 460


def test_the_split_of_an_id_never_changes() -> None:
    # Written down once: another hash would move training documents into the tests of old models.
    assert [split_of(f"document-{number}", RECIPE) for number in (0, 1, 2)] == ["validation", "test", "train"]


def test_a_larger_validation_share_leaves_the_tests_alone() -> None:
    larger = RECIPE.model_copy(update={"validation_share": 0.3})
    before = {name for name in IDS if split_of(name, RECIPE) == "test"}
    after = {name for name in IDS if split_of(name, larger) == "test"}
    assert before == after


def test_seen_finds_every_repetition_and_nothing_else() -> None:
    hashes = [hashlib.sha256(name.encode()).hexdigest() for name in IDS]
    seen = FingerprintSet()
    assert all(seen.add(value) for value in hashes)
    assert not any(seen.add(value) for value in hashes)
    assert len(seen) == len(IDS)
