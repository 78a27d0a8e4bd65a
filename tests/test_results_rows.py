"""scripts/results_rows.py: the tables and pictures of docs/results.md come from the files beside it."""

import json
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


@pytest.mark.parametrize("kind", ["start-token-h100.json", "rag-nq-h100.json", "rag-pool-both-cpu.json"])
def test_a_result_is_drawn(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows(monkeypatch, str(ROOT / "docs" / "results" / kind), "--plot", str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_setting_s_gain_stands_in_one_row_over_all_and_each_file(monkeypatch: pytest.MonkeyPatch) -> None:
    file = ROOT / "docs" / "results" / "rag-pool-release-h200.json"
    printed = rows(monkeypatch, str(file), "--over", "plain").splitlines()
    assert "| all, 3,038 | nq-pool.jsonl, 1,000 | squad-pool.jsonl, 2,038 |" in printed[0]
    (row,) = [line for line in printed if line.startswith("| 5 | 0.15 |")]
    result = json.loads(file.read_text(encoding="utf-8"))
    for own in (result, *result["parts"].values()):
        (gain,) = [one["f1"] for one in own["differences"] if (one["passages"], one["share_kept"]) == (5, 0.15)]
        assert "{:.3f} [{:.3f}, {:.3f}]".format(*gain) in row
        by_system = {
            one["system"]: one["f1"]
            for one in own["rows"]
            if 0.15 in (one["share_kept"], one["tokens_of"]) and one["passages"] == 5
        }
        assert by_system["refrag"] - by_system["plain"] == pytest.approx(gain[0], abs=1e-4)


@pytest.mark.parametrize(
    ("file", "over"),
    [
        ("rag-pool-release-h200.json", "plian"),
        ("rag-nq-release-h200.json", "full"),
        ("rag-scitldr-release-h200.json", "plain"),
        ("choices-h200.json", "plain"),
        ("told-h100.json", "full"),
        ("selection-nq-h100.json", "plain"),
        ("policy-400-h100.jsonl", "plain"),
    ],
)
def test_what_was_not_asked_at_as_many_tokens_is_named(file: str, over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = CliRunner().invoke(command(monkeypatch), [str(ROOT / "docs" / "results" / file), "--over", over])
    assert refused.exit_code == 2 and f"--over {over}" in refused.output


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


def test_every_result_file_is_named_by_a_page() -> None:
    docs = ROOT / "docs"
    pages = "\n".join(page.read_text(encoding="utf-8") for page in [*docs.glob("*.md"), *docs.glob("log/*.md")])
    assert [file.name for file in sorted((docs / "results").iterdir()) if file.name not in pages] == []


def test_every_experiment_has_a_verdict_in_the_index() -> None:
    log = ROOT / "docs" / "log"
    index = (log / "README.md").read_text(encoding="utf-8")
    pages = sorted((page.name for page in log.glob("20*.md")), reverse=True)
    assert [page for page in pages if f"]({page}) | " not in index] == []
    assert [line[3:13] for line in index.splitlines() if line.startswith("| [")] == [page[:10] for page in pages]


def test_links_of_pages_lead_somewhere() -> None:
    docs = ROOT / "docs"
    for page in [ROOT / "README.md", *docs.glob("*.md"), *docs.glob("log/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
