"""The `refrag` field of requests and answers: why each chunk was kept, where it lies, what took how long."""

from typing import Any

import httpx
import pytest

from refrag_platform.model.prompts import passage_chunks
from refrag_platform.serving.citations import chunk_spans
from refrag_platform.serving.contract import Message
from refrag_platform.serving.engine import Engine
from tests.serving.conftest import COUNTRIES, SHARE_KEPT
from tests.serving.test_site import sent_events

QUESTION = "What is the capital of Peru?"
SHAPES: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 3},
    "completions": {"prompt": QUESTION, "retrieve": 4, "max_tokens": 3},
    "responses": {"input": QUESTION, "max_output_tokens": 3},
}


def refrag_of(url: str, path: str = "chat/completions", **extra: Any) -> dict[str, Any]:
    response = httpx.post(f"{url}/v1/{path}", json={"model": "tiny"} | SHAPES[path] | extra, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["refrag"]


def passages_of(refrag: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {passage["id"]: passage for passage in refrag["citations"] + refrag["retrieved"]}


@pytest.mark.parametrize("path", SHAPES)
def test_every_shape_says_of_every_chunk_why_it_was_kept(url: str, path: str) -> None:
    refrag = refrag_of(url, path)
    chunks = [chunk for passage in passages_of(refrag).values() for chunk in passage["selection"]]
    kept = [chunk["score"] for chunk in chunks if chunk["kept"]]
    assert len(chunks) == refrag["chunks"] and len(kept) == round(SHARE_KEPT * len(chunks)) == refrag["chunks_expanded"]
    # The policy keeps the highest.
    assert min(kept) >= max(chunk["score"] for chunk in chunks if not chunk["kept"])
    for passage in passages_of(refrag).values():
        assert len(passage["selection"]) == passage["chunks"]
        assert sum(chunk["kept"] for chunk in passage["selection"]) == passage["chunks_expanded"]


@pytest.mark.parametrize("path", SHAPES)
def test_a_stream_s_last_event_says_the_same(url: str, path: str) -> None:
    whole = refrag_of(url, path)
    events = sent_events(url, path, {"model": "tiny", "stream": True} | SHAPES[path])
    last = (events[-1].get("response") or events[-1])["refrag"]
    assert passages_of(last) == passages_of(whole)
    assert set(last) == set(whole) and all(seconds > 0 for seconds in last["seconds"].values())
    assert not any((event.get("response") or event).get("refrag") for event in events[:-1])


def test_offsets_are_those_of_the_chunk_in_the_passage_s_text(url: str, engine: Engine) -> None:
    tokenizer = engine.bundle.model.tokenizer
    for name, passage in passages_of(refrag_of(url)).items():
        title = passage["title"]
        text = COUNTRIES[title]
        assert name == f"{title.lower()}-0"
        told = "".join(text[chunk["start"] : chunk["end"]] for chunk in passage["selection"])
        assert told.replace(" ", "") == text.replace(" ", "")
        cut = passage_chunks(tokenizer, title, text, engine.bundle.model.chunk_size)
        last = [token for token in cut.token_ids[-1].tolist() if token >= 0]
        end = passage["selection"][-1]
        assert text[end["start"] : end["end"]].strip() == tokenizer.decode(last).strip()


def test_a_chunk_of_the_title_alone_lies_nowhere_in_the_text(engine: Engine) -> None:
    model = engine.bundle.model
    spans = chunk_spans(model.tokenizer, "word " * 40, "Short.", model.chunk_size)
    assert spans[0] == (0, 0) and spans[-1][1] == len("Short.")


@pytest.mark.parametrize("path", SHAPES)
def test_a_request_says_p_in_the_refrag_field(url: str, path: str) -> None:
    refrag = refrag_of(url, path, refrag={"share_kept": 0})
    assert (refrag["share_kept"], refrag["chunks_expanded"]) == (0, 0)
    # Nothing was to choose, so the policy was not asked.
    assert {chunk["score"] for one in refrag["citations"] for chunk in one["selection"]} == {None}


@pytest.mark.parametrize("path", SHAPES)
def test_a_request_expands_chunks_beside_that_share(url: str, path: str) -> None:
    expand = [{"passage": "chad-0", "chunks": [1]}, {"passage": "malta-0"}]
    refrag = refrag_of(url, path, refrag={"share_kept": 0, "expand": expand})
    read = passages_of(refrag)
    assert [chunk["kept"] for chunk in read["chad-0"]["selection"]].index(True) == 1
    assert all(chunk["kept"] for chunk in read["malta-0"]["selection"])
    assert refrag["chunks_expanded"] == 1 + read["malta-0"]["chunks"]
    plain = refrag_of(url, path, refrag={"share_kept": 0})
    assert refrag["prompt_positions"] > plain["prompt_positions"]
    assert refrag["plain_prompt_tokens"] == plain["plain_prompt_tokens"]


def test_a_passage_of_the_request_is_expanded_by_its_place(url: str) -> None:
    sent = [{"text": "Lima. " * 20}, {"text": "Quito. " * 20}]
    expand = [{"passage": "request-1", "chunks": [0]}]
    refrag = refrag_of(url, passages=sent, refrag={"share_kept": 0, "expand": expand})
    assert [passage["id"] for passage in refrag["citations"]] == ["request-1"]


def test_seconds_are_told_of_what_was_done(url: str, engine: Engine) -> None:
    seconds = refrag_of(url)["seconds"]
    assert set(seconds) == {"retrieve", "select", "project", "prefill"} and all(seconds.values())
    refused = refrag_of(url, messages=[{"role": "user", "content": "Who wrote Hamlet?"}])
    assert refused["seconds"]["retrieve"] > 0 and refused["seconds"]["prefill"] is None
    assert all(passage["selection"] == [] for passage in refused["retrieved"])
    assert engine.start([Message("user", QUESTION)]).usage.seconds.prefill is None
