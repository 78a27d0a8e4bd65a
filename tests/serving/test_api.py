"""The HTTP API on a real server, used through the official OpenAI client and through plain HTTP."""

from typing import Any

import httpx
import openai
import pytest

from refrag_platform.evaluation.metrics import is_refusal
from refrag_platform.serving.contract import Message, Sampling
from refrag_platform.serving.engine import Engine
from refrag_platform.serving.generation import NOTHING_FOUND
from tests.serving.conftest import ASKED, SHARE_KEPT, error_of, post

JSON = {"Content-Type": "application/json"}
GIVEN = [{"title": "Andorra", "text": "Andorra's capital is Andorra la Vella."}, {"title": "", "text": "No title."}]


def test_the_openai_client_gets_an_answer_over_retrieved_passages(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=12)
    expected = engine.start(
        [Message("user", ASKED[0]["content"])], engine.retrieve(ASKED[0]["content"], 4), Sampling(12)
    )
    assert answer.choices[0].message.content == "".join(expected)
    assert answer.usage is not None and answer.usage.prompt_tokens == expected.usage.prompt_positions
    refrag, cited = answer.model_extra["refrag"], expected.sources.citations[0]
    assert refrag["citations"][0] | {"text": "", "selection": []} == {
        "id": "peru-0", "title": "Peru", "score": cited.score, "text": "", "chunks": cited.chunks,
        "chunks_expanded": cited.chunks_expanded, "selection": [],
    }  # fmt: skip
    assert refrag["chunks_expanded"] == round(SHARE_KEPT * refrag["chunks"])
    assert refrag["compression_rate"] == round(refrag["plain_prompt_tokens"] / refrag["prompt_positions"], 4) > 1
    assert refrag["answered"] and refrag["similarity"] == refrag["citations"][0]["score"] >= refrag["least_similarity"]
    assert refrag["time_to_first_token_ms"] > 0


def test_a_stream_says_the_same_as_a_whole_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": ASKED, "max_tokens": 24, "temperature": 1, "seed": 3}
    whole = client.chat.completions.create(**asked)
    *chunks, end = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 3
    last = chunks[-1]
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert not end.choices and end.usage is not None and whole.usage is not None
    assert end.usage.total_tokens == whole.usage.total_tokens
    assert not any(chunk.usage for chunk in chunks)
    assert last.model_extra["refrag"]["citations"] == whole.model_extra["refrag"]["citations"]


@pytest.mark.parametrize("stream", [False, True])
def test_passages_of_the_request_are_read_and_cited(client: openai.OpenAI, stream: bool) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=4, stream=stream, extra_body={"passages": GIVEN, "share_kept": 0}
    )
    refrag = (list(answer)[-1] if stream else answer).model_extra["refrag"]
    assert [(cited["title"], cited["score"]) for cited in refrag["citations"]] == [("Andorra", None), ("", None)]
    assert refrag["chunks_expanded"] == 0


@pytest.mark.parametrize(
    ("extra", "cited"),
    [({"retrieve": 2}, 2), ({"retrieve": 0}, 0), ({"passages": GIVEN, "retrieve": 1}, 3), ({"passages": []}, 0)],
)
def test_a_request_says_what_is_read(url: str, extra: dict[str, Any], cited: int) -> None:
    refrag = post(url, **extra).json()["refrag"]
    assert len(refrag["citations"] + refrag["retrieved"]) == cited


def test_a_conversation_with_parts_and_a_system_message_is_understood(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": [{"type": "text", "text": "What is the capital of Chad?"}]},
        ],
        max_tokens=2,
    )
    assert answer.model_extra["refrag"]["citations"][0]["title"] == "Chad"


def test_models_are_listed_by_name_and_found_by_tag(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("refrag-tiny:0123").id == "tiny"


def test_passages_are_retrieved_without_an_answer(url: str) -> None:
    found = httpx.post(f"{url}/v1/retrieve", json={"query": "Himalayas", "k": 2}).json()["data"]
    assert [found[0]["title"], len(found)] == ["Nepal", 2]
    assert set(found[0]) == {"id", "title", "text", "score"}
    assert all(-1 <= passage["score"] <= 1 for passage in found)


OFF_TOPIC = [{"role": "user", "content": "Who wrote Hamlet?"}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_question_that_the_store_holds_nothing_about_is_refused(client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": OFF_TOPIC, "n": 2, "logprobs": True, "max_tokens": 4}
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        texts = ["", ""]
        for chunk in chunks:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason]
        refrag = chunks[-1].model_extra["refrag"]
    else:
        answer = client.chat.completions.create(**asked)
        assert answer.usage is not None and answer.usage.total_tokens == 0
        texts = [choice.message.content or "" for choice in answer.choices]
        reasons = [choice.finish_reason for choice in answer.choices]
        refrag = answer.model_extra["refrag"]
    assert (texts, reasons) == ([NOTHING_FOUND] * 2, ["stop"] * 2)
    assert is_refusal(NOTHING_FOUND)
    assert (refrag["answered"], refrag["similarity"], refrag["least_similarity"]) == (False, 0.0, 0.1)
    assert (refrag["citations"], refrag["chunks_expanded"]) == ([], 0)


@pytest.mark.parametrize(
    "extra", [{"passages": GIVEN}, {"passages": GIVEN, "retrieve": 2}, {"retrieve": 0}, {"passages": []}]
)
def test_who_sends_passages_or_wants_none_is_answered_in_any_case(url: str, extra: dict[str, Any]) -> None:
    refrag = post(url, messages=OFF_TOPIC, **extra).json()["refrag"]
    assert (refrag["answered"], refrag["least_similarity"]) == (True, None)


def test_a_follow_up_is_looked_up_with_what_was_asked_before(url: str) -> None:
    last = {"role": "user", "content": "And where is that?"}
    before = [{"role": "user", "content": "Which currency does Malta use?"}, {"role": "assistant", "content": "Chad."}]
    assert post(url, messages=[last]).json()["refrag"]["answered"] is False
    assert post(url, messages=[*before, last], share_kept=1).json()["refrag"]["citations"][0]["title"] == "Malta"


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, 400, "messages.0.role", "must be the user's question"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "messages.0.content", "is empty"),
        ({"passages": [{"title": "no text"}]}, 400, "passages.0.text", "required"),
        ({"share_kept": 1.5}, 400, "share_kept", "less than or equal to 1"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"n": 9}, 400, "n", "writes at most 8 choices"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
        ({"max_tokens": 2048}, 400, "max_tokens", "holds 2048 in all"),
        ({"passages": [{"text": "word " * 2000}], "share_kept": 1}, 400, "messages", "the limit of tiny is 1024"),
        ({"model": "gpt"}, 404, "model", "no model 'gpt' here; this server serves 'tiny'"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_request_is_explained(
    url: str, body: dict[str, Any], status: int, param: str, says: str, stream: bool
) -> None:
    error = error_of(post(url, **body, stream=stream), status)
    assert error["param"] == param and says in error["message"]


def test_broken_json_and_unknown_routes_have_the_same_shape(url: str) -> None:
    assert error_of(httpx.post(f"{url}/v1/chat/completions", content=b"{", headers=JSON), 400)["code"] == "invalid_json"
    assert error_of(httpx.get(f"{url}/v1/nothing"), 404)["code"] == "unknown_url"
    error_of(httpx.get(f"{url}/v1/chat/completions"), 405)


def test_the_openai_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=ASKED)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=ASKED, temperature=9)


def test_choices_are_told_apart_streamed_or_not(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": ASKED, "max_tokens": 9, "temperature": 1, "seed": 3, "n": 3}
    whole = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert whole.usage is not None and whole.usage.completion_tokens <= 27
    chunks = list(client.chat.completions.create(**asked, stream=True))
    streamed = ["", "", ""]
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    assert not any(chunk.usage for chunk in chunks)
    assert ["refrag" in (chunk.model_extra or {}) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert sum(chunk.choices[0].finish_reason is not None for chunk in chunks) == 3


def test_log_probabilities_have_openai_s_shape_streamed_or_not(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": ASKED, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].logprobs is not None and whole.usage is not None
    tokens = whole.choices[0].logprobs.content or []
    assert len(tokens) == whole.usage.completion_tokens
    for token in tokens:
        # Greedy: what was drawn is the likeliest.
        assert token.logprob <= 0 and len(token.top_logprobs) == 2
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, token.top_logprobs[0].logprob)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    streamed = [one for chunk in chunks if (part := chunk.choices[0].logprobs) for one in part.content or []]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    assert client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=2).choices[0].logprobs is None


def test_a_prompt_that_was_read_before_counts_as_cached(url: str) -> None:
    asked = {"passages": GIVEN * 4, "share_kept": 0.5}
    first, again = (post(url, **asked).json() for _ in range(2))
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 0 < again["usage"]["prompt_tokens"] - cached <= 32
    assert again["refrag"]["positions_reused"] == cached
    assert first["choices"] == again["choices"]
