"""Kinds of fields of requests: whole text, fields that are refused by name, values that change nothing."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from refrag_platform.limits import MOST_CHARACTERS, MOST_CHARACTERS_IN_ALL, MOST_NAME_CHARACTERS

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


def require_characters(characters: int, what: str, field: str) -> None:
    """Texts of a request have together no more characters than the limit.

    Raises:
        PydanticCustomError: they have; it says so of `what`, in the place `field`.
    """
    if characters > MOST_CHARACTERS_IN_ALL:
        told = f"{what} have {characters:,} characters, the limit is {MOST_CHARACTERS_IN_ALL:,}; send less"
        raise fault("invalid_value", told, field)


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


RequestText = Annotated[str, Field(max_length=MOST_CHARACTERS), BeforeValidator(whole_text)]
Name = Annotated[str, Field(max_length=MOST_NAME_CHARACTERS), BeforeValidator(whole_text)]


# Not equal to one another: `typing` would take Annotated[Any, only(0)] for Annotated[Any, only(False)].
@dataclass(frozen=True, eq=False)
class Only:
    """Of a field that isn't honoured: it takes the values that ask for nothing, and null."""

    neutral: tuple[Any, ...]

    def check(self, value: Any) -> Any:
        """The value, if it asks for nothing."""
        if value is None or any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.neutral
        ):
            return value
        allowed = " or ".join(shown(one) for one in self.neutral)
        what = f"{shown(value)} is not honoured here; leave the field out"
        raise fault("unsupported_value", f"{what} or send {allowed}" if allowed else what)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [*self.neutral, None]}


def only(*neutral: Any) -> Only:
    """`Annotated[Any, only(0)]`: a field that takes 0 and null."""
    return Only(neutral)


_FORMS: dict[type, str] = {str: "text", list: "list"}
# Of Annotated[T, Tag("text")] | Annotated[list[T], Tag("list")]: an error speaks of the form that was sent.
TEXT_OR_LIST = Discriminator(
    lambda value: _FORMS.get(type(value)),
    custom_error_type="invalid_type",
    custom_error_message="Input should be a string or an array",
)


class Body(BaseModel):
    """A JSON object whose fields are all known and of their own types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    # What some call a field of ours.
    also_called: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _fields_are_known(cls, body: Any) -> Any:
        """The first unknown field is enough: a body may have a million."""
        if isinstance(body, dict):
            known = cls._names()
            for name in body:
                if name not in known:
                    raise fault(
                        "unknown_parameter", f"unknown field {shown(name)}{cls._meant(name)}", shown(name)[1:-1]
                    )
        return body

    @classmethod
    def _names(cls) -> set[str]:
        return {field.alias or name for name, field in cls.model_fields.items()}

    @classmethod
    def _meant(cls, name: str) -> str:
        close = difflib.get_close_matches(name[:MOST_SHOWN], cls._names(), n=1, cutoff=0.7)
        meant = cls.also_called.get(name) or next(iter(close), None)
        return f"; did you mean {meant}?" if meant else ""
