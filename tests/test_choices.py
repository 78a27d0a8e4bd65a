"""scripts/choices.py: run folders in, a file of choices, its plot and its Markdown rows out."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from tests.conftest import load_script

SCORES = ("P16", "P32", "P128", "P512")


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script(monkeypatch, "choices")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A reconstruction that was continued, CPT from its first part, and CPT from the untrained model."""
    reconstruction = {"train_decoder": True, "lora_rank": None}
    plant(tmp_path / "first", reconstruction, 900, reconstruction=0.8)
    plant(tmp_path / "second", reconstruction, 1300, reconstruction=0.9)
    plant(tmp_path / "frozen", {"train_decoder": False, "lora_rank": None}, 900, reconstruction=0.3)
    plant(tmp_path / "cpt", {"lora_rank": None}, 600, perplexity=3.6)
    plant(tmp_path / "direct", {"lora_rank": 64}, 600, perplexity=3.7)
    return tmp_path


def plant(
    run: Path,
    settings: dict[str, Any],
    steps: int,
    reconstruction: float | None = None,
    perplexity: float | None = None,
) -> None:
    run.mkdir()
    files: dict[str, Any] = {"settings": settings, "summary": {"steps": steps}}
    if reconstruction is not None:
        lengths = [{"chunks": n, "teacher_forced": reconstruction, "greedy": reconstruction / 2} for n in (1, 8, 32)]
        files["reconstruction"] = {"rows": lengths}
    if perplexity is not None:
        systems = {"full": 3.0, "refrag": perplexity, "refrag_shuffled": perplexity + 0.5}
        rows = [{"system": name, "share_kept": 0.0, **dict.fromkeys(SCORES, value)} for name, value in systems.items()]
        kept = {"system": "refrag", "share_kept": 0.1, **dict.fromkeys(SCORES, 1.0)}
        files["perplexity"] = {"rows": [*rows, kept]}
    for name, values in files.items():
        (run / f"{name}.json").write_text(json.dumps(values))


def call(choices: ModuleType, runs: Path, *arguments: str) -> Result:
    app = typer.Typer(rich_markup_mode=None)  # a box would break long paths
    app.command()(choices.main)
    return CliRunner().invoke(app, ["--runs", str(runs), "--out", str(runs / "choices.json"), *arguments])


def test_a_row_is_the_runs_that_a_model_went_through(choices: ModuleType, runs: Path) -> None:
    variants = ["none=direct", "reconstruction=first,cpt", "continued=first,second", "paper=frozen"]
    result = call(choices, runs, *variants, "--plot", str(runs / "choices.png"))
    assert result.exit_code == 0, result.output
    made = json.loads((runs / "choices.json").read_text())
    assert [(row["name"], row["decoder"], row["steps"]) for row in made["rows"]] == [
        ("none", "LoRA 64 (CPT)", 0),
        ("reconstruction", "all weights", 900),
        ("continued", "all weights", 2200),
        ("paper", "frozen", 900),
    ]
    found = [row["reconstruction"] and row["reconstruction"][1]["teacher_forced"] for row in made["rows"]]
    assert found == [None, 0.8, 0.9, 0.3]
    assert [row["cpt"] and (row["cpt"]["steps"], row["cpt"]["refrag"]["P32"]) for row in made["rows"]] == [
        (600, 3.7), (600, 3.6), None, None,
    ]  # fmt: skip
    assert made["rows"][1]["cpt"]["refrag_shuffled"] == dict.fromkeys(SCORES, 4.1)
    assert (runs / "choices.png").read_bytes().startswith(b"\x89PNG")
    from results_rows import choice_rows  # type: ignore[import-not-found]

    rows = choice_rows(made).splitlines()
    assert rows[3].split(" | ")[2:6] == ["900", "80.0% / 40.0%", "80.0% / 40.0%", "80.0% / 40.0%"]
    assert rows[3].split(" | ")[7] == "3.600"


def test_figures_from_before_further_training_are_not_taken_for_the_model_s(choices: ModuleType, runs: Path) -> None:
    (runs / "second" / "reconstruction.json").unlink()
    result = call(choices, runs, "continued=first,second")
    assert result.exit_code == 2 and "holds neither" in result.output
    assert not (runs / "choices.json").exists()
    assert call(choices, runs, "continued=first,second,cpt").exit_code == 0
    (row,) = json.loads((runs / "choices.json").read_text())["rows"]
    assert row["reconstruction"] is None and row["cpt"]["refrag"]["P32"] == 3.6


@pytest.mark.parametrize(
    ("variant", "why"), [("all", "NAME=RUN"), ("a=gone", "settings.json"), ("a=cut", "summary.js")]
)
def test_what_is_missing_is_named(choices: ModuleType, runs: Path, variant: str, why: str) -> None:
    plant(runs / "cut", {"lora_rank": None}, 600)
    (runs / "cut" / "summary.json").unlink()
    result = call(choices, runs, variant)
    assert result.exit_code == 2 and why in result.output
