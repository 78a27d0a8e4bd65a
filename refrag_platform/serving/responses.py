"""POST /v1/responses: OpenAI's newer API around the same answers. Nothing is stored: each request says all."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag, model_validator

from refrag_platform.limits import MOST_MESSAGES
from refrag_platform.serving.answers import Answer, PartialChoice, event, logprobs_body
from refrag_platform.serving.contract import Delta, Message, Sampling
from refrag_platform.serving.fields import TEXT_OR_LIST, Body, fault, only
from refrag_platform.serving.formats import ResponseFormat, TextFormat
from refrag_platform.serving.input_items import InputItem
from refrag_platform.serving.messages import (
    ChatMessage,
    as_conversation,
    require_calls_before_results,
    require_question,
)
from refrag_platform.serving.schema import NOT_HONOURED, ConversationRequest, FullText, StreamOptions, most_tokens

if TYPE_CHECKING:
    from refrag_platform.serving.generation import Generation, Refusal

LOGPROBS = "message.output_text.logprobs"
Input = Annotated[
    Annotated[FullText, Tag("text")]
    | Annotated[list[InputItem], Field(min_length=1, max_length=MOST_MESSAGES), Tag("list")],
    TEXT_OR_LIST,
]


class TextOptions(Body):
    """What the answer's text is to be."""

    format: ResponseFormat | None = Field(None, description="default text")
    verbosity: Annotated[Any, only("medium")] = Field(None, description=NOT_HONOURED)


class ResponseStreamOptions(StreamOptions):
    """OpenAI's options of a stream; the usage always comes with its last event."""

    include_usage: Annotated[Any, only()] = None


class ResponseRequest(ConversationRequest):
    """Body of POST /v1/responses."""

    fields_here: ClassVar[Mapping[str, str]] = {
        "messages": "input",
        "max_tokens": "max_output_tokens",
        "response_format": "text.format",
    }

    input: Input = Field(description="a question, or a conversation whose last item is one or a function's output")
    instructions: FullText | None = Field(None, description="stands before the input, as a system message does")
    max_output_tokens: int | None = most_tokens("default the recipe's")
    top_logprobs: int | None = Field(None, ge=0, le=20, description=f"needs include: [{LOGPROBS!r}]")
    include: list[Literal["message.output_text.logprobs"]] | None = Field(None, max_length=1)
    text: TextOptions | None = None
    stream_options: ResponseStreamOptions | None = None
    max_tool_calls: int | None = Field(None, ge=0, description="of no use here: no tool is called")
    background: Annotated[Any, only(False)] = Field(None, description=NOT_HONOURED)
    conversation: Annotated[Any, only()] = Field(None, description=NOT_HONOURED)
    previous_response_id: Annotated[Any, only()] = Field(
        None, description="not honoured: no response is stored; send the conversation as `input`"
    )
    prompt: Annotated[Any, only()] = Field(None, description=NOT_HONOURED)
    reasoning: Annotated[Any, only({}, {"effort": "none"})] = Field(None, description=NOT_HONOURED)
    truncation: Annotated[Any, only("disabled")] = Field(None, description=NOT_HONOURED)

    @model_validator(mode="after")
    def _fields_agree(self) -> ResponseRequest:
        messages = self.messages()
        listed = isinstance(self.input, list)
        require_question(messages, f"input.{len(messages) - 1}" if listed else "input")
        require_calls_before_results(messages, "input.{}.call_id")
        if self.top_logprobs is not None and not self.include:
            raise fault("invalid_value", f"top_logprobs needs include: [{LOGPROBS!r}]", "top_logprobs")
        said = sum(message.characters() for message in messages)
        self.require_characters(said + len(self.instructions or ""))
        return self

    def messages(self) -> list[ChatMessage]:
        """The input as a chat's messages."""
        if isinstance(self.input, str):
            return [ChatMessage(role="user", content=self.input)]
        return [item.message() for item in self.input]

    def turns(self) -> list[Message]:
        told = [Message("system", self.instructions)] if self.instructions else []
        return [*told, *as_conversation(self.messages())]

    def sampling(self, default_tokens: int) -> Sampling:
        schema = self.text.format.followed() if self.text and self.text.format else None
        top_logprobs = (self.top_logprobs or 0) if self.include else None
        return self.drawn(self.max_output_tokens or default_tokens, top_logprobs, schema)


class ModelResponse(Answer):
    """OpenAI's response around a generation, or its typed events."""

    prefix = "resp_"

    def __init__(self, asked: ResponseRequest, generation: Generation | Refusal, request_id: str | None) -> None:
        super().__init__(asked, generation, request_id)
        self._asked, self._choice, self._number = asked, PartialChoice(), 0
        self._format = (asked.text and asked.text.format) or TextFormat(type="text")
        self._refuses = self._format.type != "text" and not generation.sources.answered
        self._item_id = f"msg_{uuid.uuid4().hex}"

    def whole(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        for delta in deltas:
            self._choice.add(delta)
        return self.body(self._end())

    async def events(self, first: Delta | None, deltas: AsyncIterator[Delta]) -> AsyncIterator[str]:
        """From response.created to response.completed or, where it was cut off, response.incomplete."""
        kind = self._part()["type"]
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        yield self._event("response.created", response=self.body("in_progress"))
        yield self._event("response.in_progress", response=self.body("in_progress"))
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        yield self._event("response.content_part.added", **place, part=self._part())
        delta = first
        while delta is not None:
            self._choice.add(delta)
            if delta.text or delta.logprobs:
                logprobs = {} if self._refuses else {"logprobs": logprobs_body(delta.logprobs, no_bytes=[])}
                yield self._event(f"response.{kind}.delta", **place, delta=delta.text, **logprobs)
            delta = await anext(deltas, None)
        part, status = self._part(), self._end()
        told = {name: part[name] for name in ("text", "refusal", "logprobs") if name in part}
        yield self._event(f"response.{kind}.done", **place, **told)
        yield self._event("response.content_part.done", **place, part=part)
        item = self._item("completed" if status == "completed" else "incomplete", [part])
        yield self._event("response.output_item.done", output_index=0, item=item)
        ended = "response.completed" if status == "completed" else "response.incomplete"
        yield self._event(ended, response=self.body(status))

    def failure(self, body: dict[str, Any]) -> str:
        told = body["error"]
        return self._event("error", code=told["code"], message=told["message"], param=told["param"])

    def body(self, status: str) -> dict[str, Any]:
        """The response as far as it has come; usage and `refrag` once it has ended."""
        asked, ended = self._asked, status != "in_progress"
        cut = status == "incomplete"
        output = [self._item("completed" if status == "completed" else "incomplete", [self._part()])] if ended else []
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.model,
            "output": output,
            "parallel_tool_calls": bool(asked.parallel_tool_calls),
            "previous_response_id": None,
            "background": False,
            "store": False,
            "temperature": asked.temperature or 0.0,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "text": {"format": self._format.model_dump(by_alias=True, exclude_none=True)},
            # What was sent is not called, whatever it was.
            "tool_choice": "none" if asked.tools else asked.tool_choice or "auto",
            "tools": [],
            "truncation": "disabled",
            "user": asked.user,
            "usage": self._usage() if ended else None,
            "refrag": self.refrag() if ended else None,
        }

    def _end(self) -> str:
        """An answer that nothing has ended was cancelled."""
        return {"stop": "completed", "length": "incomplete", None: "cancelled"}[self._choice.finish_reason]

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self) -> dict[str, Any]:
        if self._refuses:
            return {"type": "refusal", "refusal": self._choice.text}
        logprobs = logprobs_body(self._choice.tokens, no_bytes=[])
        return {"type": "output_text", "text": self._choice.text, "annotations": [], "logprobs": logprobs}

    def _usage(self) -> dict[str, Any]:
        usage = self._generation.usage
        return {
            "input_tokens": usage.prompt_positions,
            "input_tokens_details": {"cached_tokens": usage.positions_reused, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_positions + usage.completion_tokens,
        }

    def _event(self, kind: str, **fields: Any) -> str:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)
