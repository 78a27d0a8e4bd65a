"""A tiny packaged project: a random model with a policy, a real chunk store, and stand-ins for the rest."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.artifacts.manifest import InputRecord
from refrag_platform.model.policy import PolicyNetwork
from refrag_platform.model.refrag import RefragModel
from refrag_platform.processes import ends_with_parent, free_port
from refrag_platform.project import Project
from refrag_platform.serving import bento
from refrag_platform.serving.api import create_app
from refrag_platform.serving.engine import Engine
from refrag_platform.serving.package import build_package
from refrag_platform.serving.plain import on_thread
from refrag_platform.serving.settings import ApiSettings
from refrag_platform.stages import STAGES, StageContext
from refrag_platform.store.build import build_chunks
from tests.candidates import manifest_of
from tests.conftest import ROOT, copy_project
from tests.processes import answers, wait_for

COUNTRIES = {
    "Peru": "Peru is a country in western South America. Its capital is Lima and its currency is the sol.",
    "Malta": "Malta is an island state in the Mediterranean Sea. Its capital is Valletta; it uses the euro.",
    "Chad": "Chad is a landlocked country in Africa. Its capital is N'Djamena. Arabic and French are spoken.",
    "Nepal": "Nepal lies in the Himalayas between China and India. Its capital is Kathmandu.",
}
SHARE_KEPT = 0.25
# By itself httpx waits for 5 s; on a busy machine the first /openapi.json took 3 of them.
for part in ("connect", "read", "write", "pool"):
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, part, 60.0)
ASKED = [{"role": "user", "content": "What is the capital of Peru?"}]


@pytest.fixture(scope="session")
def packaged_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose `tiny` has every input of the package stage, made without training."""
    project = copy_project(tmp_path_factory.mktemp("serving") / "project")
    recipe = project.recipe("tiny")
    corpus = _content(project, "corpus")
    rows = [
        {"id": f"{title.lower()}-0", "document_id": title.lower(), "title": title, "text": text, "split": "train"}
        for title, text in COUNTRIES.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), corpus / "passages.parquet")
    model = RefragModel.create(recipe, project.recipe_path("tiny").parent)
    for stage in ("cpt", "finetuned"):
        model.save(_content(project, stage))
    torch.manual_seed(0)
    policy = PolicyNetwork(model.vector_dim, 32, 2, 2, SHARE_KEPT, encoder_digest=model.encoder_digest())
    torch.nn.init.normal_(policy.head[1].weight)
    policy.save(_content(project, "policy"))
    (_content(project, "evaluation") / "rag.json").write_text(json.dumps({"rows": []}))
    context = StageContext(
        project=project,
        recipe=recipe,
        stage="chunks",
        inputs={"corpus": corpus, "finetuned": project.content("finetuned", "tiny")},
        out=_content(project, "chunks"),
        work=_folder(project.work_dir("chunks", "tiny") / "state"),
        beside=project.stage_dir("chunks", "tiny"),
    )
    build_chunks(context)
    inputs = {
        "corpus": (),
        "cpt": ("corpus",),
        "finetuned": ("corpus", "cpt"),
        "chunks": ("corpus", "finetuned"),
        "policy": ("corpus", "finetuned"),
        "evaluation": ("chunks", "policy", "finetuned"),
    }
    for stage, before in inputs.items():
        _write_manifest(project, stage, before)
    return project


@pytest.fixture(scope="session")
def engine(packaged_project: Project) -> Engine:
    return Engine.load(packaged_project, "tiny")


def package(project: Project) -> dict[str, Any]:
    """Run the package stage; its metrics."""
    out = project.content("package", "tiny")
    out.mkdir(parents=True, exist_ok=True)
    context = StageContext(
        project=project,
        recipe=project.recipe("tiny"),
        stage="package",
        inputs={name: project.content(name, "tiny") for name in STAGES["package"].inputs},
        out=out,
        work=out.parent,
        beside=out.parent,
    )
    return build_package(context)


Built = tuple[Project, bento.Package]


@pytest.fixture(scope="session")
def built(packaged_project: Project) -> Iterator[Built]:
    """The packaged project with its Bento."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("BENTOML_HOME", raising=False)
        # A server's settings are nothing to the build.
        patch.setenv("REFRAG_API_KEYS_FILE", "/nowhere/keys")
        package(packaged_project)
        patch.delenv("REFRAG_API_KEYS_FILE")
        yield packaged_project, bento.Package.of(packaged_project, "tiny")


Server = Callable[..., AbstractContextManager[str]]


@pytest.fixture
def failing_decoder(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder runs out of memory at position 61, in the middle of an answer."""
    decode = engine._scheduler.runner.decode

    def fails(tokens: list[int], slots: list[int], positions: list[int]) -> Any:
        if max(positions) > 60:
            raise RuntimeError("out of memory")
        return decode(tokens, slots, positions)

    monkeypatch.setattr(engine._scheduler.runner, "decode", fails)


@pytest.fixture
def held_decoder(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The decoder's steps wait for this event: an answer has its first token, which the prefill draws, and no other."""
    goes_on, decode = threading.Event(), engine._scheduler.runner.decode
    monkeypatch.setattr(engine._scheduler.runner, "decode", lambda *given: goes_on.wait(60) and decode(*given))
    yield goes_on
    goes_on.set()


@pytest.fixture
def slow_decoder(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder takes more than a minute for a long answer, on any machine."""
    decode = engine._scheduler.runner.decode
    monkeypatch.setattr(engine._scheduler.runner, "decode", lambda *given: time.sleep(0.05) or decode(*given))


@pytest.fixture(scope="session")
def server(engine: Engine) -> Server:
    """`with server(ApiSettings(...)) as url:` a real HTTP server with the tiny engine."""

    @contextmanager
    def start(
        settings: ApiSettings | None = None,
        loaded: bool = True,
        engine: Engine = engine,
        tracer: Any = None,
        failure: str | None = None,
    ) -> Iterator[str]:
        app = create_app("tiny", settings, "refrag-tiny:0123", tracer)
        app.state.engine, app.state.failure = engine if loaded else None, failure
        with on_thread(app) as url:
            yield url

    return start


@pytest.fixture(scope="session")
def url(server: Server) -> Iterator[str]:
    """A server with default settings, shared by the tests that don't change it."""
    with server() as address:
        yield address


def client_of(url: str, key: str = "unused") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="session")
def client(url: str) -> openai.OpenAI:
    return client_of(url)


def post(url: str, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    """The answer to a small chat with these further fields."""
    return httpx.post(url + path, json={"model": "tiny", "messages": ASKED, "max_tokens": 4} | body, timeout=60)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, which has this status and OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@contextmanager
def server_process(
    command: Sequence[str], port: int, folder: Path, log: Path, variables: Mapping[str, str]
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server on this port, started in `folder`; yields its URL and process once it is ready."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(variables),
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=ends_with_parent(signal.SIGTERM),
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: process.poll() is not None or answers(f"{url}/readyz"), 120, log)
        assert process.poll() is None, log.read_text()
        yield url, process
    finally:
        bento.end(process, 0)


@contextmanager
def plain_server(log: Path, *options: str, **variables: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`refrag serve` with these options where `import bentoml` fails; yields its URL and process once it is ready."""
    blocked = log.parent / "blocked" / "bentoml"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('no BentoML here')\n")
    port = free_port()
    command = [sys.executable, "-m", "refrag_platform", "serve", "--port", str(port), *options]
    path = os.pathsep.join((str(blocked.parent), str(ROOT)))
    with server_process(command, port, log.parent, log, {**os.environ, "PYTHONPATH": path, **variables}) as server:
        yield server


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _content(project: Project, stage: str) -> Path:
    return _folder(project.content(stage, "tiny"))


def _write_manifest(project: Project, stage: str, inputs: tuple[str, ...]) -> None:
    records = {
        name: InputRecord(
            path=project.content(name, "tiny").relative_to(project.root).as_posix(),
            hash=folder_digest(project.content(name, "tiny")),
        )
        for name in inputs
    }
    facts = {"hash": folder_digest(project.content(stage, "tiny")), "fingerprint": f"of-{stage}", "inputs": records}
    manifest_of(stage, **facts).write(project.stage_dir(stage, "tiny"))
