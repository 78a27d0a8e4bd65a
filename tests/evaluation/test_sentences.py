"""The sentences nearest to a question: how passages are split, what is taken, and within which budget."""

import pytest
from transformers import PreTrainedTokenizerFast

from refrag_platform.evaluation.sentences import nearest_sentences, split_passage
from refrag_platform.model.prompts import content_ids, passage_text
from refrag_platform.model.refrag import RefragModel
from refrag_platform.store.relevance import PassageRelevance
from refrag_platform.store.retriever import HashedWords

PASSAGES = (
    ("Oman", "The coast is long. Its capital is Muscat, a port. Dates are grown inland."),
    ("Chad", 'It has no coast. "Dry," they say. The lake shrinks.\nRain is rare.'),
)


@pytest.fixture(scope="module")
def tokenizer(model: RefragModel) -> PreTrainedTokenizerFast:
    return model.tokenizer


@pytest.mark.parametrize(
    "passage", [*PASSAGES, ("", "One. Two."), ("T", ""), ("T", "no end"), ("é", "Où? Là! 日本。 X.")]
)
def test_a_passage_is_its_title_and_its_sentences(tokenizer: PreTrainedTokenizerFast, passage: tuple[str, str]) -> None:
    title, sentences = split_passage(tokenizer, 0, *passage)
    tokens = [*title, *(token for one in sentences for token in one.token_ids)]
    assert tokens == content_ids(tokenizer, passage_text(*passage))


def test_sentences_end_where_sentences_end(tokenizer: PreTrainedTokenizerFast) -> None:
    title, sentences = split_passage(tokenizer, 7, *PASSAGES[1])
    assert [one.text for one in sentences] == [
        "It has no coast.",
        '"Dry," they say.',
        "The lake shrinks.",
        "Rain is rare.",
    ]
    assert {one.passage for one in sentences} == {7}
    assert tokenizer.decode(title) == "Chad\n"
    assert [tokenizer.decode(one.token_ids).strip() for one in sentences] == [one.text for one in sentences]


def nearest(tokenizer: PreTrainedTokenizerFast, question: str, tokens: int) -> list[int]:
    split = [split_passage(tokenizer, number, *passage) for number, passage in enumerate(PASSAGES)]
    return nearest_sentences(split, PassageRelevance(HashedWords()), question, PASSAGES, tokens)


def test_the_sentence_that_answers_is_read_under_its_title(tokenizer: PreTrainedTokenizerFast) -> None:
    title, sentences = split_passage(tokenizer, 0, *PASSAGES[0])
    room = len(title) + len(sentences[1].token_ids)
    said = tokenizer.decode(nearest(tokenizer, "What is the capital of Oman?", room))
    assert said.split("\n") == ["Oman", " Its capital is Muscat, a port."]
    # Of the other passage, when the question is about that one.
    assert "lake shrinks" in tokenizer.decode(nearest(tokenizer, "Which lake shrinks in Chad?", room))


def test_sentences_stand_in_the_order_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """The nearest sentence is the last one of the first passage; it is not read first."""
    said = tokenizer.decode(nearest(tokenizer, "Where in Oman are dates grown inland?", 60))
    assert said.index("Oman\n") < said.index("capital") < said.index("Dates")


def test_the_budget_is_filled_exactly(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = [token for passage in PASSAGES for token in content_ids(tokenizer, passage_text(*passage))]
    for question in ("Where are dates grown?", ""):
        for tokens in range(len(whole) + 1):
            assert len(nearest(tokenizer, question, tokens)) == tokens
        assert nearest(tokenizer, question, len(whole) + 5) == whole
    # A summary asks nothing: the text from its start.
    assert nearest(tokenizer, "", 9) == whole[:9]
