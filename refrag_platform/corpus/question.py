"""A question with passages and known answers, and which of its passages are shown in what order."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
Passage = tuple[str, str]
RetrieverKind = Literal["listed", "strong", "weak"]
# A weak retriever draws from this many of the best (section 5).
WEAK_POOL = 200


@dataclass(frozen=True)
class Question:
    """passages: (title, text), best first; gold: numbers of those that hold the answer, if known.

    document: what the question is about; intervals resample documents. Default: the first gold passage, of which there
    may be several questions; where none is known, the question's own id.
    gold_kept: `take` has the gold passages among its own, whatever their rank. ranked: it keeps the order; else any
    passage may stand anywhere.
    history: earlier turns, (user or assistant, text). kind: what is asked for; a summary has no question.
    answerable: whether the passages hold the answer; None where it isn't known or is debatable.
    closed: it is about all of its passages, and about no others: none may be left out or added. category: what its row
    calls its `kind`, e.g. count; figures are given of each. split: of the corpus, if its row names one.
    where: the file and row it was read from, for messages.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    gold: tuple[int, ...] = ()
    document: str = ""
    gold_kept: bool = True
    ranked: bool = True
    history: tuple[tuple[str, str], ...] = ()
    kind: Literal["answer", "summary"] = "answer"
    answerable: bool | None = None
    closed: bool = False
    category: str = ""
    split: str = ""
    where: str = field(default="", compare=False, repr=False)

    @property
    def needed(self) -> tuple[int, ...]:
        """Numbers of the passages that a reader must have seen: the gold ones, or all."""
        return tuple(range(len(self.passages))) if self.closed else self.gold

    def take(self, count: int) -> tuple[Passage, ...]:
        """`count` passages: the gold ones and the first of the others, as listed or in an order fixed by id and count.

        Without gold numbers these are the first `count`, as a retriever ranked them.
        """
        gold = self.gold if self.gold_kept else ()
        others = [number for number in range(len(self.passages)) if number not in gold]
        chosen = sorted([*gold, *others][:count])
        if not self.ranked:
            # Otherwise the gold ones, which come from further down, would stand last.
            random.Random(f"order {self.id} {count}").shuffle(chosen)
        return tuple(self.passages[number] for number in chosen)

    def shuffled(self, order: Sequence[int]) -> Question:
        """The question with the passages of these numbers, in this order."""
        place = {number: place for place, number in enumerate(order)}
        gold = tuple(sorted(place[number] for number in self.gold if number in place))
        return replace(self, passages=tuple(self.passages[number] for number in order), gold=gold)


def retrieved(question: Question, retriever: RetrieverKind) -> Question:
    """The question as a retriever would serve it; passages are listed best first.

    listed: as it is, the gold passages kept. strong: the best, whether gold or not. weak: any of the first 200 in
    random order (fixed by the question's id), the gold ones among them.
    """
    if retriever == "strong":
        return replace(question, gold_kept=False)
    if retriever == "listed":
        return question
    order = list(range(min(len(question.passages), WEAK_POOL)))
    order += [number for number in question.gold if number not in order]
    random.Random(f"weak {question.id}").shuffle(order)
    return replace(question.shuffled(order), ranked=False)


def with_distractors(question: Question, pool: Sequence[Passage], count: int) -> Question:
    """The question with passages of `pool` added until it has `count`, all in random order, fixed by its id.

    None of those added says one of the answers. Where none is wanted, as where it is closed, the order stays as it is.
    """
    if question.closed:
        return question
    chance = random.Random(f"distractors {question.id}")
    says = mention(question.answers)
    known = set(question.passages)
    added: list[Passage] = []
    for passage in chance.sample(pool, len(pool)):
        if len(question.passages) + len(added) >= count:
            break
        if passage not in known and not says.search(passage[1]):
            added.append(passage)
    if not added:
        return question
    order = list(range(len(question.passages) + len(added)))
    chance.shuffle(order)
    return replace(question, passages=(*question.passages, *added)).shuffled(order)


def keeps_order(share: float, others: Sequence[object], chance: np.random.Generator) -> bool:
    """Whether a question's passages stand as listed: for a share of those that list `others` beside the gold ones.

    Where nothing else is listed, no retriever ranked, and the gold ones would always come first.
    """
    return share > 0 and bool(others) and chance.random() < share


def arranged(chosen: Sequence[T], listed: Sequence[T], ranked: bool, chance: np.random.Generator) -> list[T]:
    """Chosen passages (or their numbers) as a retriever listed them, best first, or in random order.

    Those that aren't listed, which no retriever ranked for this question, come last.
    """
    if not ranked:
        return [chosen[number] for number in chance.permutation(len(chosen))]
    place = {passage: place for place, passage in enumerate(dict.fromkeys(listed))}
    return sorted(chosen, key=lambda passage: place.get(passage, len(place)))


def mention(answers: Sequence[str]) -> re.Pattern[str]:
    """Finds one of the answers as whole words, whatever its case."""
    words = "|".join(rf"(?<!\w){re.escape(answer)}(?!\w)" for answer in answers if answer)
    return re.compile(words or r"(?!)", re.IGNORECASE)


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most `limit` of them, evenly spread; None: all."""
    count = len(questions) if limit is None else min(limit, len(questions))
    return [questions[turn * len(questions) // count] for turn in range(count)]
