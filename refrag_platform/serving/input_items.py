"""The `input` of POST /v1/responses: messages, calls of functions and their results, read as a chat's messages are."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from refrag_platform.limits import MOST_PARTS
from refrag_platform.serving.fields import TEXT_OR_LIST, Body, Name, RequestText, fault, only
from refrag_platform.serving.messages import ChatMessage, ContentPart, FunctionCall, Part, ToolCall

NEEDED = {"message": ("role", "content"), "function_call": ("call_id", "name", "arguments"),
          "function_call_output": ("call_id", "output")}  # fmt: skip


class InputPart(Part):
    """A part as responses write it."""

    type: Literal["input_text", "output_text", "refusal"]
    annotations: Any = Field(None, description="of an earlier answer; not read")
    logprobs: Any = Field(None, description="of an earlier answer; not read")

    def part(self) -> ContentPart:
        """The same part of a chat's message."""
        kind: Literal["text", "refusal"] = "refusal" if self.type == "refusal" else "text"
        return ContentPart(type=kind, text=self.text, refusal=self.refusal)


InputContent = Annotated[
    Annotated[RequestText, Tag("text")]
    | Annotated[list[InputPart], Field(min_length=1, max_length=MOST_PARTS), Tag("list")],
    TEXT_OR_LIST,
]


class InputItem(Body):
    """An item of the conversation. Those of an earlier answer's `output` may be sent as they came."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: InputContent | None = None
    call_id: Name | None = None
    name: Name | None = None
    arguments: RequestText | None = None
    output: InputContent | None = None
    id: Name | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Annotated[Any, only("commentary", "final_answer")] = None

    @model_validator(mode="after")
    def _fields_fit_the_type(self) -> InputItem:
        for name in NEEDED[self.type]:
            if getattr(self, name) is None:
                raise fault("missing_required_parameter", f"an item of type {self.type} needs it", name)
        for name in set().union(*NEEDED.values()).difference(NEEDED[self.type]):
            if getattr(self, name) is not None:
                raise fault("invalid_value", f"an item of type {self.type} has no {name}", name)
        if self.role != "assistant" and isinstance(self.content, list):
            for place, part in enumerate(self.content):
                if part.type == "refusal":
                    raise fault("invalid_value", f"an item of role {self.role} has no refusal", f"content.{place}.type")
        return self

    def message(self) -> ChatMessage:
        """The message of a chat that says the same."""
        if self.type == "function_call":
            call = FunctionCall(name=self.name or "", arguments=self.arguments or "")
            return ChatMessage(
                role="assistant", tool_calls=[ToolCall(id=self.call_id or "", type="function", function=call)]
            )
        if self.type == "function_call_output":
            return ChatMessage(role="tool", tool_call_id=self.call_id, content=_content(self.output))
        assert self.role is not None
        return ChatMessage(role=self.role, content=_content(self.content))


def _content(content: str | list[InputPart] | None) -> str | list[ContentPart] | None:
    return [part.part() for part in content] if isinstance(content, list) else content
