"""The passages nearest to a vector: by a scan of all vectors, or in a large store by an approximate index.

The index is IVF with RaBitQ (Gao and Long, 2024): vectors in partitions of some thousand, one bit for each dimension.
It only names candidates: their distances are computed again from the vectors themselves, so that scores are those of a
scan. Rows that came after the index was built are scanned. docs/performance.md has what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lancedb.index import HnswSq, IvfPq, IvfRq
    from lancedb.table import Table

COLUMN = "retrieval_vector"
ROWS_PER_PARTITION = 4096
# Partitions that are looked into, and candidates for each passage wanted whose distances are computed again.
PROBED, CANDIDATES = 32, 4
# Kinds that were compared; a store's is the first.
SERVED, *_ = KINDS = ("IVF_RQ", "IVF_PQ", "IVF_HNSW_SQ")


def build_index(passages: Table, kind: str = SERVED) -> None:
    """Give a table of passages an index of their vectors, in the place of one that is there."""
    from lancedb.index import HnswSq, IvfPq, IvfRq

    partitions = max(1, passages.count_rows() // ROWS_PER_PARTITION)
    configs: Mapping[str, type[HnswSq | IvfPq | IvfRq]] = {"IVF_RQ": IvfRq, "IVF_PQ": IvfPq, "IVF_HNSW_SQ": HnswSq}
    passages.create_index(COLUMN, config=configs[kind](distance_type="cosine", num_partitions=partitions))


def nearest(passages: Table, vector: NDArray[np.float32], most: int) -> dict[str, NDArray[np.float32]]:
    """Vectors of the `most` passages nearest to `vector` by cosine, by id, nearest first; of an empty one none."""
    if not vector.any():
        return {}
    search: Any = passages.search(vector, vector_column_name=COLUMN)
    # The last two change nothing where there is no index.
    search = search.distance_type("cosine").nprobes(PROBED).refine_factor(CANDIDATES)
    rows = search.select(["id", COLUMN, "_distance"]).limit(most).to_list()
    return {row["id"]: np.asarray(row[COLUMN], np.float32) for row in rows}
