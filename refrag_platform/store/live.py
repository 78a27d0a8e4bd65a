"""A working copy of a store, to which documents are added and from which they are deleted while it is served.

REFRAG_STORE/
    edits.sqlite        what was changed: the only thing here that can't be made anew (store/edits.py)
    tables/HASH/        search tables of the store with that content hash, and the edits in them up to number `applied`

The store's own content stays as it is. An edit is recorded first, then it enters the tables by one commit of Lance: a
search sees all of it or nothing, and a kill between the two is made good when the tables are opened again. Tables of
another store, after a new release, begin with all edits.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import pyarrow as pa

from refrag_platform.corpus.documents import plain_document
from refrag_platform.corpus.passages import CorpusPassage, cut_passages
from refrag_platform.corpus.text import is_visible, normalize
from refrag_platform.corpus.tokens import tokenize
from refrag_platform.errors import RefragError
from refrag_platform.files import lock_file, write_text
from refrag_platform.model.refrag import RefragModel
from refrag_platform.progress import Progress
from refrag_platform.store.build import encode_passages
from refrag_platform.store.content import StoreDescription, passage_schema
from refrag_platform.store.edits import EDITS_FILE, Edit, Edits
from refrag_platform.store.retriever import Retriever
from refrag_platform.store.table import PASSAGE_COLUMNS, ChunkStore

if TYPE_CHECKING:
    import lancedb

logger = logging.getLogger("refrag.serving")
TABLES = "tables"
# Chunks encoded at once, and edits that enter new tables by one commit.
BATCH_CHUNKS, BATCH_EDITS = 64, 256
# Rows that no index knows are searched one by one; indexes take them in from time to time.
COMMITS_PER_INDEXING = 100


@dataclass(frozen=True)
class StoredDocument:
    """A document as it is found: its passages in order, (id, title, text)."""

    id: str
    passages: list[tuple[str, str, str]]


class LiveStore(ChunkStore):
    """The tables of a store with edits in them. Safe to share between threads; one process holds the folder."""

    edits: Edits
    _model: RefragModel
    _passage_tokens: int
    _lock: TextIO

    def __init__(self, description: StoreDescription, retriever: Retriever, tables: lancedb.DBConnection) -> None:
        super().__init__(description, retriever, tables)
        self._applied_file = Path(tables.uri) / "applied"
        self._writing = threading.Lock()
        self._commits = 0

    @classmethod
    def open_live(
        cls,
        content: Path,
        folder: Path,
        model: RefragModel,
        passage_tokens: int,
        base: Path | None = None,
        retriever: Retriever | None = None,
    ) -> LiveStore:
        """The working copy in `folder` of the store in `content`; made if it isn't there.

        Args:
            model: whose encoder made the store. passage_tokens: the longest passage, as the corpus was cut.
            base, retriever: as of `ChunkStore.open`.

        Raises:
            RefragError: another process has it, or it can't be written; ArtifactError as of `ChunkStore.open`.
        """
        lock = _only_process(folder)
        digest = model.encoder_digest()
        opened = cls.open(content, expect_encoder=digest, tables=folder / TABLES, base=base, retriever=retriever)
        store = cast(LiveStore, opened)
        store._lock, store._passage_tokens = lock, passage_tokens
        # A tokenizer keeps state while it reads, and this one is not the one that reads questions.
        store._model = copy.copy(model)
        store._model.tokenizer = copy.deepcopy(model.tokenizer)
        store.edits = Edits(folder / EDITS_FILE)
        store._catch_up()
        return store

    def put(self, documents: Sequence[tuple[str, str, str]]) -> list[StoredDocument]:
        """Add documents (id, title, text), or replace those with these ids: all of them or, if it fails, none.

        Raises:
            RefragError: a text has nothing to read in it, or its vectors don't fit float16.
        """
        edits = [Edit(name, normalize(title).replace("\n", " "), normalize(text)) for name, title, text in documents]
        for edit in edits:
            if not is_visible(edit.text or ""):
                raise RefragError(f"document {edit.id!r} has no text in it")
        with self._writing:
            passages = self._passages_of(edits)
            self._record(edits, self._encoded(passages))
        return [
            StoredDocument(edit.id, [(one.id, one.title, one.text) for one in passages if one.document_id == edit.id])
            for edit in edits
        ]

    def delete(self, document_id: str) -> bool:
        """Delete a document, the store's own too; False: there is none."""
        with self._writing:
            if self.document(document_id) is None:
                return False
            self._record([Edit(document_id, "", None)], None)
        return True

    def document(self, document_id: str) -> StoredDocument | None:
        """A document of the store or added to it; None: there is none."""
        wanted = self._passages.search().where(f"document_id = {_quoted(document_id)}").select(PASSAGE_COLUMNS)
        rows = wanted.limit(self._passages.count_rows()).to_list()
        rows.sort(key=lambda row: row["chunk_start"])
        return StoredDocument(document_id, [(row["id"], row["title"], row["text"]) for row in rows]) if rows else None

    def close(self) -> None:
        """Let another process have the folder."""
        self.edits.close()
        self._lock.close()

    def _record(self, edits: Sequence[Edit], rows: pa.Table | None) -> None:
        """Record edits and apply them; where the latter fails, nothing has happened."""
        names = [edit.id for edit in edits]
        before = self.edits.of(names)
        number = self.edits.record(edits)
        try:
            self._commit(names, rows)
        except Exception:
            self.edits.restore(before, names)
            raise
        self._applied(number)
        self._index()

    def _catch_up(self) -> None:
        """Apply what the tables lack: after a kill the last edit, in tables of another store all."""
        applied = int(self._applied_file.read_text()) if self._applied_file.is_file() else None
        waiting = self.edits.since(applied or 0)
        with Progress("apply edits", len(waiting), "documents") as progress:
            for start in range(0, len(waiting), BATCH_EDITS):
                edits = waiting[start : start + BATCH_EDITS]
                passages = self._passages_of([edit for edit in edits if edit.text is not None])
                copies = self._copies(passages) if applied is None else []
                self._commit([*(edit.id for edit in edits), *copies], self._encoded(passages))
                self._applied(edits[-1].number)
                progress.update(len(edits))

    def _copies(self, passages: Sequence[CorpusPassage]) -> list[str]:
        """Documents of the store with a text that was exported from here, so that it is not found twice."""
        texts = {passage.text for passage in passages}
        alike: set[str] = set()
        other: set[str] = set()
        for batch in self._passages.search().select(["document_id", "text"]).to_batches():
            for name, text in zip(batch["document_id"].to_pylist(), batch["text"].to_pylist(), strict=True):
                (alike if text in texts else other).add(name)
        return sorted(alike - other)

    def _commit(self, names: Sequence[str], rows: pa.Table | None) -> None:
        """In the place of these documents' passages, those of `rows`."""
        listed = f"document_id IN ({', '.join(map(_quoted, names))})"
        if rows is None:
            self._passages.delete(listed)
        else:
            merge = self._passages.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            merge.when_not_matched_by_source_delete(listed).execute(rows)

    def _index(self) -> None:
        """Let the indexes take new rows in from time to time; searches are right without it, and slower."""
        self._commits += 1
        if self._commits % COMMITS_PER_INDEXING == 0:
            try:
                self._passages.optimize()
            except Exception:
                logger.exception("the indexes of %s could not take new passages in", self._applied_file.parent)

    def _applied(self, number: int) -> None:
        write_text(self._applied_file, f"{number}\n")

    def _passages_of(self, edits: Sequence[Edit]) -> list[CorpusPassage]:
        documents = [plain_document(edit.id, edit.title, "live", edit.text or "") for edit in edits]
        cut = tokenize(documents, self._model.tokenizer.backend_tokenizer)
        return [one for document, tokens in cut for one in cut_passages(document, tokens, self._passage_tokens)]

    def _encoded(self, passages: Sequence[CorpusPassage]) -> pa.Table | None:
        """Rows of the passages, whose chunks are in the table of chunks: nobody looks at them before the rows are."""
        if not passages:
            return None
        texts = [(one.title, one.text) for one in passages]
        named = f"{passages[0].id} to {passages[-1].id}"
        arrays = encode_passages(self._model, self.retriever, texts, BATCH_CHUNKS, named)
        # Chunks are found by their places, so rows of this table are only ever added.
        first, counts = self._chunks.count_rows(), arrays["chunk_counts"]
        self._chunks.add(
            _table(
                self._chunks.schema,
                {
                    "chunk": range(first, first + len(arrays["vectors"])),
                    "token_ids": arrays["token_ids"],
                    "vector": arrays["vectors"],
                    "encoder_digest": [self.description.encoder_digest] * len(arrays["vectors"]),
                },
            )
        )
        starts = [first + int(counts[:place].sum()) for place in range(len(counts))]
        return _table(
            passage_schema(self.retriever.dim),
            {
                "id": [one.id for one in passages],
                "document_id": [one.document_id for one in passages],
                "title": [one.title for one in passages],
                "text": [one.text for one in passages],
                "chunk_start": starts,
                "chunk_count": counts,
                "retrieval_vector": arrays["retrieval_vectors"],
            },
        )


def _table(schema: pa.Schema, columns: dict[str, Any]) -> pa.Table:
    """Columns of a table; two-dimensional arrays are lists of one length."""

    def column(field: pa.Field) -> pa.Array:
        values = columns[field.name]
        if getattr(values, "ndim", 1) == 2:
            return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1]).cast(field.type)
        return pa.array(values, field.type)

    return pa.Table.from_arrays([column(field) for field in schema], schema=schema)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _only_process(folder: Path) -> TextIO:
    try:
        return lock_file(folder / ".lock", wait=False)
    except BlockingIOError:
        raise RefragError(f"another process serves {folder}; one folder is for one server") from None
    except OSError as error:
        raise RefragError(f"{folder} can't be written ({error}); give REFRAG_STORE another folder") from None
