"""What a reader is told in figures: pages, pictures and the release card are those of the result files."""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.testing.compare import compare_images

from refrag_platform.bench.frontier import joined
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


def test_the_results_are_short_enough_to_read() -> None:
    assert len((DOCS / "results.md").read_text(encoding="utf-8").splitlines()) <= 250


def test_the_release_card_is_that_of_its_manifest_and_of_result_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REFRAG_ROOT", str(ROOT))
    release = ROOT / "models" / "smollm2-135m" / "release"
    shutil.copytree(release, tmp_path / "release")
    given = [f"--results={DOCS / 'results' / name}" for name in ("frontier.json", "start-token-h100.json")]
    refrag("weights", "card", tmp_path / "release", *given)
    card = (tmp_path / "release" / "README.md").read_text(encoding="utf-8")
    assert card == (release / "README.md").read_text(encoding="utf-8"), STALE
    assert "taught by labels which chunks hold the answer" in card


def test_the_frontier_has_the_times_of_its_machines_and_the_quality_that_was_judged() -> None:
    results, frontier = DOCS / "results", result_of("results/frontier")
    assert frontier == joined([results / "frontier-cpu.json", results / "frontier-h200.json"])
    sets = list(frontier["rows"][0]["sets"])
    judged = [one.row() for one in read_judged([results / name for name in frontier["judged"]], sets)]
    assert judged * 2 == [{name: row[name] for name in judged[0]} for row in frontier["rows"]]


@pytest.mark.parametrize(
    "name", ["popqa-retrieved-again", "triviaqa-retrieved-again", "triviaqa-retrieved-again-shares"]
)
def test_what_was_asked_again_agrees_with_the_tables(name: str) -> None:
    def scores(files: Iterable[Path]) -> dict[tuple[Any, ...], float]:
        rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
        return {(row["system"], row["share_kept"], row["tokens_of"]): row["f1"] for row in rows}

    again = scores([DOCS / "results" / f"rag-{name}-h200.json"])
    tables = scores((DOCS / "results").glob(f"rag-{name.partition('-')[0]}-retrieved-p0*-h200.json"))
    both = again.keys() & tables.keys()
    assert len(both) >= 3 and all(abs(again[one] - tables[one]) < 0.005 for one in both)


def test_words_of_the_readme_about_quality_are_those_of_the_files() -> None:
    rows = result_of("results/frontier")["rows"]
    cpu, gpu = dict.fromkeys(row["device"] for row in rows)
    at = {(row["device"], row["system"], row["share_kept"]): row for row in rows if row["tokens_of"] is None}
    full, served = at[cpu, "full", None], at[cpu, "refrag", 0.1]
    full_gpu, served_gpu = at[gpu, "full", None], at[gpu, "refrag", 0.1]
    few, many = (f"{at[cpu, 'refrag', 0.0]['sets'][name]['f1'] / own['f1']:.0%}" for name, own in full["sets"].items())
    exact = {row["system"]: row["exact_match"] for row in result_of("results/rag-factbook-release-h200")["rows"]}
    text = result_of("results/start-token-h100")
    tuned = {row["system"]: row["P32"] for row in text["rows"] if row["tuned"]}
    last = (tuned["none"] - tuned["truncated"]) / (tuned["none"] - tuned["full"])
    said(
        f"keep {few.removesuffix('%')} and {many} of full context's F1",
        f"comes {full['ttft_ms'] / served['ttft_ms']:.1f} times sooner than full context",
        f"on the GPU {served_gpu['ttft_ms'] / full_gpu['ttft_ms']:.1f} times later",
        f"choice takes {served_gpu['choice_ms']:.1f} ms, and reading everything {full_gpu['prefill_ms']:.0f} ms",
        f"| {exact['full']:.1%} and `plain` {exact['plain']:.1%}, both by one control with 632 steps, "
        f"where REFRAG had some 2,200 | {exact['refrag']:.1%}",
        f"the last 128 tokens as text {last:.0%} | {text['gap_recovered']['P32']:.0%} (p = 0",
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
