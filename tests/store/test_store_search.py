"""Search over real Lance tables: what is found, and what is refused."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from refrag_platform.artifacts.digest import file_digest
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.store.relevance import PassageRelevance
from refrag_platform.store.retriever import HashedWords
from refrag_platform.store.table import ChunkStore
from tests.encoders import least_cosine
from tests.store.conftest import ODD_ID, PASSAGES, Made, text_of


@pytest.fixture(scope="module")
def store(made: Made) -> ChunkStore:
    return ChunkStore.open(made.content, expect_encoder=made.model.encoder_digest())


def test_the_passage_with_the_question_s_words_comes_first(store: ChunkStore) -> None:
    hits = store.search("Which country has the capital Town417?", 5)
    assert len(hits) == 5
    assert (hits[0].id, hits[0].title, hits[0].text) == ("c417/0", "Country417", text_of(417))
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_titles_are_searched_too(store: ChunkStore) -> None:
    assert store.search("Country123", 1)[0].id == "c123/0"


def test_a_hit_brings_its_own_chunks_and_vectors(made: Made, store: ChunkStore) -> None:
    for hit in store.search("Town99 Town350 Town7", 8):
        with torch.inference_mode():
            vectors = made.model.encode(torch.tensor(hit.token_ids).long())
        assert hit.text in made.model.tokenizer.decode(hit.token_ids[hit.token_ids >= 0])
        assert least_cosine(hit.vectors, vectors) > 0.999


@pytest.mark.parametrize("query", ["'; DROP TABLE", 'a "quoted AND (Town3', "*:~^+-", "Ж 中文 \U0001f600"])
def test_any_characters_may_be_asked(store: ChunkStore, query: str) -> None:
    store.search(query, 3)


def test_a_query_without_words_finds_nothing(store: ChunkStore) -> None:
    assert store.search("  ", 3) == []


def test_more_passages_than_there_are_gives_all(store: ChunkStore) -> None:
    assert len(store.search("capital people speak", 5 * PASSAGES)) == PASSAGES


def test_no_passages_can_not_be_asked_for(store: ChunkStore) -> None:
    with pytest.raises(RefragError, match="is 0; it must be at least 1"):
        store.search("Town1", 0)


def test_a_passage_is_found_by_its_id(store: ChunkStore) -> None:
    assert store.passage(ODD_ID).text == text_of(0)
    with pytest.raises(RefragError, match="no passage 'c9999/0'"):
        store.passage("c9999/0")


def test_one_store_serves_many_threads(store: ChunkStore) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: store.search(f"Town{number}", 1)[0].id, range(40, 60)))
    assert found == [f"c{number}/0" for number in range(40, 60)]


def test_a_store_of_another_encoder_is_refused_with_the_command_that_mends_it(made: Made) -> None:
    with pytest.raises(ArtifactError) as refused:
        ChunkStore.open(made.content, expect_encoder="0123456789")
    message = str(refused.value)
    assert "0123456789" in message
    assert made.model.encoder_digest() in message
    assert "refrag run chunks --model tiny" in message


def test_a_retriever_other_than_the_store_s_is_refused(made: Made) -> None:
    other = HashedWords()
    other.digest = "another"
    with pytest.raises(ArtifactError, match=r"hash \(hash-1-512\).*hash \(another\)"):
        ChunkStore.open(made.content, retriever=other)


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"store\.json is missing"):
        ChunkStore.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "fault"), [("{", "is damaged"), ('{"format": 9}', "has format 9"), ('{"format": 1}', "is damaged")]
)
def test_a_damaged_description_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(ArtifactError, match=fault):
        ChunkStore.open(tmp_path)


def test_tables_are_built_once_under_the_content_s_hash(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / file_digest(made.content / "store.json")
    left = folder.with_name(f".{folder.name}.partial")
    left.mkdir()  # by a killed build
    (left / "half").touch()
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda _: ChunkStore.open(made.content, tables=tmp_path), range(3)))
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == [folder]
    assert not (folder / "half").exists()
    built = folder.stat().st_mtime_ns
    ChunkStore.open(made.content, tables=tmp_path)
    assert folder.stat().st_mtime_ns == built
    assert all(store.search("Town5", 1)[0].id == "c5/0" for store in stores)


def test_other_content_gets_other_tables(made: Made, tmp_path: Path) -> None:
    content = tmp_path / "content"
    shutil.copytree(made.content, content)
    description = (content / "store.json").read_text()
    ChunkStore.open(content, tables=tmp_path / "lance")
    (content / "store.json").write_text(description + "\n")
    ChunkStore.open(content, tables=tmp_path / "lance")
    assert len([path for path in (tmp_path / "lance").iterdir() if not path.name.startswith(".")]) == 2


def test_content_that_lacks_chunks_is_refused(made: Made, tmp_path: Path) -> None:
    content = tmp_path / "content"
    shutil.copytree(made.content, content)
    text = (content / "store.json").read_text()
    (content / "store.json").write_text(text.replace(f'"passages": {PASSAGES}', f'"passages": {PASSAGES + 1}'))
    with pytest.raises(ArtifactError, match=f"holds {PASSAGES} passages.*says {PASSAGES + 1}"):
        ChunkStore.open(content, tables=tmp_path / "lance")


def test_a_score_is_the_cosine_that_embedding_it_now_gives(store: ChunkStore) -> None:
    question = "Where do trains run?"
    hits = store.search(question, 3)
    assert hits
    expected = PassageRelevance(store.retriever).of(question, [(hit.title, hit.text) for hit in hits])
    assert [hit.score for hit in hits] == expected
    assert store.passage(hits[0].id).score is None


def test_a_follow_up_is_searched_with_what_was_said_before(store: ChunkStore) -> None:
    before = "Has Country12 the capital Town12?"
    alone, together = store.search("And of Country340?", 3), store.search("And of Country340?", 3, before)
    assert together[0].id == "c340/0"
    assert "c12/0" in [hit.id for hit in together] and "c12/0" not in [hit.id for hit in alone]


def test_another_subject_is_found_whatever_was_said_before(store: ChunkStore) -> None:
    before = "Which town is the capital of Country12? How many people speak Language3?"
    assert store.search("Country340 has the capital Town340", 1, before)[0].id == "c340/0"


def test_what_was_said_before_is_read_to_a_limit(store: ChunkStore) -> None:
    before = "Town77 " * 1000 + "Town12 " * 100
    found = [hit.id for hit in store.search("And of Country340?", 8, before)]
    assert "c12/0" in found and "c77/0" not in found
    # A question as long as that speaks for itself.
    long = "Country340 " * 60
    assert [hit.id for hit in store.search(long, 8, before)] == [hit.id for hit in store.search(long, 8)]
