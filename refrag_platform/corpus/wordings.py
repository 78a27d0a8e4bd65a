"""The kinds of questions over many passages, and how each is worded."""

from __future__ import annotations

from typing import Literal, get_args

QuestionKind = Literal["compare", "extreme", "count", "list", "which", "same", "extreme_of"]
KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)

EXPLAINED: dict[QuestionKind, str] = {
    "compare": "which of two countries has more, or less, of something",
    "extreme": "which country has the most, or the least, of it",
    "count": "for how many countries something holds",
    "list": "for which countries it holds, one to four of them, in the order of the alphabet",
    "which": "for which of three countries it holds",
    "same": "whether two countries have the same",
    "extreme_of": "which of the countries for which something holds has the most, or the least, of something else",
}

# Of each kind the last two are held out: training never sees them, held-out questions are asked in them alone.
HELD_OUT = 2
WORDINGS: dict[QuestionKind, tuple[str, ...]] = {
    "compare": (
        "Which has the {more} {name}, {a} or {b}?",
        "Does {a} or {b} have the {more} {name}?",
        "Is the {name} of {a} or that of {b} {more}?",
        "Compare {a} and {b}: which has the {more} {name}?",
        "Between {a} and {b}, which one has the {more} {name}?",
        "Of {a} and {b}, name the one whose {name} is {more}.",
    ),
    "extreme": (
        "Which country has the {most} {name}?",
        "Which of these countries has the {most} {name}?",
        "Name the country with the {most} {name}.",
        "What country's {name} is the {most}?",
        "Whose {name} is the {most} of all?",
        "Of all the countries, where is the {name} {most}?",
    ),
    "count": (
        "How many countries have {what}?",
        "How many of these countries have {what}?",
        "Count the countries with {what}.",
        "What is the number of countries with {what}?",
        "In how many cases does a country have {what}?",
        "Give the number of countries that have {what}.",
    ),
    "list": (
        "Which countries have {what}? Answer in alphabetical order.",
        "List the countries with {what} alphabetically.",
        "Name all countries that have {what}, from A to Z.",
        "Which of these countries have {what}? List them from A to Z.",
        "Give an alphabetical list of all countries having {what}.",
        "In alphabetical order, which ones have {what}?",
    ),
    "which": (
        "Which of {names} has {what}?",
        "Which country has {what}: {names}?",
        "One of {names} has {what}: which one?",
        "Name the one of {names} that has {what}.",
        "Out of {names}, which has {what}?",
        "{names}: where do we find {what}?",
    ),
    "same": (
        "Do {a} and {b} have the same {name}?",
        "Have {a} and {b} the same {name}, yes or no?",
        "Is the {name} of {a} the same as that of {b}?",
        "Does {a} have the same {name} as {b}?",
        "Yes or no: {a} and {b} share the same {name}.",
        "Is there one and the same {name} in {a} and {b}?",
    ),
    "extreme_of": (
        "Of the countries with {what}, which has the {most} {name}?",
        "Which country with {what} has the {most} {name}?",
        "Among the countries that have {what}, which one has the {most} {name}?",
        "Name the country with the {most} {name} among those with {what}.",
        "Look only at countries with {what}: whose {name} is the {most}?",
        "Where is the {name} {most}, if only countries with {what} count?",
    ),
}


def wordings(kind: QuestionKind, held_out: bool) -> tuple[str, ...]:
    """Those that training sees, or those that it doesn't."""
    return WORDINGS[kind][-HELD_OUT:] if held_out else WORDINGS[kind][:-HELD_OUT]
