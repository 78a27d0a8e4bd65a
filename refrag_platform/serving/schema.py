"""Bodies of requests: OpenAI's fields, and passages, retrieve, share_kept. What isn't honoured is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, Tag, WithJsonSchema, model_validator

from refrag_platform.limits import (
    MOST_CHARACTERS,
    MOST_CHARACTERS_IN_ALL,
    MOST_CHOICES,
    MOST_MESSAGES,
    MOST_PASSAGES,
    MOST_QUERY_WORDS,
    MOST_STOP_CHARACTERS,
    MOST_STOPS,
    MOST_TITLE_CHARACTERS,
    MOST_TOKENS,
)
from refrag_platform.serving.contract import Message, Passage, Sampling
from refrag_platform.serving.fields import TEXT_OR_LIST, Body, Name, Text, fault, only, shown, whole_text
from refrag_platform.serving.messages import ChatMessage, require_calls_before_results

Title = Annotated[str, Field(max_length=MOST_TITLE_CHARACTERS), BeforeValidator(whole_text)]
FullText = Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS), BeforeValidator(whole_text)]
Stop = Annotated[str, Field(max_length=MOST_STOP_CHARACTERS), BeforeValidator(whole_text)]
Stops = Annotated[
    Annotated[Stop, Tag("text")] | Annotated[list[Stop], Field(max_length=MOST_STOPS), Tag("list")], TEXT_OR_LIST
]
NOT_HONOURED = "not honoured: only values that ask for nothing are accepted"


class GivenPassage(Body):
    """A passage that the client brings along."""

    title: Title = ""
    text: FullText


class StreamOptions(Body):
    """OpenAI's options of a stream."""

    include_usage: bool | None = Field(None, description="a last chunk, without choices, bears the usage")
    include_obfuscation: Annotated[Any, only(False)] = None


def _no_bias(value: dict[str, float] | None) -> dict[str, float] | None:
    if value and any(value.values()):
        raise fault("unsupported_value", f"{shown(value)} is not honoured here; leave the field out or send {{}}")
    return value


class ChatRequest(Body):
    """Body of POST /v1/chat/completions."""

    also_called: ClassVar[Mapping[str, str]] = {
        name: "passages" for name in ("documents", "docs", "context", "contexts", "sources")
    }

    model: Name
    messages: list[ChatMessage] = Field(
        min_length=1,
        max_length=MOST_MESSAGES,
        description=f"the last one is the question; of what passages are retrieved with, at most "
        f"{MOST_QUERY_WORDS:,} different words; of all messages and passages together, at most "
        f"{MOST_CHARACTERS_IN_ALL:,} characters",
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS, description="the older name of max_completion_tokens")
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS, description="default the recipe's")
    temperature: float | None = Field(None, ge=0, le=2, description="default 0: the likeliest token each time")
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="choices, which share the prompt's prefill")
    logprobs: bool | None = Field(None, description="log-probabilities of the answer's tokens")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="likeliest tokens in each place; needs logprobs")
    passages: list[GivenPassage] | None = Field(
        None,
        max_length=MOST_PASSAGES,
        description="read these; nothing is retrieved unless `retrieve` says so",
    )
    retrieve: int | None = Field(
        None,
        ge=0,
        le=MOST_PASSAGES,
        description="passages retrieved for the question; default the recipe's",
    )
    share_kept: float | None = Field(
        None,
        ge=0,
        le=1,
        description="p: share of chunks that the policy keeps as tokens; default the recipe's",
    )
    # Names for the client's own use: they change no answer anywhere.
    user: Text | None = Field(None, description="for the client's own use")
    safety_identifier: Text | None = Field(None, description="for the client's own use")
    metadata: dict[str, Any] | None = Field(None, description="for the client's own use; not kept")
    prompt_cache_key: Text | None = Field(None, description="of no use here: all prompts share one cache")
    prompt_cache_retention: Text | None = Field(None, description="of no use here")
    parallel_tool_calls: bool | None = Field(None, description="of no use here: no tool is called")
    tools: list[Any] | None = Field(
        None, description="not honoured, the model calls no tools: [], or any with tool_choice none"
    )
    tool_choice: Annotated[Any, only("none", "auto")] = Field(None, description=NOT_HONOURED)
    functions: Annotated[Any, only([])] = Field(None, description=NOT_HONOURED)
    function_call: Annotated[Any, only("none", "auto")] = Field(None, description=NOT_HONOURED)
    response_format: Annotated[Any, only({"type": "text"})] = Field(None, description=NOT_HONOURED)
    logit_bias: Annotated[dict[str, float] | None, AfterValidator(_no_bias), WithJsonSchema({"enum": [{}, None]})] = (
        Field(None, description=NOT_HONOURED)
    )
    presence_penalty: Annotated[Any, only(0)] = Field(None, description=NOT_HONOURED)
    frequency_penalty: Annotated[Any, only(0)] = Field(None, description=NOT_HONOURED)
    best_of: Annotated[Any, only(1)] = Field(None, description=NOT_HONOURED)
    audio: Annotated[Any, only()] = Field(None, description=NOT_HONOURED)
    modalities: Annotated[Any, only(["text"], [])] = Field(None, description=NOT_HONOURED)
    prediction: Annotated[Any, only()] = Field(None, description=NOT_HONOURED)
    web_search_options: Annotated[Any, only()] = Field(None, description=NOT_HONOURED)
    store: Annotated[Any, only(False)] = Field(None, description=NOT_HONOURED)
    service_tier: Annotated[Any, only("auto", "default")] = Field(None, description=NOT_HONOURED)
    reasoning_effort: Annotated[Any, only("none")] = Field(None, description=NOT_HONOURED)
    verbosity: Annotated[Any, only("medium")] = Field(None, description=NOT_HONOURED)

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        last, where = self.messages[-1], f"messages.{len(self.messages) - 1}"
        if last.role not in ("user", "tool"):
            raise fault(
                "invalid_value",
                f"the last message has role {last.role!r}; it must be the user's question, or a tool's result",
                f"{where}.role",
            )
        if not last.words().strip():
            raise fault(
                "invalid_value", "the last message is empty; it must be the user's question", f"{where}.content"
            )
        require_calls_before_results(self.messages)
        if self.tools and self.tool_choice != "none":
            raise fault(
                "unsupported_value",
                'the model calls no tools; leave the field out, or send tool_choice "none" with it',
                "tools",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise fault(
                "invalid_value", f"top_logprobs is {self.top_logprobs}; it needs logprobs: true", "top_logprobs"
            )
        if self.stream_options is not None and not self.stream:
            raise fault("invalid_value", "stream_options needs stream: true", "stream_options")
        characters = sum(message.characters() for message in self.messages)
        characters += sum(len(passage.title) + len(passage.text) for passage in self.passages or [])
        if characters > MOST_CHARACTERS_IN_ALL:
            raise fault(
                "invalid_value",
                f"messages and passages have {characters:,} characters, the limit is {MOST_CHARACTERS_IN_ALL:,}; "
                "send less",
                "passages" if self.passages else "messages",
            )
        return self

    def conversation(self) -> list[Message]:
        """The messages in the engine's form."""
        return [message.message(last=message is self.messages[-1]) for message in self.messages]

    def sampling(self, default_tokens: int) -> Sampling:
        """How the answer is drawn."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens or default_tokens,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(stop for stop in stops if stop),
            n=self.n or 1,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    def given(self) -> list[Passage]:
        """The passages of the request, named by their place in it."""
        return [
            Passage(id=f"request-{place}", title=item.title, text=item.text)
            for place, item in enumerate(self.passages or [])
        ]

    def to_retrieve(self, default: int) -> int:
        """How many passages to look up."""
        if self.retrieve is not None:
            return self.retrieve
        return 0 if self.passages is not None else default


def _not_blank(value: str) -> str:
    if not value.strip():
        raise fault("invalid_value", "it is empty; it must say what to look for")
    return value


class RetrieveRequest(Body):
    """Body of POST /v1/retrieve."""

    also_called: ClassVar[Mapping[str, str]] = {"n": "k", "top_k": "k", "retrieve": "k", "question": "query"}

    query: Annotated[FullText, AfterValidator(_not_blank)] = Field(
        description=f"at most {MOST_QUERY_WORDS:,} different words"
    )
    k: int = Field(8, ge=1, le=MOST_PASSAGES, description="passages to find")
