"""Other names and numbers in a context, its questions and its answers (ours): what is new each time has to be read.

A small set of passages is learnt by heart, and with it its names; then questions about them teach nothing of reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from refrag_platform.corpus.passages import sentences
from refrag_platform.training.reading.blanks import OPENER

CAPITALIZED = re.compile(r"(?<!\w)[A-Z][a-z’'-]*[a-z]{2}(?!\w)")
DIGITS = re.compile(r"\d+")
# Of the names and numbers of a context, the share that is replaced.
SHARE = 0.7


def names_in(text: str) -> list[str]:
    """Single words with a capital that doesn't come from standing first in a sentence."""
    capitalized = []
    for sentence in sentences(text):
        capitalized += [match.group() for match in CAPITALIZED.finditer(sentence) if match.start() > 0]
    return [name for name in capitalized if not OPENER.fullmatch(name)]


class Renaming:
    """Draws replacements from a fixed supply of names."""

    def __init__(self, names: Iterable[str]) -> None:
        """Args: names: the supply; one name is enough to go on with, and is no replacement for itself."""
        self.names = sorted(set(names))

    def draw(self, texts: Sequence[str], chance: np.random.Generator) -> Callable[[str], str]:
        """How the names and numbers of these texts are replaced, everywhere alike.

        A number keeps its digits' count, and its first digit isn't 0 if it wasn't.
        """
        told = sorted({name for text in texts for name in names_in(text)})
        numbers = sorted({number for text in texts for number in DIGITS.findall(text)})
        others: dict[str, str] = {}
        for name in told if self.names else ():
            if chance.random() < SHARE:
                others[name] = self.names[int(chance.integers(len(self.names)))]
        for number in numbers:
            if chance.random() < SHARE:
                digits = chance.integers(0, 10, len(number))
                if number[0] != "0":
                    digits[0] = max(1, digits[0])
                others[number] = "".join(map(str, digits))
        pattern = re.compile(rf"{CAPITALIZED.pattern}|{DIGITS.pattern}")
        return lambda text: pattern.sub(lambda match: others.get(match.group(), match.group()), text)
