"""Evaluation: log-perplexity and RAG answers, REFRAG beside full, no and truncated context, held-out data."""

from __future__ import annotations

from typing import Any

from dagster import MetadataValue

from assets.metadata import Metadata, Published, answers, numbers, side_by_side, table
from assets.stage_asset import GPU_POOL, stage_asset


def describe(published: Published) -> Metadata:
    """Both reports as tables, sample answers, all models side by side; REFRAG's own log-perplexities as numbers."""
    perplexity, rag = (published.read_json(name) for name in ("perplexity.json", "rag.json"))
    refrag: dict[str, Any] = next((row for row in perplexity["rows"] if row["system"] == "refrag"), {})
    return {
        "perplexity": table(perplexity["rows"]),
        "rag": table(rag["rows"]),
        **answers(published),
        **side_by_side(published),
        "gap_recovered": MetadataValue.json(perplexity.get("gap_recovered") or {}),
        **numbers({key: value for key, value in refrag.items() if key.startswith("P")}, "refrag."),
    }


evaluation = stage_asset("evaluation", description=__doc__, kinds=("pytorch",), describe=describe, pool=GPU_POOL)
