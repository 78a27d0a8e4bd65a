"""POST /v1/chat/completions: a conversation's last message is answered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from refrag_platform.limits import MOST_CHARACTERS_IN_ALL, MOST_MESSAGES, MOST_QUERY_WORDS
from refrag_platform.serving.answers import ChoicesAnswer, PartialChoice, logprobs_body
from refrag_platform.serving.contract import Delta, Message, Sampling, TokenLogprob
from refrag_platform.serving.fields import fault, only
from refrag_platform.serving.formats import ChatFormat
from refrag_platform.serving.messages import (
    ChatMessage,
    as_conversation,
    require_calls_before_results,
    require_question,
)
from refrag_platform.serving.schema import NOT_HONOURED, ChoicesRequest, ConversationRequest, most_tokens

if TYPE_CHECKING:
    from refrag_platform.serving.generation import Generation, Refusal


class ChatRequest(ConversationRequest, ChoicesRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(
        min_length=1,
        max_length=MOST_MESSAGES,
        description=f"the last one is the question; of what passages are retrieved with, at most "
        f"{MOST_QUERY_WORDS:,} different words; of all messages and passages together, at most "
        f"{MOST_CHARACTERS_IN_ALL:,} characters",
    )
    max_tokens: int | None = most_tokens("the older name of max_completion_tokens")
    max_completion_tokens: int | None = most_tokens("default the recipe's")
    logprobs: bool | None = Field(None, description="log-probabilities of the answer's tokens")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="likeliest tokens in each place; needs logprobs")
    functions: Annotated[Any, only([])] = Field(None, description=NOT_HONOURED)
    function_call: Annotated[Any, only("none", "auto")] = Field(None, description=NOT_HONOURED)
    response_format: ChatFormat | None = Field(None, description="what the answer's text is to be; default text")
    audio: Annotated[Any, only()] = Field(None, description=NOT_HONOURED)
    modalities: Annotated[Any, only(["text"], [])] = Field(None, description=NOT_HONOURED)
    prediction: Annotated[Any, only()] = Field(None, description=NOT_HONOURED)
    web_search_options: Annotated[Any, only()] = Field(None, description=NOT_HONOURED)
    reasoning_effort: Annotated[Any, only("none")] = Field(None, description=NOT_HONOURED)
    verbosity: Annotated[Any, only("medium")] = Field(None, description=NOT_HONOURED)

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        require_question(self.messages, f"messages.{len(self.messages) - 1}")
        require_calls_before_results(self.messages)
        if self.top_logprobs is not None and not self.logprobs:
            raise fault(
                "invalid_value", f"top_logprobs is {self.top_logprobs}; it needs logprobs: true", "top_logprobs"
            )
        self.require_characters(sum(message.characters() for message in self.messages))
        return self

    def field_here(self, name: str) -> str:
        newer = name == "max_tokens" and self.max_completion_tokens is not None
        return "max_completion_tokens" if newer else super().field_here(name)

    def turns(self) -> list[Message]:
        return as_conversation(self.messages)

    @property
    def wants_json(self) -> bool:
        """Whether the answer is to be JSON."""
        return self.response_format is not None and self.response_format.type != "text"

    def sampling(self, default_tokens: int) -> Sampling:
        most = self.max_completion_tokens or self.max_tokens or default_tokens
        schema = self.response_format.followed() if self.response_format else None
        return self.drawn_choices(most, (self.top_logprobs or 0) if self.logprobs else None, schema)


class ChatAnswer(ChoicesAnswer):
    """OpenAI's chat.completion around a generation, or the events of a streamed one."""

    prefix, whole_object, event_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, asked: ChatRequest, generation: Generation | Refusal, request_id: str | None) -> None:
        super().__init__(asked, generation, request_id)
        self._logprobs = bool(asked.logprobs)
        self._refuses = asked.wants_json and not generation.sources.answered

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", **self._said("")}, "logprobs": None}

    def whole_choice(self, choice: PartialChoice) -> dict[str, Any]:
        message = {"role": "assistant", "refusal": None, **self._said(choice.text)}
        return {"message": message, "logprobs": self._tokens(choice.tokens)}

    def piece(self, delta: Delta) -> dict[str, Any]:
        told = bool(delta.text or delta.logprobs)
        logprobs = self._tokens(delta.logprobs) if delta.logprobs else None
        return {"delta": self._said(delta.text) if told else {}, "logprobs": logprobs}

    def _said(self, text: str) -> dict[str, Any]:
        """Where JSON was asked for, a sentence in its place stands where OpenAI's clients look for one."""
        return {"content": None, "refusal": text} if self._refuses else {"content": text}

    def _tokens(self, tokens: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": logprobs_body(tokens), "refusal": None} if self._logprobs else None
