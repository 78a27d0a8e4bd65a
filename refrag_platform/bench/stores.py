"""The store that a question is searched in: a real chunk store, or on a bare machine an exact search of its vectors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from refrag_platform.model.loading import default_device
from refrag_platform.model.refrag import RefragModel
from refrag_platform.progress import waiting
from refrag_platform.recipes import Recipe
from refrag_platform.store.build import PartWriter, describe, encode_passages, write_store
from refrag_platform.store.content import DESCRIPTION_FILE, PASSAGES_FILE
from refrag_platform.store.retriever import Retriever
from refrag_platform.store.table import ChunkStore, Hit

if TYPE_CHECKING:
    from refrag_platform.corpus.question import Passage

CHUNK_STORE = "chunk store: question embedded on the CPU, vector and full-text search, chunk vectors fetched"
EXACT = "exact search in memory: question embedded on {device}, one product with all passages' vectors; no full text"


class Store(Protocol):
    """What `ChunkStore` offers a question."""

    def search(self, query: str, k: int) -> list[Hit]:
        """The k nearest passages with their chunks, nearest first."""
        ...

    def passage(self, passage_id: str) -> Hit:
        """The passage of this id (`passage_id`), without a score."""
        ...


class ExactStore:
    """All passages in memory: retrieval vectors on the device, chunks and their float16 vectors on the host."""

    def __init__(
        self,
        model: RefragModel,
        retriever: Retriever,
        passages: Sequence[Passage],
        batch_size: int,
        device: torch.device,
    ) -> None:
        encoded = encode_passages(model, retriever, passages, batch_size, "of the questions")
        ends = np.cumsum(encoded["chunk_counts"])[:-1]
        cut = zip(np.split(encoded["token_ids"], ends), np.split(encoded["vectors"], ends), strict=True)
        self._hits = [
            Hit(passage_id(passage), "", *passage, None, token_ids, vectors)
            for passage, (token_ids, vectors) in zip(passages, cut, strict=True)
        ]
        self._places = {hit.id: place for place, hit in enumerate(self._hits)}
        self._vectors = torch.from_numpy(encoded["retrieval_vectors"]).to(device)
        self._retriever = retriever

    def search(self, query: str, k: int) -> list[Hit]:
        asked = torch.from_numpy(self._retriever.encode([query])[0]).to(self._vectors.device)
        return [self._hits[place] for place in (self._vectors @ asked).topk(min(k, len(self._hits))).indices.tolist()]

    def passage(self, passage_id: str) -> Hit:
        return self._hits[self._places[passage_id]]


def passage_id(passage: Passage) -> str:
    """The same for the same title and text."""
    return hashlib.sha256(json.dumps(passage).encode()).hexdigest()[:16]


def open_store(
    folder: Path, model_dir: Path, retriever: Retriever, recipe: Recipe, base: Path, passages: Sequence[Passage]
) -> tuple[Store, str]:
    """A store of these passages with the vectors of a model's encoder, and how it searches.

    Args:
        folder: where chunk stores lie; one that was made of the same passages and encoders is taken.
        retriever: the recipe's. base: the recipe's folder.
    """
    device = default_device()
    model = RefragModel.load(model_dir)
    model.encoder.to(device)
    if not (find_spec("lancedb") and find_spec("pyarrow")):
        with waiting(f"{len(passages):,} passages are encoded, to be searched in memory: there is no lancedb here"):
            store = ExactStore(model, retriever, passages, recipe.chunks.batch_size, device)
        return store, EXACT.format(device=device.type)
    named = [passage_id(passage) for passage in passages]
    wanted = describe(recipe.name, model, retriever, len(passages))
    key = json.dumps([wanted.encoder_digest, wanted.retriever_digest, named])
    store_folder = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not (store_folder / "content" / DESCRIPTION_FILE).is_file():
        _write_passages(store_folder / PASSAGES_FILE, named, passages)
        for name in ("work", "content"):
            (store_folder / name).mkdir(exist_ok=True)
        batch_size = recipe.chunks.batch_size
        writer = PartWriter(model, retriever, wanted, store_folder / "work", batch_size)
        write_store(writer, store_folder / PASSAGES_FILE, store_folder / "content")
    # Its own retriever is on the CPU, as the server's is.
    return ChunkStore.open(
        store_folder / "content", wanted.encoder_digest, tables=store_folder / "lance", base=base
    ), CHUNK_STORE


def _write_passages(path: Path, named: Sequence[str], passages: Sequence[Passage]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    titles, texts = zip(*passages, strict=True)
    parquet.write_table(pa.table({"id": named, "document_id": named, "title": titles, "text": texts}), path)
