"""Bodies of responses, as /openapi.json describes them. The answers themselves are written by `answers`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from refrag_platform.serving.contract import Sources, Usage

T = TypeVar("T")


class _Response(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class Listed(_Response, Generic[T]):
    """All that there is of something, or the best of it first."""

    object: Literal["list"]
    data: list[T]


class ErrorDetail(_Response):
    """What was wrong, in OpenAI's shape."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Response):
    """Body of every error."""

    error: ErrorDetail
    request_id: str | None


class TokenBody(_Response):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class DrawnTokenBody(TokenBody):
    """A token that was drawn, with the likeliest ones in its place."""

    top_logprobs: list[TokenBody]


class LogprobsBody(_Response):
    """Log-probabilities of a choice's tokens."""

    content: list[DrawnTokenBody]
    refusal: None


class AnswerMessage(_Response):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None = Field(description="in the answer's place, where JSON was asked for and nothing found")


class Choice(_Response):
    """One of the answers that were asked for."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: LogprobsBody | None


class CachedTokens(_Response):
    """Of the prompt."""

    cached_tokens: int


class UsageBody(_Response):
    """OpenAI's usage: prompt tokens are the positions that the decoder read."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


@dataclass(frozen=True)
class RefragBody(Sources, Usage):
    """What was read and why, how far it was compressed, what took how long."""

    request_id: str | None = None


class Choices(_Response, Generic[T]):
    """What chat completions and completions have in common."""

    id: str
    created: int
    model: str
    choices: list[T]
    usage: UsageBody
    refrag: RefragBody


class ChatCompletion(Choices[Choice]):
    """An answer that is not streamed."""

    object: Literal["chat.completion"]


class TextLogprobsBody(_Response):
    """Log-probabilities of a text's tokens, a list for each of their parts."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(_Response):
    """One way in which the text goes on."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: TextLogprobsBody | None


class Completion(Choices[TextChoice]):
    """A text's continuation that is not streamed."""

    object: Literal["text_completion"]


class OutputText(_Response):
    """The text of a response."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[DrawnTokenBody]


class OutputRefusal(_Response):
    """In the text's place, where JSON was asked for and nothing found."""

    type: Literal["refusal"]
    refusal: str


class OutputMessage(_Response):
    """What a response says."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText | OutputRefusal]


class InputTokens(CachedTokens):
    """Of a response's input."""

    cache_write_tokens: int


class OutputTokens(_Response):
    """Of a response's output."""

    reasoning_tokens: int


class ResponseUsage(_Response):
    """Usage of a response: input tokens are the positions that the decoder read."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class Response(_Response):
    """A response; fields of OpenAI's that say the same at each are not described."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "cancelled"]
    model: str
    output: list[OutputMessage]
    usage: ResponseUsage
    refrag: RefragBody


class Embedding(_Response):
    """The vector of a text; a string: base64 of its float32 values."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(_Response):
    """In tokens of the served model."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Listed[Embedding]):
    """Vectors in the order of their texts."""

    model: str
    usage: EmbeddingUsage


class ModelCard(_Response):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class FoundPassage(_Response):
    """A passage of the store."""

    id: str
    title: str
    text: str
    score: float | None


class ChangedDocument(_Response):
    """A document that was added or replaced, with the number of its passages."""

    id: str
    object: Literal["document"]
    passages: int


class ListedDocument(_Response):
    """A document that was added or replaced."""

    id: str
    object: Literal["document"]
    title: str


class DocumentList(Listed[ListedDocument]):
    """A page of them, by id."""

    has_more: bool


class StoredPassage(_Response):
    """A passage of a document."""

    id: str
    title: str
    text: str


class Document(_Response):
    """A document of the store."""

    id: str
    object: Literal["document"]
    passages: list[StoredPassage]


class DocumentDeleted(_Response):
    """A document that is there no more."""

    id: str
    object: Literal["document.deleted"]
    deleted: bool


STREAMED_CHOICES = (
    "The answer. With stream: true OpenAI's events, each `data: JSON`, then `data: [DONE]`; the one that ends the last "
    "choice bears `refrag`, and a failure is an event with `error`."
)
STREAMED_RESPONSE = (
    "The response. With stream: true OpenAI's typed events, from response.created to response.completed or "
    "response.incomplete, which bears `refrag`; a failure is an event of type error."
)
# `itemSchema` is that of one event (OpenAPI 3.2).
STREAM: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    }
}
_RETRY = {"Retry-After": {"description": "seconds", "schema": {"type": "string"}}}
_ERRORS: dict[int, dict[str, Any]] = {
    400: {"description": "The request is wrong; `param` names the field."},
    401: {"description": "The key is missing or wrong; or there are none, and the client is elsewhere."},
    404: {"description": "There is no such model, response, document or URL."},
    408: {"description": "The body did not come in time."},
    413: {"description": "The body has more bytes than REFRAG_MAX_BODY."},
    429: {"description": "Too many requests wait already, or this key has asked too often.", "headers": _RETRY},
    500: {"description": "The server failed; its log says why, by the request's id."},
    501: {"description": "Documents can't be changed here; REFRAG_STORE says whether."},
    503: {"description": "The model is being loaded, or has failed.", "headers": _RETRY},
    504: {"description": "Not answered within REFRAG_DEADLINE.", "headers": _RETRY},
}


def documented(ok: type[BaseModel] | None, *errors: int, **more: Any) -> dict[int | str, dict[str, Any]]:
    """The responses of a route for OpenAPI; ok: None where there never is anything to answer."""
    told: dict[int | str, dict[str, Any]] = {200: {"model": ok, **more}} if ok else {}
    return told | {status: {"model": ErrorBody, **_ERRORS[status]} for status in errors}
