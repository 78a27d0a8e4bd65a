"""Which documents are held out: decided by a hash of the document's id and by nothing else.

A document keeps its split when others are added, removed or reordered, and a larger validation share
takes documents from training only, never from the tests.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from refrag_platform.recipes import CorpusRecipe

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def split_of(group: str, recipe: CorpusRecipe) -> Split:
    """The split of all documents of `group` (a document's id, or the id of the file it is a part of)."""
    position = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    if position < recipe.test_share:
        return "test"
    return "validation" if position < recipe.test_share + recipe.validation_share else "train"
