"""Artifact files to summary rows: a table of a stage is a function of its module, from the artifact to plain rows.

Suites name tables by these functions. Every row has a `row` column that names it (a shard, a split, a file, a system).
"""

from __future__ import annotations

from types import ModuleType

from refrag_platform.quality.summaries import checkpoints, chunks, corpus, evaluation, package, policy

SUMMARIES: dict[str, ModuleType] = {
    "corpus": corpus,
    "reconstruction": checkpoints,
    "cpt": checkpoints,
    "chunks": chunks,
    "policy": policy,
    "finetuned": checkpoints,
    "evaluation": evaluation,
    "package": package,
}
