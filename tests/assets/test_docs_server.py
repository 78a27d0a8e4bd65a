"""Data Docs over HTTP: what checks/ folders hold and nothing else."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from assets.docs_server import server
from assets.metadata import DOCS_URL, docs_link
from refrag_platform.project import Project


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    for name in ("models/tiny/cpt", "data/tiny/corpus", "work/tiny/chunks/failed"):
        (tmp_path / name / "checks").mkdir(parents=True)
        (tmp_path / name / "checks" / "index.html").write_text(f"docs of {name}")
    (tmp_path / "models" / "tiny" / "cpt" / "content").mkdir()
    (tmp_path / "models" / "tiny" / "cpt" / "content" / "secret.txt").write_text("text")
    (tmp_path / "params.yaml").write_text("models: []")
    running = server(tmp_path, port=0)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()
    thread.join()


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def test_the_link_of_a_check_opens_its_data_docs(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, folder = Project(tmp_path), tmp_path / "models" / "tiny" / "cpt"
    monkeypatch.delenv(DOCS_URL, raising=False)
    assert docs_link(project, folder).value == str(folder / "checks" / "index.html")
    monkeypatch.setenv(DOCS_URL, f"{address}/")
    link = docs_link(project, folder).value
    assert isinstance(link, str) and get(link) == "docs of models/tiny/cpt"
    assert "docs of work/tiny/chunks/failed" in get(f"{address}/work/tiny/chunks/failed/checks/index.html")
    assert get(address).count("<li>") == 3


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
