"""A comparison of choices of chunks as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refrag_platform.evaluation.figures import blank_figure
from refrag_platform.evaluation.metrics import PREFIXES
from refrag_platform.evaluation.report import figure, gain
from refrag_platform.markdown import table

METRICS = {
    **{name: name for name in PREFIXES},
    "answer_log_perplexity": "answer, nats",
    "answer_kept": "answer kept",
    "exact_match": "exact match",
    "f1": "F1",
}


def selection_report(result: Mapping[str, Any]) -> str:
    """Figures of every choice, and the policy's paired gains with their intervals, a table for each share."""
    rows, names = result["rows"], _metrics(result)
    counted = "questions" if "questions" in rows[0] else "windows"
    parts = [
        "## Choice of chunks",
        "Every choice keeps the same share p of the chunks as tokens. P16 to P512 and the answer: mean negative "
        "log-likelihood in nats, lower is better. Answer kept: every chunk of its first mention is. Gains are the "
        "policy's, item by item; above zero the policy is better; in brackets 95% intervals, documents resampled. The "
        "oracle sees the tokens that are judged; tried on fewer items, it compares by its gains alone.",
    ]
    for share in dict.fromkeys(row["share_kept"] for row in rows):
        at_share = [row for row in rows if row["share_kept"] == share]
        lines = [[row["system"], *(figure(row.get(name), 4) for name in names), str(row[counted])] for row in at_share]
        parts += [f"### p = {share:g}", table(["system", *(METRICS[name] for name in names), counted], lines)]
        gains = [
            [f"{row['system']} over {row['over']}", *(gain(row.get(name), 4) for name in names)]
            for row in result["differences"]
            if row["share_kept"] == share
        ]
        if gains:
            parts.append(table(["gain", *(METRICS[name] for name in names)], gains))
    if result.get("references_skipped"):
        parts.append(
            f"Skipped for exact match and F1: {result['references_skipped']:,} references of which normalization "
            "leaves nothing."
        )
    return "\n\n".join(parts) + "\n"


def selection_figure(result: Mapping[str, Any], path: Path) -> None:
    """The longest prefix's log-perplexity, or the answer's, against the share kept: a line for each choice."""
    name = [name for name in _metrics(result) if name not in {"answer_kept", "exact_match", "f1"}][-1]
    picture, (axes,) = blank_figure(1)
    for system in dict.fromkeys(row["system"] for row in result["rows"]):
        points = [(row["share_kept"], row[name]) for row in result["rows"] if row["system"] == system]
        dashed = "--" if system == "oracle" else "-"
        axes.plot(*zip(*sorted(points), strict=True), dashed, marker="o", label=system)
    axes.set_xlabel("p, share of chunks kept as tokens")
    axes.set_ylabel(f"log-perplexity ({METRICS[name]}), nats")
    axes.legend(frameon=False, fontsize=8)
    picture.savefig(path, dpi=150)


def _metrics(result: Mapping[str, Any]) -> list[str]:
    return [name for name in METRICS if any(name in row for row in result["rows"])]
