"""Whether a store's search finds the right passage, in conversations too, and tells what the store holds nothing about.

The questions of `refrag evaluate retrieval` are a corpus' own, from the Factbook, put alone, after another question
("And of Nepal?", "How many people live in it?") and after a change of subject; and questions about countries that are
not in the store. Or those of a file. The evaluation stage looks up its held-out questions (evaluation/served.py).
"""

from __future__ import annotations

import random
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refrag_platform.corpus.facts import FIELDS, with_article
from refrag_platform.corpus.question import Passage, Question
from refrag_platform.corpus.question_files import question_files_of, read_questions
from refrag_platform.errors import RefragError
from refrag_platform.evaluation.metrics import rounded
from refrag_platform.progress import Progress
from refrag_platform.store.content import stored_passages

if TYPE_CHECKING:
    from refrag_platform.store.table import ChunkStore, Hit

# Hit rate at k: the share of questions with a gold passage among the first k.
CUTS = (1, 5, 10, 20)
IN_STORE, NOT_IN_STORE, GOLD_UNKNOWN = "in the store", "not in the store", "gold unknown"
ELLIPSES = ("And of {x}?", "What about {x}?", "And {x}?", "How about {x}?")
THRESHOLDS = tuple(round(0.01 * step, 2) for step in range(1, 100))


@dataclass(frozen=True)
class LookupQuestion:
    """One question to look up.

    before: what the user said before it. gold: passages that hold the answer, as far as they are known. group: what it
    is about; halves are split by it. answerable: whether the store holds an answer.
    """

    kind: str
    question: str
    before: str
    gold: frozenset[Passage]
    group: str
    answerable: bool = True


@dataclass(frozen=True)
class Looked:
    """A case looked up: the gold passage's rank (0 = not found) without and with what was said before.

    similarity: that of the nearest passage that the service would send, -1 to 1.
    """

    case: LookupQuestion
    alone: int
    together: int
    similarity: float


def factbook_cases(content: Path, limit: int, seed: int = 0) -> list[LookupQuestion]:
    """At most `limit` cases of each kind from a corpus' questions, and about the Factbook's other countries.

    Raises:
        RefragError: the corpus has no questions of the Factbook's.
    """
    chance = random.Random(seed)
    known = [
        one
        for path in question_files_of(content, "train", "validation", "test")
        for one in read_questions(path)
        if "/swapped" not in one.id and one.id.startswith("factbook/") and one.gold
    ]
    by_field: dict[str, list[Question]] = defaultdict(list)
    by_document: dict[str, list[Question]] = defaultdict(list)
    for one in known:
        by_field[_field(one)].append(one)
        by_document[one.document].append(one)
    if len(by_document) < 2:
        raise RefragError(f"{content} has questions about fewer than two countries of the Factbook; give --questions")
    wordings = {field.name: field.wordings for field in FIELDS}
    cases: list[LookupQuestion] = []
    chance.shuffle(known)
    for one in known[:limit]:
        gold = frozenset(one.passages[number] for number in one.gold)
        country = with_article(next(iter(gold))[0].split(" - ")[0])

        def case(kind: str, question: str, before: Sequence[str], gold: frozenset[Passage], group: str) -> None:
            cases.append(LookupQuestion(kind, question, "\n".join(before), gold, group, bool(gold)))

        alike = [other.question for other in by_field[_field(one)] if other.document != one.document]
        others = [other.question for other in by_document[one.document] if other is not one]
        apart = [other.question for other in known if other.document != one.document and _field(other) != _field(one)]
        ellipsis = chance.choice(ELLIPSES).format(x=country)
        case("alone", one.question, [], gold, one.document)
        if alike:
            case("another country", ellipsis, [chance.choice(alike)], gold, one.document)
        if others:
            asked = chance.choice(wordings[_field(one)]).format(x="it", year="2023")
            case("the same country", asked, [chance.choice(others)], gold, one.document)
        if len(apart) >= 3:
            case("another subject", one.question, chance.sample(apart, 1), gold, one.document)
            case("another subject, third turn", one.question, chance.sample(apart, 3), gold, one.document)
    for group, field, question, country in _absent(by_document, chance)[:limit]:
        nothing: frozenset[Passage] = frozenset()
        case("not in the store", question, [], nothing, group)
        if by_field[field]:
            asked = chance.choice(ELLIPSES).format(x=with_article(country))
            case("not in the store, follow-up", asked, [chance.choice(by_field[field]).question], nothing, group)
        case("not in the store, another subject", question, [chance.choice(known).question], nothing, group)
    return cases


def _absent(present: Iterable[str], chance: random.Random) -> list[tuple[str, str, str, str]]:
    """(document, field, question, country) of facts about countries that a corpus lacks."""
    from refrag_platform.corpus.factbook import read_factbook_facts

    asked = [
        (document, fact.field, fact.question, country)
        for document, country, facts in read_factbook_facts()
        if document not in set(present)
        for fact in facts
    ]
    chance.shuffle(asked)
    return asked


def _field(question: Question) -> str:
    return question.id.rsplit("/", 1)[-1]


def file_cases(questions: Sequence[Question], content: Path, kind: str = "") -> list[LookupQuestion]:
    """The cases of questions with passages; their kinds say whether the store in `content` holds the answer.

    It doesn't where a question's gold passages are none of the store's own, or `answerable` is false.

    Args: kind: what the questions are called.
    """
    stored = stored_passages(content, (one.passages[number] for one in questions for number in one.gold))
    cases = []
    for one in questions:
        listed = [one.passages[number] for number in one.gold]
        gold = frozenset[Passage]() if one.answerable is False else frozenset(stored.intersection(listed))
        answerable = bool(gold) or (not listed and one.answerable is not False)
        name = IN_STORE if gold else GOLD_UNKNOWN if answerable else NOT_IN_STORE
        before = "\n".join(text for role, text in one.history if role == "user")
        cases.append(
            LookupQuestion(f"{kind}, {name}" if kind else name, one.question, before, gold, one.document, answerable)
        )
    return cases


def look_up(store: ChunkStore, cases: Sequence[LookupQuestion], passages: int) -> Iterator[tuple[Looked, list[Hit]]]:
    """Every case, looked up as served, with the passages that the service would send.

    Args: passages: how many it sends.
    """
    most = max(cuts_of(store))
    with Progress("look up", len(cases), "questions") as progress:
        for case in cases:
            hits = store.search(case.question, most, case.before)
            # A search for more weighs more candidates.
            sent = hits if passages == most else store.search(case.question, passages, case.before)
            alone = store.search(case.question, most) if case.before else hits
            similarity = max((hit.score or 0.0 for hit in sent), default=0.0)
            yield Looked(case, _rank(case, alone), _rank(case, hits), similarity), sent
            progress.update()


def cuts_of(store: ChunkStore) -> tuple[int, ...]:
    """CUTS as far as the store has passages."""
    return tuple(cut for cut in CUTS if cut <= max(store.description.passages, 1))


def _rank(case: LookupQuestion, hits: Sequence[Hit]) -> int:
    return next((rank for rank, hit in enumerate(hits, 1) if (hit.title, hit.text) in case.gold), 0)


def retrieval_report(looked: Sequence[Looked], least: float | None, cuts: Sequence[int] = CUTS) -> dict[str, Any]:
    """Rates by kind of question, shares of 1.

    Returns: {rows: [{kind, questions, alone: {1, 5, 10, 20}, together: {1, 5, 10, 20}, answered, answered_other_half}],
    best, least_similarity}; alone, together: hit rates of those whose gold is known, by the last message alone and with
    what was said before. answered: share that `least` lets pass. best: the least similarity that one half of the
    subjects chooses (the mean over kinds of answered where there is an answer, refused where there is none);
    answered_other_half: what that lets pass of the other half. None where there is no choice.
    """
    chosen = best_threshold([one for one in looked if _half(one) == 0])
    rows = []
    for kind, members in _by_kind(looked).items():
        judged = [one for one in members if one.case.gold]
        rows.append(
            {
                "kind": kind,
                "questions": len(members),
                "alone": _hit_rates([one.alone for one in judged], cuts) if judged else None,
                "together": _hit_rates([one.together for one in judged], cuts) if judged else None,
                "answered": None if least is None else _answered(members, least),
                "answered_other_half": None
                if chosen is None or not (others := [one for one in members if _half(one) == 1])
                else _answered(others, chosen),
            }
        )
    return {"rows": rows, "best": chosen, "least_similarity": least}


def _by_kind(looked: Sequence[Looked]) -> dict[str, list[Looked]]:
    kinds: dict[str, list[Looked]] = defaultdict(list)
    for one in looked:
        kinds[one.case.kind].append(one)
    return kinds


def best_threshold(looked: Sequence[Looked]) -> float | None:
    """The least similarity with the best balance of answered and refused, each the mean over kinds."""
    kinds = _by_kind(looked).values()
    there = [members for members in kinds if members[0].case.answerable]
    missing = [members for members in kinds if not members[0].case.answerable]
    if not there or not missing:
        return None

    def balance(least: float) -> float:
        answered, wrongly = (np.mean([_answered(members, least) for members in half]) for half in (there, missing))
        return float(answered - wrongly)

    return max(THRESHOLDS, key=balance)


def _half(one: Looked) -> int:
    return zlib.crc32(one.case.group.encode()) & 1


def _hit_rates(ranks: Sequence[int], cuts: Sequence[int]) -> dict[str, float]:
    return {str(cut): rounded(np.mean([0 < rank <= cut for rank in ranks])) for cut in cuts}


def _answered(looked: Sequence[Looked], least: float) -> float:
    return rounded(np.mean([one.similarity >= least for one in looked]))
