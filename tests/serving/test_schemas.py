"""Answers that follow a JSON schema, on a real server: whatever random weights draw is whole and valid JSON."""

import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from refrag_platform.limits import MOST_SCHEMA_CHARACTERS
from refrag_platform.serving.engine import Engine
from refrag_platform.serving.generation import NOTHING_FOUND
from tests.processes import wait_for

QUESTION = "What is the capital of Peru?"
ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 300}
# Bounded, so that random weights come to an end.
COUNTRY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "capital": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["island", "landlocked", None]},
        "neighbours": {"type": "array", "maxItems": 3, "items": {"$ref": "#/$defs/place"}},
        "share": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.01},
    },
    "required": ["capital", "kind", "neighbours", "share"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"code": {"type": "string", "pattern": "^[A-Z]{2}$"}, "border": {"type": "boolean"}},
            "required": ["code", "border"],
            "additionalProperties": False,
        }
    },
}
DRAWN = [
    {},
    {"temperature": 1, "seed": 1},
    {"temperature": 2, "top_p": 0.9, "seed": 2},
    {"temperature": 1, "seed": 3, "logprobs": True, "top_logprobs": 2},
]


class Place(BaseModel):
    """As a client of OpenAI's writes a schema."""

    model_config = ConfigDict(extra="forbid")
    code: str = Field(max_length=4)
    area: int = Field(ge=0, le=999)


def by(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


def post(url: str, path: str = "chat/completions", **body: Any) -> httpx.Response:
    # In ASCII: half of a surrogate pair is no UTF-8.
    return httpx.post(
        f"{url}/v1/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"}, timeout=60
    )


def choices(url: str, **extra: Any) -> list[dict[str, Any]]:
    response = post(url, **ASKED | extra)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def content(url: str, **extra: Any) -> str:
    return choices(url, **extra)[0]["message"]["content"]


@pytest.mark.parametrize("drawn", DRAWN)
def test_an_answer_is_whole_and_follows_its_schema(url: str, drawn: dict[str, Any]) -> None:
    (choice,) = choices(url, response_format=by(COUNTRY, strict=True), **drawn)
    jsonschema.validate(json.loads(choice["message"]["content"]), COUNTRY)
    assert choice["finish_reason"] == "stop"
    if "logprobs" in drawn:
        tokens = choice["logprobs"]["content"]
        assert bytes(byte for token in tokens for byte in token["bytes"] or []).decode().startswith('{"capital":"')


def test_each_choice_follows_the_schema_by_itself(url: str) -> None:
    several = choices(url, response_format=by(COUNTRY), n=3, temperature=1.5, seed=5)
    told = [json.loads(choice["message"]["content"]) for choice in several]
    for one in told:
        jsonschema.validate(one, COUNTRY)
    assert told[0] != told[1] != told[2]


def test_beside_answers_in_json_a_neighbour_says_what_it_says_alone(url: str) -> None:
    texts = [{"temperature": 1, "seed": 7, "max_tokens": 60}, {"max_tokens": 60}]
    alone = [content(url, **text) for text in texts]
    json_alone = [content(url, response_format=by(COUNTRY), **drawn) for drawn in DRAWN[:2]]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            told = [pool.submit(content, url, **text) for text in texts]
            as_json = [pool.submit(content, url, response_format=by(COUNTRY), **drawn) for drawn in DRAWN[:2]]
            assert [one.result() for one in told] == alone
            assert [one.result() for one in as_json] == json_alone


def test_a_stream_says_the_same(client: openai.OpenAI, url: str) -> None:
    asked: dict[str, Any] = ASKED | {"response_format": by(COUNTRY), "temperature": 1, "seed": 1}
    chunks = list(client.chat.completions.create(**asked, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == content(url, **asked)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_an_answer_ends_wherever_it_is_whole(url: str) -> None:
    schema = {"type": "integer", "minimum": 0, "maximum": 999_999}
    told = {content(url, response_format=by(schema), temperature=2, seed=seed) for seed in range(40)}
    for text in told:
        jsonschema.validate(json.loads(text), schema)
    # The shorter ones by the model's own choice.
    assert len({len(text) for text in told}) > 1


def test_any_object_follows_json_object(url: str) -> None:
    for seed in range(8):
        drawn = {"temperature": 1, "seed": seed, "max_tokens": 40}
        (choice,) = choices(url, response_format={"type": "json_object"}, **drawn)
        text = choice["message"]["content"]
        assert text.startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)


def test_what_max_tokens_cuts_ends_by_length_and_what_just_fits_by_stop(url: str) -> None:
    asked = {"response_format": by(COUNTRY), "temperature": 1, "seed": 1, "logprobs": True}
    (whole,) = choices(url, **asked)
    tokens = len(whole["logprobs"]["content"])
    (fits,), (cut,) = choices(url, **asked, max_tokens=tokens), choices(url, **asked, max_tokens=tokens - 1)
    assert (fits["message"], fits["finish_reason"]) == (whole["message"], "stop")
    assert cut["finish_reason"] == "length"
    assert whole["message"]["content"].startswith(cut["message"]["content"])


def test_a_stop_string_ends_the_answer_before_its_end(url: str) -> None:
    (cut,) = choices(url, response_format=by(COUNTRY), stop='","kind"')
    assert cut["finish_reason"] == "stop"
    assert cut["message"]["content"] == content(url, response_format=by(COUNTRY)).partition('","kind"')[0]


def test_the_official_client_parses_into_a_model_of_pydantic(client: openai.OpenAI) -> None:
    chat = client.chat.completions.parse(**ASKED, response_format=Place, temperature=1)
    assert isinstance(chat.choices[0].message.parsed, Place)
    response = client.responses.parse(model="tiny", input=QUESTION, text_format=Place, max_output_tokens=300)
    assert isinstance(response.output_parsed, Place)
    assert response.text is not None and response.text.format is not None and response.text.format.name == "Place"


def test_a_response_says_what_a_chat_completion_says(client: openai.OpenAI, url: str) -> None:
    form: Any = {"type": "json_schema", "name": "answer", "schema": COUNTRY}
    asked: dict[str, Any] = {"model": "tiny", "input": QUESTION, "max_output_tokens": 300, "text": {"format": form}}
    response = client.responses.create(**asked)
    assert response.output_text == content(url, response_format=by(COUNTRY))
    assert list(client.responses.create(**asked, stream=True))[-1].response.output_text == response.output_text
    assert response.status == "completed"
    anything = client.responses.create(**asked | {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 8})
    assert anything.output_text.startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_where_nothing_is_found_the_sentence_is_no_json_but_a_refusal(client: openai.OpenAI, stream: bool) -> None:
    asked = ASKED | {"messages": [{"role": "user", "content": "Who wrote Hamlet?"}], "response_format": by(COUNTRY)}
    form: Any = {"type": "json_schema", "name": "answer", "schema": COUNTRY}
    chat = client.chat.completions.create(**asked, stream=stream)
    response = client.responses.create(model="tiny", input="Who wrote Hamlet?", text={"format": form}, stream=stream)
    if stream:
        deltas = [chunk.choices[0].delta for chunk in chat]
        assert "".join(delta.refusal or "" for delta in deltas) == NOTHING_FOUND
        assert not any(delta.content for delta in deltas)
        events = list(response)
        assert [event.delta for event in events if event.type == "response.refusal.delta"] == [NOTHING_FOUND]
        assert next(event.refusal for event in events if event.type == "response.refusal.done") == NOTHING_FOUND
        response = events[-1].response
    else:
        assert (chat.choices[0].message.content, chat.choices[0].message.refusal) == (None, NOTHING_FOUND)
    assert response.output[0].content[0].refusal == NOTHING_FOUND and response.output_text == ""


@pytest.mark.parametrize(
    ("form", "param", "says"),
    [
        ({"type": "xml"}, "response_format", "'json_schema'"),
        ({"type": "json_schema"}, "response_format.json_schema", "required"),
        (by({}) | {"json_schema": {"schema": {}}}, "response_format.json_schema.name", "required"),
        (by({}) | {"json_schema": {"name": "a"}}, "response_format.json_schema.schema", "required"),
        (by({}, schemas={}), "response_format.json_schema.schemas", "did you mean schema?"),
        (by({}) | {"json_schema": {"name": "a b", "schema": {}}}, "response_format.json_schema.name", "pattern"),
        (
            by({"description": "x" * MOST_SCHEMA_CHARACTERS}), "response_format.json_schema.schema",
            "the limit is 65,536; shorten it",
        ),
        (by({"type": "text"}), "response_format", "Invalid type: text"),
        (by({"uniqueItems": True}), "response_format", '"uniqueItems"'),
        (by({"not": {}}, strict=True), "response_format", "send strict: false"),
        (by({"x-guidance": {"lenient": True}, "not": {}}), "response_format", '"not"'),
        (by({"$ref": "https://example.com/schema"}), "response_format", "https://example.com/schema"),
        (by({"type": "string", "pattern": "(?=a)"}), "response_format", "look-around"),
        (by({"type": "integer", "minimum": 2, "maximum": 1}), "response_format", "minimum (2) is greater"),
        (by({"enum": ["\ud800"]}), "response_format", "can't be read"),
        (by({"type": "array", "minItems": 10**6, "maxItems": 10**7}), "response_format", "more than 2 s or 256 MiB"),
        (by({"type": "integer", "multipleOf": 999983}), "response_format", "more than 2 s or 256 MiB"),
        # It asks for an object without an end.
        (by({"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object"}), None, "the schema simpler"),
    ],
)  # fmt: skip
def test_a_schema_that_can_not_be_followed_is_refused_by_its_part(
    url: str,
    engine: Engine,
    caplog: pytest.LogCaptureFixture,
    form: dict[str, Any],
    param: str | None,
    says: str,
) -> None:
    response = post(url, **ASKED | {"response_format": form})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and says in error["message"]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    wait_for(lambda: engine.decoder_load().running == 0, 20)
    assert content(url, max_tokens=2)


def test_a_grammar_that_grows_too_large_ends_a_stream_by_an_error(
    client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    schema = {"type": "string", "pattern": "^.*[a-m].{30}[n-z].{10}$"}
    asked: dict[str, Any] = ASKED | {"response_format": by(schema), "temperature": 2, "seed": 0}
    told = ""
    with pytest.raises(openai.APIError, match="make the schema simpler") as raised:
        for chunk in client.chat.completions.create(**asked, stream=True):
            told += chunk.choices[0].delta.content or ""
    assert told.startswith('"') and raised.value.code == "invalid_schema"
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_response_names_its_own_field(url: str) -> None:
    form = {"type": "json_schema", "name": "a", "schema": {"uniqueItems": True}}
    error = post(url, "responses", model="tiny", input=QUESTION, text={"format": form}).json()["error"]
    assert (error["param"], error["code"]) == ("text.format", "invalid_schema")


def test_what_is_not_strict_ignores_keywords_without_a_grammar(url: str) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 4, "uniqueItems": True}
    told = json.loads(content(url, response_format=by(schema, strict=False)))
    jsonschema.validate(told, {name: value for name, value in schema.items() if name != "uniqueItems"})


def test_a_schema_is_compiled_once(engine: Engine, url: str) -> None:
    form = by({"enum": ["only here"]})
    before = engine._grammars._compiled.cache_info()
    assert [content(url, response_format=form) for _ in range(3)] == ['"only here"'] * 3
    after = engine._grammars._compiled.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 2)


def test_a_server_without_schemas_does_not_import_llguidance() -> None:
    code = "import refrag_platform.serving.engine, refrag_platform.serving.api, sys; print('llguidance' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_without_llguidance_text_is_answered_and_json_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    error = post(url, **ASKED | {"response_format": by({"enum": ["not kept yet"]})}).json()["error"]
    assert "pip install llguidance" in error["message"]
    assert content(url, max_tokens=2)
