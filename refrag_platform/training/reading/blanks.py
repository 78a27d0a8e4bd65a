"""Questions without labels (ours): a name, number or word is taken out of a sentence, and asked for.

Part of them is put as people ask ("founded what in 1998?"), part with words left out or in another order, so that the
sentence is found by what it says and not by its wording. The patterns are of English text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from refrag_platform.corpus.passages import sentences

BlankKind = Literal["name", "number", "word"]

NAME = re.compile(r"\b[A-Z][\w’'-]+(?:\s+(?:(?:of|the|de|la|von|and)\s+)?[A-Z][\w’'-]+){0,3}")
NUMBER = re.compile(r"\b\d(?:[\d,.]*\d)?\b")
WORD = re.compile(r"\b[a-z]{5,}\b(?![’'])")
# Capitals of a sentence's first word: no names.
OPENER = re.compile(
    r"(?:A|After|All|An|And|As|At|Before|But|By|Even|For|From|Had|He|Her|Here|His|How|I|If|In|It|Its|My|No|Not|Now|Of|Oh|On"
    r"|One|Or|Our|She|So|Some|That|The|Their|Then|There|These|They|This|Those|Though|To|We|Well|What|When|Where|Which|While"
    r"|Who|Why|With|Yes|You|Your)(?:\s+|$)"
)
ASKED_BY: dict[BlankKind, Sequence[str]] = {
    "name": ("who", "what", "which", "what name"),
    "number": ("how many", "when", "what number", "which year"),
    "word": ("what", "which word"),
}
GAP = "____"
# How much likelier a name or a number is asked for than one of two words of a sentence.
WEIGHT = 3
SHORTEST_SENTENCE = 30
# Words of the sentence in a question: before the blank and after it, at most; all together, at least.
MOST_BEFORE, MOST_AFTER, LEAST = 14, 11, 3
# Shares of the questions: with a gap instead of a question word; with words left out; of those, in another order.
GAPS, THINNED, REORDERED = 0.3, 0.4, 0.5
LOWER_CASE = 0.15


class QuestionAnswer(NamedTuple):
    """A question and what it asks for."""

    question: str
    answer: str


class _Span(NamedTuple):
    start: int
    end: int
    kind: BlankKind


def blank(text: str, chance: np.random.Generator) -> QuestionAnswer | None:
    """A question on one sentence of the text; None where the draw finds nothing to ask for."""
    long = [sentence for sentence in sentences(text) if len(sentence) >= SHORTEST_SENTENCE]
    if not long:
        return None
    sentence = long[int(chance.integers(len(long)))]
    spans = list(_spans(sentence, chance))
    if not spans:
        return None
    span = spans[int(chance.integers(len(spans)))]
    question, answer = _question(sentence, span, chance), sentence[span.start : span.end]
    if question is None or re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", question, re.IGNORECASE):
        return None  # It would be copied from the question.
    return QuestionAnswer(question, answer)


def _spans(sentence: str, chance: np.random.Generator) -> Iterator[_Span]:
    """What could be asked for, the likelier the more often."""
    for match in NAME.finditer(sentence):
        start, name = match.start(), match.group()
        if opener := OPENER.match(name):
            start += opener.end()
            if start == match.end() or not sentence[start].isupper():
                continue
        elif start == 0 and " " not in name:  # Any word has a capital there.
            continue
        yield from [_Span(start, match.end(), "name")] * WEIGHT
    for match in NUMBER.finditer(sentence):
        yield from [_Span(*match.span(), "number")] * WEIGHT
    words = [_Span(*match.span(), "word") for match in WORD.finditer(sentence)]
    for number in chance.permutation(len(words))[:2]:
        yield words[number]


def _question(sentence: str, span: _Span, chance: np.random.Generator) -> str | None:
    before = sentence[: span.start].split()[-int(chance.integers(2, MOST_BEFORE + 1)) :]
    after = sentence[span.end :].split()[: int(chance.integers(1, MOST_AFTER + 1))]
    if after and not sentence[span.end].isspace():  # A comma, or 's.
        after[0] = re.sub(r"^[’']s\b|^\W+", "", after[0])
    style = chance.random()
    if style >= 1 - THINNED:
        missing = chance.uniform(0.15, 0.5)
        before, after = ([word for word in words if chance.random() > missing] for words in (before, after))
    if len(before) + len(after) < LEAST:
        return None
    asked_by = ASKED_BY[span.kind][int(chance.integers(len(ASKED_BY[span.kind])))]
    if style < GAPS:
        words = [*before, GAP, *after]
    elif style >= 1 - THINNED * REORDERED:
        parts = (before, after) if chance.random() < 0.5 else (after, before)
        words = [asked_by.capitalize(), *parts[0], *parts[1]]
    else:
        words = [*before, asked_by, *after]
    question = " ".join(word for word in words if word).rstrip(" .,;:!?\"'”’")
    if style >= GAPS:
        question += "?"
    return question.lower() if chance.random() < LOWER_CASE else question
