"""What stands around the answers: root, description, metrics, ids, the log, and what a request may cost in memory."""

import json
import logging
import re
import subprocess
import sys
from typing import Any

import httpx
import pytest

from refrag_platform.project import Project
from refrag_platform.serving.engine import Engine
from refrag_platform.serving.settings import ApiSettings
from tests.conftest import ROOT
from tests.processes import wait_for
from tests.serving.conftest import Server

ASKED: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Capital of Peru?"}],
    "max_tokens": 3,
}
ELSEWHERE = re.compile(r"""(?:src|href|action|url|import)\s*[=(:]\s*["']?\s*(?:https?:)?//""", re.IGNORECASE)


@pytest.mark.parametrize("path", ["/", "/docs", "/v1/docs"])
def test_no_page_loads_anything_from_elsewhere(url: str, path: str) -> None:
    page = httpx.get(url + path)
    assert page.status_code == 200 and "html" in page.headers["content-type"]
    assert not ELSEWHERE.search(page.text)
    # Whatever its scripts try, the browser asks this server alone.
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.headers["content-security-policy"]
    for part in re.findall(r"""(?:src|href)=["']([^"']+)["']""", page.text):
        if not part.startswith("data:") and part not in {"livez", "readyz"}:
            assert httpx.get(httpx.URL(url + path).join(part)).status_code == 200, part


def test_the_description_says_what_is_true(url: str) -> None:
    described = httpx.get(f"{url}/openapi.json").json()
    assert described == httpx.get(f"{url}/v1/openapi.json").json()
    chat = described["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "404", "413", "429", "503"} <= set(chat["responses"])
    assert all("422" not in one["responses"] for path in described["paths"].values() for one in path.values())
    assert described["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    fields = described["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["messages"]["maxItems"] == 1024 and "2,048 different words" in fields["messages"]["description"]


def test_our_page_runs_its_own_script_and_style_alone(url: str) -> None:
    page = httpx.get(url)
    allowed = page.headers["content-security-policy"]
    assert "unsafe" not in allowed and "script-src 'self'" in allowed and "form-action 'none'" in allowed
    assert not re.search(r"<script(?! src=)|style=|\son[a-z]+=", page.text)


@pytest.mark.parametrize("path", ["/", "/page.js"])
def test_the_page_itself_needs_no_key(server: Server, path: str) -> None:
    with server(ApiSettings(api_key="secret", rate_limit=1)) as url:
        assert [httpx.get(url + path).status_code for _ in range(3)] == [200] * 3
        assert httpx.get(url + path, headers={"Authorization": "Bearer wrong"}).status_code == 200
        assert [httpx.get(f"{url}/{path}").status_code, httpx.get(f"{url}{path}x").status_code] == [401, 401]


@pytest.mark.parametrize(
    "path",
    ["/docs", "/openapi.json", "/metrics", "/docs.json", "/schema.json", "/nothing", "/v1/models", "/v1/nothing",
     "/docs/swagger-ui.css", "/static_content/index.css", "/v1/documents", "/v1/responses/x"],
)  # fmt: skip
def test_nothing_is_answered_without_the_key(server: Server, path: str) -> None:
    with server(ApiSettings(api_key="secret")) as url:
        assert httpx.get(url + path).status_code == 401
        assert httpx.get(url + path, headers={"Authorization": "Bearer secret"}).status_code in {200, 404, 501}


def test_labels_of_metrics_come_from_routes(server: Server) -> None:
    with server() as url:
        httpx.post(f"{url}/v1/chat/completions", json=ASKED)
        for number in range(20):
            httpx.get(f"{url}/made/up/{number}")
            httpx.get(f"{url}/v1/models/made-up-{number}")
            httpx.request("PROPFIND", f"{url}/v1/models")
        figures = httpx.get(f"{url}/metrics").text
    assert "made" not in figures.lower() and "PROPFIND" not in figures
    assert set(re.findall(r'endpoint="([^"]*)"', figures)) == {
        "/v1/chat/completions", "/v1/models", "/v1/models/{model:path}", "/metrics", "other"
    }  # fmt: skip
    assert 'refrag_requests_total{endpoint="other",method="GET",status="404"} 20.0' in figures
    assert 'refrag_requests_total{endpoint="/v1/chat/completions",method="POST",status="200"} 1.0' in figures


def test_a_request_s_id_is_in_header_body_and_log(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "refrag.serving")
    for given in ("mine-1", None, "no\x09tab", "x" * 200):
        headers = {"X-Request-Id": given} if given else {}
        answer = httpx.post(f"{url}/v1/chat/completions", json=ASKED, headers=headers)
        name = answer.headers["x-request-id"]
        assert (name == given) == (given == "mine-1") and re.fullmatch(r"mine-1|req-[0-9a-f]{32}", name)
        assert answer.json()["refrag"]["request_id"] == name
        wrong = httpx.post(f"{url}/v1/chat/completions", json=ASKED | {"n": 0}, headers={"X-Request-Id": name})
        assert wrong.headers["x-request-id"] == wrong.json()["request_id"] == name
        # The line is written once the client has its answer.
        for status in (200, 400):
            line = re.compile(rf"POST /v1/chat/completions: {status} after \d+ ms, request {name}")
            wait_for(lambda line=line: line.search(caplog.text), 20)


def test_a_failure_is_logged_once_with_the_request_s_id(
    server: Server, engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(engine, "retrieve", fails)
    with server() as url:
        answer = httpx.post(f"{url}/v1/retrieve", json={"query": "x"}, headers={"X-Request-Id": "lost"})
    assert answer.status_code == 500 and "disk" not in answer.text and answer.json()["request_id"] == "lost"
    traces = [record for record in caplog.records if record.exc_info]
    assert [record.getMessage() for record in traces] == ["POST /v1/retrieve failed, request lost"]


def test_a_path_can_t_write_lines_into_the_log(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "refrag.serving")
    httpx.get(f"{url}/a%0AINFO%20all%20is%20well%1b[2J")
    # The line follows the answer.
    wait_for(lambda: bool(caplog.records), 20)
    assert [len(record.getMessage().splitlines()) for record in caplog.records] == [1]


def events(url: str, **extra: Any) -> list[dict[str, Any]]:
    return sent_events(url, "chat/completions", {"stream": True, **ASKED, **extra})


def sent_events(url: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream; typed ones name their type twice, others end with [DONE]."""
    text = httpx.post(f"{url}/v1/{path}", json=body, timeout=60).content.decode()
    # The hardest of line splitters: it takes every kind of line end that Unicode knows.
    lines = [line for line in text.splitlines() if line]
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert len(kinds) + len(data) == len(lines) and (kinds or data.pop() == "[DONE]")
    told = [json.loads(line) for line in data]
    assert not kinds or kinds == [event["type"] for event in told]
    return told


def test_usage_comes_in_a_last_chunk_of_its_own_when_it_is_asked_for(url: str) -> None:
    assert not any("usage" in event for event in events(url))
    assert not any("usage" in event for event in events(url, stream_options={"include_usage": False}))
    *before, last = events(url, stream_options={"include_usage": True}, n=2)
    assert not any("usage" in event for event in before) and all(event["choices"] for event in before)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 0
    assert "refrag" in before[-1]


def test_any_line_splitter_can_read_a_stream(url: str) -> None:
    odd = "x\u0085y\u2028z\u2029\x0b\x0c\x1c"
    told = events(url, passages=[{"title": "A\u2028B", "text": odd}], share_kept=1)
    [cited] = told[-1]["refrag"]["citations"]
    assert (cited["title"], cited["text"]) == ("A\u2028B", odd)


def test_the_memory_of_keys_and_values_is_told(engine: Engine) -> None:
    words = engine.memory()
    assert re.match(r"keys and values of 8 slots of 2,048 positions take \d+\.\d\d GiB, (at once|as they are)", words)


COSTS = """
import json, resource, sys
from pathlib import Path
from starlette.testclient import TestClient
from refrag_platform.project import Project
from refrag_platform.serving.api import create_app
from refrag_platform.serving.engine import Engine

app = create_app("tiny")
app.state.engine = Engine.load(Project(Path(sys.argv[1])), "tiny")
client = TestClient(app, "http://localhost", client=("127.0.0.1", 50000))

def ask(path, body):
    return client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"}).status_code

def chat(**more):
    return ask("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "q"}]} | more)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

assert chat() == 200 and ask("/v1/retrieve", {"query": "Peru"}) == 200
before = peak()
seen = [
    ask("/v1/retrieve", {"query": " ".join(f"word{number}" for number in range(2048))}),
    ask("/v1/retrieve", {"query": "x " * 131_072}),
    ask("/v1/retrieve", {"query": "x " * 2_000_000}),
    chat(messages=[{"role": "user", "content": "x " * 131_072}]),
    chat(messages=[{"role": "user", "content": "a b c " * 43_690}] * 4, retrieve=0),
    chat(passages=[{"text": "ab cd " * 690}] * 250, share_kept=1),
    chat(**{f"k{number}": 1 for number in range(250_000)}),
]
print(json.dumps({"seen": seen, "megabytes": peak() - before}))
"""


def test_requests_at_their_limits_cost_bounded_memory(packaged_project: Project) -> None:
    command = [sys.executable, "-c", COSTS, str(packaged_project.root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seen"] == [200, 200, 400, 400, 400, 400, 400]
    assert found["megabytes"] < 400
