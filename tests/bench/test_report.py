"""Documents' tables come from result files, and the benchmark's own document is up to date."""

import json
import re
import shutil
from pathlib import Path

import pytest

from refrag_platform.bench.report import BLOCK, write_tables
from refrag_platform.errors import RefragError
from tests.command import refrag, refused

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ["performance.md", "reliability.md"]


def test_a_latency_run_becomes_a_table_and_a_picture(tmp_path: Path) -> None:
    file, picture, document = tmp_path / "latency.json", tmp_path / "plots/latency.png", tmp_path / "doc.md"
    arguments = ["--context", "32,64", "--question", "4", "--k", "4,8", "--runs", "2", "--warmup", "1"]
    told = refrag("bench", "latency", "--shape", "tiny", *arguments, "--json", file, "--plot", picture).output
    assert told.count("refrag, k = 8") == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    document.write_text("# Speed\n<!-- bench latency.json -->\nold\n<!-- end -->\nThe end\n")
    assert write_tables(document) == (1, [])
    written = document.read_text()
    assert "old" not in written and written.startswith("# Speed\n") and written.endswith("<!-- end -->\nThe end\n")
    assert "**32 context tokens**" in written and "**64 context tokens**" in written
    assert written.count("| refrag, k = 8 (random projection) |") == 2
    assert "![latency]" not in written
    picture.rename(file.with_suffix(".png"))
    write_tables(document)
    assert "![latency](latency.png)\n\n<!-- end -->" in document.read_text()
    written = document.read_text()
    write_tables(document)
    assert document.read_text() == written


def test_a_throughput_run_becomes_a_table(tmp_path: Path) -> None:
    file, document = tmp_path / "throughput.json", tmp_path / "doc.md"
    arguments = ["--context", "32", "--new-tokens", "3", "--k", "4", "--runs", "1", "--largest-batch", "2"]
    refrag("bench", "throughput", "--shape", "tiny", *arguments, "--json", file, "--plot", tmp_path / "t.png")
    assert json.loads(file.read_text())["new_tokens"] == 3
    document.write_text("<!-- bench throughput.json -->\n<!-- end -->\n")
    write_tables(document)
    assert "| refrag, k = 4 | 2 |" in document.read_text()


def test_a_missing_file_is_told_and_a_foreign_one_refused(tmp_path: Path) -> None:
    document = tmp_path / "doc.md"
    document.write_text("<!-- bench away.json -->\n<!-- end -->\n")
    assert write_tables(document) == (1, ["away.json"])
    assert document.read_text() == "<!-- bench away.json -->\n\nNot measured yet.\n\n<!-- end -->\n"
    (tmp_path / "away.json").write_text("{}")
    with pytest.raises(RefragError, match="holds no result of `refrag bench`"):
        write_tables(document)
    assert "Not measured yet." in document.read_text()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_its_files(page: str, tmp_path: Path) -> None:
    copy = Path(shutil.copy(DOCS / page, tmp_path))
    shutil.copytree(DOCS / "performance", tmp_path / "performance")
    assert write_tables(copy)[1] == []
    assert copy.read_text() == (DOCS / page).read_text(), "run `make tables`"


def test_one_command_writes_every_page_that_has_tables_of_benchmarks() -> None:
    makefile = (DOCS.parent / "Makefile").read_text()
    assert re.findall(r"bench tables docs/(\S+)", makefile) == PAGES
    assert {page.name for page in DOCS.glob("*.md") if BLOCK.search(page.read_text())} == set(PAGES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "tiny", "--model", "tiny"], "give either --shape or --model"),
        (["--shape", "tiny", "--k", "8,none"], "--k is '8,none'"),
        (["--shape", "huge"], "no shape 'huge'"),
    ],
)
def test_wrong_options_are_explained(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused("bench", "latency", *arguments, "--json", tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()
