"""The service runs the released version: real Bentos of planted models, real tags, a real server."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

import httpx
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
from tests.asking import ask, asking
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


@dataclass(frozen=True)
class Released:
    """A version that was released, where it was committed and what serves it."""

    commit: str
    bento: str
    model: str


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Project, list[Released]]]:
    """A project with two releases of a model; the second one is prod and in place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("BENTOML_HOME", raising=False)  # the Makefile's is another project's
        yield _two_releases(tmp_path_factory.mktemp("served"))


def _two_releases(folder: Path) -> tuple[Project, list[Released]]:
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
        package = bento.Package.of(project, MODEL)
        found.append(Released(commit, package.bento_tag, package.model_tag))
    assert found[0].bento != found[1].bento
    return project, found


@dataclass(frozen=True)
class Serving:
    """`refrag serve` of the project, its words in a log."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def servers(self, tag: str) -> list[psutil.Process]:
        """Its children that serve this Bento."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and tag in child.cmdline()]

    def serves(self, tag: str) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return bool(self.servers(tag)) and answers(f"{self.url}/readyz")

    def wait_for(self, condition: Callable[[], bool]) -> None:
        wait_for(condition, PATIENCE, self.log)

    def wait_for_words(self, words: str) -> None:
        self.wait_for(lambda: words in self.log.read_text())


@contextmanager
def serving(project: Project, log: Path, **variables: str) -> Iterator[Serving]:
    """The released version; at the end it gets SIGTERM, and ends well."""
    port = free_port()
    command = [sys.executable, "-m", "refrag_platform", "serve", "--model", MODEL, "--port", str(port)]
    # What Python caches beside the source is not part of it.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **variables}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=project.root, env=environment, stdout=output, stderr=output)
    try:
        yield Serving(f"http://127.0.0.1:{port}", process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()


def test_a_rollback_brings_the_version_before_to_be_served_even_if_its_bento_is_gone(
    versions: tuple[Project, list[Released]], tmp_path: Path
) -> None:
    project, (old, new) = versions
    assert package_to_serve(project, MODEL).bento_tag == new.bento
    built = bento.store_path(project, "bentos", old.bento)
    source = folder_digest(built / "src")
    with serving(project, tmp_path / "log") as server:
        server.wait_for(lambda: server.serves(new.bento))
        shutil.rmtree(built)
        (project.root / "README.md").write_text("an edit that is nobody's business\n")
        before = (run(project.root, "git", "status", "--porcelain"), (project.root / "dvc.lock").read_bytes())
        run(project.root, sys.executable, "-m", "refrag_platform", "release", "rollback", MODEL)
        server.wait_for_words(f"{old.bento} has taken over")
        server.wait_for(lambda: server.serves(old.bento) and not server.servers(new.bento))
    assert not answers(f"{server.url}/readyz")
    assert folder_digest(built / "src") == source
    assert before == (run(project.root, "git", "status", "--porcelain"), (project.root / "dvc.lock").read_bytes())
    assert bento.Package.of(project, MODEL).bento_tag == new.bento, "what is in place stays"


def test_requests_wait_while_another_version_takes_the_folder_of_documents_over(
    versions: tuple[Project, list[Released]], tmp_path: Path
) -> None:
    project, (old, new) = versions
    git = Git(project.root)
    tags.assign(git, MODEL, old.commit, "the older one")
    with serving(project, tmp_path / "log", REFRAG_STORE=str(tmp_path / "live")) as server:
        server.wait_for(lambda: server.serves(old.bento))
        document = {"id": "oman", "title": "Oman", "text": "Oman lies in Arabia."}
        httpx.post(f"{server.url}/v1/documents", json={"documents": [document]}, timeout=60).raise_for_status()
        with asking(server.url, MODEL, threads=2) as asked:
            tags.assign(git, MODEL, new.commit, "the newer one")
            server.wait_for_words(f"{new.bento} has taken over")
            assert not server.servers(old.bento)
            taken_over = asked.answered
            server.wait_for(lambda: asked.answered > taken_over + 4)
        assert not asked.failed
        assert httpx.get(f"{server.url}/v1/documents/oman", timeout=60).status_code == 200


def test_no_request_fails_while_another_version_takes_over(
    versions: tuple[Project, list[Released]], tmp_path: Path
) -> None:
    project, (old, new) = versions
    git = Git(project.root)
    tags.assign(git, MODEL, new.commit, "the newer one")
    with serving(project, tmp_path / "log") as server, httpx.Client(trust_env=False) as client:
        server.wait_for(lambda: server.serves(new.bento))
        with asking(server.url, MODEL) as asked:
            server.wait_for(lambda: asked.answered > 20)
            tags.assign(git, MODEL, old.commit, "the older one")
            server.wait_for_words(f"{old.bento} has taken over")
            server.wait_for(lambda: not server.servers(new.bento))
            taken_over = asked.answered
            server.wait_for(lambda: asked.answered > taken_over + 20)
            ask(client, server.url, stream=True, model=old.model)
            with pytest.raises(AssertionError, match="model_not_found"):
                ask(client, server.url, stream=False, model=new.model)

            # Its weights are damaged.
            for file in bento.store_path(project, "models", new.model).rglob("*.safetensors"):
                file.write_bytes(b"no weights")
            tags.assign(git, MODEL, new.commit, "the newer one again")
            server.wait_for_words(f"{old.bento} goes on serving: {new.bento} did not get ready")
            assert server.servers(old.bento) and not server.servers(new.bento)
            taken_over = asked.answered
            server.wait_for(lambda: asked.answered > taken_over + 20)
        assert not asked.failed

        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "retrieve": 0, "stream": True}
        with client.stream("POST", f"{server.url}/v1/chat/completions", json=body | {"max_tokens": 300}) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert list(filter(None, lines))[-1] == "data: [DONE]"


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
