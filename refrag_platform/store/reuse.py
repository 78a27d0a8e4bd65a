"""Passages of the chunk store in place that a new one can take over: same text, same encoder, same retriever.

What is taken over was made in another batch, or on another machine, and may differ by rounding; nothing else sets it
apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from refrag_platform.store.content import PASSAGES_FILE, StoreDescription

Arrays = dict[str, NDArray[Any]]
WHO = ("encoder_digest", "tokenizer_digest", "chunk_size", "vector_dim", "retriever", "retriever_digest")


def difference(known: StoreDescription, wanted: StoreDescription) -> str | None:
    """What keeps a store from being taken over; None when nothing does."""
    for name in WHO:
        old, new = getattr(known, name), getattr(wanted, name)
        if old != new:
            return f"its {name.replace('_', ' ')} is {old}, now it is {new}"
    return None


class KnownPassages:
    """A finished store, looked up by the text of a passage. Memory: 28 bytes a passage and one group of rows."""

    def __init__(self, content: Path, description: StoreDescription) -> None:
        import pyarrow.parquet as pq

        self._content, self._rows = content, pq.ParquetFile(content / PASSAGES_FILE)
        self._files = list(description.files)
        ends = np.cumsum(list(description.files.values()))
        self._starts = np.concatenate([[0], ends])
        groups = [self._rows.metadata.row_group(number).num_rows for number in range(self._rows.num_row_groups)]
        self._group_starts = np.concatenate([[0], np.cumsum(groups)])
        keys = (
            _key(title, text)
            for batch in self._rows.iter_batches(columns=["title", "text"])
            for title, text in zip(batch["title"].to_pylist(), batch["text"].to_pylist(), strict=True)
        )
        hashes = np.fromiter(keys, np.uint64, self._rows.metadata.num_rows)
        self._order = np.argsort(hashes, kind="stable").astype(np.uint32)
        self._hashes = hashes[self._order]
        self._group: tuple[int, dict[str, Any]] = (-1, {})

    def find(self, title: str, text: str) -> Arrays | None:
        """token_ids [n, k], vectors [n, dim] and retrieval_vector [dim] of a passage; None when it is new."""
        key = np.uint64(_key(title, text))
        place = int(np.searchsorted(self._hashes, key))
        if place == len(self._hashes) or self._hashes[place] != key:
            return None
        row = self._row(int(self._order[place]))
        if (row["title"], row["text"]) != (title, text):  # two texts with one hash
            return None
        start, count = row["chunk_start"], row["chunk_count"]
        return {**self._chunks(start, count), "retrieval_vector": np.array(row["retrieval_vector"], np.float32)}

    def _row(self, number: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._group_starts, number, side="right")) - 1
        if self._group[0] != group:  # mostly the last one again: passages keep their order
            self._group = (group, {"rows": self._rows.read_row_group(group).to_pylist()})
        return self._group[1]["rows"][number - int(self._group_starts[group])]

    def _chunks(self, start: int, count: int) -> Arrays:
        """Chunks of one passage, which never lie in two files."""
        file = int(np.searchsorted(self._starts, start, side="right")) - 1
        first = start - int(self._starts[file])
        with safe_open(self._content / self._files[file], framework="np") as tensors:
            names: Sequence[str] = ("token_ids", "vectors")
            return {name: tensors.get_slice(name)[first : first + count] for name in names}


def _key(title: str, text: str) -> int:
    digest = hashlib.blake2b(f"{title}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
