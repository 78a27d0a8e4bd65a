"""Evaluation on held-out data: log-perplexity and answers, REFRAG beside full context, none and as many tokens of text;
what the chunk store's search finds, and answers over that."""

from typing import Any

import dagster as dg

from assets.metadata import Metadata, Published, answers, numbers, side_by_side, table
from assets.stage_asset import GPU_POOL, stage_asset
from refrag_platform.evaluation.items import Items
from refrag_platform.evaluation.report import beside_full


def describe(published: Published) -> Metadata:
    """The answers beside full context's, all reports as tables, sample answers, all models side by side, the gap.

    Times lie beside the content: the manifest has those at the most passages.
    """
    perplexity, rag = (published.read_json(name) for name in ("perplexity.json", "rag.json"))
    refrag: dict[str, Any] = next((row for row in perplexity["rows"] if row["system"] == "refrag"), {})
    most = max((row["passages"] for row in rag["rows"]), default=0)
    timed = [row | {"ttft_ms": published.manifest.metrics.get(f"{row['system']}_ttft_ms")} for row in rag["rows"]]
    asked = len(Items.read(published.content).questions.groups)
    line = beside_full([row for row in timed if row["passages"] == most], asked)
    return {
        **({"beside_full_context": dg.MetadataValue.text(line)} if line else {}),
        "perplexity": table(perplexity["rows"]),
        "rag": table(rag["rows"]),
        **{f"retrieval_{name}": table(rag["retrieval"][name]) for name in ("lookups", "rows") if "retrieval" in rag},
        **answers(published),
        **side_by_side(published),
        "gap_recovered": dg.MetadataValue.json(perplexity.get("gap_recovered") or {}),
        **numbers({key: value for key, value in refrag.items() if key.startswith("P")}, "refrag."),
    }


evaluation = stage_asset("evaluation", description=__doc__, kinds=("pytorch",), describe=describe, pool=GPU_POOL)
