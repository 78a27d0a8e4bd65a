"""`refrag bench service` on a tiny model: real clients, real HTTP."""

import asyncio
import json
from dataclasses import replace
from http.server import HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from refrag_platform.bench import service
from refrag_platform.bench.clients import NO_ANSWER, ClientLoad, Reply, ask_all
from refrag_platform.bench.report import service_report
from refrag_platform.cli import app
from refrag_platform.model.refrag import RefragModel
from refrag_platform.project import Project
from refrag_platform.serving import api
from tests.conftest import ROOT
from tests.web import Silent, served


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    """The command's options for a random tiny model and three questions."""
    project = Project(ROOT)
    torch.manual_seed(0)
    model = RefragModel.create(project.recipe("tiny"), project.recipe_path("tiny").parent)
    (tmp_path / "model").mkdir()
    model.save(tmp_path / "model")
    rows = [
        {
            "id": str(n),
            "question": f"What is {n}?",
            "answers": ["a"],
            "passages": [{"title": "", "text": f"It is {n}."}],
        }
        for n in range(3)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"model": "model", "questions": "questions.jsonl", "json": "service.json"}
    given = [part for name, file in names.items() for part in (f"--{name}", str(tmp_path / file))]
    return [*given, "--recipe", str(ROOT / "models" / "tiny" / "recipe.yaml"), "--seconds", "0.2", "--share-kept", "0"]


def test_engine_and_service_answer_the_same_requests(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "ALONE", 2)
    done = CliRunner().invoke(app, ["bench", "service", *asked, "--clients", "3", "--new-tokens", "5"])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "service.json").read_text())
    assert [(row["side"], row["clients"]) for row in result["rows"]] == [
        ("engine", 1), ("service", 1), ("engine", 3), ("service", 3)
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["statuses"] == {"200": row["requests"]}
        # Greedy, the random model never ends by itself.
        assert row["tokens"] == 5 * row["requests"]
        assert row["requests"] >= (2 if row["clients"] == 1 else 3)
    alone = [row["requests"] for row in result["rows"] if row["clients"] == 1]
    assert alone == [2, 2]
    # Of so few none is worth a 99th percentile.
    assert set(result["rows"][0]["ttft_ms"]) == {"p50", "p95"}
    assert result["mean_tokens"] == 5
    assert "clients get" in service_report(result)


def test_a_full_service_refuses_and_that_is_counted(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "ALONE", 1)
    # Room for nobody beside the one slot.
    made = api.create_app
    monkeypatch.setattr(api, "create_app", lambda name, settings: made(name, replace(settings, max_waiting=0)))
    run = CliRunner().invoke(app, ["bench", "service", *asked, "--clients", "4", "--slots", "1", "--new-tokens", "40"])
    assert run.exit_code == 0, run.output
    row = json.loads((tmp_path / "service.json").read_text())["rows"][-1]
    assert set(row["statuses"]) == {"200", "429"}
    assert "429" in run.output


def test_questions_without_passages_are_refused(asked: list[str], tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"id": "alone", "question": "Who?", "answers": ["I"], "passages": []}\n')
    done = CliRunner().invoke(app, ["bench", "service", *asked])
    assert done.exit_code == 2
    assert "alone is no question over passages" in done.output


def test_answers_without_a_text_are_told() -> None:
    with pytest.raises(service.RefragError, match=r"none of 2 answers has a text \(status 2 x 503\)"):
        service._row("service", 2, [Reply(503, None, 0)] * 2, 1.0, 0.0)


def test_every_client_of_every_process_has_requests_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, int]] = []

    def run(_command: list[str], *, input: str, **_: object) -> SimpleNamespace:
        given.append(json.loads(input))
        return SimpleNamespace(returncode=0, stdout=json.dumps({"answers": [], "begun": 1.0, "ended": 3.0}))

    monkeypatch.setattr(service.subprocess, "run", run)
    monkeypatch.setattr(service.os, "cpu_count", lambda: 16)
    assert service._ask_service(ClientLoad("", 40, 1.0, 0, [{}], 0, 40)) == ([], 2.0)
    first_turns = [own["first"] + number for own in given for number in range(own["clients"])]
    assert sorted(first_turns) == list(range(40)) and {own["stride"] for own in given} == {40}


def test_an_answer_that_breaks_off_is_no_answer() -> None:
    class Failing(Silent):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'data: {"choices": [{"text": "so far"}]}\n\ndata: {"error": {"message": "gone"}}\n\n')

    with served(HTTPServer(("127.0.0.1", 0), Failing)) as url:
        answers, *_ = asyncio.run(ask_all(ClientLoad(url, 1, 9.0, 1, [{}], 0, 1)))
    assert answers == [Reply(NO_ANSWER, None, 0)]
