"""What full-text search is asked for: a bounded number of words, each once.

A word costs memory and a pass over its list of passages at each mention, so that a long text, or one word said a
thousand times, is slow, and a million words take the machine down.
"""

from __future__ import annotations

import re
import unicodedata

from refrag_platform.errors import QueryTooLong
from refrag_platform.limits import MOST_QUERY_WORDS

# What a tokenizer may cut apart, at the finest.
FINEST = re.compile(r"[^\W_]+")


def search_words(query: str) -> str:
    """The words of a query, each once, in their order; case and punctuation don't tell words apart.

    Raises:
        QueryTooLong: there are more than MOST_QUERY_WORDS of them.
    """
    # Accents and vowel signs that stand as characters of their own belong to their word.
    spaced = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in query)
    once: dict[str, str] = {}
    for word in spaced.split():
        once.setdefault(word.casefold(), word)
    words = " ".join(once.values())
    count = sum(1 for _ in FINEST.finditer(words))
    if count > MOST_QUERY_WORDS:
        raise QueryTooLong(
            f"the query has {count:,} different words, full-text search takes {MOST_QUERY_WORDS:,}; shorten it"
        )
    return words
