"""What a reader is told in figures: pages, pictures and the release card are those of the result files."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib.testing.compare import compare_images

from refrag_platform.bench.judged import read_judged
from tests.command import refrag
from tests.conftest import ROOT, load_script

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *(DOCS / f"{name}.md" for name in ("results", "operations", "performance"))]
STALE = "run `make tables`"


def result_of(name: str) -> Any:
    return json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_and_pictures_are_those_of_their_files(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = load_script(monkeypatch, "results_rows")
    assert script.written(page) == page.read_text(encoding="utf-8"), STALE
    for picture, draw in script.pictures(page).items():
        draw(tmp_path / picture.name)
        assert compare_images(str(picture), str(tmp_path / picture.name), tol=10) is None, STALE


def test_one_command_writes_every_page_that_has_tables_of_files() -> None:
    (pages,) = re.findall(r"foreach page,([^,]+),--write", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert {ROOT / f"{page}.md" for page in pages.split()} == set(PAGES)
    assert {page for page in DOCS.glob("*.md") if "<!-- rows" in page.read_text(encoding="utf-8")} <= set(PAGES)


def test_tests_that_a_page_names_are_there() -> None:
    named = set(re.findall(r"\btest_\w+\b(?!\.py)", (DOCS / "reliability.md").read_text(encoding="utf-8")))
    defined = {name for file in ROOT.glob("tests/*/*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert named and sorted(named - defined) == []


def test_the_results_are_short_enough_to_read() -> None:
    assert len((DOCS / "results.md").read_text(encoding="utf-8").splitlines()) <= 250


def test_the_release_card_is_that_of_its_manifest_and_of_result_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REFRAG_ROOT", str(ROOT))
    release = ROOT / "models" / "smollm2-135m" / "release"
    shutil.copytree(release, tmp_path / "release")
    given = [f"--results={DOCS / 'results' / name}" for name in ("frontier.json",)]
    refrag("weights", "card", tmp_path / "release", *given)
    card = (tmp_path / "release" / "README.md").read_text(encoding="utf-8")
    assert card == (release / "README.md").read_text(encoding="utf-8"), STALE
    assert "taught by labels which chunks hold the answer" in card


def test_the_frontier_has_the_quality_that_was_judged() -> None:
    results, frontier = DOCS / "results", result_of("results/frontier")
    sets = list(frontier["rows"][0]["sets"])
    judged = [one.row() for one in read_judged([results / name for name in frontier["judged"]], sets)]
    devices = list(dict.fromkeys(row["device"] for row in frontier["rows"]))
    assert len(devices) == len(frontier["machines"])
    for device in devices:
        timed = [row for row in frontier["rows"] if row["device"] == device]
        assert judged == [{name: row[name] for name in judged[0]} for row in timed]


def test_words_of_the_readme_about_quality_are_those_of_the_files() -> None:
    rows = result_of("results/frontier")["rows"]
    every = {(row["device"], row["system"], row["share_kept"], row["tokens_of"]): row for row in rows}
    at = {key[1:]: row for key, row in every.items() if key[0].startswith("CPU")}
    full, served, vectors = (at[one] for one in (("full", None, None), ("refrag", 0.1, None), ("refrag", 0.0, None)))
    gpu_full, gpu_served = (every["NVIDIA H200", *one] for one in (("full", None, None), ("refrag", 0.1, None)))

    def kept(row: dict[str, Any]) -> str:
        first, second = (f"{row['sets'][name]['f1'] / own['f1']:.0%}" for name, own in full["sets"].items())
        return f"{first.removesuffix('%')} and {second}"

    lead = at["sentences", None, 0.1]["f1"] - served["f1"]
    said(
        f"`sentences` answers better, by {100 * lead:.0f} points of F1",
        f"REFRAG keeps {kept(served)} of full context's F1",
        f"(p = 0, {full['decoder_tokens'] / vectors['decoder_tokens']:.0f} times fewer tokens) {kept(vectors)}",
        f"first token {full['ttft_ms'] / served['ttft_ms']:.1f} times sooner than full context",
        f"reads {round(gpu_full['decoder_tokens'])} tokens in {gpu_full['prefill_ms']:.0f} ms",
        f"for which the question is encoded, takes {gpu_served['choice_ms']:.0f}",
    )


def test_words_of_the_readme_about_speed_are_those_of_the_files() -> None:
    def rows(file: str, context: int) -> dict[int | None, dict[str, Any]]:
        found = [row for row in result_of(f"performance/{file}")["rows"] if row["context"] == context]
        return {row["k"]: row for row in found if row["system"] in {"full", "refrag"}}

    def seconds(row: dict[str, Any], name: str) -> float:
        return float(row[f"ttft{name}_ms"]) / 1e3

    cpu, gpu = rows("latency-cpu", 4096), rows("latency-h100", 16384)
    said(
        f"| {seconds(cpu[None], ''):.2f} s | {seconds(cpu[8], '_cached'):.2f} s (k = 8), vectors made ahead; "
        f"{seconds(cpu[8], '_uncached'):.2f} s with encoding",
        f"| {gpu[None]['ttft_ms']:.0f} ms | {gpu[16]['ttft_cached_ms']:.1f} ms (k = 16), vectors made ahead; "
        f"{gpu[16]['ttft_uncached_ms']:.1f} ms with encoding",
    )


def said(*figures: str) -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert [one for one in figures if one not in readme] == []
