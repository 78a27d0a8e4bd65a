"""Keys of one collection learn nothing of another's documents: by ids, searches, scores, reuse, figures or errors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from refrag_platform.artifacts.digest import folder_digest
from refrag_platform.errors import RefragError
from refrag_platform.project import Project
from refrag_platform.serving.engine import Engine
from refrag_platform.serving.keys import COLLECTION, add_key, new_key, parse_keys, read_keys
from refrag_platform.serving.settings import ApiSettings
from refrag_platform.store.live import LiveStore
from tests.command import refrag, refused
from tests.serving.conftest import COUNTRIES, Server

OMAN = {"id": "oman", "title": "Oman", "text": "Oman is a sultanate in Arabia. Its capital is Muscat."}
QUESTION = "What is the capital of Oman?"
Clients = dict[str, httpx.Client]


@pytest.fixture(scope="module")
def clients(packaged_project: Project, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    """A client for each key of one server: `ana` and `bo` are of acme, `cy` is of zeta, `di` of none."""
    folder = tmp_path_factory.mktemp("collections")
    engine = Engine.load(packaged_project, "tiny", folder / "live")
    collections = {"ana": "acme", "bo": "acme", "cy": "zeta", "di": ""}
    keys = {}
    for name, collection in collections.items():
        keys[name], kept = new_key(name, collection=collection)
        add_key(folder / "keys", kept)
    with server(ApiSettings(api_keys_file=folder / "keys"), engine=engine) as url:
        yield {
            name: httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
            for name, key in keys.items()
        }
    engine.close()


@pytest.fixture(autouse=True)
def nothing_added(clients: Clients) -> Iterator[None]:
    """What a test adds is deleted after it."""
    yield
    for client in clients.values():
        for document in listed(client):
            client.delete(f"/v1/documents/{document}")


def put(client: httpx.Client, *documents: dict[str, str]) -> httpx.Response:
    return client.post("/v1/documents", json={"documents": documents})


def listed(client: httpx.Client) -> list[str]:
    return [document["id"] for document in client.get("/v1/documents").json()["data"]]


def retrieved(client: httpx.Client, query: str, k: int = 8) -> list[dict[str, Any]]:
    passages: list[dict[str, Any]] = client.post("/v1/retrieve", json={"query": query, "k": k}).json()["data"]
    return passages


def asked(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 2, **fields}
    answer: dict[str, Any] = client.post("/v1/chat/completions", json=body).json()
    return answer


def read(client: httpx.Client) -> list[str]:
    """Ids of the passages that an answer rests on."""
    refrag = asked(client, retrieve=8)["refrag"]
    return [passage["id"] for passage in refrag["citations"] + refrag["retrieved"]]


def test_documents_are_read_with_keys_of_their_collection_alone(clients: Clients) -> None:
    assert put(clients["ana"], OMAN).is_success
    for name in ("ana", "bo"):
        assert listed(clients[name]) == ["oman"] and "oman:0" in read(clients[name])
        assert clients[name].get("/v1/documents/oman").json()["passages"][0]["text"] == OMAN["text"]
        assert retrieved(clients[name], "Muscat in Oman")[0]["id"] == "oman:0"
    for name in ("cy", "di"):
        assert listed(clients[name]) == [] and "oman:0" not in read(clients[name])
        assert {passage["title"] for passage in retrieved(clients[name], "Muscat in Oman")} == set(COUNTRIES)
    assert put(clients["di"], {**OMAN, "id": "common"}).is_success
    assert [listed(clients[name]) for name in ("ana", "cy", "di")] == [["oman"], [], ["common"]]


@pytest.mark.parametrize("name", ["cy", "di"])
def test_another_s_id_is_answered_as_one_that_nobody_has(clients: Clients, name: str) -> None:
    put(clients["ana"], OMAN)

    def told(document: str) -> list[tuple[int, str]]:
        client = clients[name]
        question = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "retrieve": 2}
        answers = [
            client.get(f"/v1/documents/{document}"),
            client.delete(f"/v1/documents/{document}"),
            client.get("/v1/documents", params={"after": document[:-1]}),
            client.post(
                "/v1/chat/completions", json={**question, "refrag": {"expand": [{"passage": f"{document}:0"}]}}
            ),
        ]
        bodies = [{**answer.json(), "request_id": None} for answer in answers]
        return [(one.status_code, str(body).replace(document, "ID")) for one, body in zip(answers, bodies, strict=True)]

    assert told("oman") == told("none")
    assert [status for status, _ in told("oman")] == [404, 404, 200, 400]
    assert listed(clients["bo"]) == ["oman"]


def test_an_id_means_another_document_in_each_collection(clients: Clients) -> None:
    put(clients["ana"], OMAN)
    put(clients["cy"], {**OMAN, "text": "Oman exports dates."})
    put(clients["cy"], {"id": "peru", "title": "Peru", "text": "Peru's capital is Cusco now."})
    texts = [clients[name].get("/v1/documents/oman").json()["passages"][0]["text"] for name in ("bo", "cy")]
    assert texts == [OMAN["text"], "Oman exports dates."]
    assert (
        clients["cy"].delete("/v1/documents/oman").is_success and clients["cy"].delete("/v1/documents/malta").is_success
    )
    assert listed(clients["ana"]) == ["oman"] and clients["cy"].get("/v1/documents/malta").status_code == 404
    # What the store came with stays as it was for everyone else.
    for name in ("ana", "di"):
        for country in ("Peru", "Malta"):
            assert (
                clients[name].get(f"/v1/documents/{country.lower()}").json()["passages"][0]["text"]
                == COUNTRIES[country]
            )


def test_neither_order_nor_scores_tell_what_another_collection_holds(clients: Clients) -> None:
    queries = (QUESTION, "Muscat", "sultanate in Arabia and the euro", "capital")
    before = [retrieved(clients["cy"], query) for query in queries]
    put(clients["ana"], OMAN, *({"id": f"d{number}", "text": f"Muscat is a capital {number}."} for number in range(40)))
    assert [retrieved(clients["cy"], query) for query in queries] == before


def test_a_prompt_s_beginning_is_used_again_within_its_collection_alone(clients: Clients) -> None:
    passage = {"title": "Oman", "text": " ".join(f"Muscat has {number} lanes." for number in range(30))}

    def used_again(name: str) -> bool:
        """Whether more than the words that stand before every prompt is used again."""
        answer = asked(clients[name], passages=[passage], share_kept=1)
        reused, positions = (answer["refrag"][field] for field in ("positions_reused", "prompt_positions"))
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == reused
        return reused > positions / 2

    order = ("ana", "ana", "bo", "cy", "cy", "di", "di")
    assert [used_again(name) for name in order] == [False, True, True, False, True, False, True]


def test_figures_are_not_for_keys_of_a_collection(clients: Clients) -> None:
    put(clients["ana"], {**OMAN, "id": "secret-id"})
    clients["ana"].get("/v1/documents/secret-id")
    assert [clients[name].get("/metrics").status_code for name in ("ana", "cy")] == [403, 403]
    figures = clients["di"].get("/metrics").text
    assert "refrag_requests_total" in figures and not any(
        word in figures for word in ("secret-id", "acme", "zeta", "Oman")
    )


def test_documents_outlive_the_server_in_their_collection(
    packaged_project: Project, engine: Engine, tmp_path: Path
) -> None:
    def stores() -> Engine:
        return Engine.load(packaged_project, "tiny", tmp_path / "live")

    first = stores()
    assert first.live is not None
    first.live.of("acme").put([("oman", "Oman", OMAN["text"])])
    first.close()
    again = stores()
    assert again.live is not None
    assert [again.live.of(name).document("oman") is not None for name in ("acme", "zeta", "")] == [True, False, False]
    again.close()


def test_a_collection_shares_the_store_s_files_and_changes_none(
    packaged_project: Project, engine: Engine, tmp_path: Path
) -> None:
    content, unchanged = packaged_project.content("chunks", "tiny"), packaged_project.root / "data/tiny/lance"
    before = folder_digest(unchanged)
    folders = [path for path in unchanged.rglob("*") if path.is_dir()]
    for path in folders:
        path.chmod(0o555)  # as of a package that nobody is to change
    store = LiveStore.open_live(content, tmp_path, engine.bundle.model, 128, unchanged=unchanged)
    assert all(path.stat().st_mode & 0o200 for path in tmp_path.rglob("*") if path.is_dir())
    shared = {file.stat().st_ino for file in unchanged.rglob("*.lance") if file.is_file()}
    assert shared and shared <= {file.stat().st_ino for file in tmp_path.rglob("*.lance")}
    store.put([("oman", "Oman", OMAN["text"]), ("peru", "Peru", "Peru is elsewhere.")])
    store.delete("malta")
    store._tidy()
    store.close()
    for path in folders:
        path.chmod(0o755)
    assert folder_digest(unchanged) == before


def test_collections_share_what_is_large_and_an_export_names_those_that_it_leaves_out(
    packaged_project: Project, tmp_path: Path
) -> None:
    engine = Engine.load(packaged_project, "tiny", tmp_path / "live")
    assert engine.live is not None
    acme, common = engine.live.of("acme"), engine.live.of("")
    acme.put([("oman", "Oman", OMAN["text"])])
    assert acme._model is common._model and acme.document("oman") and not common.document("oman")
    engine.close()
    run = refrag("store", "export", tmp_path / "live", "-o", tmp_path / "out.jsonl")
    assert "0 documents" in run.stderr and "not in it: the collections acme" in run.stderr


def test_a_collection_that_cannot_be_opened_is_named_to_keys_of_none_alone_and_holds_no_other_s_folder(
    packaged_project: Project, server: Server, tmp_path: Path
) -> None:
    live = tmp_path / "live"
    (live / "collections" / "zeta").mkdir(parents=True)
    (live / "collections" / "zeta" / "edits.sqlite").write_text("no database")
    with pytest.raises(RefragError, match="zeta") as failure:
        Engine.load(packaged_project, "tiny", live)
    (live / "collections" / "zeta" / "edits.sqlite").unlink()
    Engine.load(packaged_project, "tiny", live).close()
    acme, none = new_key("ana", collection="acme"), new_key("di")
    lines = ",".join(kept.line() for _, kept in (acme, none))
    with server(ApiSettings(api_keys=lines), loaded=False, failure=str(failure.value)) as url:
        said = [
            httpx.post(f"{url}/v1/retrieve", json={"query": "x"}, headers={"Authorization": f"Bearer {key}"}).text
            for key, _ in (acme, none)
        ]
    assert ["zeta" in text for text in said] == [False, True] and "its log says why" in said[0]


def test_a_key_s_collection_stands_in_its_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    refrag("keys", "add", "ana", "--collection", "acme", "--per-minute", 60, "--file", file)
    refrag("keys", "add", "bo", "--collection", 60, "--file", file)
    assert [(key.collection, key.per_minute) for key in read_keys(file)] == [("acme", 60), ("60", None)]
    assert parse_keys([key.line() for key in read_keys(file)], "again") == read_keys(file)
    assert refrag("keys", "ls", "--file", file).output == "ana  60 a minute  of acme\nbo  of 60\n"
    for wrong in ("..", ".a", "a/b", "A", "a b", "x" * 65):
        assert "can't name a collection" in refused("keys", "add", "cy", "--collection", wrong, "--file", file)
        assert not COLLECTION.fullmatch(wrong)
