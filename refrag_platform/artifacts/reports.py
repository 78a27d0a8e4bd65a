"""reports/: copies of an artifact's metrics where `dvc metrics show` and `dvc plots show` look for them.

DVC expands a folder named in dvc.yaml to the files in it, so models and stages need not be listed there.
The originals lie beside the artifacts; everything here can be deleted and comes back with the next run.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from refrag_platform.artifacts.manifest import Manifest
from refrag_platform.files import write_json, write_text
from refrag_platform.project import Project

# Before a parameter group's name, in a training's lines: its learning rate.
GROUP_RATE = "learning_rate_"
# Figures of such a line that the machine decides, not the seed.
MACHINE = {"tokens_per_second", "memory_gb", "clock_mhz"}


def export(project: Project, manifest: Manifest) -> None:
    """Write the artifact's metrics, training curve, learning rates and perplexity rows, each if it has them.

    reports/metrics/MODEL/STAGE.json, reports/curves/MODEL/STAGE.csv, reports/perplexity/MODEL/STAGE.csv, and a file for
    each group of parameters, reports/learning_rates/MODEL/STAGE.GROUP.csv
    """
    folder = project.stage_dir(manifest.stage, manifest.model)
    write_json(report_path(project, "metrics", manifest, "json"), manifest.metrics, allow_nan=True)
    log = folder / "metrics.jsonl"
    if log.is_file():
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        write_text(report_path(project, "curves", manifest, "csv"), table(rows))
        for name in {name: None for row in rows for name in row if name.startswith(GROUP_RATE)}:
            rates = [{"step": row["step"], "learning_rate": row[name]} for row in rows if name in row]
            suffix = f"{name.removeprefix(GROUP_RATE)}.csv"
            write_text(report_path(project, "learning_rates", manifest, suffix), table(rates))
    perplexity = folder / "content" / "perplexity.json"
    if perplexity.is_file():
        rows = json.loads(perplexity.read_text(encoding="utf-8"))["rows"]
        write_text(report_path(project, "perplexity", manifest, "csv"), table([_labelled(row) for row in rows]))


def report_path(project: Project, kind: str, manifest: Manifest, suffix: str) -> Path:
    """Where a report of an artifact lies."""
    return project.root / "reports" / kind / manifest.model / f"{manifest.stage}.{suffix}"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV; the columns are all their keys, in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _labelled(row: dict[str, Any]) -> dict[str, Any]:
    """A perplexity row whose system says what sets it apart: tuned, and the share of chunks kept as tokens."""
    marks = ["tuned"] if row.get("tuned") else []
    if row.get("share_kept"):
        marks.append(f"{row['share_kept']:g} kept")
    return {**row, "system": f"{row['system']} ({', '.join(marks)})" if marks else row["system"]}
