"""The package stage: exact tags, nothing made twice, nothing half-made accepted, and a Bento that serves."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.files import lock_file
from refrag_platform.project import Project
from refrag_platform.serving import bento, client
from refrag_platform.serving.contract import Message, Sampling
from refrag_platform.serving.engine import Engine
from refrag_platform.serving.keys import add_key, new_key, revoke_key
from refrag_platform.serving.package import load_packaged
from tests.command import refrag
from tests.conftest import ROOT
from tests.object_store import BUCKET, object_store
from tests.serving.conftest import Built, package, plain_server

QUESTION = "What is the capital of Peru?"


def test_the_same_inputs_have_the_same_tags_and_are_not_packed_twice(built: Built) -> None:
    project, tags = built
    lock = (project.content("package", "tiny") / "package.json").read_bytes()
    again = package(project)
    assert (again["model_made"], again["bento_made"]) == (False, False)
    assert (again["model_tag"], again["bento_tag"]) == (tags.model_tag, tags.bento_tag)
    assert (project.content("package", "tiny") / "package.json").read_bytes() == lock


@pytest.mark.parametrize("lost", ["tables", "model/encoder.safetensors", "model.yaml", "recipe.json"])
def test_a_half_copied_model_is_made_again(built: Built, lost: str) -> None:
    project, tags = built
    victim = bento.store_path(project, "models", tags.model_tag) / lost
    if victim.is_dir():
        shutil.rmtree(next(victim.glob("*/*.lance")))
    else:
        victim.write_bytes(victim.read_bytes()[:20])
    made = package(project)
    assert (made["model_made"], made["bento_made"]) == (True, False)
    assert made["model_tag"] == tags.model_tag


def test_a_half_copied_bento_is_made_again(built: Built) -> None:
    project, tags = built
    source = bento.store_path(project, "bentos", tags.bento_tag) / "src/refrag_platform"
    (source / "serving/engine.py").unlink()
    made = package(project)
    assert (made["model_made"], made["bento_made"]) == (False, True)
    assert (source / "serving/engine.py").is_file()


def test_the_model_bears_its_lineage_down_to_the_corpus(built: Built) -> None:
    project, tags = built
    description = bento.store_path(project, "models", tags.model_tag) / "model.yaml"
    lineage = yaml.safe_load(description.read_text())["metadata"]["lineage"]
    assert lineage["data/tiny/corpus/content"]["fingerprint"] == "of-corpus"
    cpt = lineage["models/tiny/finetuned/content"]["inputs"]["models/tiny/cpt/content"]
    assert cpt == lineage["models/tiny/cpt/content"]["hash"]


def test_the_packaged_model_answers_as_the_project_does(built: Built, engine: Engine) -> None:
    project, tags = built
    packed = load_packaged(bento.store_path(project, "models", tags.model_tag))
    asked = [Message("user", QUESTION)]
    answers = ["".join(one.start(asked, one.retrieve(QUESTION, 2), Sampling(12))) for one in (engine, packed)]
    assert answers[0] == answers[1]


def test_a_server_finds_the_same_in_published_tables(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an object store, which is moto's mock of S3."""
    project, tags = built
    folder = bento.store_path(project, "models", tags.model_tag)
    with object_store(monkeypatch) as objects:
        engine = load_packaged(folder, tables=f"s3://{BUCKET}/stores")
        here, there = (one.retrieve(QUESTION, 2) for one in (load_packaged(folder), engine))
        assert [(one.id, one.score) for one in there] == [(one.id, one.score) for one in here]
        assert engine.store is not None and engine.store.place.startswith(f"s3://{BUCKET}/stores/")
        assert objects.puts("passages.lance")


def test_a_package_is_read_whatever_else_its_recipe_held(built: Built) -> None:
    project, tags = built
    folder = bento.store_path(project, "models", tags.model_tag)
    path = folder / "recipe.json"
    written = path.read_text()
    path.write_text(written.replace('"policy": {', '"policy": {"key_of_old": 1,', 1))
    try:
        assert load_packaged(folder).settings == project.recipe("tiny").serving
    finally:
        path.write_text(written)


def test_the_bento_holds_code_and_pins_and_names_no_host(built: Built) -> None:
    project, tags = built
    folder = bento.store_path(project, "bentos", tags.bento_tag)
    requirements = (folder / "env/python/requirements.txt").read_text()
    assert "torch>=2.11" in requirements and "index" not in requirements and "://" not in requirements
    description = yaml.safe_load((folder / "bento.yaml").read_text())
    assert description["args"] == {"model_tag": tags.model_tag}
    assert not list((folder / "src").rglob("*.safetensors"))


def test_the_pins_are_the_versions_that_the_tests_pass_with() -> None:
    tested = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    versions = {canonicalize_name(requirement.name): requirement.specifier for requirement in tested}
    for pin in yaml.safe_load((ROOT / "bentofile.yaml").read_text())["python"]["packages"]:
        requirement = Requirement(pin)
        wanted = versions.get(canonicalize_name(requirement.name), requirement.specifier)
        assert requirement.specifier == wanted, f"bentofile.yaml pins {pin}, constraints.txt says {wanted}"


def test_the_pins_fit_the_project_s_own_ranges() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    ranges = {Requirement(entry).name.lower(): Requirement(entry).specifier for entry in listed}
    for pin in yaml.safe_load((ROOT / "bentofile.yaml").read_text())["python"]["packages"]:
        requirement = Requirement(pin)
        versions = [part.version for part in requirement.specifier if part.operator == "=="]
        for version in versions:
            allowed = ranges.get(requirement.name.lower())
            assert allowed is None or allowed.contains(version), f"{pin} is outside {allowed}"


def test_a_plain_build_keeps_the_exact_model(built: Built) -> None:
    project, tags = built
    command = [sys.executable, "-m", "bentoml", "build", "--version", "by-hand", "--output", "tag"]
    subprocess.run(command, cwd=project.root, env=bento.environment(project), check=True, capture_output=True)
    description = yaml.safe_load((bento.home(project) / "bentos/refrag/by-hand/bento.yaml").read_text())
    assert description["args"] == {"model_tag": tags.model_tag}


def test_a_missing_package_says_how_to_make_it(project: Project) -> None:
    with pytest.raises(ArtifactError, match="refrag run package --model tiny"):
        bento.Package.of(project, "tiny")


def test_a_store_of_another_encoder_is_refused(built: Built, tmp_path: Path) -> None:
    project, _ = built
    chunks = shutil.copytree(project.content("chunks", "tiny"), tmp_path / "chunks")
    stored = (chunks / "store.json").read_text()
    digest = Engine.load(project, "tiny").bundle.model.encoder_digest()
    (chunks / "store.json").write_text(stored.replace(digest, "0" * len(digest)))
    with pytest.raises(ArtifactError, match=rf"(?s)0000.*{digest}.*refrag run chunks"):
        Engine.open("tiny", project.content("finetuned", "tiny"), chunks, project.recipe("tiny").serving)


def test_ask_answers_from_a_shell(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRAG_ROOT", str(built[0].root))
    result = refrag("ask", QUESTION, "--model", "tiny", "--passages", "2", "--share-kept", "0")
    assert "[1] Peru (peru-0" in result.stderr
    said = re.search(
        r"0 of 22 chunks expanded, compression ([\d.]+)x: (\d+) positions instead of (\d+) tokens", result.stderr
    )
    assert said is not None
    assert float(said[1]) == round(int(said[3]) / int(said[2]), 2)
    assert result.stdout.strip()
    assert "loading tiny ..." in result.stderr.splitlines()


@pytest.mark.slow
def test_the_built_bento_serves(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real `bentoml serve`: health, metrics, the OpenAI client, `refrag ask --url`, errors, and its end."""
    project, tags = built
    monkeypatch.setenv("REFRAG_API_KEY", "secret")
    monkeypatch.setenv("REFRAG_MAX_BODY", "5000")
    monkeypatch.setenv("REFRAG_STORE", str(tmp_path / "live"))
    monkeypatch.setenv("REFRAG_API_KEYS_FILE", str(tmp_path / "keys"))
    added, kept = new_key("ana")
    add_key(tmp_path / "keys", kept)
    before = stored(project)
    with bento.running(project, "tiny", tmp_path / "serve.log") as url:
        for path in ("/healthz", "/livez", "/readyz"):
            assert httpx.get(url + path).status_code == 200
        # What BentoML serves by itself is closed, or ours, and asks for the key.
        for path in ("/metrics", "/docs.json", "/schema.json", "/static_content/index.css", "/livez/", "/v1/x"):
            assert httpx.get(url + path).status_code == 401
        keyed = httpx.Client(base_url=url, headers={"Authorization": "Bearer secret"})
        page = httpx.get(url).text
        assert "googletagmanager" not in page and "refrag-platform" in page
        assert [keyed.get(path).status_code for path in ("/docs.json", "/schema.json", "/v1/x")] == [404] * 3
        assert keyed.get("/docs").status_code == keyed.get("/openapi.json").status_code == 200
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8}
        official = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        whole = official.chat.completions.create(model=tags.model_tag, **asked)
        chunks = list(official.chat.completions.create(model="tiny", stream=True, **asked))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.choices[0].message.content
        assert chunks[-1].model_extra["refrag"]["citations"][0]["title"] == "Peru"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
        with pytest.raises(openai.NotFoundError):
            official.chat.completions.create(model="other", **asked)
        with pytest.raises(openai.BadRequestError):
            official.chat.completions.create(model="tiny", **asked | {"max_tokens": 0})
        with pytest.raises(openai.APIStatusError) as large:
            official.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 6000}])
        assert large.value.status_code == 413
        shell = refrag("ask", QUESTION, "--url", url, "--max-tokens", 8)
        assert shell.stdout.strip() == text.strip()
        with pytest.raises(RefragError, match="answered 401"):
            list(client.ask(url, QUESTION, "tiny", "wrong"))
        ana = openai.OpenAI(base_url=f"{url}/v1", api_key=added, max_retries=0)
        assert ana.responses.create(model="tiny", input=QUESTION, max_output_tokens=8).output_text == text
        document = {"id": "oman", "title": "Oman", "text": "Oman's capital is Muscat."}
        assert keyed.post("/v1/documents", json={"documents": [document]}).is_success
        assert keyed.post("/v1/retrieve", json={"query": "Muscat", "k": 1}).json()["data"][0]["id"] == "oman:0"
        revoke_key(tmp_path / "keys", kept.name)
        with pytest.raises(openai.AuthenticationError):
            ana.models.list()
        figures = keyed.get("/metrics").text
        assert 'refrag_requests_total{endpoint="/v1/chat/completions",method="POST",status="200"}' in figures
        assert "docs.json" not in figures
    log = (tmp_path / "serve.log").read_text()
    assert "keys and values of 8 slots of 2,048 positions take" in log
    assert re.search(r"POST /v1/chat/completions: 200 after \d+ ms, request req-[0-9a-f]{32}", log)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/livez")
    assert stored(project) == before, "deploy/kubernetes mounts these folders read-only"


def stored(project: Project) -> dict[Path, tuple[int, int]]:
    """When each file of models and Bentos was written, and how long it is; compiled code left out."""
    files = (file for kind in ("models", "bentos") for file in (bento.home(project) / kind).rglob("*"))
    return {
        file: (file.stat().st_mtime_ns, file.stat().st_size)
        for file in files
        if file.suffix != ".pyc" and file.is_file()
    }


@pytest.mark.slow
def test_the_same_model_answers_alike_under_bentoml_and_under_uvicorn_alone(built: Built, tmp_path: Path) -> None:
    project, tags = built
    asked = {"model": tags.model_tag, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12}

    def told(url: str) -> list[Any]:
        whole = httpx.post(f"{url}/v1/chat/completions", json=asked).json()
        for name in ("request_id", "seconds", "time_to_first_token_ms"):
            whole["refrag"].pop(name)
        found = httpx.post(f"{url}/v1/retrieve", json={"query": QUESTION, "k": 2}).json()
        pages = [httpx.get(url + path).text for path in ("/openapi.json", "/")]
        health = [httpx.get(url + path).status_code for path in ("/healthz", "/livez", "/readyz")]
        return [whole["choices"], whole["usage"], whole["refrag"], found, pages, health]

    folder = bento.store_path(project, "models", tags.model_tag)
    log = tmp_path / "plain.log"
    with (
        bento.running(project, "tiny", tmp_path / "bento.log") as bentoml,
        plain_server(log, "--packaged", str(folder)) as (plain, _),
    ):
        assert told(plain) == told(bentoml)


@pytest.mark.slow
def test_answer_once_starts_asks_and_stops(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever keys and tables the environment names, and whoever holds its folder of documents."""
    project, tags = built
    monkeypatch.setenv("REFRAG_API_KEYS_FILE", str(tmp_path / "keys"))
    add_key(tmp_path / "keys", new_key("ana")[1])
    monkeypatch.setenv("REFRAG_STORE", str(tmp_path))
    monkeypatch.setenv("REFRAG_TABLES", "s3://nowhere/stores")
    monkeypatch.setenv("REFRAG_RATE_LIMIT", "1")
    held = lock_file(tmp_path / ".lock")
    answer = client.answer_once(project, "tiny", QUESTION, max_tokens=8)
    assert answer["bento_tag"] == tags.bento_tag
    assert answer["citations"][0]["id"] == "peru-0"
    assert answer["ttft_ms"] > 0 and answer["answer"]
    assert not [process for process in psutil.process_iter(["cmdline"]) if tags.bento_tag in str(process.info)]
    monkeypatch.delenv("REFRAG_TABLES")
    with (
        pytest.raises(RefragError, match=r"(?s)can't be served.*another process serves .*; one folder is for one"),
        bento.running(project, "tiny", tmp_path / "log"),
    ):
        pass
    held.close()


def test_a_bento_that_can_t_start_shows_the_end_of_its_log(built: Built, tmp_path: Path) -> None:
    project, tags = built
    description = bento.store_path(project, "bentos", tags.bento_tag) / "bento.yaml"
    kept = description.read_text()
    description.write_text(kept.replace("refrag_platform.serving.service", "refrag_platform.serving.nothing"))
    try:
        with (
            pytest.raises(RefragError, match=r"(?s)ended with status.*refrag_platform\.serving\.nothing"),
            bento.running(project, "tiny", tmp_path / "log"),
        ):
            pass
    finally:
        description.write_text(kept)
