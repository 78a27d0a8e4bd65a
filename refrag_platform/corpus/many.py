"""Questions whose answer needs many passages at once: `refrag questions many --help`.

A context is a passage for each of ten to twenty countries, all saying the same few fields; questions compare and count
over all of them (corpus/wordings.py has the kinds). In swapped contexts every value is another country's, so that no
answer can be known by heart: it has to be found in the passages. All else is decided by the seed.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

from refrag_platform.corpus.attributes import QUALITIES, QUANTITIES, Attribute, Quality, Quantity
from refrag_platform.corpus.facts import Profile, with_article
from refrag_platform.corpus.splits import Split
from refrag_platform.corpus.swapping import MARK
from refrag_platform.corpus.wordings import KINDS, QuestionKind, wordings
from refrag_platform.errors import RefragError

# Fields of a context's passages.
LEAST_FIELDS, MOST_FIELDS = 2, 5
# Countries that a list names and a count counts, at most.
MOST_LISTED, MOST_COUNTED = 4, 10
# Names in a `which`.
NAMED = 3
# Draws of a context that has room for enough countries, and of a question that has one answer.
CONTEXT_DRAWS = QUESTION_DRAWS = 50
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class ManySettings:
    """What a file of questions is made by.

    count: rows. passages: least and most of a context. room: tokens of its passages together, at most, each cut into
    whole chunks. swapped_share: of the contexts, those with swapped values.
    """

    count: int
    passages: tuple[int, int] = (10, 20)
    room: int = 1024
    swapped_share: float = 0.5
    seed: int = 0


class QuestionDraft(NamedTuple):
    """What fills a wording, the answers, the best first, and the numbers of the countries that are needed."""

    words: dict[str, str]
    answers: list[str]
    needed: list[int]


@dataclass(frozen=True)
class CountryContext:
    """Countries by name, and for each attribute what the passage of each of them says.

    One attribute at least is a quantity, and one a quality that two countries can have alike.
    """

    countries: list[str]
    shown: dict[Attribute, list[str]]

    def question(self, kind: QuestionKind, chance: random.Random) -> QuestionDraft | None:
        """A question of this kind with one answer; None where the draw finds none."""
        return _ASKING[kind](self, chance)

    def numbers(self, quantity: Quantity) -> list[float]:
        return [quantity.value(shown) for shown in self.shown[quantity]]

    def quantity(self, chance: random.Random) -> Quantity:
        return chance.choice([one for one in self.shown if isinstance(one, Quantity)])

    def qualities(self) -> list[Quality]:
        return [one for one in self.shown if isinstance(one, Quality)]

    def of_quality(self, chance: random.Random) -> tuple[str, list[int]] | None:
        """Something that countries have, in words, and who does; what many have is as likely as what one has."""
        quality = chance.choice(self.qualities())
        having: dict[str, list[int]] = defaultdict(list)
        for number, shown in enumerate(self.shown[quality]):
            for thing in quality.holding(shown):
                having[thing].append(number)
        if not having:
            return None
        count = chance.choice(sorted({len(numbers) for numbers in having.values()}))
        thing = chance.choice(sorted(thing for thing, numbers in having.items() if len(numbers) == count))
        return quality.having.format(thing), having[thing]

    def beyond_limit(self, most: int, chance: random.Random) -> tuple[str, list[int]] | None:
        """That a number is above, or below, a limit, in words, and for whom: 1 to `most` of the countries."""
        quantity, above = self.quantity(chance), chance.random() < 0.5
        values = self.numbers(quantity)
        ranked = sorted(range(len(values)), key=lambda number: values[number], reverse=above)
        count = chance.randint(1, min(most, len(values) - 1))
        low, high = sorted((values[ranked[count - 1]], values[ranked[count]]))
        limit = _between(low, high)
        if limit is None or quantity.value(quantity.limit.format(limit)) != limit:  # Years are written whole.
            return None
        return quantity.beyond(limit, above), sorted(ranked[:count])

    def holding(self, most: int, chance: random.Random) -> tuple[str, list[int]] | None:
        """Either of these."""
        group = self.of_quality(chance) if chance.random() < 0.5 else self.beyond_limit(most, chance)
        return group if group and len(group[1]) <= most else None

    def every(self) -> list[int]:
        return list(range(len(self.countries)))


def many_questions(
    profiles: Sequence[tuple[str, Profile]], split: Split, settings: ManySettings, positions: Callable[[str, str], int]
) -> Iterator[dict[str, Any]]:
    """Rows of a question file (id, question, answers, passages, gold, document_id), a question of each kind a context.

    Beside these a row has its `kind`, its `split`, and `closed`: it is about all of its passages and about no others.
    `document_id` names the context, whose questions intervals resample together.

    Args:
        profiles: (country, profile) of the split alone. positions: of a passage of this title and text in a context.

    Raises:
        RefragError: the split has too few countries with the same fields, or the room is too small.
    """
    values = {
        attribute: {name: shown for name, profile in profiles if (shown := attribute.shown(profile))}
        for attribute in (*QUANTITIES, *QUALITIES)
    }
    countries = sorted(name for name, _ in profiles if "," not in name)  # Commas part the names of a list.
    written = number = 0
    while written < settings.count:
        chance = random.Random(f"many {split} {settings.seed} {number}")
        swapped = chance.random() < settings.swapped_share
        context, passages = _context(countries, values, swapped, settings, positions, chance)
        name = f"many/{split}{MARK if swapped else '/'}{settings.seed}-{number}"
        for kind in KINDS:
            asked = next((one for _ in range(QUESTION_DRAWS) if (one := context.question(kind, chance))), None)
            if asked is None or written == settings.count:
                continue
            written += 1
            yield {
                "id": f"{name}/{kind}",
                "question": _sentence(chance.choice(wordings(kind, split != "train")).format(**asked.words)),
                "answers": asked.answers,
                "passages": passages,
                "gold": sorted(asked.needed),
                "document_id": name,
                "kind": kind,
                "closed": True,
                "split": split,
            }
        number += 1


def _context(
    countries: Sequence[str],
    values: Mapping[Attribute, Mapping[str, str]],
    swapped: bool,
    settings: ManySettings,
    positions: Callable[[str, str], int],
    chance: random.Random,
) -> tuple[CountryContext, list[dict[str, str]]]:
    """Countries with their passages, in random order: as many as were drawn, or as there is room for."""
    least, most = settings.passages
    for _ in range(CONTEXT_DRAWS):
        attributes = _attributes(chance)
        known = [name for name in countries if swapped or all(name in values[one] for one in attributes)]
        names = chance.sample(known, min(len(known), chance.randint(least, most)))
        shown = {one: [_value(name, values[one], swapped, chance) for name in names] for one in attributes}
        if not all(map(all, shown.values())):
            continue
        passages: list[dict[str, str]] = []
        room = settings.room
        for number, name in enumerate(names):
            lines = [f"{one.label}: {shown[one][number]}" for one in chance.sample(attributes, len(attributes))]
            passage = {"title": name, "text": "\n".join(lines)}
            room -= positions(name, passage["text"])
            if room < 0:
                break
            passages.append(passage)
        if (count := len(passages)) >= least:
            return CountryContext(names[:count], {one: texts[:count] for one, texts in shown.items()}), passages
    raise RefragError(
        f"no {least} of these {len(countries)} countries with the same fields have room in {settings.room} positions; "
        "ask for fewer passages, give more room, or take a larger share of swapped contexts, which need no fields"
    )


def _attributes(chance: random.Random) -> list[Attribute]:
    """Fields for a context, the first two of each sort; no two are one line of the passage."""
    drawn: list[Attribute] = [chance.choice(QUANTITIES), chance.choice([one for one in QUALITIES if one.whole])]
    drawn += chance.sample([*QUANTITIES, *QUALITIES], chance.randint(LEAST_FIELDS, MOST_FIELDS) - 2)
    return [one for place, one in enumerate(drawn) if one.label not in {other.label for other in drawn[:place]}]


def _value(name: str, values: Mapping[str, str], swapped: bool, chance: random.Random) -> str:
    """What a passage says of a country: its own value, or another's that doesn't name it; "" where there is none."""
    if not swapped:
        return values[name]
    return chance.choice([shown for other, shown in values.items() if other != name and name not in shown] or [""])


def _compare(context: CountryContext, chance: random.Random) -> QuestionDraft | None:
    quantity, (a, b) = context.quantity(chance), chance.sample(context.every(), 2)
    values = context.numbers(quantity)
    if values[a] == values[b]:
        return None
    more = chance.random() < 0.5
    said = quantity.words.more if more else quantity.words.less
    best = (max if more else min)((a, b), key=lambda number: values[number])
    return QuestionDraft(
        {"more": said, "name": quantity.name, **_pair(context, a, b)}, [context.countries[best]], [a, b]
    )


def _extreme(context: CountryContext, chance: random.Random) -> QuestionDraft | None:
    return _best(context, context.every(), {}, chance)


def _extreme_of(context: CountryContext, chance: random.Random) -> QuestionDraft | None:
    group = context.of_quality(chance)
    if group is None or not 1 < len(group[1]) < len(context.countries):
        return None
    return _best(context, group[1], {"what": group[0]}, chance)


def _best(
    context: CountryContext, among: Sequence[int], words: dict[str, str], chance: random.Random
) -> QuestionDraft | None:
    """Who of these has the most, or the least; everyone's passage is needed to know."""
    quantity, most = context.quantity(chance), chance.random() < 0.5
    values = context.numbers(quantity)
    first, second = sorted(among, key=lambda number: values[number], reverse=most)[:2]
    if values[first] == values[second]:
        return None
    words = {**words, "most": quantity.words.most if most else quantity.words.least, "name": quantity.name}
    return QuestionDraft(words, [context.countries[first]], context.every())


def _count(context: CountryContext, chance: random.Random) -> QuestionDraft | None:
    group = context.holding(MOST_COUNTED, chance)
    if group is None:
        return None
    count = len(group[1])
    return QuestionDraft({"what": group[0]}, [str(count), NUMBERS[count]], context.every())


def _list(context: CountryContext, chance: random.Random) -> QuestionDraft | None:
    group = context.holding(MOST_LISTED, chance)
    if group is None:
        return None
    return QuestionDraft(
        {"what": group[0]}, [", ".join(sorted(context.countries[n] for n in group[1]))], context.every()
    )


def _which(context: CountryContext, chance: random.Random) -> QuestionDraft | None:
    group = context.holding(len(context.countries), chance)
    if group is None:
        return None
    others = [number for number in context.every() if number not in group[1]]
    if len(others) < NAMED - 1:
        return None
    answer = chance.choice(group[1])
    named = chance.sample([answer, *chance.sample(others, NAMED - 1)], NAMED)
    *before, last = [with_article(context.countries[number]) for number in named]
    return QuestionDraft(
        {"what": group[0], "names": f"{', '.join(before)} or {last}"}, [context.countries[answer]], named
    )


def _same(context: CountryContext, chance: random.Random) -> QuestionDraft | None:
    """Half of the answers are yes, where any two countries have the same."""
    alike, pairs = chance.random() < 0.5, list(combinations(context.every(), 2))
    matching = {
        quality: [(a, b) for a, b in pairs if (said[a] == said[b]) == alike]
        for quality in context.qualities()
        if quality.whole
        for said in [context.shown[quality]]
    }
    possible = [quality for quality in matching if matching[quality]]
    if not possible:
        return None
    quality = chance.choice(possible)
    a, b = chance.sample(chance.choice(matching[quality]), 2)
    return QuestionDraft({"name": quality.name, **_pair(context, a, b)}, ["yes" if alike else "no"], [a, b])


_ASKING: dict[QuestionKind, Callable[[CountryContext, random.Random], QuestionDraft | None]] = {
    "compare": _compare, "extreme": _extreme, "count": _count, "list": _list, "which": _which, "same": _same,
    "extreme_of": _extreme_of,
}  # fmt: skip


def _pair(context: CountryContext, a: int, b: int) -> dict[str, str]:
    return {"a": with_article(context.countries[a]), "b": with_article(context.countries[b])}


def _between(low: float, high: float) -> float | None:
    """The number of fewest digits between these two; None where they are equal."""
    middle = (low + high) / 2
    for digits in range(1, 12):
        limit = float(f"{middle:.{digits}g}")
        if low < limit < high:
            return limit
    return None


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
