"""Which fields of a country profile have one short answer, how it is read and how it is asked for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

# {(section, field): {subfield or "" for the field's own text: plain text}}
Profile = dict[tuple[str, str], dict[str, str]]

_LONGEST_ANSWER = 60
_TAKES_ARTICLE = re.compile(
    r"(United |Central African|Dominican Republic|Federated|European Union|Isle of|British |French Southern|West Bank"
    r"|Gaza Strip|Netherlands|Philippines|Maldives|Comoros|Holy See|Republic of|Democratic Republic|Seychelles"
    r"|Turks and)|.*Islands"
)


@dataclass(frozen=True)
class Field:
    """One askable field. `wordings` are formatted with {x}, the country, and {year}, where the value has one."""

    name: str
    path: tuple[str, str]
    subfield: str | None
    pattern: re.Pattern[str]
    wordings: tuple[str, ...]
    aliases: Callable[[re.Match[str]], tuple[str, ...]] = lambda match: ()


@dataclass(frozen=True)
class ProfileFact:
    """A fact in one profile."""

    field: str
    question: str
    answers: tuple[str, ...]
    path: tuple[str, str]


def _no_unit(match: re.Match[str]) -> tuple[str, ...]:
    """The bare number beside the number with its unit."""
    number = match["answer"].split(" ")[0]
    return number, number.replace(",", "")


def _population(match: re.Match[str]) -> tuple[str, ...]:
    digits = match["answer"].replace(",", "")
    return (digits, f"{int(digits) / 1e6:.1f} million") if int(digits) >= 1_000_000 else (digits,)


def _square_kilometers(match: re.Match[str]) -> tuple[str, ...]:
    number = match["answer"].removesuffix(" sq km")
    return number, f"{number} square kilometers", f"{number} km2"


def _dollars(match: re.Match[str]) -> tuple[str, ...]:
    return match["answer"].lstrip("$"), match["answer"].replace(",", "")


def _field(
    name: str,
    section: str,
    field: str,
    subfield: str | None,
    pattern: str,
    *wordings: str,
    aliases: Callable[[re.Match[str]], tuple[str, ...]] = lambda match: (),
) -> Field:
    return Field(name, (section, field), subfield, re.compile(pattern), wordings, aliases)


# `subfield` None: the newest of the yearly values, which are named "FIELD YEAR".
FIELDS: tuple[Field, ...] = (
    _field(
        "capital", "Government", "Capital", "name", r"(?P<answer>[A-Z][^;(\n,]+(?:, DC)?)",
        "What is the capital of {x}?", "Which city is the capital of {x}?", "Name the capital of {x}.",
    ),
    _field(
        "population", "People and Society", "Population", "total", r"(?P<answer>\d[\d,]*\d)\b",
        "What is the population of {x}?", "How many people live in {x}?", "How large is the population of {x}?",
        aliases=_population,
    ),
    _field(
        "area", "Geography", "Area", "total", r"(?P<answer>\d[\d,.]* sq km)",
        "What is the total area of {x}?", "How large is {x}?", "How many square kilometers does {x} cover?",
        aliases=_square_kilometers,
    ),
    _field(
        "currency", "Economy", "Exchange rates", "Currency",
        r"(?P<answer>[^(\n]+?)(?: \((?P<code>[A-Z]{3})\))? per US dollar",
        "What is the currency of {x}?", "Which currency is used in {x}?", "What money do people pay with in {x}?",
        aliases=lambda match: (match["code"],) if match["code"] else (),
    ),
    _field(
        "gdp_per_capita", "Economy", "Real GDP per capita", None, r"(?P<answer>\$\d[\d,]*) \((?P<year>\d{4})",
        "What was the real GDP per capita of {x} in {year}?", "How high was GDP per person in {x} in {year}?",
        aliases=_dollars,
    ),
    _field(
        "life_expectancy", "People and Society", "Life expectancy at birth", "total population",
        r"(?P<answer>[\d.]+ years)",
        "What is the life expectancy at birth in {x}?", "How long can a newborn in {x} expect to live?",
        aliases=_no_unit,
    ),
    _field(
        "official_language", "People and Society", "Languages", "Languages",
        r"(?P<answer>[A-Z][\w'’ -]*?)(?: [\d.]+%)? \(official",
        "What is the official language of {x}?", "Which language is official in {x}?",
    ),
    _field(
        "government_type", "Government", "Government type", "", r"(?P<answer>[^;(\n]+)",
        "What type of government does {x} have?", "How is {x} governed?", "What is the form of government of {x}?",
    ),
    _field(
        "independence", "Government", "Independence", "",
        r"(?P<answer>(?P<day>\d{1,2}) (?P<month>[A-Z][a-z]+) (?P<in>\d{4})) \((?:from|declared)",
        "When did {x} become independent?", "What is the date of independence of {x}?",
        "On what date did {x} gain independence?",
        aliases=lambda match: (f"{match['month']} {match['day']}, {match['in']}",),
    ),
    _field(
        "highest_point", "Geography", "Elevation", "highest point",
        r"(?P<answer>[A-Z][^\d\n,;]*?) -?\d[\d,.]*(?: m\b|$)",
        "What is the highest point of {x}?", "Which place in {x} has the highest elevation?",
        aliases=lambda match: (match["answer"].split(" (")[0],),
    ),
    _field(
        "highest_elevation", "Geography", "Elevation", "highest point", r"[^\d\n]+ (?P<answer>\d[\d,.]* m)\b",
        "How high is the highest point of {x}?", "At what elevation is the highest point of {x}?",
        aliases=_no_unit,
    ),
    _field(
        "lowest_point", "Geography", "Elevation", "lowest point",
        r"(?P<answer>[A-Z][^\d\n,;]*?) -?\d[\d,.]*(?: m\b|$)",
        "What is the lowest point of {x}?", "Where is the lowest elevation of {x}?",
    ),
    _field(
        "internet_country_code", "Communications", "Internet country code", "", r"(?P<answer>\.[a-z]{2})\b",
        "What is the internet country code of {x}?", "Which top-level domain belongs to {x}?",
        aliases=lambda match: (match["answer"].lstrip("."),),
    ),
    _field(
        "median_age", "People and Society", "Median age", "total", r"(?P<answer>[\d.]+ years)",
        "What is the median age in {x}?", "How old is the median inhabitant of {x}?",
        aliases=_no_unit,
    ),
    _field(
        "coastline", "Geography", "Coastline", "", r"(?P<answer>[1-9][\d,.]* km)",
        "How long is the coastline of {x}?", "What is the length of the coast of {x}?",
        aliases=_no_unit,
    ),
    _field(
        "land_boundaries", "Geography", "Land boundaries", "total", r"(?P<answer>[1-9][\d,.]* km)",
        "How long are the land boundaries of {x}?", "What is the total length of the land borders of {x}?",
        aliases=_no_unit,
    ),
    _field(
        "national_holiday", "Government", "National holiday", "", r"(?P<answer>[A-Z][^,;(\n]+?)(?: \([^)]*\))?, \d",
        "What is the national holiday of {x} called?", "Which national holiday is celebrated in {x}?",
    ),
    _field(
        "national_anthem", "Government", "National anthem(s)", "title", r'["“](?P<answer>[^"“”]+)["”]',
        "What is the title of the national anthem of {x}?", "What is the national anthem of {x} called?",
    ),
    _field(
        "voting_age", "Government", "Suffrage", "", r"(?P<answer>\d\d years) of age; universal",
        "At what age can people vote in {x}?", "What is the voting age in {x}?",
        aliases=lambda match: (match["answer"][:2], f"{match['answer']} of age"),
    ),
    _field(
        "demonym", "People and Society", "Nationality", "adjective", r"(?P<answer>[A-Z][\w'’ -]*)$",
        "What is the adjective of nationality for {x}?", "Which adjective describes someone or something from {x}?",
    ),
    _field(
        "legislature", "Government", "Legislative branch", "legislature name",
        r"(?P<answer>[A-Z][^(\n;]*?)(?: \(| - |$)",
        "What is the legislature of {x} called?", "What is the name of the parliament of {x}?",
    ),
    _field(
        "fertility_rate", "People and Society", "Total fertility rate", "", r"(?P<answer>\d[\d.]*) children",
        "What is the total fertility rate of {x}?", "How many children are born per woman in {x}?",
    ),
    _field(
        "urban_population", "People and Society", "Urbanization", "urban population", r"(?P<answer>[\d.]+%)",
        "What share of the population of {x} is urban?", "What percentage of people in {x} live in cities?",
    ),
    _field(
        "internet_users", "Communications", "Internet users", "percent of population", r"(?P<answer>[\d.]+%)",
        "What percentage of the population of {x} uses the internet?", "What share of people in {x} is online?",
    ),
    _field(
        "unemployment_rate", "Economy", "Unemployment rate", None, r"(?P<answer>[\d.]+%) \((?P<year>\d{4})",
        "What was the unemployment rate of {x} in {year}?", "How high was unemployment in {x} in {year}?",
    ),
    _field(
        "airports", "Transportation", "Airports", "", r"(?P<answer>\d[\d,]*) \(",
        "How many airports does {x} have?", "How many airports are there in {x}?",
    ),
)  # fmt: skip


def facts_of(country: str, profile: Profile) -> list[ProfileFact]:
    """The facts of one profile, in an order that differs by country, so that a few of each cover all fields."""
    facts = []
    for field in FIELDS:
        match = field.pattern.match(_value(field, profile))
        if match is None or len(match["answer"]) > _LONGEST_ANSWER:
            continue
        answers = tuple(dict.fromkeys(answer.strip() for answer in (match["answer"], *field.aliases(match))))
        wording = field.wordings[_hash(country, field.name) % len(field.wordings)]
        question = wording.format(x=with_article(country), year=match.groupdict().get("year", ""))
        facts.append(ProfileFact(field.name, question, answers, field.path))
    return sorted(facts, key=lambda fact: _hash(fact.field, country))


def with_article(country: str) -> str:
    """The name as it stands inside a sentence: `the Netherlands`, `the Gambia`, `France`."""
    if country.startswith("The "):
        return f"the {country[4:]}"
    return f"the {country}" if _TAKES_ARTICLE.match(country) else country


def _value(field: Field, profile: Profile) -> str:
    texts = profile.get(field.path, {})
    if field.subfield is None:
        return next((text for key, text in texts.items() if re.search(r"\d{4}$", key)), "")
    return texts.get(field.subfield, "") or (texts.get("", "") if field.name == "official_language" else "")


def _hash(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:8], "big")
