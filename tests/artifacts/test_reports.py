"""reports/ holds what `dvc metrics show` and `dvc plots show` read."""

import csv
import json
from pathlib import Path
from typing import Any

from refrag_platform import runner
from refrag_platform.artifacts import reports
from refrag_platform.project import Project
from tests.planted import MODEL


def read(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_perplexity_rows_say_what_sets_systems_of_one_name_apart(planted_project: Project) -> None:
    manifest = runner.run_stage(planted_project, "corpus", MODEL).manifest
    rows = [
        {"system": "none", "tuned": False, "share_kept": None, "P32": 3.5},
        {"system": "none", "tuned": True, "share_kept": None, "P32": 3.0},
        {"system": "refrag", "tuned": True, "share_kept": 0.0, "P32": 2.0},
        {"system": "refrag", "tuned": True, "share_kept": 0.25, "P32": 1.5},
    ]
    content = planted_project.content("corpus", MODEL)
    (content / "perplexity.json").write_text(json.dumps({"rows": rows}))
    reports.export(planted_project, manifest)
    systems = [row["system"] for row in read(reports.report_path(planted_project, "perplexity", manifest, "csv"))]
    assert systems == ["none", "none (tuned)", "refrag (tuned)", "refrag (tuned, 0.25 kept)"]


def test_a_curve_has_a_column_for_every_figure_that_any_line_has(planted_project: Project) -> None:
    manifest = runner.run_stage(planted_project, "corpus", MODEL).manifest
    log = planted_project.stage_dir("corpus", MODEL) / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": 3.5}\n{"step": 2, "loss": 3.0, "reward": 1}\n')
    reports.export(planted_project, manifest)
    rows = read(reports.report_path(planted_project, "curves", manifest, "csv"))
    assert rows == [{"step": "1", "loss": "3.5", "reward": ""}, {"step": "2", "loss": "3.0", "reward": "1"}]


def test_each_group_of_parameters_has_the_course_of_its_learning_rate(planted_project: Project) -> None:
    manifest = runner.run_stage(planted_project, "corpus", MODEL).manifest
    log = planted_project.stage_dir("corpus", MODEL) / "metrics.jsonl"
    lines = [{"step": step, "loss": 1.0, "learning_rate": 0.5, "learning_rate_decoder": 0.5} for step in (1, 2)]
    lines[1]["learning_rate_encoder"] = 0.0
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reports.export(planted_project, manifest)
    found = {
        name: read(reports.report_path(planted_project, "learning_rates", manifest, f"{name}.csv"))
        for name in ("decoder", "encoder")
    }
    assert found["decoder"] == [{"step": "1", "learning_rate": "0.5"}, {"step": "2", "learning_rate": "0.5"}]
    assert found["encoder"] == [{"step": "2", "learning_rate": "0.0"}]


def test_reports_that_were_deleted_come_back_with_a_cached_run(planted_project: Project) -> None:
    manifest = runner.run_stage(planted_project, "corpus", MODEL).manifest
    path = reports.report_path(planted_project, "metrics", manifest, "json")
    path.unlink()
    assert runner.run_stage(planted_project, "corpus", MODEL).cached
    assert json.loads(path.read_text()) == manifest.metrics
