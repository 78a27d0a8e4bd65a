"""Markdown rows of docs/results.md from result files: python scripts/results_rows.py docs/results/FILE..."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TRAINING = ("step", "reconstruction_loss", "shuffled_loss", "helper_loss", "vector_std", "tokens_per_second")


def bench_rows(result: dict[str, Any]) -> list[str]:
    """A row a loop of `refrag bench train`."""
    rows = ["| loop | positions/s | ms a step | MFU | peak GB |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in result["rows"]:
        mfu = "–" if row["mfu"] is None else f"{row['mfu']:.1%}"
        rows.append(
            f"| {row['loop']} | {row['positions_per_second']:,} | {row['step_seconds'] * 1000:.1f} | {mfu} "
            f"| {row['memory_gb']} |"
        )
    return rows


def training_rows(lines: list[dict[str, Any]], count: int = 9) -> list[str]:
    """About `count` lines of a metrics.jsonl, evenly spread, the last one among them."""
    rows = ["| " + " | ".join(TRAINING) + " |", "| " + " | ".join("---:" for _ in TRAINING) + " |"]
    stride = max(1, (len(lines) - 1) // (count - 1))
    for line in [*lines[:-1:stride], lines[-1]]:
        cells = [line.get(name) for name in TRAINING]
        rows.append("| " + " | ".join("–" if cell is None else f"{cell:,.4g}" for cell in cells) + " |")
    return rows


if __name__ == "__main__":
    for name in sys.argv[1:]:
        text = Path(name).read_text(encoding="utf-8")
        if name.endswith(".jsonl"):
            print("\n".join(training_rows([json.loads(line) for line in text.splitlines()])), end="\n\n")
        else:
            print("\n".join(bench_rows(json.loads(text))), end="\n\n")
