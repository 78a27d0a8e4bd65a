"""`refrag bench faults` on a tiny model: hostile requests over real HTTP, and servers that fail at them."""

import json
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from refrag_platform.bench.clients import NO_ANSWER
from refrag_platform.bench.faults import exchange
from refrag_platform.bench.hostile import CHAT, RESPONSES, sound_bodies
from refrag_platform.bench.malformed import KINDS, hostile_requests, request_bytes
from refrag_platform.project import Project
from refrag_platform.serving import api
from refrag_platform.serving.settings import ApiSettings
from tests.command import refrag, refused
from tests.serving.conftest import Server


@pytest.fixture(autouse=True)
def in_project(packaged_project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRAG_ROOT", str(packaged_project.root))


def fails_at(method: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the service fail at these requests."""
    made = api.create_app

    async def fails() -> None:
        raise RuntimeError("a fault of the service")

    def create_app(model: str, settings: ApiSettings) -> FastAPI:
        app = made(model, settings)
        app.router.routes.insert(0, APIRoute(path, fails, methods=[method]))
        return app

    monkeypatch.setattr(api, "create_app", create_app)


def test_no_hostile_request_has_a_fault_of_the_service_and_ordinary_ones_are_answered(tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    said = refrag("bench", "faults", "--model", "tiny", "--requests", 60, "--json", file).stdout
    result = json.loads(file.read_text())
    assert [row["kind"] for row in result["rows"]] == list(KINDS)
    assert sum(count for row in result["rows"] for count in row["statuses"].values()) == result["requests"] == 60
    assert result["documents"] and result["failed"] == []
    seen = {row["kind"]: set(row["statuses"]) for row in result["rows"]}
    assert max(int(status) for statuses in seen.values() for status in statuses) < 500
    assert seen["body too large"] == {"413"} and seen["client that leaves"] == {"0"}
    assert seen["guessed id"] == {"404"} and "400" in seen["broken JSON"]
    assert result["ordinary"] == {"asked": 4, "answered": 4}
    assert "| body too large | 4 |" in said and "Of 4 ordinary questions" in said


def test_what_a_model_folder_without_a_store_does_not_have_is_no_fault(packaged_project: Project) -> None:
    folder = packaged_project.content("finetuned", "tiny")
    recipe = packaged_project.recipe_path("tiny")
    said = refrag("bench", "faults", "--model", folder, "--recipe", recipe, "--requests", 56).stdout
    assert "without a store" in said and " x 501 |" in said and "500" not in said


def test_an_answer_500_makes_the_command_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fails_at("GET", "/v1/{anything:path}", monkeypatch)
    file = tmp_path / "faults.json"
    said = refused("bench", "faults", "--model", "tiny", "--requests", 42, "--json", file)
    assert "its log above says why: 500 to " in said
    result = json.loads(file.read_text())
    assert result["ordinary"] == {"asked": 4, "answered": 4}
    assert any("guessed id (GET" in one for one in result["failed"])


@pytest.mark.parametrize(("path", "asked"), [(CHAT, {"max_tokens": 200}), (RESPONSES, {"max_output_tokens": 200})])
def test_a_stream_that_fails_is_no_200(server: Server, failing_decoder: None, path: str, asked: dict[str, int]) -> None:
    body = sound_bodies("tiny")[path][1] | asked | {"stream": True, "retrieve": 0}
    with server() as url:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        assert exchange(address, request_bytes("POST", path, json.dumps(body).encode()))[0] == 500
    assert exchange(address, request_bytes("GET", "/v1/models")) == (NO_ANSWER, b"")


def test_an_ordinary_question_without_an_answer_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    fails_at("POST", "/v1/chat/completions", monkeypatch)
    said = refused("bench", "faults", "--model", "tiny")
    assert "no answer to an ordinary question after 0 requests" in said


def test_a_seed_draws_the_same_requests_again() -> None:
    drawn = [list(hostile_requests("tiny", 2 * len(KINDS), seed)) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {request.kind for request in drawn[0]} == set(KINDS)
