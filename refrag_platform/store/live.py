"""A working copy of a store, to which documents are added and from which they are deleted while it is served.

REFRAG_STORE/
    edits.sqlite        what was changed: the only thing here that can't be made anew (store/edits.py)
    tables/HASH/        search tables of the store with that content hash, and the edits in them up to number `applied`;
                        those of another store are removed

The store's own content stays as it is. An edit is recorded first, then it enters the tables by one commit of Lance: a
search sees all of it or nothing, and a kill between the two is made good when the tables are opened again. Tables of
another store, after a new release, begin with all edits.
"""

from __future__ import annotations

import copy
import logging
import shutil
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
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
from refrag_platform.store.edits import EDITS_FILE, Edit, Edits, digest_of
from refrag_platform.store.retriever import Retriever
from refrag_platform.store.table import PASSAGE_COLUMNS, ChunkStore, open_tables

if TYPE_CHECKING:
    import lancedb

logger = logging.getLogger("refrag.serving")
TABLES = "tables"
# Chunks encoded at once, and edits that enter new tables by one commit.
BATCH_CHUNKS, BATCH_EDITS = 64, 256
# Rows that no index knows are searched one by one, and each commit is a file more: now and then they are put together.
COMMITS_PER_TIDYING = 100
# Files of old versions stay until no search that began with them can last.
KEPT_VERSIONS = timedelta(hours=1)


@dataclass(frozen=True)
class StoredDocument:
    """A document as it is found: its passages in order, (id, title, text)."""

    id: str
    passages: list[tuple[str, str, str]]


class LiveStore(ChunkStore):
    """The tables of a store with edits in them. Safe to share between threads; one process holds the folder."""

    def __init__(
        self,
        description: StoreDescription,
        retriever: Retriever,
        tables: lancedb.DBConnection,
        edits: Edits,
        model: RefragModel,
        passage_tokens: int,
        lock: TextIO,
        like: LiveStore | None = None,
    ) -> None:
        """Args: lock: held as long as the store is open. like: as of `open_live`."""
        super().__init__(description, retriever, tables)
        self.edits, self._passage_tokens, self._lock = edits, passage_tokens, lock
        if like is None:
            # A tokenizer keeps state while it reads, and this one is not the one that reads questions.
            self._model, self._writing = copy.copy(model), threading.Lock()
            self._model.tokenizer = copy.deepcopy(model.tokenizer)
        else:
            self._model, self._writing = like._model, like._writing
        self._applied_file = Path(tables.uri) / "applied"
        self._commits = 0
        self._behind = False  # whether the tables lack what is recorded

    @classmethod
    def open_live(
        cls,
        content: Path,
        folder: Path,
        model: RefragModel,
        passage_tokens: int,
        base: Path | None = None,
        retriever: Retriever | None = None,
        unchanged: Path | None = None,
        like: LiveStore | None = None,
    ) -> LiveStore:
        """The working copy in `folder` of the store in `content`; made if it isn't there.

        Args:
            model: whose encoder made the store. passage_tokens: the longest passage, as the corpus was cut.
            base, retriever, unchanged: as of `open_tables`.
            like: another working copy of this store: the two share a tokenizer, which is large, and change in turn.

        Raises:
            RefragError: another process has it, or it can't be written; ArtifactError as of `open_tables`.
        """
        lock = _only_process(folder)
        with ExitStack() as on_failure:
            on_failure.callback(lock.close)
            edits = Edits(folder / EDITS_FILE)
            on_failure.callback(edits.close)
            for applied in (folder / TABLES).glob("[!.]*/applied"):
                if (_number_in(applied) or 0) > edits.last():
                    logger.warning("%s holds edits that %s lacks: made anew", applied.parent, EDITS_FILE)
                    _remove(applied.parent)
            opened = open_tables(content, model.encoder_digest(), folder / TABLES, base, retriever, unchanged)
            store = cls(*opened, edits, model, passage_tokens, lock, like)
            with store._writing:
                store._catch_up()
            for tables in (folder / TABLES).glob("[!.]*"):
                if tables.is_dir() and tables != store._applied_file.parent:  # of another release
                    _remove(tables)
            on_failure.pop_all()
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
            self._make_good()
            passages = self._passages_of(edits)
            self._record(edits, self._encoded(passages))
        return [
            StoredDocument(edit.id, [(one.id, one.title, one.text) for one in passages if one.document_id == edit.id])
            for edit in edits
        ]

    def delete(self, document_id: str) -> bool:
        """Delete a document, the store's own too; False: there is none."""
        with self._writing:
            self._make_good()
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
        number = self.edits.record(edits, [digest_of(one.text) for one in self._passages_of(before)])
        try:
            self._commit(names, rows)
        except Exception:
            self._behind = True
            self.edits.restore(before, names)
            self._behind = False
            raise
        self._applied(number)
        self._commits += 1
        if self._commits % COMMITS_PER_TIDYING == 0:
            self._tidy()

    def _make_good(self) -> None:
        """Apply what was recorded and neither applied nor taken back, on a full disk say: no later edit may pass it."""
        if self._behind:
            self._catch_up()
            self._behind = False

    def _catch_up(self) -> None:
        """Apply what the tables lack: after a kill the last edit, in tables of another store all."""
        applied = _number_in(self._applied_file)
        if applied is None:
            self._delete_copies()
        with Progress("apply edits", self.edits.count_since(applied or 0), "documents") as progress:
            for edits in self.edits.since(applied or 0, BATCH_EDITS):
                self._commit([edit.id for edit in edits], self._encoded(self._passages_of(edits)))
                self._applied(edits[-1].number)
                progress.update(len(edits))
        indexes = [self._passages.index_stats(index.name) for index in self._passages.list_indices()]
        if any(stats and stats.num_unindexed_rows for stats in indexes):
            self._tidy()

    def _delete_copies(self) -> None:
        """Delete the store's documents that were exported from here, as they are or as they were: what is live is not
        to be found twice, and what was deleted or replaced not at all."""
        digests = self.edits.former()
        for edits in self.edits.since(0, BATCH_EDITS):
            digests.update(digest_of(passage.text) for passage in self._passages_of(edits))
        if not digests:
            return
        alike: set[str] = set()
        other: set[str] = set()
        for batch in self._passages.search().select(["document_id", "text"]).to_batches():
            for name, text in zip(batch["document_id"].to_pylist(), batch["text"].to_pylist(), strict=True):
                (alike if digest_of(text) in digests else other).add(name)
        if copies := sorted(alike - other):
            self._commit(copies, None)

    def _commit(self, names: Sequence[str], rows: pa.Table | None) -> None:
        """In the place of these documents' passages, those of `rows`."""
        listed = f"document_id IN ({', '.join(map(_quoted, names))})"
        if rows is None:
            self._passages.delete(listed)
            return
        merge = self._passages.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        kept = ", ".join(map(_quoted, rows["id"].to_pylist()))
        if self._passages.count_rows(f"{listed} AND id NOT IN ({kept})"):
            # Reads the whole table, where the others go by the index of ids: only for documents that lose passages.
            merge = merge.when_not_matched_by_source_delete(listed)
        merge.execute(rows)

    def _tidy(self) -> None:
        """Let the indexes take new rows in and put small files together; searches are right without it, and slower."""
        try:
            for table in (self._passages, self._chunks):  # Lance keeps the order of rows: chunks keep their places
                table.optimize(cleanup_older_than=KEPT_VERSIONS)
        except Exception:
            logger.exception("%s could not be tidied", self._applied_file.parent)

    def _applied(self, number: int) -> None:
        """Say which edits the tables hold. Applying them again changes nothing, so it may fail."""
        try:
            write_text(self._applied_file, f"{number}\n")
        except OSError:
            logger.exception("%s could not be written", self._applied_file)

    def _passages_of(self, edits: Sequence[Edit]) -> list[CorpusPassage]:
        """Passages of the edits that delete nothing."""
        documents = [plain_document(one.id, one.title, "live", one.text) for one in edits if one.text is not None]
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
        return _table(
            passage_schema(self.retriever.dim),
            {
                "id": [one.id for one in passages],
                "document_id": [one.document_id for one in passages],
                "title": [one.title for one in passages],
                "text": [one.text for one in passages],
                "chunk_start": first + np.cumsum(counts) - counts,
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


def _number_in(applied: Path) -> int | None:
    """The last edit that tables hold; None: they may lack any."""
    try:
        return int(applied.read_text())
    except (FileNotFoundError, ValueError):  # ValueError: a power cut emptied it
        return None


def _remove(tables: Path) -> None:
    """Remove tables under a name that isn't theirs: a kill leaves no half of them."""
    partial = tables.with_name(f".{tables.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(tables.rename(partial))


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _only_process(folder: Path) -> TextIO:
    try:
        return lock_file(folder / ".lock", wait=False)
    except BlockingIOError:
        raise RefragError(f"another process serves {folder}; one folder is for one server") from None
    except OSError as error:
        raise RefragError(f"{folder} can't be written ({error}); give REFRAG_STORE another folder") from None
