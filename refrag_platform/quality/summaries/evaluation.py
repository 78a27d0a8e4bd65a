"""Summary rows of an evaluation: one per reported row, and one per system that must be there."""

from __future__ import annotations

from typing import Any

from refrag_platform.quality.summaries.artifact import Artifact, SummaryRow, is_finite, wanted

PERPLEXITY_SYSTEMS = ("full", "none", "truncated", "refrag", "refrag_shuffled", "refrag_zero", "refrag_none")
RAG_SYSTEMS = ("full", "none", "first", "plain", "sentences", "refrag", "refrag_wrong")
RETRIEVAL_SYSTEMS = ("full", "first", "plain", "sentences", "refrag")
PREFIXES = (16, 32, 128, 512)


def files(artifact: Artifact) -> list[SummaryRow]:
    """Both reports."""
    return artifact.files(["perplexity.json", "rag.json"])


def perplexity(artifact: Artifact) -> list[SummaryRow]:
    """One row per perplexity row: how many log-perplexities are not finite positive numbers."""
    columns = prefixes(artifact)
    return [
        {
            "row": f"{row['system']} k={row.get('k')} share={row.get('share_kept')}",
            "nonfinite": sum(not (is_finite(row.get(column)) and row[column] >= 0) for column in columns),
        }
        for row in _rows(artifact, "perplexity.json")
    ]


def perplexity_systems(artifact: Artifact) -> list[SummaryRow]:
    """One row per system that must be reported."""
    reported = {row["system"] for row in _rows(artifact, "perplexity.json")}
    return [{"row": system, "missing": int(system not in reported)} for system in PERPLEXITY_SYSTEMS]


def gain(artifact: Artifact) -> list[SummaryRow]:
    """One row per prefix length: lowest log-perplexity of no context and of another document's chunks; REFRAG's.

    No context is the model's own decoder without one, and a control that was tuned without. The untrained decoder is
    neither: what training did to a decoder is not what a context does for it. REFRAG's is that of vectors alone:
    chunks kept as tokens would help whatever the vectors carry.
    """
    reports = _rows(artifact, "perplexity.json")
    vectors = [row for row in reports if not row.get("share_kept")]
    return [
        {
            "row": column,
            "none": min(
                _figures(reports, column, system="refrag_none") + _figures(reports, column, system="none", tuned=True),
                default=None,
            ),
            "shuffled": min(_figures(reports, column, system="refrag_shuffled"), default=None),
            "refrag": min(_figures(vectors, column, system="refrag"), default=None),
        }
        for column in prefixes(artifact)
    ]


def rag(artifact: Artifact) -> list[SummaryRow]:
    """One row per RAG row."""
    return [
        {
            "row": f"{row['system']} passages={row['passages']}",
            **{column: row.get(column) for column in ("exact_match", "f1", "decoder_tokens")},
        }
        for row in _rows(artifact, "rag.json")
    ]


def rag_systems(artifact: Artifact) -> list[SummaryRow]:
    """One row per system and number of passages that must be reported; no context has no passages."""
    reported = {(row["system"], row["passages"]) for row in _rows(artifact, "rag.json")}
    systems = {system for system, _ in reported}
    return [
        {"row": f"{system} passages={count}", "missing": int((system, count) not in reported)}
        for system in RAG_SYSTEMS
        if system != "none"
        for count in artifact.recipe.evaluation.passages
    ] + [{"row": "none", "missing": int("none" not in systems)}]


def rag_gain(artifact: Artifact) -> list[SummaryRow]:
    """One row per number of passages: F1 without context and of REFRAG."""
    reports = _rows(artifact, "rag.json")
    none = max(_figures(reports, "f1", system="none"), default=None)
    return [
        {
            "row": f"{count} passages",
            "none": none,
            "refrag": max(_figures(reports, "f1", system="refrag", passages=count), default=None),
        }
        for count in artifact.recipe.evaluation.passages
    ]


def retrieval(artifact: Artifact) -> list[SummaryRow]:
    """What must be there of the questions that were looked up in the chunk store: a hit rate, a row per system."""
    reported = {row["system"] for row in _retrieval(artifact)["rows"]}
    return [{"row": "hit rate", "missing": int(not hit_rates(artifact))}] + [
        {"row": system, "missing": int(system not in reported)} for system in RETRIEVAL_SYSTEMS
    ]


def hit_rates(artifact: Artifact) -> list[SummaryRow]:
    """One row per cut k: the hit rate at k, and at the cut before it; none where no question is in the store."""
    there = [row for row in _retrieval(artifact)["lookups"] if row["kind"] == "in the store"]
    cuts = sorted(int(name[4:]) for row in there for name in row if name.startswith("hit_"))
    rates = [row[f"hit_{cut}"] for row in there for cut in cuts]
    return [
        {"row": f"hit_{cut}", "hit_rate": rate, "at_fewer": fewer}
        for cut, rate, fewer in zip(cuts, rates, [0.0, *rates], strict=False)
    ]


def hit_rate_floor(artifact: Artifact) -> list[SummaryRow]:
    """The hit rate at the largest cut, beside the least that the recipe asks for."""
    return [row | {"least_hit_rate": artifact.recipe.evaluation.least_hit_rate} for row in hit_rates(artifact)[-1:]]


def prefixes(artifact: Artifact) -> list[str]:
    """P16, P32 ... as far as the recipe's windows reach."""
    return [f"P{count}" for count in PREFIXES if count <= artifact.recipe.evaluation.output_tokens]


def _rows(artifact: Artifact, name: str) -> list[dict[str, Any]]:
    return wanted(artifact.read_json(name), "rows", name)


def _retrieval(artifact: Artifact) -> dict[str, Any]:
    return wanted(artifact.read_json("rag.json"), "retrieval", "rag.json")


def _figures(rows: list[dict[str, Any]], column: str, **which: Any) -> list[float]:
    """Finite values of a column in the rows whose keys have the given values."""
    chosen = [row for row in rows if all(row.get(key) == value for key, value in which.items())]
    return [row[column] for row in chosen if is_finite(row.get(column))]
