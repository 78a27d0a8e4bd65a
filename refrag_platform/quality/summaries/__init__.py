"""Artifact files to summary rows: `TABLES[stage][table](artifact)` reads the files and returns plain rows.

Every row has a `row` column that names it (a shard, a split, a file, a system).
"""

from __future__ import annotations

from refrag_platform.quality.summaries import checkpoints, chunks, corpus, evaluation, package, policy
from refrag_platform.quality.summaries.artifact import Artifact, Row, Table

TABLES: dict[str, dict[str, Table]] = {
    "corpus": corpus.TABLES,
    "reconstruction": checkpoints.TABLES,
    "cpt": checkpoints.TABLES,
    "chunks": chunks.TABLES,
    "policy": policy.TABLES,
    "finetuned": checkpoints.TABLES,
    "evaluation": evaluation.TABLES,
    "package": package.TABLES,
}

__all__ = ["TABLES", "Artifact", "Row", "Table"]
