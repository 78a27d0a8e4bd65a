"""Tokens are those of the whole text; passages are bounded, end at sentences and lose nothing."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from refrag_platform.corpus import tokens as tokens_module
from refrag_platform.corpus.documents import Document, DocumentSection, plain_document
from refrag_platform.corpus.passages import CorpusPassage, cut_passages
from refrag_platform.corpus.tokens import tokenize
from tests.conftest import ROOT

TEXT = "\n\n".join(
    f"The {name} sailed from Genoa in 18{number:02}. Its captain, an old man; its crew, nobody knows! Café 1,234."
    for number, name in enumerate(["Aurora", "Beagle", "Cutty Sark", "Endeavour", "Vega"] * 8)
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / "models/tiny/tokenizer.json"))


def passages(document: Document, tokenizer: Tokenizer, limit: int) -> list[CorpusPassage]:
    return [p for d, tokens in tokenize([document], tokenizer) for p in cut_passages(d, tokens, limit)]


@pytest.mark.parametrize("block", [50, 333])
def test_blocks_have_the_tokens_of_the_whole(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(tokens_module, "BLOCK_CHARACTERS", block)
    monkeypatch.setattr(tokens_module, "BATCH_CHARACTERS", 1000)
    documents = [plain_document(str(n), "Ships", "test", TEXT[: 900 * n + 1]) for n in range(5)]
    for document, tokens in tokenize(documents, tokenizer):
        assert tokens.ids.tolist() == tokenizer.encode(document.text).ids
        assert tokens.ends[-1] == len(document.text)


@pytest.mark.parametrize("limit", [16, 40, 128])
def test_passages_are_bounded_and_lose_nothing(tokenizer: Tokenizer, limit: int) -> None:
    found = passages(plain_document("d", "Ships", "test", TEXT), tokenizer, limit)
    assert max(len(tokenizer.encode(passage.text).ids) for passage in found) <= limit
    assert "".join("".join(p.text.split()) for p in found) == "".join(TEXT.split())
    assert [passage.id for passage in found] == [f"d:{number}" for number in range(len(found))]


def test_passages_end_where_sentences_end(tokenizer: Tokenizer) -> None:
    found = passages(plain_document("d", "Ships", "test", TEXT), tokenizer, 128)
    assert all(passage.text[-1] in ".!" for passage in found)


def test_a_word_longer_than_a_passage_is_cut(tokenizer: Tokenizer) -> None:
    found = passages(plain_document("d", "Noise", "test", "q7" * 500), tokenizer, 20)
    assert "".join(passage.text for passage in found) == "q7" * 500
    assert max(len(tokenizer.encode(passage.text).ids) for passage in found) <= 20


def test_passages_stay_inside_their_titled_section(tokenizer: Tokenizer) -> None:
    text = "First\nOne. Two.\n\nSecond\nThree."
    sections = (DocumentSection("First", 6, 15), DocumentSection("Second", 24, 30))
    found = passages(Document("d", "D", "test", text, sections), tokenizer, 64)
    assert [(p.title, p.text, p.section) for p in found] == [("First", "One. Two.", 0), ("Second", "Three.", 1)]


def test_an_empty_folder_of_documents_gives_no_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert list(tokenize([], tokenizer)) == []
