"""The messages of a request as OpenAI's API takes them, and as the decoder reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, Tag, model_validator

from refrag_platform.limits import MOST_PARTS
from refrag_platform.serving.contract import Message
from refrag_platform.serving.fields import TEXT_OR_LIST, Body, Name, RequestText, fault, only, shown

# Fields that only one role has.
ROLES = dict.fromkeys(("refusal", "tool_calls", "function_call", "audio", "annotations"), "assistant")
ROLES["tool_call_id"] = "tool"


class Part(Body):
    """One part of a message's content; only text is understood."""

    type: str
    text: RequestText | None = None
    refusal: RequestText | None = Field(
        None, description="the text of a part of type refusal, in the assistant's messages"
    )

    @model_validator(mode="before")
    @classmethod
    def _kind_is_known(cls, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in get_args(cls.model_fields["type"].annotation):
            raise fault("unsupported_value", f"a part of type {shown(kind)} is not understood, only text is", "type")
        return part

    @model_validator(mode="after")
    def _text_is_there(self) -> Part:
        name, other = ("refusal", "text") if self.type == "refusal" else ("text", "refusal")
        if getattr(self, name) is None:
            raise fault("missing_required_parameter", f"a part of type {self.type} needs it", name)
        if getattr(self, other) is not None:
            raise fault("invalid_value", f"a part of type {self.type} has no {other}", other)
        return self


class ContentPart(Part):
    """A part as chat completions write it."""

    type: Literal["text", "refusal"]

    def words(self) -> str:
        """What it says."""
        return self.text or self.refusal or ""


Content = Annotated[
    Annotated[RequestText, Tag("text")]
    | Annotated[list[ContentPart], Field(min_length=1, max_length=MOST_PARTS), Tag("list")],
    TEXT_OR_LIST,
]


class FunctionCall(Body):
    """What an assistant asked a function for."""

    name: Name
    arguments: RequestText = Field(description="JSON, as the model wrote it")


class ToolCall(Body):
    """A call of a tool by the assistant."""

    id: Name
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(Body):
    """A message of the conversation. Calls of tools and their results are read as text."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: Name | None = Field(None, description="who speaks; written before what a history's message says")
    refusal: RequestText | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MOST_PARTS)
    tool_call_id: Name | None = None
    function_call: FunctionCall | None = None
    audio: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> ChatMessage:
        for name, role in ROLES.items():
            if getattr(self, name) and self.role != role:
                raise fault("invalid_value", f"a message of role {self.role} has no {name}", name)
        said = self.content is not None or self.refusal is not None
        if not (said or self.tool_calls or self.function_call):
            raise fault("missing_required_parameter", f"a message of role {self.role} needs content", "content")
        if self.role == "tool" and self.tool_call_id is None:
            raise fault("missing_required_parameter", "a message of role tool needs the id of its call", "tool_call_id")
        if self.role == "function" and self.name is None:
            raise fault("missing_required_parameter", "a message of role function needs the function's name", "name")
        if isinstance(self.content, list) and self.role != "assistant":
            for place, part in enumerate(self.content):
                if part.type == "refusal":
                    where = f"content.{place}.type"
                    raise fault("invalid_value", f"a message of role {self.role} has no refusal", where)
        return self

    def words(self) -> str:
        """What it says: parts are joined, a refusal is as good as content."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.words() for part in content)
        return text + (self.refusal or "")

    def characters(self) -> int:
        """Characters of all that the decoder would read."""
        calls = self.calls()
        return len(self.words()) + sum(len(call.name) + len(call.arguments) for call in calls) + len(self.name or "")

    def calls(self) -> list[FunctionCall]:
        """The calls of functions in it, of the older form too."""
        calls = [call.function for call in self.tool_calls or []]
        return [*calls, self.function_call] if self.function_call else calls

    def message(self, last: bool = False) -> Message:
        """The engine's form; `developer` is the newer name of `system`.

        Calls and results are written as models of ChatML with tools are used to them, so that nothing is lost.
        """
        text = self.words()
        match self.role:
            case "system" | "developer":
                return Message("system", text)
            case "tool" | "function":
                return Message("user", f"<tool_response>\n{text}\n</tool_response>", is_result=True)
            case role:
                calls = [
                    f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}\n</tool_call>'
                    for call in self.calls()
                ]
                said = f"{self.name}: {text}" if self.name and text and not last else text
                return Message(role, "\n".join([*([said] if said or not calls else []), *calls]))


def as_conversation(messages: Sequence[ChatMessage]) -> list[Message]:
    """The messages in the engine's form."""
    return [message.message(last=message is messages[-1]) for message in messages]


def require_question(messages: Sequence[ChatMessage], where: str) -> None:
    """The last message asks something.

    Args: where: it lies in the body.

    Raises:
        PydanticCustomError: it doesn't.
    """
    last = messages[-1]
    if last.role not in ("user", "tool"):
        raise fault(
            "invalid_value",
            f"the last message has role {last.role!r}; it must be the user's question, or a tool's result",
            f"{where}.role",
        )
    if not last.words().strip():
        raise fault("invalid_value", "the last message is empty; it must be the user's question", f"{where}.content")


def require_calls_before_results(messages: Sequence[ChatMessage], where: str = "messages.{}.tool_call_id") -> None:
    """Every result of a tool belongs to a call before it.

    Args: where: the id of the call of message {} lies in the body.

    Raises:
        PydanticCustomError: one doesn't.
    """
    known: set[str] = set()
    for place, message in enumerate(messages):
        known |= {call.id for call in message.tool_calls or []}
        if message.role == "tool" and message.tool_call_id not in known:
            raise fault(
                "invalid_value",
                f"{shown(message.tool_call_id)} is the id of no call before it in the conversation",
                where.format(place),
            )
