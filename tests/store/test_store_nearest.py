"""A store large enough for an approximate index: it finds what a scan finds, and what was edited since."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from refrag_platform.bench.search import write_neighbours
from refrag_platform.files import write_json
from refrag_platform.store import nearest as nearest_module
from refrag_platform.store import table
from refrag_platform.store.build import build_chunks
from refrag_platform.store.live import LiveStore
from refrag_platform.store.table import ChunkStore
from tests.object_store import BUCKET, object_store
from tests.store.conftest import PASSAGES, Made, text_of

LARGE = 6000
QUESTIONS = [
    f"Which country has the capital Town{number}, and who speaks Language{number % 7}?" for number in range(40)
]


@pytest.fixture
def indexed(made: Made, tmp_path: Path) -> Path:
    """The content of `made`'s store, as it is but for an index."""
    return with_index(made.content, tmp_path / "indexed")


def with_index(content: Path, target: Path) -> Path:
    shutil.copytree(content, target)
    facts = json.loads((target / "store.json").read_text())
    write_json(target / "store.json", facts | {"index_from": 256})
    return target


def has_index(store: ChunkStore) -> bool:
    return "retrieval_vector" in {column for index in store._passages.list_indices() for column in index.columns}


def ids(store: ChunkStore, query: str, k: int = 3) -> list[str]:
    return [hit.document_id for hit in store.search(query, k)]


def test_an_index_finds_what_a_scan_finds_and_scores_it_alike(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest_module, "ROWS_PER_PARTITION", 100)  # so that half of the partitions are not looked into
    write_neighbours(made.content, tmp_path / "scanned", LARGE, seed=0)
    scan, index = (
        ChunkStore.open(content, tables=tmp_path / "lance")
        for content in (tmp_path / "scanned", with_index(tmp_path / "scanned", tmp_path / "indexed"))
    )
    assert has_index(index) and not has_index(scan) and index.place != scan.place
    recalls = []
    for question in QUESTIONS:
        (vector,) = index.retriever.encode([question])
        exact, near = (list(nearest_module.nearest(store._passages, vector, 80))[:20] for store in (scan, index))
        recalls.append(len({*exact} & {*near}) / 20)
        scores = {hit.id: hit.score for hit in scan.search(question, 20)}
        both = [hit for hit in index.search(question, 20) if hit.id in scores]
        assert len(both) >= 10 and all(hit.score == scores[hit.id] for hit in both)
    assert sum(recalls) / len(recalls) >= 0.95


def test_the_recipe_says_from_which_size_on_there_is_an_index(made: Made, tmp_path: Path) -> None:
    context = made.context(tmp_path / "made")
    chunks = context.recipe.chunks.model_copy(update={"index_from": PASSAGES})
    build_chunks(replace(context, recipe=context.recipe.model_copy(update={"chunks": chunks})))
    assert has_index(ChunkStore.open(context.out, tables=tmp_path / "lance"))
    assert not has_index(ChunkStore.open(made.content, tables=tmp_path / "lance"))


def test_what_is_added_is_found_at_once_and_what_is_deleted_never(made: Made, indexed: Path, tmp_path: Path) -> None:
    def opened() -> LiveStore:
        return LiveStore.open_live(indexed, tmp_path / "live", made.model, 128)

    store = opened()
    assert has_index(store) and ids(store, text_of(417), 1) == ["c417"]
    (long,) = store.put([("new", "Atlantis", "It is far. " * 200)])
    assert len(long.passages) > 1
    store.put([("new", "Atlantis", "The capital is Poseidonis."), ("c12", "Country12", "It has sunk into the sea.")])
    assert store.delete("c417")
    for again in range(3):
        if again == 1:  # the index takes the new rows in
            store._tidy()
        if again == 2:
            store.close()
            store = opened()
        (vector,) = store.retriever.encode(["Poseidonis is the capital"])
        assert next(iter(nearest_module.nearest(store._passages, vector, 5))).startswith("new")
        assert ids(store, "It is far, Poseidonis Atlantis", PASSAGES + 9).count("new") == 1
        assert store.search("sunk into the sea", 1)[0].text == "It has sunk into the sea."
        assert (
            "c417" not in ids(store, text_of(417), PASSAGES)
            and len(store.search(text_of(12), 2 * PASSAGES)) == PASSAGES
        )
    store.close()


def test_tables_that_were_built_without_an_index_are_scanned(
    made: Made, indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(table, "build_index", lambda passages: None)
        ChunkStore.open(indexed, tables=tmp_path / "lance")
    store = ChunkStore.open(indexed, tables=tmp_path / "lance")
    assert not has_index(store) and ids(store, text_of(417), 1) == ["c417"]


def test_tables_in_an_object_store_have_the_index_too(
    made: Made, indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ChunkStore.open(indexed, tables=tmp_path / "lance")
    with object_store(monkeypatch):
        there = ChunkStore.open(indexed, tables=f"s3://{BUCKET}/stores")
        assert has_index(there)
        hits, wanted = there.search(text_of(7), 20), here.search(text_of(7), 20)
        assert [(hit.id, hit.score) for hit in hits] == [(hit.id, hit.score) for hit in wanted]


def test_tables_are_opened_without_reading_the_content_they_are_made_of(
    made: Made, build: Callable[[str], Path], tmp_path: Path
) -> None:
    content = build("made")
    ChunkStore.open(content, tables=tmp_path / "lance")
    for path in content.iterdir():
        if path.name != "store.json":
            path.unlink()
    assert ids(ChunkStore.open(content, tables=tmp_path / "lance"), text_of(5), 1) == ["c5"]


def test_a_store_from_before_there_were_digests_has_its_tables_by_the_hash_of_its_files(
    made: Made, build: Callable[[str], Path], tmp_path: Path
) -> None:
    content = build("made")
    facts = json.loads((content / "store.json").read_text())
    write_json(content / "store.json", {name: facts[name] for name in facts if name not in {"digests", "index_from"}})
    places = {ChunkStore.open(content, tables=tmp_path / "lance").place}
    (content / "added").touch()
    places.add(ChunkStore.open(content, tables=tmp_path / "lance").place)
    assert len(places) == 2 and ChunkStore.open(made.content, tables=tmp_path / "lance").place not in places
