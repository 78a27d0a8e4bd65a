"""How search scales with the passages of a store: recall, time, memory and disk, with each index beside none.

A corpus' own passages are taken with their vectors and, up to the size that is asked for, random neighbours of them:
u cos(a) + r sin(a), where u is a passage's vector, r a random direction and cos(a) uniform in NEAREST. Texts are those
of the passages that they lie around. Each has one small chunk, since chunks are only read once passages are found.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from refrag_platform.artifacts.digest import file_digest
from refrag_platform.bench.resident import resident_bytes
from refrag_platform.progress import Progress, waiting
from refrag_platform.store.connection import connect
from refrag_platform.store.content import PASSAGES_FILE, StoreDescription, chunk_file, passage_schema
from refrag_platform.store.nearest import build_index, nearest
from refrag_platform.store.retriever import Retriever
from refrag_platform.store.table import CANDIDATES_PER_HIT, ROWS_PER_BATCH, ChunkStore

if TYPE_CHECKING:
    import pyarrow as pa

NONE = "none"
ASKED = ("nearest", "search")
WANTED, WARMUP = 20, 10
# Cosine similarity of a neighbour to its passage.
NEAREST = (0.6, 1.0)
CHUNK_TOKENS, CHUNK_DIM = 1, 8


@dataclass
class Embedded:
    """A retriever that knows its texts: a process that measures memory holds no encoder."""

    name: str
    digest: str
    dim: int
    vectors: dict[str, NDArray[np.float32]]

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.stack([self.vectors[text] for text in texts])


def bench_search(
    content: Path,
    retriever: Retriever,
    questions: Sequence[str],
    sizes: Sequence[int],
    kinds: Sequence[str],
    folder: Path | None,
    seed: int,
    show: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """A row for each size and index, `none` first.

    Args:
        content: of a chunk store, whose passages are taken. sizes: passages; kinds: of store/nearest.py.
        folder: where stores lie while they are measured. show: is given each row.
    """
    import lancedb

    with waiting(f"{len(questions):,} questions are embedded"):
        vectors = dict(zip(questions, retriever.encode(questions), strict=True))
    embedded = Embedded(retriever.name, retriever.digest, retriever.dim, vectors)
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=folder, prefix="refrag-search-") as place:
            for row in _measured(content, Path(place), embedded, size, kinds, seed):
                show(row)
                rows.append(row)
    description = StoreDescription.read(content)
    return {
        "benchmark": "search",
        "model": description.model,
        "retriever": retriever.name,
        "dim": retriever.dim,
        "real_passages": description.passages,
        "neighbours": NEAREST,
        "questions": len(questions),
        "wanted": WANTED,
        "device": f"CPU, {os.cpu_count()} cores",
        "lancedb": lancedb.__version__,
        "seed": seed,
        "rows": rows,
    }


def _measured(
    source: Path, place: Path, embedded: Embedded, size: int, kinds: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """Rows of one size: each index in tables and a process of its own, each question asked of all in turn."""
    content = place / "content"
    write_neighbours(source, content, size, seed)
    rows: list[dict[str, Any]] = []
    with ExitStack() as processes:
        builder, *servers = (
            processes.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for _ in range(len(kinds) + 2)
        )
        for kind in (NONE, *kinds):
            with waiting(f"{size:,} passages, index {kind}: built"):
                built = builder.submit(_build, content, place, embedded, kind).result()
            rows.append({"passages": size, "index": kind, "build_seconds": built})
        for row, server in zip(rows, servers, strict=True):
            row |= server.submit(_open, content, place / str(row["index"]), embedded).result()
        answered, times = _in_turns(servers, list(embedded.vectors))
        for row, server, ids, asked in zip(rows, servers, answered, times, strict=True):
            recalls = [len({*exact} & {*near}) / len(exact) for exact, near in zip(answered[0], ids, strict=True)]
            row["recall"] = float(np.mean(recalls))
            for name, milliseconds in asked.items():
                row[f"{name}_ms"] = {f"p{share}": float(np.percentile(milliseconds, share)) for share in (50, 95)}
            row["searched_rss"] = server.submit(resident_bytes).result()
    return rows


def _in_turns(
    servers: Sequence[ProcessPoolExecutor], texts: Sequence[str]
) -> tuple[list[list[list[str]]], list[dict[str, list[float]]]]:
    """Of each server the ids nearest to each text, and milliseconds by what was asked."""
    answered: list[list[list[str]]] = [[] for _ in servers]
    times: list[dict[str, list[float]]] = [{name: [] for name in ASKED} for _ in servers]
    with Progress("ask", len(texts), "questions") as progress:
        warmup = texts[:WARMUP]
        for number, text in enumerate([*warmup, *texts]):
            for server, ids, asked in zip(servers, answered, times, strict=True):
                for name in ASKED:
                    milliseconds, answer = server.submit(_ask, name, text).result()
                    if number >= len(warmup):
                        asked[name].append(milliseconds)
                        if name == "nearest":
                            ids.append(answer)
            progress.update(number >= len(warmup))
    return answered, times


# In a process that serves one store: that store.
_served: list[tuple[ChunkStore, Embedded]] = []


def _build(content: Path, place: Path, embedded: Embedded, kind: str) -> float:
    """Seconds for all tables, and for those with an index, which share their files, for that alone."""
    begun, tables = time.perf_counter(), place / kind
    if kind == NONE:
        ChunkStore.open(content, tables=tables, retriever=embedded)
    else:
        shutil.copytree(place / NONE, tables, copy_function=os.link)
        (folder,) = (path for path in tables.iterdir() if path.is_dir())
        build_index(connect(str(folder)).open_table("passages"), kind)
    return time.perf_counter() - begun


def _open(content: Path, tables: Path, embedded: Embedded) -> dict[str, Any]:
    """Open the store that this process serves; its size on disk and in memory."""
    row: dict[str, Any] = {"library_rss": resident_bytes()}
    begun = time.perf_counter()
    store = ChunkStore.open(content, tables=tables, retriever=embedded)
    row |= {"open_seconds": time.perf_counter() - begun, "open_rss": resident_bytes()}
    _served.append((store, embedded))
    indexes = {config.name: config.size_bytes for config in store._passages.list_indices()}
    row["index_bytes"] = sum(size or 0 for name, size in indexes.items() if name.startswith("retrieval_vector"))
    row["disk_bytes"] = sum(path.stat().st_size for path in Path(store.place).rglob("*") if path.is_file())
    return row


def _ask(name: str, text: str) -> tuple[float, list[str]]:
    """Milliseconds, and ids: of the nearest passages, or of the whole search's, the question's vector known."""
    ((store, embedded),) = _served
    begun = time.perf_counter()
    if name == "nearest":
        ids = list(nearest(store._passages, embedded.vectors[text], WANTED * CANDIDATES_PER_HIT))
    else:
        ids = [hit.id for hit in store.search(text, WANTED)]
    return (time.perf_counter() - begun) * 1e3, ids[:WANTED]


def write_neighbours(source: Path, content: Path, size: int, seed: int) -> None:
    """The content of a store of `size` passages: those in `source`, then neighbours of theirs."""
    import pyarrow.parquet as pq

    known, stored = StoreDescription.read(source), pq.read_table(source / PASSAGES_FILE).combine_chunks()
    content.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    schema = passage_schema(known.retriever_dim)
    files: dict[str, int] = {}
    with pq.ParquetWriter(content / PASSAGES_FILE, schema) as writer, Progress("write passages", size) as progress:
        for begin in range(0, size, ROWS_PER_BATCH):
            numbers = np.arange(begin, min(begin + ROWS_PER_BATCH, size))
            writer.write_table(_neighbours(stored, numbers, generator).cast(schema))
            name = chunk_file(len(files))
            chunks: dict[str, NDArray[Any]] = {
                "token_ids": np.zeros((len(numbers), CHUNK_TOKENS), np.int32),
                "vectors": np.zeros((len(numbers), CHUNK_DIM), np.float16),
            }
            save_file(chunks, content / name)
            files[name] = len(numbers)
            progress.update(len(numbers))
    digests = {name: file_digest(content / name) for name in (PASSAGES_FILE, *files)}
    described = replace(known, passages=size, chunks=size, files=files, digests=digests, index_from=size + 1)
    replace(described, chunk_size=CHUNK_TOKENS, vector_dim=CHUNK_DIM).write(content)


def _neighbours(stored: pa.Table, numbers: NDArray[np.int64], generator: np.random.Generator) -> pa.Table:
    """Passages of these numbers: the store's own first, then neighbours."""
    import pyarrow as pa

    is_stored = numbers < len(stored)
    rows = stored.take(np.where(is_stored, numbers, generator.integers(0, len(stored), len(numbers))))
    dim = rows["retrieval_vector"].type.list_size
    vectors = rows["retrieval_vector"].combine_chunks().flatten().to_numpy().reshape(-1, dim)
    near = generator.uniform(*NEAREST, (len(numbers), 1)).astype(np.float32)
    near[is_stored] = 1.0
    random = generator.standard_normal(vectors.shape, np.float32)
    random -= (random * vectors).sum(1, keepdims=True) * vectors
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    vectors = near * vectors + np.sqrt(1 - near**2) * random
    columns = {
        "id": [f"{name}~{number}" for name, number in zip(rows["id"].to_pylist(), numbers, strict=True)],
        "chunk_start": numbers,
        "chunk_count": np.ones(len(numbers), np.int32),
        "retrieval_vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim),
    }
    return pa.table({name: columns.get(name, rows[name]) for name in rows.column_names})
