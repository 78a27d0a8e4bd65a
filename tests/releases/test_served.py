"""The service runs the released version: real Bentos of planted models, real tags, a real server."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.history import tags
from refrag_platform.history.git import Git
from refrag_platform.history.runs import commit_run
from refrag_platform.processes import free_port
from refrag_platform.project import Project
from refrag_platform.releases import served
from refrag_platform.releases.served import package_to_serve
from refrag_platform.serving import bento
from tests.assets.conftest import MODEL, planted_project
from tests.conftest import ROOT
from tests.planted import record_all, run
from tests.processes import answers, wait_for
from tests.web import Silent
from tests.web import served as web_served

pytestmark = pytest.mark.slow
# A planted store can't be searched.
REAL = ("refrag_platform/store/build.py", "refrag_platform/serving/package.py")
# How long a server may take to be built, loaded and ready on a busy machine.
PATIENCE = 300


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Project, list[str]]]:
    """A project with two releases of a model, and their Bentos' tags; the second one is prod and in place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("BENTOML_HOME", raising=False)  # the Makefile's is another project's
        yield _two_releases(tmp_path_factory.mktemp("served"))


def _two_releases(folder: Path) -> tuple[Project, list[str]]:
    project = planted_project(folder)
    for name in REAL:
        shutil.copy(ROOT / name, project.root / name)
    run(project.root, "git", "commit", "--quiet", "--all", "--message", "Real chunks and package")
    found = []
    for seed in (0, 1):
        recipe = project.recipe_path(MODEL)
        recipe.write_text(recipe.read_text().replace("seed: 0", f"seed: {seed}"))
        run(project.root, sys.executable, "-m", "refrag_platform", "run", "all", "--model", MODEL)
        record_all(project, model=MODEL)
        git, commit = Git(project.root), commit_run(project, MODEL)
        tags.register(git, MODEL, commit, f"seed {seed}")
        tags.assign(git, MODEL, commit, f"seed {seed}")
        found.append(bento.Package.of(project, MODEL).bento_tag)
    assert len(set(found)) == 2
    return project, found


def test_a_rollback_brings_the_version_before_to_be_served_even_if_its_bento_is_gone(
    versions: tuple[Project, list[str]],
) -> None:
    project, (old, new) = versions
    assert package_to_serve(project, MODEL).bento_tag == new
    built = bento.store_path(project, "bentos", old)
    source = folder_digest(built / "src")
    port = free_port()
    ready = f"http://127.0.0.1:{port}/readyz"
    command = [sys.executable, "-m", "refrag_platform", "serve", "--model", MODEL, "--port", str(port)]
    # What Python caches beside the source is not part of it.
    server = subprocess.Popen(command, cwd=project.root, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})

    def serves(tag: str) -> bool:
        assert server.poll() is None
        try:
            words = [child.cmdline() for child in psutil.Process(server.pid).children()]
        except psutil.NoSuchProcess:  # it is being changed over
            return False
        return any(tag in line for line in words) and answers(ready)

    try:
        wait_for(lambda: serves(new), PATIENCE)
        shutil.rmtree(built)
        (project.root / "README.md").write_text("an edit that is nobody's business\n")
        before = (run(project.root, "git", "status", "--porcelain"), (project.root / "dvc.lock").read_bytes())
        run(project.root, sys.executable, "-m", "refrag_platform", "release", "rollback", MODEL)
        wait_for(lambda: serves(old), PATIENCE)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert not answers(ready)
    assert folder_digest(built / "src") == source
    assert before == (run(project.root, "git", "status", "--porcelain"), (project.root / "dvc.lock").read_bytes())
    assert bento.Package.of(project, MODEL).bento_tag == new, "what is in place stays"


def test_a_server_that_lost_its_device_is_noticed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    said = {"/readyz": 503, "/livez": 200}

    class Says(Silent):
        def do_GET(self) -> None:
            self.send_response(said[self.path])
            self.end_headers()

    web = ThreadingHTTPServer(("127.0.0.1", 0), Says)
    with web_served(web):
        server = served._Server(project, web.server_port, "0.0.0.0")
        assert not server.failed(), "it is being loaded"
        said["/livez"] = 503
        assert not server.failed(), "it can't be loaded: starting it again changes nothing"
        said |= {"/readyz": 200, "/livez": 200}
        assert not server.failed()
        said |= {"/readyz": 503, "/livez": 503}
        assert server.failed()
    assert not server.failed(), "it is busy"
