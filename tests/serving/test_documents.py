"""Documents that are added, replaced and deleted while a real server answers."""

import json
import socket
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from refrag_platform.errors import RefragError
from refrag_platform.model.segments import unchunk
from refrag_platform.project import Project
from refrag_platform.serving.engine import Engine
from refrag_platform.serving.settings import ApiSettings
from refrag_platform.store import live as live_module
from refrag_platform.store.edits import EDITS_FILE
from refrag_platform.store.live import LiveStore
from tests.command import refrag, refused
from tests.processes import wait_for
from tests.serving.conftest import Server

OMAN = {"id": "oman", "title": "Oman", "text": "Oman is a sultanate in Arabia. Its capital is Muscat."}


@pytest.fixture
def live(packaged_project: Project, server: Server, tmp_path: Path) -> Iterator[tuple[str, Engine]]:
    """A server with a working copy of its own in tmp_path/live."""
    engine = Engine.load(packaged_project, "tiny", tmp_path / "live")
    with server(engine=engine) as url:
        yield url, engine
    engine.close()


def open_store(project: Project, engine: Engine, folder: Path) -> LiveStore:
    return LiveStore.open_live(project.content("chunks", "tiny"), folder, engine.bundle.model, 128)


def put(url: str, *documents: dict[str, str]) -> httpx.Response:
    return httpx.post(f"{url}/v1/documents", json={"documents": documents}, timeout=60)


def found(url: str, query: str) -> list[str]:
    response = httpx.post(f"{url}/v1/retrieve", json={"query": query, "k": 3}, timeout=60)
    return [passage["text"] for passage in response.json()["data"] if passage["score"] > 0.1]


def test_a_document_is_found_and_read_right_at_once(live: tuple[str, Engine]) -> None:
    url, engine = live
    assert put(url, OMAN).json()["data"] == [{"id": "oman", "object": "document", "passages": 1}]
    assert found(url, "Muscat in Oman")[0] == OMAN["text"]
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "What is the capital of Oman?"}],
        "max_tokens": 2,
    }
    refrag = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60).json()["refrag"]
    oman = next(one for one in refrag["citations"] + refrag["retrieved"] if one["id"] == "oman:0")
    assert oman["title"] == "Oman"
    # Its chunks are its own, though they were added behind the others.
    hit = engine.retrieve("Muscat", 1)[0]
    assert hit.token_ids is not None and hit.vectors is not None
    assert engine.bundle.model.tokenizer.decode(unchunk(hit.token_ids)) == f"{OMAN['title']}\n{OMAN['text']}\n"


def test_a_document_is_replaced_and_deleted(live: tuple[str, Engine]) -> None:
    url, _ = live
    long = {**OMAN, "text": " ".join(f"Muscat has {number} lanes." for number in range(200))}
    assert put(url, long).json()["data"][0]["passages"] > 3
    assert put(url, OMAN).json()["data"][0]["passages"] == 1
    shown = httpx.get(f"{url}/v1/documents/oman").json()
    assert shown["passages"] == [{"id": "oman:0", "title": "Oman", "text": OMAN["text"]}]
    assert not any("lanes" in text for text in found(url, "lanes of Muscat"))
    assert httpx.delete(f"{url}/v1/documents/oman").json()["deleted"] is True
    assert not any("Muscat" in text for text in found(url, "Muscat in Oman"))
    for method in ("GET", "DELETE"):
        gone = httpx.request(method, f"{url}/v1/documents/oman")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "document_not_found")


def test_the_store_s_own_documents_can_be_replaced_and_deleted(live: tuple[str, Engine]) -> None:
    url, _ = live
    put(url, {"id": "peru", "title": "Peru", "text": "Peru's capital is Cusco now."})
    assert found(url, "capital of Peru")[0] == "Peru's capital is Cusco now."
    assert len(httpx.get(f"{url}/v1/documents/peru").json()["passages"]) == 1
    assert httpx.delete(f"{url}/v1/documents/malta").is_success
    assert not any("Valletta" in text for text in found(url, "Valletta in Malta"))


def test_documents_of_one_request_enter_together_or_not_at_all(live: tuple[str, Engine]) -> None:
    url, _ = live
    texts = [{"id": f"d{number}", "text": f"Zanzibar spice {number}."} for number in range(5)]
    response = put(url, *texts, {"id": "empty", "text": "\u200b"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "documents.5.text")
    assert put(url, texts[0], texts[0]).json()["error"]["param"] == "documents.1.id"
    assert found(url, "Zanzibar spice") == []
    assert put(url, *texts).is_success and len(found(url, "Zanzibar spice")) == 3
    page = httpx.get(f"{url}/v1/documents", params={"limit": 3}).json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == (["d0", "d1", "d2"], True)
    rest = httpx.get(f"{url}/v1/documents", params={"after": "d2"}).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (["d3", "d4"], False)
    assert httpx.get(f"{url}/v1/documents", params={"limit": 0}).json()["error"]["param"] == "limit"


@pytest.mark.parametrize("name", [".", "..", "a/../b", "./a"])
def test_an_id_that_no_path_can_hold_is_refused(live: tuple[str, Engine], name: str) -> None:
    refused = put(live[0], {"id": name, "text": "Some text."})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "documents.0.id")


class SlowWrites:
    """A store whose writes wait until they may end; a look-up is answered at once."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.may_end = threading.Event()
        self.alive, self.live = True, self

    def put(self, documents: list[tuple[str, str, str]]) -> list[Any]:
        self.begun.append(documents[0][0])
        assert self.may_end.wait(60)
        return []

    def of(self, collection: str) -> Any:
        return self

    def document(self, name: str) -> None:
        return None


def test_writes_of_clients_that_gave_up_are_counted_until_they_end(server: Server) -> None:
    slow = SlowWrites()
    with server(ApiSettings(max_waiting=2), engine=slow) as url:
        address, body = httpx.URL(url), json.dumps({"documents": [OMAN]})
        head = ["POST /v1/documents HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        for number in range(3):
            with socket.create_connection((address.host, address.port or 0), timeout=20) as connection:
                connection.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", body]).encode())
                wait_for(lambda most=number + 1: len(slow.begun) == most, 20)
        full = put(url, OMAN)
        assert full.status_code == 429 and "retry-after" in full.headers
        # Whoever only looks up doesn't wait behind them.
        assert httpx.get(f"{url}/v1/documents/oman", timeout=20).status_code == 404
        slow.may_end.set()
        wait_for(lambda: put(url, OMAN).is_success, 20)
    assert slow.begun == ["oman"] * 4


def test_a_file_of_edits_that_is_held_is_told(live: tuple[str, Engine], tmp_path: Path) -> None:
    url, engine = live
    assert engine.live is not None
    engine.live.of("").edits._database.execute("PRAGMA busy_timeout = 10")
    holder = sqlite3.connect(tmp_path / "live" / EDITS_FILE, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    held = put(url, OMAN)
    assert (held.status_code, held.json()["error"]["code"]) == (503, "store_busy")
    holder.execute("ROLLBACK")
    holder.close()
    assert put(url, OMAN).is_success


def test_a_write_that_fails_leaves_nothing(
    live: tuple[str, Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, engine = live
    put(url, OMAN)

    def fails(*given: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(LiveStore, "_commit", fails)
        assert put(url, {**OMAN, "text": "Something else."}, {"id": "new", "text": "New."}).status_code == 500
    assert engine.live is not None
    assert [(edit.id, edit.text) for edit in engine.live.of("").edits.all()] == [("oman", OMAN["text"])]
    assert found(url, "Muscat in Oman")[0] == OMAN["text"]


def test_indexes_that_take_the_new_rows_in_change_no_answer(
    live: tuple[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, engine = live
    monkeypatch.setattr(live_module, "COMMITS_PER_TIDYING", 3)
    for number in range(7):
        put(url, {"id": f"isle-{number}", "text": f"Isle name{number} lies in the sea."})
    httpx.delete(f"{url}/v1/documents/isle-2")
    for number in (0, 1, 3, 6):
        hit = engine.retrieve(f"name{number} isle", 1)[0]
        assert hit.id == f"isle-{number}:0" and hit.token_ids is not None
        assert engine.bundle.model.tokenizer.decode(unchunk(hit.token_ids)) == f"{hit.text}\n"
    # Eight commits to each table, put together twice.
    assert engine.live is not None
    assert engine.live.of("")._chunks.stats()["fragment_stats"]["num_fragments"] < 4
    assert not any("name2" in text for text in found(url, "name2 isle"))


def test_indexes_that_can_not_be_made_cost_no_write(live: tuple[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> None:
        raise OSError("the disk is full")

    url, engine = live
    assert engine.live is not None
    monkeypatch.setattr(live_module, "COMMITS_PER_TIDYING", 1)
    monkeypatch.setattr(engine.live.of("")._passages, "optimize", fails)
    assert put(url, OMAN).is_success and found(url, "Muscat in Oman")[0] == OMAN["text"]


def test_without_a_folder_the_routes_say_how_to_turn_them_on(url: str) -> None:
    for method, path in (("POST", ""), ("GET", ""), ("GET", "/peru"), ("DELETE", "/peru")):
        body = {"json": {"documents": [OMAN]}} if method == "POST" else {}
        refused = httpx.request(method, f"{url}/v1/documents{path}", **body)
        assert refused.status_code == 501 and "REFRAG_STORE" in refused.json()["error"]["message"]


def test_a_folder_is_for_one_server(live: tuple[str, Engine], packaged_project: Project, tmp_path: Path) -> None:
    with pytest.raises(RefragError, match="another process serves"):
        open_store(packaged_project, live[1], tmp_path / "live")


def test_live_documents_are_exported_as_a_source_file(live: tuple[str, Engine], tmp_path: Path) -> None:
    url, _ = live
    put(url, OMAN, {"id": "odd", "text": "Ünïcode  and\r\nspaces."})
    httpx.delete(f"{url}/v1/documents/malta")
    out, gone = tmp_path / "live.jsonl", tmp_path / "deleted.txt"
    refrag("store", "export", tmp_path / "live", "-o", out, "--deleted", gone)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [{"id": "odd", "title": "", "text": "Ünïcode and\nspaces."}, OMAN]
    assert gone.read_text() == "malta\n"
    refrag("store", "export", tmp_path / "live", "-o", "/dev/null")
    assert "--force" in refused("store", "export", tmp_path / "live", "-o", out)
    assert refrag("store", "ls", tmp_path / "live").output == "+ odd\n+ oman\n- malta\n"


def test_the_folder_is_named_by_its_whole_path() -> None:
    assert ApiSettings.from_environment({"REFRAG_STORE": "/srv/live"}).store == Path("/srv/live")
    with pytest.raises(RefragError, match="REFRAG_STORE is 'live'; give the whole path"):
        ApiSettings.from_environment({"REFRAG_STORE": "live"})
