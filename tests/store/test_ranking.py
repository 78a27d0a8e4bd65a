"""How passages are ranked: by similarity, with a bonus for words, and by the better of two ways to ask."""

import numpy as np
import pytest

from refrag_platform.store.ranking import (
    MEAN_ALLOWANCE,
    MOST_CHARACTERS_BEFORE,
    WORDS_BONUS,
    SearchQuery,
    rank,
    texts_to_ask,
    ways_to_ask,
)


def unit(*values: float) -> np.ndarray:
    return np.array(values, np.float32) / np.float32(np.linalg.norm(values))


EAST, NORTH, NORTH_EAST = unit(1, 0), unit(0, 1), unit(1, 1)
PASSAGES = {"east": EAST, "north": NORTH, "between": NORTH_EAST}


def test_the_nearest_comes_first_with_its_cosine() -> None:
    found = rank([SearchQuery(EAST, {})], PASSAGES)
    assert [(one.id, one.similarity) for one in found] == [("east", 1.0), ("between", 0.707), ("north", 0.0)]


def test_words_decide_between_near_ones_and_are_no_part_of_a_similarity() -> None:
    near = {"a": unit(1, 0.2), "b": unit(1, 0.3), "c": NORTH}
    found = rank([SearchQuery(EAST, {"b": 1.0, "c": 1.0})], near)
    assert [one.id for one in found] == ["b", "a", "c"]
    assert found[0].similarity == 0.958 < found[1].similarity
    assert found[2].similarity == 0 < WORDS_BONUS


def test_equals_are_in_the_order_of_their_ids() -> None:
    assert [one.id for one in rank([SearchQuery(EAST, {})], {"y": NORTH, "x": NORTH})] == ["x", "y"]


def test_a_passage_counts_as_the_better_way_to_ask_finds_it() -> None:
    ways = ways_to_ask([EAST, NORTH], [{}, {}])
    found = {one.id: (one.similarity, one.follows) for one in rank(ways, PASSAGES)}
    assert found == {
        "east": (1.0, False), "between": (1.0, True), "north": (pytest.approx(0.707 + MEAN_ALLOWANCE), True)
    }  # fmt: skip


def test_a_question_without_a_known_word_is_near_to_nothing() -> None:
    nothing = np.zeros(2, np.float32)
    for ways in ([nothing], [nothing, nothing]):
        found = rank(ways_to_ask(ways, [{}] * len(ways)), PASSAGES)
        assert [one.similarity for one in found] == [0, 0, 0]


@pytest.mark.parametrize(
    ("question", "before", "asked"),
    [
        ("And of Nepal?", "", ["And of Nepal?"]),
        ("And of Nepal?", " \n", ["And of Nepal?"]),
        (" ", "Capital of Oman?", [" "]),
        ("And of Nepal?", "Capital of Oman?", ["And of Nepal?", "Capital of Oman?\nAnd of Nepal?"]),
        ("x" * 600, "Capital of Oman?", ["x" * 600]),
    ],
)
def test_a_question_is_asked_with_the_end_of_what_was_said_before(question: str, before: str, asked: list[str]) -> None:
    assert texts_to_ask(question, before) == asked


def test_of_what_was_said_before_the_last_words_are_read_whole() -> None:
    _, text = texts_to_ask("And?", "first " + "abcdefg " * 200)
    assert set(text.split()) == {"abcdefg", "And?"}
    assert MOST_CHARACTERS_BEFORE - 8 <= len(text) <= MOST_CHARACTERS_BEFORE + len(" And?")


def test_text_without_spaces_is_cut_too() -> None:
    assert len(texts_to_ask("?", "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 5000)[1]) == MOST_CHARACTERS_BEFORE + 2


def test_the_same_question_again_is_no_follow_up() -> None:
    for angle in np.linspace(0.1, 1.5, 200):
        vector = unit(float(np.cos(angle)), float(np.sin(angle)))
        ways = ways_to_ask([vector, vector], [{}, {}])
        (found,) = rank(ways, {"a": unit(1.0, 0.0)})
        assert not found.follows
