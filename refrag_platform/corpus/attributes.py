"""What several countries can be compared by: fields of a profile with a short value, and what is asked of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from refrag_platform.corpus.facts import Profile

NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
# Longer values, and lists of more than a few things, make a passage of many lines.
LONGEST = 60


class Words(NamedTuple):
    """How greater and smaller values of a quantity are spoken of."""

    more: str = "higher"
    less: str = "lower"
    most: str = "highest"
    least: str = "lowest"
    above: str = "above"
    below: str = "below"


MEASURE = Words()
SIZE = Words("larger", "smaller", "largest", "smallest")
LENGTH = Words("longer", "shorter", "longest", "shortest")
TIME = Words("later", "earlier", "latest", "earliest", "after", "before")


@dataclass(frozen=True)
class Attribute:
    """A field that passages show and questions compare.

    name: as questions call it. label: as passages do. pattern: all of its matches in the field's text, with commas
    between, are what a passage shows. each: stands in the text as often as the pattern matches, or the value would be
    a part of what the Factbook says; "": the first match is all. subfield None: the newest of the yearly values; where
    it is missing, the field's own text.
    """

    name: str
    label: str
    path: tuple[str, str]
    subfield: str | None
    pattern: str
    each: str = ""

    def shown(self, profile: Profile) -> str | None:
        """What a passage says after the label; None where the profile has no such value."""
        texts = profile.get(self.path, {})
        newest = next((text for key, text in texts.items() if re.search(r"\d{4}$", key)), "")
        text = newest if self.subfield is None else texts.get(self.subfield) or texts.get("", "")
        values = [value.strip() for value in re.findall(self.pattern, text)]
        if not values or len(values) != max(1, text.count(self.each) if self.each else 1):
            return None
        value = ", ".join(values)
        return value if len(value) <= LONGEST else None


@dataclass(frozen=True)
class Quantity(Attribute):
    """An attribute whose values are numbers in one unit; `limit` writes a value that others are above or below."""

    limit: str = "{:,.10g}"
    words: Words = MEASURE
    number: str = NUMBER

    def value(self, shown: str) -> float:
        match = re.search(self.number, shown)
        assert match is not None, shown
        return float(match.group().replace(",", ""))

    def beyond(self, limit: float, above: bool) -> str:
        """`a median age above 30 years`"""
        side = self.words.above if above else self.words.below
        return f"a {self.name} {side} {self.limit.format(limit)}"


@dataclass(frozen=True)
class Quality(Attribute):
    """An attribute whose value says that some things hold; `having` says one of them, as something that one has.

    whole: two countries can be asked for having the same.
    """

    having: str = "{}"
    holding: Callable[[str], Sequence[str]] = lambda shown: [shown]
    whole: bool = False


def _quantity(
    name: str, label: str, section: str, field: str, subfield: str | None, pattern: str, limit: str,
    words: Words = MEASURE, number: str = NUMBER,
) -> Quantity:  # fmt: skip
    return Quantity(name, label, (section, field), subfield, rf"^{pattern}", limit=limit, words=words, number=number)


def _any_of(*words: str) -> Callable[[str], Sequence[str]]:
    """Those of the words that stand in a value, as whole words: `semi-presidential` is not `presidential`."""
    return lambda shown: [word for word in words if re.search(rf"(?<![\w-]){word}(?![\w-])", shown, re.IGNORECASE)]


def _listed(shown: str) -> Sequence[str]:
    return shown.split(", ")


PEOPLE, LAND, STATE, ECONOMY = "People and Society", "Geography", "Government", "Economy"
PERCENT, COUNT, METERS = r"[\d.]+%", r"\d[\d,]*(?= \()", r"\d[\d,.]* m\b"

QUANTITIES: tuple[Quantity, ...] = (
    _quantity("population", "Population", PEOPLE, "Population", "total", r"\d[\d,]*\d", "{:,.10g}", SIZE),
    _quantity("total area", "Total area", LAND, "Area", "total", r"\d[\d,.]* sq km", "{:,.10g} sq km", SIZE),
    _quantity("coastline", "Coastline", LAND, "Coastline", "", r"\d[\d,.]* km", "{:,.10g} km", LENGTH),
    _quantity("land border", "Land boundaries", LAND, "Land boundaries", "total", r"\d[\d,.]* km", "{:,.10g} km",
              LENGTH),
    _quantity("summit", "Highest point", LAND, "Elevation", "highest point", rf"[A-Z][^\d,;(]* {METERS}", "{:,.10g} m"),
    _quantity("mean elevation", "Mean elevation", LAND, "Elevation", "mean elevation", METERS, "{:,.10g} m"),
    _quantity("median age", "Median age", PEOPLE, "Median age", "total", r"[\d.]+ years", "{:g} years"),
    _quantity("life expectancy", "Life expectancy at birth", PEOPLE, "Life expectancy at birth", "total population",
              r"[\d.]+ years", "{:g} years"),
    _quantity("fertility rate", "Total fertility rate", PEOPLE, "Total fertility rate", "",
              r"[\d.]+ children born/woman", "{:g}"),
    _quantity("birth rate", "Birth rate", PEOPLE, "Birth rate", "", r"[\d.]+ births/1,000 population",
              "{:g} per 1,000"),
    _quantity("rate of infant mortality", "Infant mortality rate", PEOPLE, "Infant mortality rate", "total",
              r"[\d.]+ deaths/1,000 live births", "{:g} per 1,000"),
    _quantity("literacy rate", "Literacy", PEOPLE, "Literacy", "total population", PERCENT, "{:g}%"),
    _quantity("rate of obesity", "Obesity", PEOPLE, "Obesity - adult prevalence rate", "", PERCENT, "{:g}%"),
    _quantity("share of urban population", "Urban population", "Environment", "Urbanization", "urban population",
              PERCENT, "{:g}%"),
    _quantity("share of forest", "Forest", LAND, "Land use", "forest", PERCENT, "{:g}%"),
    _quantity("share of internet users", "Internet users", "Communications", "Internet users", "percent of population",
              PERCENT, "{:g}%"),
    _quantity("number of airports", "Airports", "Transportation", "Airports", "", COUNT, "{:,.10g}"),
    _quantity("number of World Heritage Sites", "World Heritage Sites", STATE, "National heritage",
              "total World Heritage Sites", COUNT, "{:,.10g}"),
    _quantity("GDP per capita", "Real GDP per capita", ECONOMY, "Real GDP per capita", None, r"\$\d[\d,]*",
              "${:,.10g}"),
    _quantity("rate of unemployment", "Unemployment rate", ECONOMY, "Unemployment rate", None, PERCENT, "{:g}%"),
    _quantity("year of independence", "Independence", STATE, "Independence", "", r"\d{1,2} [A-Z][a-z]+ \d{4}", "{:.0f}",
              TIME, r"\d{4}"),
)  # fmt: skip

QUALITIES: tuple[Quality, ...] = (
    Quality("region", "Region", (LAND, "Map references"), "",
            r"^(?:Africa|Europe|Oceania|Asia|Southeast Asia|Middle East|South America|North America"
            r"|Central America and the Caribbean)$", having="{} as region", whole=True),
    Quality("coast", "Coastline", (LAND, "Coastline"), "", r"^\d[\d,.]* km(?: \(landlocked\))?",
            holding=lambda shown: ["no coast" if "landlocked" in shown else "a coast"]),
    Quality("type of legislature", "Legislature", (STATE, "Legislative branch"), "legislative structure",
            r"^(?:unicameral|bicameral)$", having="a {} legislature", whole=True),
    Quality("currency", "Currency", (ECONOMY, "Exchange rates"), "Currency", r"^[^(\n]+?(?= \([A-Z]{3}\))",
            having="{} as currency", whole=True),
    Quality("time zone", "Time zone", (STATE, "Capital"), "time difference", r"^UTC ?[+-]?[\d.]+",
            having="{} as time zone", whole=True),
    Quality("dual citizenship rule", "Dual citizenship recognized", (STATE, "Citizenship"),
            "dual citizenship recognized", r"^(?:yes|no)$", having="dual citizenship {}",
            holding=lambda shown: ["recognized" if shown == "yes" else "not recognized"], whole=True),
    Quality("government type", "Government type", (STATE, "Government type"), "", r"^[^;(\n]+",
            having='the word "{}" in the government type', whole=True,
            holding=_any_of("republic", "monarchy", "democracy", "federal", "parliamentary", "presidential")),
    Quality("legal system", "Legal system", (STATE, "Legal system"), "", r"^[^;(\n]+", having="{} in the legal system",
            holding=_any_of("civil law", "common law", "customary law", "Islamic law")),
    Quality("official language", "Official languages", (PEOPLE, "Languages"), "Languages",
            r"([A-Z][\w'’ -]*?)(?: [\d.]+%)? \(official", "(official", having="{} as official language",
            holding=_listed),
    Quality("neighbor", "Border countries", (LAND, "Land boundaries"), "border countries",
            r"([A-Z][^;,\d()]*?) \d[\d,.]* km", " km", having="a border with {}", holding=_listed),
    Quality("capital", "Capital", (STATE, "Capital"), "name", r"^[A-Z][^;(\n,]+",
            having='a capital beginning with "{}"', holding=lambda shown: [shown[0]]),
    Quality("national color", "National colors", (STATE, "National color(s)"), "", r"^[a-z, ]+$",
            having="{} as a national color", holding=_listed),
)  # fmt: skip
