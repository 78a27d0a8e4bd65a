"""Data Docs over HTTP: what checks/ folders hold and nothing else."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from assets.docs_server import HOST, PORT, server
from assets.metadata import DOCS_URL, docs_links
from refrag_platform.project import Project
from tests.conftest import ROOT
from tests.web import served


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    for name in ("models/tiny/cpt", "data/tiny/corpus", "work/tiny/chunks/failed"):
        (tmp_path / name / "checks").mkdir(parents=True)
        (tmp_path / name / "checks" / "index.html").write_text(f"docs of {name}")
    (tmp_path / "models" / "tiny" / "cpt" / "content").mkdir()
    (tmp_path / "models" / "tiny" / "cpt" / "content" / "secret.txt").write_text("text")
    (tmp_path / "params.yaml").write_text("models: []")
    with served(server(tmp_path, port=0)) as url:
        yield url


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def test_the_link_of_a_check_opens_its_data_docs(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, folder = Project(tmp_path), tmp_path / "models" / "tiny" / "cpt"
    monkeypatch.delenv(DOCS_URL, raising=False)
    monkeypatch.setenv(DOCS_URL, f"{address}/")
    link, file = (value.value for value in docs_links(project, folder).values())
    assert isinstance(link, str) and get(link) == "docs of models/tiny/cpt"
    assert isinstance(file, str) and Path(file).read_text() == get(link)
    assert "docs of work/tiny/chunks/failed" in get(f"{address}/work/tiny/chunks/failed/checks/index.html")
    assert get(address).count("<li>") == 3


def test_a_link_recorded_without_a_server_leads_to_the_one_that_make_ui_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(DOCS_URL, raising=False)
    link = docs_links(Project(tmp_path), tmp_path / "models" / "tiny" / "cpt")["data_docs"].value
    assert link == f"http://{HOST}:{PORT}/models/tiny/cpt/checks/index.html"
    assert f"DOCS_PORT ?= {PORT}" in (ROOT / "Makefile").read_text().splitlines()


@pytest.mark.parametrize(
    "path",
    [
        "params.yaml",
        "models/",
        "models/tiny/cpt/content/secret.txt",
        "models/tiny/cpt/checks/../content/secret.txt",
        "models/tiny/cpt/checks/%2e%2e/content/secret.txt",
        "../../etc/passwd",
    ],
)
def test_nothing_else_is_there(address: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(f"{address}/{path}")
