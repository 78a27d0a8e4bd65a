"""Copies of questions with another answer: question, passage and answer still agree."""

from typing import Any

import pytest

from refrag_platform.corpus.swapping import swapped


def question(country: str, answer: str, field: str = "capital", text: str | None = None) -> dict[str, Any]:
    told = f"name: {answer}; {answer}ville is near" if text is None else text
    return {
        "id": f"{country}/{field}",
        "question": f"What is the capital of {country}?",
        "answers": [answer, answer.upper()],
        "passages": [{"title": "Elsewhere", "text": f"{answer} is not here"}, {"title": country, "text": told}],
        "gold": [1],
        "field": field,
        "document_id": country,
    }


def test_a_copy_has_another_answer_of_its_field_in_its_gold_passage_alone() -> None:
    own = [question("Chad", "Ndj"), question("Mali", "Bam"), question("Peru", "1821", "independence")]
    made = list(swapped(own, copies=2))
    assert [row["id"] for row in made] == [
        "Chad/capital/swapped-1", "Mali/capital/swapped-1", "Chad/capital/swapped-2", "Mali/capital/swapped-2",
    ]  # fmt: skip
    first = made[0]
    assert (first["question"], first["answers"], first["gold"]) == (own[0]["question"], ["Bam", "BAM"], [1])
    assert [passage["text"] for passage in first["passages"]] == ["Ndj is not here", "name: Bam; Ndjville is near"]
    # What it was made from stays as it was.
    assert own[0]["passages"][1]["text"] == "name: Ndj; Ndjville is near"


def test_copies_differ_where_there_is_a_choice_and_are_the_same_each_time() -> None:
    own = [question(f"country {number}", f"City{number}") for number in range(20)]
    made = list(swapped(own, copies=4))
    assert made == list(swapped(own, copies=4))
    answers = {row["answers"][0] for row in made if row["document_id"] == "country 3"}
    assert len(answers) > 1 and "City3" not in answers


@pytest.mark.parametrize(
    "alone",
    [
        question("Chad", "Ndj", "demonym"),
        question("Chad", "Ndj", text="Ndjville alone"),
        question("Chad", "6%", text="4.6% and 6%5"),
        question("Chad", "bam"),
    ],
    ids=["a field of its own", "no whole word", "part of a number", "the same answer in other letters"],
)
def test_what_can_not_be_swapped_is_left_out(alone: dict[str, Any]) -> None:
    made = [row["document_id"] for row in swapped([alone, question("Mali", "Bam", text="Bam")], copies=1)]
    assert "Chad" not in made
