"""Real answers and requests against OpenAI's own description of its API, as its client brings it along.

The types of the `openai` package are generated from OpenAI's OpenAPI description; pydantic makes JSON schemas of them.
"""

import functools
import json
from collections.abc import Iterator
from typing import Any, get_args

import httpx
import jsonschema
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types import completion_create_params as text_params
from openai.types import embedding_create_params as embedding_params
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses import response_create_params as response_params
from openai.types.shared import ErrorObject
from pydantic import TypeAdapter
from schemathesis import GenerationMode

QUESTION = "What is the capital of Peru?"
ASKED = [{"role": "user", "content": QUESTION}]
# The store holds nothing about it.
OFF_TOPIC = "Who wrote Hamlet?"
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}
NAMED = {"name": "a", "schema": SCHEMA}
LOGPROBS = "message.output_text.logprobs"
CHAT, TEXT, RESPONSE, EMBEDDING = "chat/completions", "completions", "responses", "embeddings"
ANSWERS: dict[str, tuple[Any, Any]] = {
    CHAT: (ChatCompletion, ChatCompletionChunk),
    TEXT: (Completion, Completion),
    RESPONSE: (Response, ResponseStreamEvent),
    EMBEDDING: (CreateEmbeddingResponse, None),
}
TRIED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": ASKED}),
    (CHAT, {"messages": ASKED, "n": 2, "logprobs": True, "top_logprobs": 20, "temperature": 1, "seed": 1}),
    (CHAT, {"messages": ASKED, "response_format": {"type": "json_schema", "json_schema": NAMED}}),
    (CHAT, {"messages": [{"role": "user", "content": OFF_TOPIC}]}),
    (CHAT, {"messages": [{"role": "user", "content": OFF_TOPIC}], "response_format": {"type": "json_object"}}),
    (TEXT, {"prompt": "Lima is"}),
    (TEXT, {"prompt": ["Lima is"], "n": 2, "logprobs": 5, "temperature": 1, "seed": 1}),
    (TEXT, {"prompt": OFF_TOPIC, "retrieve": 1, "logprobs": 0}),
    (RESPONSE, {"input": QUESTION}),
    (RESPONSE, {"input": ASKED, "instructions": "Be brief.", "include": [LOGPROBS], "top_logprobs": 20}),
    (RESPONSE, {"input": QUESTION, "metadata": {"a": "b"}, "user": "u", "prompt_cache_key": "k"}),
    (RESPONSE, {"input": QUESTION, "text": {"format": {"type": "json_schema", **NAMED}}}),
    (RESPONSE, {"input": QUESTION, "tools": [{"type": "web_search"}], "tool_choice": "none"}),
    (RESPONSE, {"input": OFF_TOPIC, "text": {"format": {"type": "json_object"}}}),
]  # fmt: skip
# One for all: a client reads a hundred certificates as it is made.
ASKING = httpx.Client(timeout=60)
SHORT = {CHAT: "max_completion_tokens", TEXT: "max_tokens", RESPONSE: "max_output_tokens"}


def post(url: str, path: str, body: dict[str, Any]) -> httpx.Response:
    return ASKING.post(f"{url}/v1/{path}", json={"model": "tiny"} | body)


@functools.cache
def validator(kind: Any) -> jsonschema.protocols.Validator:
    return jsonschema.Draft202012Validator(TypeAdapter(kind).json_schema())


@functools.cache
def event_kinds() -> dict[str, Any]:
    """The kinds of a response's events by their names; a schema of all would be tried kind after kind."""
    kinds, _ = get_args(ResponseStreamEvent)
    return {get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(kinds)}


def follows(body: Any, kind: Any) -> None:
    """The body is what OpenAI says this type is."""
    validator(event_kinds()[body["type"]] if kind is ResponseStreamEvent else kind).validate(body)


def events(url: str, path: str, body: dict[str, Any]) -> Iterator[Any]:
    """The data of a stream's events; [DONE] is left out."""
    response = post(url, path, body | {"stream": True})
    assert response.status_code == 200, response.text
    for line in response.text.splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize(("path", "body"), TRIED)
def test_answers_are_what_openai_says_they_are(url: str, path: str, body: dict[str, Any]) -> None:
    whole, event = ANSWERS[path]
    # Long enough for an object of the schema, and without one cut by the limit.
    body = {SHORT[path]: 40} | body
    response = post(url, path, body)
    assert response.status_code == 200, response.text
    follows(response.json(), whole)
    if path == CHAT:
        # The client's types take it for optional, OpenAI's description doesn't.
        assert all("refusal" in choice["message"] for choice in response.json()["choices"])
    if path != RESPONSE:
        body |= {"stream_options": {"include_usage": True}}
    streamed = list(events(url, path, body))
    assert streamed
    for one in streamed:
        for choice in one["choices"] if path == TEXT else []:
            # The description has no null there; OpenAI's own example of a stream has.
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        follows(one, event)


def test_embeddings_models_and_errors_are_what_openai_says_they_are(url: str) -> None:
    for body in ({"input": "Lima"}, {"input": ["Lima", "Peru"], "encoding_format": "float", "user": "u"}):
        follows(post(url, EMBEDDING, body).json(), CreateEmbeddingResponse)
    listed = httpx.get(f"{url}/v1/models").json()
    assert listed["object"] == "list"
    for model in (*listed["data"], httpx.get(f"{url}/v1/models/tiny").json()):
        follows(model, Model)
    for response in (
        post(url, CHAT, {}),
        post(url, CHAT, {"messages": ASKED, "model": "other"}),
        post(url, "responses/resp_1/cancel", {}),
        httpx.get(f"{url}/v1/responses/resp_1"),
        httpx.get(f"{url}/v1/chat/completions"),
    ):
        assert response.status_code >= 400
        follows(response.json()["error"], ErrorObject)


def test_a_cancelled_response_is_what_openai_says_it_is(url: str, client: openai.OpenAI, slow_decoder: None) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "input": QUESTION,
        "max_output_tokens": 1500,
        "extra_body": {"retrieve": 0},
    }
    stream = client.responses.create(**asked, stream=True)
    follows(post(url, f"responses/{next(stream).response.id}/cancel", {}).json(), Response)
    for event in stream:
        follows(event.to_dict(mode="json"), ResponseStreamEvent)


REQUESTS: dict[str, tuple[Any, dict[str, Any]]] = {
    CHAT: (
        chat_params.CompletionCreateParamsNonStreaming,
        {"messages": ASKED, "max_completion_tokens": 1, "retrieve": 0},
    ),
    TEXT: (text_params.CompletionCreateParamsNonStreaming, {"prompt": "Lima is", "max_tokens": 1}),
    RESPONSE: (
        response_params.ResponseCreateParamsNonStreaming,
        {"input": QUESTION, "max_output_tokens": 1, "retrieve": 0},
    ),
    EMBEDDING: (embedding_params.EmbeddingCreateParams, {"input": "Lima"}),
}
HONOURED = {
    "messages", "prompt", "input", "instructions", "max_tokens", "max_completion_tokens", "max_output_tokens",
    "temperature", "top_p", "seed", "n", "stop", "stream_options", "logprobs", "top_logprobs", "include",
    "response_format", "text", "encoding_format", "dimensions",
}  # fmt: skip
# They say who asks, or how tools are called, of which there are none.
CHANGE_NO_ANSWER = {
    "user", "safety_identifier", "metadata", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls",
    "max_tool_calls",
}  # fmt: skip
# Of all others values that ask for nothing are taken.
NEUTRAL: tuple[Any, ...] = (
    None,
    False,
    0,
    1,
    "",
    "auto",
    "none",
    "default",
    "medium",
    "disabled",
    [],
    {},
    ["text"],
    {"effort": "none"},
)


@functools.cache
def described(path: str) -> dict[str, Any]:
    """A request's fields as OpenAI describes them, and in `$defs` what these refer to."""
    return TypeAdapter(REQUESTS[path][0]).json_schema()


def only_known(schema: Any) -> Any:
    """The schema with references as OpenAPI writes them, whose objects have no other properties than those it names."""
    if isinstance(schema, list):
        return [only_known(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else {}
    parts = {name: only_known(part) for name, part in schema.items() if name != "$ref"}
    reference = {"$ref": schema["$ref"].replace("$defs", "components/schemas")} if "$ref" in schema else {}
    return closed | parts | reference


def request_of(path: str, name: str) -> Any:
    """An operation whose body is this one field, for requests to be made of."""
    schema = described(path)
    body = {"type": "object", "properties": {name: schema["properties"][name]}, "required": [name]}
    content = {"application/json": {"schema": only_known(body)}}
    document = {
        "openapi": "3.1.0",
        "info": {"title": path, "version": "1"},
        "paths": {"/": {"post": {"requestBody": {"required": True, "content": content}, "responses": {}}}},
        "components": {"schemas": only_known(schema.get("$defs", {}))},
    }
    return schemathesis.openapi.from_dict(document)["/"]["POST"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path in REQUESTS for name in described(path)["properties"] if name not in ("model", "stream")],
)
def test_a_field_of_openai_s_is_honoured_or_refused_by_its_name(url: str, path: str, name: str) -> None:
    @given(case=request_of(path, name).as_strategy(generation_mode=GenerationMode.POSITIVE))
    @settings(
        max_examples=6,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def asked(case: schemathesis.Case) -> None:
        assert isinstance(case.body, dict)
        value = case.body[name]
        response = post(url, path, REQUESTS[path][1] | {name: value})
        if response.status_code == 200:
            assert name in HONOURED | CHANGE_NO_ANSWER or value in NEUTRAL, value
        else:
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert error["param"].split(".")[0] == name, (value, error)

    asked()
