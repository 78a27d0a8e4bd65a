"""scripts/results_rows.py: the tables and pictures of docs/results.md come from the files beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.conftest import ROOT, load_script

RESULTS = sorted((ROOT / "docs" / "results").glob("*.json*"))
NUMBER = re.compile(r"\d")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_every_kept_result_gives_rows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.name.endswith("-seconds-h100.json"):
        pytest.skip("quoted in the text, not in a table")
    printed = rows(monkeypatch, str(path))
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) >= 3 and NUMBER.search(lines[-1])


@pytest.mark.parametrize(
    "kind",
    [
        "start-token-h100.json",
        "start-token-scores-h100.json",
        "rag-nq-h100.json",
        "choices-h200.json",
        "choices-h100.json",
    ],
)
def test_a_result_is_drawn(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows(monkeypatch, str(ROOT / "docs" / "results" / kind), "--plot", str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_without_a_picture_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = [str(ROOT / "docs" / "results" / "policy-400-h100.jsonl"), "--plot", str(tmp_path / "plot.png")]
    refused = CliRunner().invoke(command(monkeypatch), given)
    assert refused.exit_code == 2 and "nothing to draw" in refused.output and not (tmp_path / "plot.png").exists()


def command(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    app = typer.Typer()
    app.command()(load_script(monkeypatch, "results_rows").main)
    return app


def rows(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    result = CliRunner().invoke(command(monkeypatch), list(arguments))
    assert result.exit_code == 0, result.output
    return result.output
