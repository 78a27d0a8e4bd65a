"""Completions, responses and embeddings on a real server, by the official OpenAI client: one answer in three shapes."""

import base64
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob
from openai.types.responses import Response
from openai.types.responses.response_output_text import Logprob

from refrag_platform.model.generate import generate
from refrag_platform.model.prompts import content_ids, stop_ids
from refrag_platform.model.segments import Text
from refrag_platform.serving.answers import logprobs_body
from refrag_platform.serving.contract import TokenLogprob
from refrag_platform.serving.engine import Engine
from refrag_platform.serving.generation import NOTHING_FOUND
from tests.processes import wait_for

QUESTION = "What is the capital of Peru?"
ASKED = [{"role": "user", "content": QUESTION}]
DRAWN: dict[str, Any] = {"model": "tiny", "temperature": 1, "extra_body": {"seed": 3}}
PASSAGES = [{"title": "Andorra", "text": "Andorra's capital is Andorra la Vella."}]


def error_of(url: str, path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{url}/v1/{path}", json={"model": "tiny"} | body, timeout=60)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def test_a_response_says_what_a_chat_completion_says(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(messages=ASKED, max_tokens=12, **DRAWN)
    for asked in (QUESTION, ASKED, [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]):
        response = client.responses.create(input=asked, max_output_tokens=12, **DRAWN)
        assert response.output_text == chat.choices[0].message.content
        assert response.usage is not None and chat.usage is not None
        assert response.usage.input_tokens == chat.usage.prompt_tokens
        assert response.refrag["citations"] == chat.refrag["citations"]
    assert (response.status, response.store) == ("incomplete", False)
    assert response.incomplete_details is not None and response.incomplete_details.reason == "max_output_tokens"


def test_instructions_are_a_system_message(client: openai.OpenAI) -> None:
    told = [{"role": "system", "content": "Be brief."}, *ASKED]
    chat = client.chat.completions.create(messages=told, max_tokens=8, **DRAWN)
    response = client.responses.create(input=QUESTION, instructions="Be brief.", max_output_tokens=8, **DRAWN)
    assert response.output_text == chat.choices[0].message.content
    assert response.instructions == "Be brief."


def test_a_conversation_goes_on_with_the_output_as_it_came(client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input=QUESTION, max_output_tokens=4)
    items = [*ASKED, *(item.to_dict() for item in first.output), {"role": "user", "content": "And of Malta?"}]
    chat = [*ASKED, {"role": "assistant", "content": first.output_text}, items[-1]]
    again = client.responses.create(input=items, max_output_tokens=8, **DRAWN)
    assert (
        again.output_text
        == client.chat.completions.create(messages=chat, max_tokens=8, **DRAWN).choices[0].message.content
    )


def test_a_stream_of_a_response_has_its_typed_events(client: openai.OpenAI) -> None:
    asked = DRAWN | {"input": QUESTION, "max_output_tokens": 8}
    asked |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [event.type for event in events if event not in deltas] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in deltas) == whole.output_text == events[-4].text
    assert sum(len(event.logprobs) for event in deltas) == 8 == len(whole.output[0].content[0].logprobs)
    last = events[-1].response
    assert events[0].response.id == last.id and last.refrag["citations"] == whole.refrag["citations"]
    assert events[0].response.usage is None and last.usage.total_tokens == whole.usage.total_tokens


def test_a_streaming_response_is_cancelled_by_its_id(client: openai.OpenAI, engine: Engine, slow_decoder: None) -> None:
    stream = client.responses.create(
        model="tiny", input=QUESTION, max_output_tokens=1500, stream=True, extra_body={"retrieve": 0}
    )
    first = next(stream)
    cancelled = client.responses.cancel(first.response.id)
    assert (cancelled.id, cancelled.status) == (first.response.id, "cancelled")
    last = list(stream)[-1]
    assert (last.type, last.response.status) == ("response.incomplete", "cancelled")
    assert last.response.usage.output_tokens < 1500
    wait_for(lambda: engine.decoder_load().running == 0, 20)
    with pytest.raises(openai.NotFoundError, match="is being written; it has ended"):
        client.responses.cancel(first.response.id)


def test_a_response_is_not_stored_and_says_so(client: openai.OpenAI) -> None:
    made: Response = client.responses.create(model="tiny", input=QUESTION, max_output_tokens=1)
    for ask in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match="responses are not stored here"):
            ask(made.id)


@pytest.mark.parametrize("stream", [False, True])
def test_an_off_topic_input_is_refused_in_every_shape(client: openai.OpenAI, stream: bool) -> None:
    response = client.responses.create(model="tiny", input="Who wrote Hamlet?", stream=stream)
    last = list(response)[-1].response if stream else response
    assert (last.status, last.output_text, last.refrag["answered"]) == ("completed", NOTHING_FOUND, False)


@pytest.mark.parametrize(
    ("extra", "param", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not honoured"),
        ({"background": True}, "background", "not honoured"),
        ({"store": True}, "store", "not honoured"),
        ({"tools": [{"type": "web_search"}]}, "tools", "calls no tools"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "not honoured"),
        ({"include": ["reasoning.encrypted_content"]}, "include.0", "message.output_text.logprobs"),
        ({"top_logprobs": 1}, "top_logprobs", "needs include"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type", "input_image"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "refusal": "y"}]}]},
            "input.0.content.0.refusal",
            "has no refusal",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "4"}]}, "input.0.call_id", "no call"),
        ({"input": [{"role": "assistant", "content": "Hi"}]}, "input.0.role", "must be the user's question"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.call_id", "needs it"),
        ({"input": "x", "max_output_tokens": 2048}, "max_output_tokens", "holds 2048 in all"),
        ({"input": "word " * 3000, "retrieve": 0}, "input", "the limit of tiny is 1024"),
        ({"input": " ".join(map(str, range(2049)))}, "input", "2,049 different"),
    ],
)
def test_what_a_response_can_not_do_is_refused_by_name(url: str, extra: dict[str, Any], param: str, says: str) -> None:
    error = error_of(url, "responses", **{"input": QUESTION} | extra)
    assert error["param"] == param and says in error["message"]


def test_a_completion_goes_on_with_a_text(client: openai.OpenAI, engine: Engine) -> None:
    model = engine.bundle.model
    prompt = [Text([model.start_token_id]), Text(content_ids(model.tokenizer, "Lima is"))]
    expected = model.tokenizer.decode(list(generate(model, prompt, 12, stop_ids(model.tokenizer))))
    for asked in ("Lima is", ["Lima is"]):
        answer = client.completions.create(model="tiny", prompt=asked, max_tokens=12)
        assert answer.choices[0].text == expected.rstrip("\N{REPLACEMENT CHARACTER}")
        assert answer.usage is not None and answer.usage.prompt_tokens == sum(len(part.token_ids) for part in prompt)
        assert answer.refrag["citations"] == []


def test_a_completion_reads_passages_compressed(client: openai.OpenAI) -> None:
    extra = {"passages": PASSAGES, "share_kept": 0}
    answer = client.completions.create(model="tiny", prompt="It is", max_tokens=2, extra_body=extra)
    assert [cited["title"] for cited in answer.refrag["citations"]] == ["Andorra"]
    assert answer.refrag["compression_rate"] > 1
    found = client.completions.create(model="tiny", prompt=QUESTION, max_tokens=2, extra_body={"retrieve": 1})
    assert found.refrag["citations"][0]["title"] == "Peru"


def test_a_stream_of_a_completion_says_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = DRAWN | {"prompt": "Lima is", "max_tokens": 8, "n": 2, "logprobs": 1}
    whole = client.completions.create(**asked)
    *chunks, end = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for number, choice in enumerate(whole.choices):
        pieces = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == number]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert pieces[-1].finish_reason == choice.finish_reason
        for name in ("tokens", "text_offset", "token_logprobs"):
            streamed = [one for piece in pieces if piece.logprobs for one in getattr(piece.logprobs, name)]
            assert streamed == getattr(choice.logprobs, name)
    assert not end.choices and end.usage.total_tokens == whole.usage.total_tokens
    assert ["refrag" in (chunk.model_extra or {}) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


@pytest.mark.parametrize(
    ("extra", "param", "says"),
    [
        ({"prompt": ["a", "b"]}, "prompt", "2 prompts are not answered at once; send one request for each"),
        ({"prompt": [1, 2]}, "prompt", "token ids are not read"),
        ({"prompt": [[1, 2]]}, "prompt", "token ids are not read"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"echo": True}, "echo", "not honoured"),
        ({"suffix": "x"}, "suffix", "not honoured"),
        ({"best_of": 2}, "best_of", "not honoured"),
        ({"prompt": "word " * 3000}, "prompt", "the limit of tiny is 1024"),
        ({"messages": []}, "messages", "unknown field"),
    ],
)
def test_what_a_completion_can_not_do_is_refused_by_name(
    url: str, extra: dict[str, Any], param: str, says: str
) -> None:
    error = error_of(url, "completions", **{"prompt": "Lima is"} | extra)
    assert error["param"] == param and says in error["message"]


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_embeddings_are_the_vectors_by_which_the_store_is_searched(
    client: openai.OpenAI, engine: Engine, form: str | None
) -> None:
    assert engine.store is not None
    texts = ["The capital of Peru", "Lima"]
    given: Any = {"encoding_format": form} if form else {}
    answer = client.embeddings.create(model="tiny", input=texts, **given)
    expected = engine.store.retriever.encode(texts)
    # Who names base64 gets it as it is; else the client asks for it, and decodes it.
    rows = [row.embedding for row in answer.data]
    assert np.allclose([_decoded(row) if form == "base64" else row for row in rows], expected)
    assert [row.index for row in answer.data] == [0, 1] and answer.usage.prompt_tokens > 1
    one = client.embeddings.create(model="tiny", input=texts[0], dimensions=expected.shape[1], **given)
    assert len(one.data) == 1 and len(answer.data) == 2


def _decoded(row: Any) -> Any:
    return np.frombuffer(base64.b64decode(row), "<f4")


@pytest.mark.parametrize(
    ("extra", "param", "says"),
    [
        ({"dimensions": 64}, "dimensions", "dimensions is 64; the retriever's vectors have 512"),
        ({"input": [1, 2, 3]}, "input", "check_embedding_ctx_length=False"),
        ({"input": [[1, 2], [3]]}, "input", "check_embedding_ctx_length=False"),
        ({"input": ["x", 2]}, "input.1", "valid string"),
        ({"input": []}, "input", "at least 1"),
        ({"encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
    ],
)
def test_what_an_embedding_can_not_be_is_refused(url: str, extra: dict[str, Any], param: str, says: str) -> None:
    error = error_of(url, "embeddings", **{"input": "x"} | extra)
    assert error["param"] == param and says in error["message"]


def test_vectors_of_another_length_are_not_even_made(url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "embed", None)
    assert error_of(url, "embeddings", input="x", dimensions=64)["param"] == "dimensions"


def test_half_a_character_s_bytes_are_as_each_client_s_model_wants_them() -> None:
    half = TokenLogprob("\ufffd", -1.0, (("\ufffd", -1.0),))
    (chat,), (response,) = logprobs_body([half]), logprobs_body([half], no_bytes=[])
    assert ChatCompletionTokenLogprob.model_validate(chat).bytes is None
    assert Logprob.model_validate(response).bytes == []


def test_a_failure_is_a_response_s_last_event(client: openai.OpenAI, failing_decoder: None) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": QUESTION, "max_output_tokens": 200}
    last = list(client.responses.create(**asked, stream=True, extra_body={"retrieve": 0}))[-1]
    assert (last.type, last.code) == ("error", "internal_error") and "its log says why" in last.message


def test_another_shape_s_answer_is_not_cancelled_as_a_response(client: openai.OpenAI, url: str) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=40, stream=True, extra_body={"retrieve": 0}
    )
    name = next(stream).id
    assert httpx.post(f"{url}/v1/responses/{name}/cancel").status_code == 404
    assert list(stream)[-1].choices[0].finish_reason == "length"
