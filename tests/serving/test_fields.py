"""What a request may hold: what isn't honoured is refused by name, histories are taken whole, limits have units."""

from typing import Any

import httpx
import pytest

from refrag_platform import limits
from refrag_platform.serving.chat import ChatRequest

ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Capital of Peru?"}]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
QUESTION = {"role": "user", "content": "So?"}


def post(url: str, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=60)


@pytest.mark.parametrize(
    ("extra", "param", "says"),
    [
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice", "not honoured"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "function"),
        ({"tools": TOOLS}, "tools", 'tool_choice "none"'),
        ({"functions": [{"name": "f"}]}, "functions", "not honoured"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not honoured"),
        ({"presence_penalty": 0.1}, "presence_penalty", "0.1 is not honoured here; leave the field out or send 0"),
        ({"frequency_penalty": -2}, "frequency_penalty", "not honoured"),
        ({"best_of": 2}, "best_of", "not honoured"),
        ({"audio": {"voice": "a"}}, "audio", "leave the field out"),
        ({"modalities": ["text", "audio"]}, "modalities", "not honoured"),
        ({"store": True}, "store", "not honoured"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not honoured"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
        ({"documents": [{"text": "x"}]}, "documents", "did you mean passages?"),
        ({"retreive": 1}, "retreive", "did you mean retrieve?"),
        ({"max_token": 1}, "max_token", "did you mean max_tokens?"),
        ({"refrag": {"p": 0.1}}, "refrag.p", "unknown field"),
        ({"refrag": {"share_kept": 2}}, "refrag.share_kept", "less than or equal to 1"),
        ({"refrag": {"rate": 2}}, "refrag.rate", "tiny: rate is 2, and this model is trained for 1; ask for one of"),
        ({"refrag": {"rate": 2}, "retrieve": 0}, "refrag.rate", "trained for 1"),
        ({"refrag": {"rate": 0}}, "refrag.rate", "greater than or equal to 1"),
        ({"refrag": {"share_kept": 0}, "share_kept": 0}, "refrag.share_kept", "send one of them"),
        ({"refrag": {"expand": [{"passage": "a"}, {"passage": "a"}]}}, "refrag.expand", "named twice"),
        ({"refrag": {"expand": [{"passage": "oman-0"}]}}, "refrag.expand", "'oman-0' is not read here; those that"),
        (
            {"refrag": {"expand": [{"passage": "peru-0", "chunks": [99]}]}},
            "refrag.expand",
            "'peru-0' has no chunk 99; its chunks are 0 to ",
        ),
        ({"stream": "true"}, "stream", "boolean"),
        ({"passages": [{"text": "x", "titel": "y"}]}, "passages.0.titel", "did you mean title?"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(url: str, extra: dict[str, Any], param: str, says: str) -> None:
    response = post(url, **ASKED | extra)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert says in error["message"]


def test_values_that_ask_for_nothing_are_taken(url: str) -> None:
    neutral: dict[str, Any] = {
        "tools": [], "tool_choice": "auto", "functions": [], "function_call": "none", "logit_bias": {},
        "presence_penalty": 0, "frequency_penalty": 0.0, "response_format": {"type": "text"}, "best_of": 1,
        "modalities": ["text"], "store": False, "service_tier": "auto", "reasoning_effort": None, "audio": None,
        "user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"a": "b"}, "stop": [],
        "parallel_tool_calls": True, "stream": None, "stream_options": None, "n": None, "seed": None,
    }  # fmt: skip
    assert post(url, **ASKED | {"max_tokens": 2} | neutral).status_code == 200
    assert post(url, **ASKED | {"max_tokens": 2, "tools": TOOLS, "tool_choice": "none"}).status_code == 200


@pytest.mark.parametrize(
    ("history", "reads"),
    [
        (
            [
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "42"},
                QUESTION,
            ],
            ['<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "<tool_response>\n42\n</tool_resp"],
        ),
        (
            [
                {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                {"role": "function", "name": "f", "content": "42"},
                QUESTION,
            ],
            ['{"name": "f", "arguments": {}}', "42"],
        ),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, QUESTION], ["no"]),
        ([{"role": "assistant", "content": None, "refusal": "no"}, QUESTION], ["no"]),
        (
            [
                {"role": "assistant", "content": "yes", "refusal": None, "annotations": [], "audio": None,
                 "function_call": None, "tool_calls": None},
                QUESTION,
            ],
            ["yes"],
        ),
        ([{"role": "assistant", "content": "yes", "tool_calls": []}, QUESTION], ["yes"]),
        ([{"role": "user", "content": "hi", "name": "Ana"}, {"role": "user", "content": "ho", "name": "Bo"}],
         ["Ana: hi", "ho"]),
        ([{"role": "assistant", "content": ""}, QUESTION], [""]),
        ([{"role": "assistant", "content": None, "tool_calls": [CALL]},
          {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]}], ["f", "42"]),
    ],
)  # fmt: skip
def test_a_history_that_openai_s_api_takes_is_read_whole(
    url: str, history: list[dict[str, Any]], reads: list[str]
) -> None:
    body = ASKED | {"messages": [*ASKED["messages"], *history]}
    assert post(url, **body | {"max_tokens": 2}).status_code == 200
    read = [message.content for message in ChatRequest.model_validate(body).turns()[1:]]
    assert all(part in said for part, said in zip(reads, read, strict=False))


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "content": None}, "messages.0.content"),
        ({"role": "assistant"}, "messages.0.content"),
        ({"role": "user", "content": None}, "messages.0.content"),
        ({"role": "user", "content": []}, "messages.0.content"),
        ({"role": "user", "content": 5}, "messages.0.content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content.0.text"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}, "messages.0.content.0.type"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages.0.content.0.type"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages.0.tool_calls"),
        ({"role": "tool", "content": "42"}, "messages.0.tool_call_id"),
        ({"role": "tool", "content": "42", "tool_call_id": "c9"}, "messages.0.tool_call_id"),
        ({"role": "function", "content": "42"}, "messages.0.name"),
        ({"role": "robot", "content": "x"}, "messages.0.role"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}, "messages.0.tool_calls.0.type"),
    ],
)
def test_a_history_that_is_none_is_refused_where_it_is_wrong(url: str, message: dict[str, Any], param: str) -> None:
    response = post(url, model="tiny", messages=[message, QUESTION])
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("extra", "param", "says"),
    [
        ({"stop": "x" * (limits.MOST_STOP_CHARACTERS + 1)}, "stop", "at most 1024 characters, not 1,025"),
        ({"stop": ["x"] * 5}, "stop", "at most 4 items"),
        ({"passages": [{"text": "x"}] * 257}, "passages", "at most 256 items"),
        ({"passages": [{"title": "x" * 4097, "text": "x"}]}, "passages.0.title", "at most 4096 characters, not 4,097"),
        ({"passages": [{"text": "x" * 262_145}]}, "passages.0.text", "at most 262144 characters, not 262,145"),
        ({"passages": [{"text": "x" * 262_144}] * 5}, "passages", "1,310,736 characters, the limit is 1,048,576"),
        ({"messages": [QUESTION] * 1025}, "messages", "at most 1024 items"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 257}]},
            "messages.0.content",
            "256",
        ),
        ({"messages": [{"role": "user", "content": " ".join(map(str, range(2049)))}]}, "messages", "2,049 different"),
        ({"max_tokens": 8193}, "max_tokens", "less than or equal to 8192, not 8193"),
        ({"n": 17}, "n", "less than or equal to 16, not 17"),
        ({"retrieve": 257}, "retrieve", "less than or equal to 256, not 257"),
    ],
)
def test_each_limit_is_told_with_field_value_and_limit(url: str, extra: dict[str, Any], param: str, says: str) -> None:
    error = post(url, **ASKED | extra).json()["error"]
    assert error["param"] == param and says in error["message"]


def test_a_query_has_a_limit_of_different_words(url: str) -> None:
    words = [f"word{number}" for number in range(limits.MOST_QUERY_WORDS)]
    assert post(url, "/v1/retrieve", query=" ".join([*words, *words])).status_code == 200
    error = post(url, "/v1/retrieve", query="_".join([*words, "more"])).json()["error"]
    assert error["param"] == "query" and "2,049 different words, full-text search takes 2,048" in error["message"]
    blank = post(url, "/v1/retrieve", query=" \n")
    assert (blank.status_code, blank.json()["error"]["param"]) == (400, "query")
    error = post(url, "/v1/retrieve", query="x " * 2_000_000).json()["error"]
    assert error["param"] == "query" and "at most 262144 characters, not 4,000,000" in error["message"]
