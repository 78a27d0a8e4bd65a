"""The words that full-text search is asked for."""

import pytest

from refrag_platform.errors import QueryTooLong
from refrag_platform.limits import MOST_QUERY_WORDS
from refrag_platform.store.query import search_words


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("What is the capital of Peru?", "What is the capital of Peru"),
        ("x " * 1000 + "X", "x"),
        ("a_b,a.b", "a b"),
        ("cafe\u0301 cafe\u0301", "cafe\u0301"),
        ("नमस्ते नमस्ते दुनिया", "नमस्ते दुनिया"),
        (" ?! ", ""),
    ],
)
def test_each_word_is_looked_for_once(query: str, words: str) -> None:
    assert search_words(query) == words


@pytest.mark.parametrize("between", [" ", "_", ",", "\u0301", "\0", "\u2028"])
def test_too_many_words_are_refused_whatever_stands_between_them(between: str) -> None:
    words = [f"w{number}" for number in range(MOST_QUERY_WORDS)]
    search_words(between.join(words))
    with pytest.raises(QueryTooLong, match=r"2,049 different words, full-text search takes 2,048"):
        search_words(between.join([*words, "more"]))
