"""Search over a chunk store: Lance tables built from its content, in a folder named by the content's hash.

Tables are a cache, never tracked: Lance names its files at random. Delete data/NAME/lance whenever you like.

    store = ChunkStore.open(Path("data/tiny/chunks/content"))
    hits = store.search("What is the capital of Malta?", k=8)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from numpy.typing import NDArray

from refrag_platform.artifacts.digest import file_digest, folder_digest
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.files import lock_file, whole
from refrag_platform.store.connection import connect
from refrag_platform.store.content import DESCRIPTION_FILE, PASSAGES_FILE, StoreDescription
from refrag_platform.store.nearest import build_index, nearest
from refrag_platform.store.objects import open_or_build, searched
from refrag_platform.store.query import search_words
from refrag_platform.store.ranking import Ranked, rank, texts_to_ask, ways_to_ask
from refrag_platform.store.retriever import Retriever, load_retriever

if TYPE_CHECKING:
    import lancedb
    import pyarrow as pa

ROWS_PER_BATCH = 16_384
# Ranked per result wanted, of each search.
CANDIDATES_PER_HIT = 4
TABLES_FOLDER = "lance"
PASSAGE_COLUMNS = ["id", "document_id", "title", "text", "chunk_start", "chunk_count"]


@dataclass(frozen=True)
class Hit:
    """A retrieved passage with its chunks: token_ids [n, k] int32, -1 = padding; vectors [n, dim] float16.

    score: its cosine similarity to the query that found it, -1 to 1 (store/ranking.py); None without a query.
    follows: what was said before the query makes it nearer.
    """

    id: str
    document_id: str
    title: str
    text: str
    score: float | None
    token_ids: NDArray[np.int32]
    vectors: NDArray[np.float16]
    follows: bool = False


class ChunkStore:
    """The tables of one store, open for search. Safe to share between threads."""

    def __init__(self, description: StoreDescription, retriever: Retriever, tables: lancedb.DBConnection) -> None:
        self.description, self.retriever, self.place = description, retriever, str(tables.uri)
        with searched(self.place):
            self._passages, self._chunks = tables.open_table("passages"), tables.open_table("chunks")

    @classmethod
    def open(
        cls,
        content: Path,
        expect_encoder: str | None = None,
        tables: Path | str | None = None,
        base: Path | None = None,
        retriever: Retriever | None = None,
    ) -> ChunkStore:
        """Open the store in `content`, building its tables first if they are not there.

        Args, Raises: as of `open_tables`.
        """
        return cls(*open_tables(content, expect_encoder, tables, base, retriever))

    def search(self, query: str, k: int, before: str = "") -> list[Hit]:
        """The k best passages by vector search and full-text search together, best first.

        Args:
            before: what was said before the query, without which it may not be understood.

        Raises:
            QueryTooLong: the query has more different words than full-text search may be asked for.
        """
        if k < 1:
            raise RefragError(f"the number of passages is {k}; it must be at least 1")
        texts = texts_to_ask(query, before)
        most = k * CANDIDATES_PER_HIT
        vectors: dict[str, NDArray[np.float32]] = {}
        asked = list(self.retriever.encode(texts))
        with searched(self.place):
            ways = ways_to_ask(asked, [self._by_words(text, most, vectors) for text in texts])
            for way in ways:
                vectors.update(nearest(self._passages, way.vector, most))
        return self._hits(rank(ways, vectors)[:k])

    def _by_words(self, text: str, most: int, vectors: dict[str, NDArray[np.float32]]) -> dict[str, float]:
        """Passages with words of a text, each with its share of the best BM25 score; `vectors` gets theirs."""
        words = search_words(text)
        if not words:
            return {}
        search: Any = self._passages.search(words, query_type="fts", fts_columns=["title", "text"])
        rows = search.select(["id", "retrieval_vector", "_score"]).limit(most).to_list()
        vectors.update((row["id"], np.asarray(row["retrieval_vector"], np.float32)) for row in rows)
        best = max((row["_score"] for row in rows), default=0.0)
        return {row["id"]: row["_score"] / best for row in rows} if best > 0 else {}

    def passage(self, passage_id: str) -> Hit:
        """The passage with this id, without a score.

        Raises:
            RefragError: the store has none.
        """
        hits = self._hits([Ranked(passage_id, None, False)])
        if not hits:
            raise RefragError(f"the store has no passage {passage_id!r}")
        return hits[0]

    def _hits(self, ranked: Sequence[Ranked]) -> list[Hit]:
        """Passages by id, in the order given, with their chunks; one take from each table."""
        if not ranked:
            return []
        names = ", ".join("'" + one.id.replace("'", "''") + "'" for one in ranked)
        with searched(self.place):
            wanted = self._passages.search().where(f"id IN ({names})").select(PASSAGE_COLUMNS).limit(len(ranked))
            rows = {row["id"]: row for row in wanted.to_list()}
            present = [(rows[one.id], one) for one in ranked if one.id in rows]
            chunks = self._take([(row["chunk_start"], row["chunk_count"]) for row, _ in present])
        return [
            Hit(
                row["id"],
                row["document_id"],
                row["title"],
                row["text"],
                one.similarity,
                token_ids,
                vectors,
                one.follows,
            )
            for (row, one), (token_ids, vectors) in zip(present, chunks, strict=True)
        ]

    def _take(self, ranges: list[tuple[int, int]]) -> list[tuple[NDArray[np.int32], NDArray[np.float16]]]:
        """Chunks of (start, count) ranges.

        A Lance take of 8 passages costs 2 ms, next to 10 ms of search. A memory map of the content's files
        would save most of it, at the price of a second reader and of files that must stay beside the tables.
        """
        numbers = sorted({start + offset for start, count in ranges for offset in range(count)})
        if not numbers:
            return []
        columns = ["chunk", "token_ids", "vector"]
        table = self._chunks.take_offsets(numbers).select(columns).to_arrow().combine_chunks()
        # Lance promises no order.
        order = np.argsort(table["chunk"].to_numpy())
        token_ids = _matrix(table["token_ids"], self.description.chunk_size)[order]
        vectors = _matrix(table["vector"], self.description.vector_dim)[order]
        place = {number: row for row, number in enumerate(numbers)}
        slices = [slice(place[start], place[start] + count) if count else slice(0) for start, count in ranges]
        return [(token_ids[where], vectors[where]) for where in slices]


def open_tables(
    content: Path,
    expect_encoder: str | None = None,
    tables: Path | str | None = None,
    base: Path | None = None,
    retriever: Retriever | None = None,
    unchanged: Path | None = None,
) -> tuple[StoreDescription, Retriever, lancedb.DBConnection]:
    """What the store in `content` is made of; its tables are built first if they are not there.

    Args:
        expect_encoder: digest of the encoder of the model that will read the vectors.
        tables: where tables of all versions lie; default data/NAME/lance for data/NAME/chunks/content. A text is
            an object store's URL (store/objects.py).
        base: the recipe's folder, for a retriever given by `path:`; default: the working directory.
        retriever: one that is loaded already, instead of the one that store.json names.
        unchanged: where tables lie that nobody changes; those that are missing in `tables` are copied from there.

    Raises:
        ArtifactError: there is no store, another encoder made its chunk vectors, or another
            retriever its retrieval vectors.
        RefragError: the tables can't be read or built there.
    """
    description = StoreDescription.read(content)
    if expect_encoder is not None:
        description.require_encoder(expect_encoder)
    retriever = retriever or load_retriever(description.retriever, base or Path.cwd())
    if retriever.digest != description.retriever_digest:
        raise ArtifactError(
            f"the store's retrieval vectors are of {description.retriever} "
            f"({description.retriever_digest}), the retriever here is {retriever.name} "
            f"({retriever.digest}); make the store again with "
            f"`refrag run chunks --model {description.model}`"
        )
    if isinstance(tables, str):
        return description, retriever, open_or_build(f"{tables}/{_version(content)}", partial(_build, content))
    tables = tables or content.parent.parent / TABLES_FOLDER
    return description, retriever, connect(str(_tables(content, tables, unchanged)))


def _matrix(column: Any, width: int) -> NDArray[Any]:
    """A column of fixed-size lists as [rows, width], without a copy."""
    values = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    return values.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)


def _version(content: Path) -> str:
    """The name of a content's tables: a hash of all of it.

    store.json has those of the other files, which are not read again: a large store's take minutes.
    """
    if StoreDescription.read(content).digests:
        return file_digest(content / DESCRIPTION_FILE)
    return folder_digest(content).removesuffix(".dir")


def _tables(content: Path, parent: Path, unchanged: Path | None) -> Path:
    """The folder of this content's tables, built if it is not there; half-built ones never get its name."""
    folder = parent / _version(content)
    if folder.is_dir():
        return folder
    with _only_builder(parent):
        for left in parent.glob(".*.partial"):  # by a killed build, of this store or an older one
            shutil.rmtree(left)
        # Another process may have built it while this one waited.
        if not folder.is_dir():
            with whole(folder) as building:
                if unchanged is not None and (source := unchanged / folder.name).is_dir():
                    _link_files(source, building)
                else:
                    _build(content, connect(str(building)))
    return folder


def _link_files(source: Path, target: Path) -> None:
    """A second name for each file, or a copy on another disk: Lance never writes into a file that is there.

    Folders are made, not copied: those of a package may be read-only.
    """
    for file in filter(Path.is_file, source.rglob("*")):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, place)
        except OSError:
            shutil.copy2(file, place)


def _only_builder(parent: Path) -> TextIO:
    """Hold the builders' lock."""
    try:
        return lock_file(parent / ".lock")
    except OSError as error:
        raise RefragError(f"search tables can't be written to {parent} ({error}); give another folder") from None


def _build(content: Path, database: lancedb.DBConnection) -> None:
    """Both tables and their indexes."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from lancedb.index import FTS, BTree

    description = StoreDescription.read(content)
    stored = pq.ParquetFile(content / PASSAGES_FILE)
    passages = database.create_table(
        "passages", data=stored.iter_batches(batch_size=ROWS_PER_BATCH), schema=stored.schema_arrow
    )
    chunk_schema = pa.schema(
        [
            ("chunk", pa.int64()),
            ("token_ids", pa.list_(pa.int32(), description.chunk_size)),
            ("vector", pa.list_(pa.float16(), description.vector_dim)),
            ("encoder_digest", pa.string()),
        ]
    )
    chunks = database.create_table(
        "chunks", data=_chunk_batches(content, description, chunk_schema), schema=chunk_schema
    )
    if (passages.count_rows(), chunks.count_rows()) != (description.passages, description.chunks):
        raise ArtifactError(
            f"{content} holds {passages.count_rows()} passages and {chunks.count_rows()} chunks, its "
            f"store.json says {description.passages} and {description.chunks}; make the store again with "
            f"`refrag run chunks --model {description.model} --force`"
        )
    for column in ("id", "document_id"):
        passages.create_index(column, config=BTree())
    for column in ("title", "text"):
        passages.create_index(column, config=FTS())
    if description.passages >= description.index_from:
        build_index(passages)


def _chunk_batches(content: Path, description: StoreDescription, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The chunk files' rows in order, some thousands at a time."""
    import pyarrow as pa
    from safetensors import safe_open

    first = 0
    for name, size in description.files.items():
        with safe_open(content / name, framework="np") as tensors:
            token_ids, vectors = tensors.get_slice("token_ids"), tensors.get_slice("vectors")
            for begin in range(0, size, ROWS_PER_BATCH):
                end = min(begin + ROWS_PER_BATCH, size)
                ids, rows = token_ids[begin:end], vectors[begin:end]
                yield pa.RecordBatch.from_arrays(
                    [
                        pa.array(np.arange(first + begin, first + end)),
                        pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), description.chunk_size),
                        pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), description.vector_dim),
                        pa.array([description.encoder_digest] * len(ids)),
                    ],
                    schema=schema,
                )
        first += size
