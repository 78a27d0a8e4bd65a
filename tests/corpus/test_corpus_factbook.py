"""Country profiles become titled passages and questions whose answers stand in the gold passage."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from refrag_platform.corpus import factbook
from refrag_platform.corpus.documents import Document
from refrag_platform.corpus.facts import FIELDS, with_article
from refrag_platform.corpus.splits import SPLITS, split_of
from refrag_platform.recipes import CorpusRecipe

RECIPE = CorpusRecipe.model_validate({"sources": [{"kind": "factbook"}]})


@pytest.fixture(scope="module")
def documents() -> dict[str, Document]:
    return {document.id: document for document in factbook.read_factbook(RECIPE, None)}


@pytest.fixture(scope="module")
def questions(tiny_corpus: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        split: [json.loads(line) for line in (tiny_corpus / f"questions/{split}.jsonl").read_text().splitlines()]
        for split in SPLITS
    }


def test_the_whole_book_is_read_with_unique_names(documents: dict[str, Document]) -> None:
    assert len(documents) > 250
    titles = Counter(document.title for document in documents.values())
    assert set(titles.values()) == {1} and "none" not in titles
    text = "".join(document.text for document in documents.values())
    assert not re.search(r"</?(?:strong|br|em|p)\b|&[a-z]+;|\xa0", text)


def test_sections_are_titled_fields(documents: dict[str, Document]) -> None:
    france = documents["factbook/fr"]
    texts = {section.title: france.text[section.start : section.end] for section in france.sections}
    assert texts["France - Communications: Internet country code"].startswith("metropolitan France - .fr;")
    assert "\nFrance - Geography: Climate\n" in france.text


def test_known_answers_are_found(documents: dict[str, Document]) -> None:
    facts = {fact.field: fact for fact in documents["factbook/fr"].facts}
    assert facts["capital"].answers == ("Paris",)
    assert facts["highest_point"].answers[0] == "Mont Blanc"
    assert facts["official_language"].answers[0] == "French"
    assert facts["currency"].answers == ("euros", "EUR")
    assert "France" in facts["population"].question
    assert "independence" not in facts  # the profile says that there is no such date


def test_each_answer_stands_in_its_section(documents: dict[str, Document]) -> None:
    for document in documents.values():
        for fact in document.facts:
            section = document.sections[fact.section]
            assert fact.answers[0] in document.text[section.start : section.end], fact
            assert 0 < len(fact.answers[0]) <= 60 and fact.answers[0] == fact.answers[0].strip()
            assert "{" not in fact.question


def test_every_field_is_asked_about_many_countries(documents: dict[str, Document]) -> None:
    counts = Counter(fact.field for document in documents.values() for fact in document.facts)
    assert len(counts) == len(FIELDS) >= 8
    assert min(counts.values()) > 50, counts


def test_names_take_an_article_inside_a_sentence() -> None:
    names = ("France", "The Gambia", "Netherlands", "Cayman Islands", "United States", "Oman")
    assert [with_article(name) for name in names] == [
        "France", "the Gambia", "the Netherlands", "the Cayman Islands", "the United States", "Oman",
    ]  # fmt: skip


def test_a_part_has_every_split_and_many_regions() -> None:
    found = factbook.countries()
    part = factbook.choose_part(found, RECIPE, 24)
    assert len({country.code for country in part}) == 24
    assert {split_of(f"factbook/{country.code}", RECIPE) for country in part} == set(SPLITS)
    assert len({country.region for country in part}) >= 9
    larger = factbook.choose_part(found, RECIPE, 60)
    assert {country.code for country in part} < {country.code for country in larger}


def test_gold_passages_hold_the_answer(questions: dict[str, list[dict[str, Any]]]) -> None:
    for split, rows in questions.items():
        assert rows, split
        for row in rows:
            (gold,) = row["gold"]
            assert row["answers"][0] in row["passages"][gold]["text"]
            assert row["document_id"].startswith("factbook/") and row["question"]
            assert len(row["passages"]) == 4
            assert len({(passage["title"], passage["text"]) for passage in row["passages"]}) == 4


def test_at_least_eight_fields_are_asked(questions: dict[str, list[dict[str, Any]]]) -> None:
    assert len({row["field"] for row in questions["train"]}) >= 8
    assert len({row["gold"][0] for row in questions["train"]}) == 4, "the gold passage's place must give nothing away"


def test_questions_and_distractors_stay_in_their_split(
    questions: dict[str, list[dict[str, Any]]], tiny_corpus: Path
) -> None:
    table = pq.read_table(tiny_corpus / "passages.parquet").to_pylist()
    split_of_passage = {(row["title"], row["text"]): row["split"] for row in table}
    for split, rows in questions.items():
        for row in rows:
            assert {split_of_passage[p["title"], p["text"]] for p in row["passages"]} == {split}


def test_distractors_are_near_misses(questions: dict[str, list[dict[str, Any]]]) -> None:
    row = questions["train"][0]
    gold = row["passages"][row["gold"][0]]["title"]
    country, field = gold.split(" - ", 1)
    titles = [passage["title"] for passage in row["passages"] if passage["title"] != gold]
    assert any(title.endswith(field) for title in titles)
    assert any(title.startswith(f"{country} - ") for title in titles)
