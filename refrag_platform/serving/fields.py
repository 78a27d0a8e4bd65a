"""Kinds of fields of requests: whole text, fields that are refused by name, values that change nothing."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from refrag_platform.limits import MOST_CHARACTERS, MOST_NAME_CHARACTERS

MOST_SHOWN = 80  # characters of what a client sent, in a message


def shown(value: Any) -> str:
    """A value of a request as an error shows it: short, on one line, in ASCII."""
    try:
        text = json.dumps(value[: MOST_SHOWN + 1] if isinstance(value, str) else value)
    except (RecursionError, TypeError, ValueError):  # nested too deep, or of too many digits
        text = "an object" if isinstance(value, dict) else "an array" if isinstance(value, list) else "a value"
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "..."


def fault(code: str, message: str, field: str | None = None) -> PydanticCustomError:
    """An error of validation with a code of OpenAI's; field: where it lies below what is validated."""
    # Braces would be filled in from the context.
    return PydanticCustomError(code, "{message}", {"message": message, "field": field})


def whole_text(value: Any) -> Any:
    """Refuse text that is no Unicode: neither a tokenizer nor a response can take half of a surrogate pair."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise fault(
                "invalid_unicode",
                f"character {error.start} is {half}, half of a surrogate pair, which stands for no character",
            ) from None
    return value


Text = Annotated[str, Field(max_length=MOST_CHARACTERS), BeforeValidator(whole_text)]
Name = Annotated[str, Field(max_length=MOST_NAME_CHARACTERS), BeforeValidator(whole_text)]


def only(*neutral: Any) -> Any:
    """A field that isn't honoured: it takes the values that ask for nothing, and null."""

    def check(value: Any) -> Any:
        if value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
            return value
        allowed = " or ".join(shown(one) for one in neutral)
        raise fault(
            "unsupported_value",
            f"{shown(value)} is not honoured here; leave the field out" + (f" or send {allowed}" if neutral else ""),
        )

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": [*neutral, None]})]


def text_or_list(text: Any, items: Any) -> Any:
    """One text, or a list; an error then speaks of the one that was sent."""
    kinds: dict[type, str] = {str: "text", list: "list"}
    return Annotated[
        Annotated[text, Tag("text")] | Annotated[items, Tag("list")],
        Discriminator(
            lambda value: kinds.get(type(value)),
            custom_error_type="invalid_type",
            custom_error_message="Input should be a string or an array",
        ),
    ]


class Body(BaseModel):
    """A JSON object whose fields are all known and of their own types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    # What some call a field of ours.
    also_called: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _fields_are_known(cls, given: Any) -> Any:
        """The first unknown field is enough: a body may have a million."""
        if isinstance(given, dict):
            for name in given:
                if name not in cls.model_fields:
                    raise fault(
                        "unknown_parameter", f"unknown field {shown(name)}{cls._meant(name)}", shown(name)[1:-1]
                    )
        return given

    @classmethod
    def _meant(cls, name: str) -> str:
        close = difflib.get_close_matches(name[:MOST_SHOWN], cls.model_fields, n=1, cutoff=0.7)
        meant = cls.also_called.get(name) or next(iter(close), None)
        return f"; did you mean {meant}?" if meant else ""
