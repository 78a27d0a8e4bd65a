"""Bodies of requests: OpenAI's fields that are honoured here, and passages, retrieve and share_kept."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from refrag_platform.serving.contract import Message, Passage, Sampling

MOST_PASSAGES = 256
MOST_TOKENS = 8192
MOST_CHOICES = 16


class TextPart(BaseModel):
    """One part of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def message(self) -> Message:
        """The engine's form; parts are joined, `developer` is the newer name of `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role: Literal["system", "user", "assistant"] = "system" if self.role == "developer" else self.role
        return Message(role, text)


class GivenPassage(BaseModel):
    """A passage that the client brings along."""

    model_config = ConfigDict(extra="forbid")

    title: str = ""
    text: str = Field(min_length=1)


class StreamOptions(BaseModel):
    """OpenAI's; the last chunk bears usage and the `refrag` field in any case."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """Body of POST /v1/chat/completions. Fields of OpenAI's that change nothing here are ignored."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2, description="default 0: the likeliest token each time")
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
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
        description="passages retrieved for the last message; default the recipe's",
    )
    share_kept: float | None = Field(
        None,
        ge=0,
        le=1,
        description="p: share of chunks that the policy keeps as tokens; default the recipe's",
    )

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.messages[-1].role != "user":
            raise ValueError(f"the last message has role {self.messages[-1].role!r}; it must be the user's question")
        if not self.messages[-1].message().content.strip():
            raise ValueError("the last message is empty; it must be the user's question")
        if isinstance(self.stop, list) and len(self.stop) > 4:
            raise ValueError(f"stop has {len(self.stop)} strings; at most 4 are allowed")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError(f"top_logprobs is {self.top_logprobs}; it needs logprobs: true")
        return self

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


class RetrieveRequest(BaseModel):
    """Body of POST /v1/retrieve."""

    model_config = ConfigDict(extra="forbid")

    query: str = Field(min_length=1)
    k: int = Field(8, ge=1, le=MOST_PASSAGES)
