"""Questions over many passages: each answer follows from its passages alone, by a reading of its own."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from refrag_platform.corpus.factbook import read_factbook_profiles
from refrag_platform.corpus.facts import with_article
from refrag_platform.corpus.many import ManySettings, many_questions
from refrag_platform.corpus.question_files import read_questions
from refrag_platform.corpus.splits import SPLITS, Split, split_of
from refrag_platform.corpus.wordings import HELD_OUT, KINDS, WORDINGS
from refrag_platform.errors import RefragError
from refrag_platform.recipes import CorpusRecipe
from tests.command import refrag, refused
from tests.conftest import ROOT

RECIPE = CorpusRecipe.model_validate({"sources": [{"kind": "factbook"}]})
SETTINGS = ManySettings(count=420, swapped_share=0.6)
# What a question calls a quantity: the line of a passage.
LINES = {
    "population": "Population", "total area": "Total area", "coastline": "Coastline", "land border": "Land boundaries",
    "summit": "Highest point", "mean elevation": "Mean elevation", "median age": "Median age",
    "life expectancy": "Life expectancy at birth", "fertility rate": "Total fertility rate", "birth rate": "Birth rate",
    "rate of infant mortality": "Infant mortality rate", "literacy rate": "Literacy", "rate of obesity": "Obesity",
    "share of urban population": "Urban population", "share of forest": "Forest",
    "GDP per capita": "Real GDP per capita", "share of internet users": "Internet users",
    "number of airports": "Airports",
    "number of World Heritage Sites": "World Heritage Sites", "rate of unemployment": "Unemployment rate",
    "year of independence": "Independence",
}  # fmt: skip
SAME = {
    "region": "Region", "type of legislature": "Legislature", "currency": "Currency", "time zone": "Time zone",
    "dual citizenship rule": "Dual citizenship recognized", "government type": "Government type",
}  # fmt: skip
UPWARDS = {"higher", "larger", "longer", "later", "highest", "largest", "longest", "latest", "above", "after"}
DOWNWARDS = {"lower", "smaller", "shorter", "earlier", "lowest", "smallest", "shortest", "earliest", "below", "before"}

FILLED = {
    "name": "|".join([*LINES, *SAME]),
    "more": "|".join(UPWARDS | DOWNWARDS),
    "most": "|".join(UPWARDS | DOWNWARDS),
}


def size(title: str, text: str) -> int:
    return len(re.findall(r"\d|\w+|\W", f"{title}\n{text}")) // 2


@pytest.fixture(scope="module")
def profiles() -> dict[Split, list[tuple[str, Any]]]:
    found: dict[Split, list[tuple[str, Any]]] = {split: [] for split in SPLITS}
    for document, country, profile in read_factbook_profiles():
        found[split_of(document, RECIPE)].append((country, profile))
    return found


@pytest.fixture(scope="module")
def rows(profiles: dict[Split, list[tuple[str, Any]]]) -> dict[Split, list[dict[str, Any]]]:
    return {
        "train": list(many_questions(profiles["train"], "train", SETTINGS, size)),
        "validation": list(
            many_questions(profiles["validation"], "validation", ManySettings(70, (8, 12), 999, 1.0), size)
        ),
        "test": list(many_questions(profiles["test"], "test", SETTINGS, size)),
    }


def table(row: dict[str, Any]) -> dict[str, dict[str, str]]:
    """{country: {line: what it says}}"""
    return {
        passage["title"]: dict(line.split(": ", 1) for line in passage["text"].splitlines())
        for passage in row["passages"]
    }


def number(said: str, line: str) -> float:
    digits = re.findall(r"\d[\d,]*(?:\.\d+)?", said)
    # A day stands before the year.
    return float(digits[-1 if line == "Independence" else 0].replace(",", ""))


def has(country: dict[str, str], what: str) -> bool:
    if match := re.fullmatch(r"a (.+) (above|below|after|before) (.+)", what):
        line, value = LINES[match[1]], number(match[3], "")
        own = number(country[line], line)
        assert own != value, what
        return (own > value) == (match[2] in UPWARDS)
    if match := re.fullmatch(r'the word "(.+)" in the government type', what):
        words = country["Government type"].lower().replace("(", " ").replace(",", " ").replace("/", " ").split()
        return match[1] in words
    if match := re.fullmatch(r"(\S+ law) in the legal system", what):
        return f" {match[1].lower()} " in re.sub(r"[^\w-]", " ", f" {country['Legal system'].lower()} ")
    if match := re.fullmatch(r'a capital beginning with "(.)"', what):
        return country["Capital"].startswith(match[1])
    if what in ("a coast", "no coast"):
        return ("landlocked" in country["Coastline"]) == (what == "no coast")
    if match := re.fullmatch(r"dual citizenship (not )?recognized", what):
        return (country["Dual citizenship recognized"] == "yes") == (match[1] is None)
    if match := re.fullmatch(r"a (\w+) legislature", what):
        return country["Legislature"] == match[1]
    for ending, line in {"region": "Region", "currency": "Currency", "time zone": "Time zone"}.items():
        if what.endswith(f" as {ending}"):
            return country[line] == what.removesuffix(f" as {ending}")
    for pattern, line in {
        r"(.+) as official language": "Official languages", r"(.+) as a national color": "National colors",
        r"a border with (.+)": "Border countries",
    }.items():  # fmt: skip
        if match := re.fullmatch(pattern, what):
            return match[1] in country[line].split(", ")
    raise AssertionError(what)


def read(row: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The wording that a question is in, and what fills it."""
    countries = "|".join(re.escape(with_article(passage["title"])) for passage in row["passages"])
    filled = {**FILLED, "a": countries, "b": countries}
    for wording in WORDINGS[row["kind"]]:
        pattern = re.sub(
            r"\\\{(\w+)\\\}", lambda word: f"(?P<{word[1]}>{filled.get(word[1], '.+')})", re.escape(wording)
        )
        if match := re.fullmatch(pattern, row["question"], re.IGNORECASE):
            return wording, match.groupdict()
    raise AssertionError(row["question"])


def meant(said: str, countries: dict[str, dict[str, str]]) -> str:
    (found,) = [country for country in countries if with_article(country).lower() == said.lower()]
    return found


def best(countries: dict[str, dict[str, str]], name: str, word: str) -> str:
    line = LINES[name]
    ranked = sorted(countries, key=lambda one: number(countries[one][line], line), reverse=word in UPWARDS)
    first, second = (number(countries[one][line], line) for one in ranked[:2])
    assert first != second, "a tie was asked for"
    return ranked[0]


def answer(row: dict[str, Any]) -> tuple[str, set[str] | None]:
    """The answer, and the countries that are needed for it; None: all."""
    countries, (_, words) = table(row), read(row)
    match row["kind"]:
        case "compare" | "same":
            pair = {meant(words[place], countries) for place in "ab"}
            assert len(pair) == 2
            if row["kind"] == "same":
                said = {countries[one][SAME[words["name"]]] for one in pair}
                return "yes" if len(said) == 1 else "no", pair
            return best({one: countries[one] for one in pair}, words["name"], words["more"]), pair
        case "extreme":
            return best(countries, words["name"], words["most"]), None
        case "count":
            return str(sum(has(one, words["what"]) for one in countries.values())), None
        case "list":
            return ", ".join(sorted(one for one, said in countries.items() if has(said, words["what"]))), None
        case "which":
            named = {meant(one, countries) for one in re.split(r", | or ", words["names"])}
            assert len(named) == 3
            (own,) = [one for one in named if has(countries[one], words["what"])]
            return own, named
        case "extreme_of":
            those = {one: said for one, said in countries.items() if has(said, words["what"])}
            assert 1 < len(those) < len(countries)
            return best(those, words["name"], words["most"]), None
    raise AssertionError(row["kind"])


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_and_what_is_needed_for_it_follow_from_the_passages(
    rows: dict[Split, list[dict[str, Any]]], split: Split
) -> None:
    for row in rows[split]:
        found, needed = answer(row)
        assert row["answers"][0] == found, row["id"]
        titles = [passage["title"] for passage in row["passages"]]
        assert {titles[place] for place in row["gold"]} == (needed or set(titles)), row["id"]
        assert len(set(titles)) == len(titles)


def test_no_country_and_no_wording_of_training_is_held_out(
    rows: dict[Split, list[dict[str, Any]]], profiles: dict[Split, list[tuple[str, Any]]]
) -> None:
    for split in SPLITS:
        known = {name for name, _ in profiles[split]}
        assert {passage["title"] for row in rows[split] for passage in row["passages"]} <= known
    for split in SPLITS:
        for row in rows[split]:
            held_out = WORDINGS[row["kind"]].index(read(row)[0]) >= len(WORDINGS[row["kind"]]) - HELD_OUT
            assert held_out == (split != "train"), row["question"]


def test_swapped_contexts_say_other_values_and_the_others_what_the_factbook_says(
    rows: dict[Split, list[dict[str, Any]]], profiles: dict[Split, list[tuple[str, Any]]]
) -> None:
    own = {
        name: "\n".join(text for texts in profile.values() for text in texts.values())
        for name, profile in profiles["test"]
    }
    agreed: dict[bool, list[bool]] = {False: [], True: []}
    for row in rows["test"]:
        for country, said in table(row).items():
            for value in said.values():
                agreed["/swapped-" in row["id"]].append(all(part in own[country] for part in value.split(", ")))
    assert all(agreed[False]) and len(agreed[False]) > 500
    assert sum(agreed[True]) < 0.5 * len(agreed[True])


def test_contexts_keep_to_their_bounds_and_kinds_are_even(rows: dict[Split, list[dict[str, Any]]]) -> None:
    for row in rows["train"]:
        assert 10 <= len(row["passages"]) <= 20
        assert sum(size(**passage) for passage in row["passages"]) <= SETTINGS.room
    kinds = Counter(row["kind"] for row in rows["train"])
    assert set(kinds) == set(KINDS)
    assert max(kinds.values()) < 1.3 * min(kinds.values())
    said = Counter(row["answers"][0] for row in rows["train"] if row["kind"] == "same")
    assert 0.25 < said["yes"] / said.total() < 0.75


def test_rows_are_fixed_by_the_seed(profiles: dict[Split, list[tuple[str, Any]]]) -> None:
    def asked(seed: int) -> list[dict[str, Any]]:
        return list(many_questions(profiles["test"], "test", ManySettings(30, seed=seed), size))

    assert asked(1) == asked(1)
    assert asked(1) != asked(2)


def test_too_little_room_is_refused(profiles: dict[Split, list[tuple[str, Any]]]) -> None:
    with pytest.raises(RefragError, match=r"no 10 of these 24 countries .* in 40 positions"):
        next(many_questions(profiles["test"], "test", ManySettings(1, room=40), size))


def test_the_verb_writes_a_question_file_says_what_it_holds_and_overwrites_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFRAG_ROOT", str(ROOT))
    command = ["questions", "many", "--model", "tiny", "--count", "14", "--out", str(tmp_path / "many.jsonl")]
    made = refrag(*command)
    assert "14 questions on 2 contexts of 24 countries" in made.stdout and "| extreme_of | 2 |" in made.stdout
    written = read_questions(tmp_path / "many.jsonl")
    assert {one.category for one in written} == set(KINDS) and len({one.document for one in written}) == 2
    assert all(one.closed and one.split == "test" for one in written)
    assert "is there already" in refused(*command)
    assert "give the least and the most" in refused(*command[:-1], tmp_path / "new.jsonl", "--passages", "20,10")


def test_the_page_s_examples_are_what_is_made(profiles: dict[Split, list[tuple[str, Any]]]) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    made = [*many_questions(profiles["test"], "test", ManySettings(21), size)]
    shown = [row for row in made if row["document_id"] == "many/test/0-2"]
    assert len(shown) == len(KINDS)
    for row in shown:
        assert f"| {row['kind']} | {row['question']} | {row['answers'][0]} | {len(row['gold'])} |" in page
