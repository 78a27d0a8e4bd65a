"""What an answer's text may be asked to be: OpenAI's `response_format`, and `text.format` of responses."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from refrag_platform.decoding.settings import Schema
from refrag_platform.limits import MOST_SCHEMA_CHARACTERS
from refrag_platform.serving.fields import Body, RequestText, fault


def _short_enough(schema: dict[str, Any]) -> dict[str, Any]:
    try:
        characters = len(json.dumps(schema))
    except RecursionError:
        raise fault("invalid_value", "it is nested too deep") from None
    if characters > MOST_SCHEMA_CHARACTERS:
        raise fault(
            "invalid_value", f"it has {characters:,} characters, the limit is {MOST_SCHEMA_CHARACTERS:,}; shorten it"
        )
    return schema


class TextFormat(Body):
    """Text as it comes."""

    type: Literal["text"]

    def followed(self) -> Schema | None:
        """What the answer follows."""
        return None


class ObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]

    def followed(self) -> Schema | None:
        """What the answer follows."""
        return Schema('{"type": "object"}')


class JsonSchema(Body):
    """A JSON schema with its name."""

    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$", description="for the client's own use")
    description: RequestText | None = Field(None, description="for the client's own use: the model isn't shown it")
    schema_: Annotated[dict[str, Any], AfterValidator(_short_enough)] = Field(
        alias="schema",
        description=f"of the answer, at most {MOST_SCHEMA_CHARACTERS:,} characters; the model isn't shown it",
    )
    strict: bool | None = Field(
        None, description="false: keywords that can't be held to are ignored; default: they are refused by name"
    )

    def followed(self) -> Schema | None:
        """What the answer follows."""
        return Schema(json.dumps(self.schema_), self.strict is not False)


class ChatSchemaFormat(Body):
    """JSON that follows a schema, as chat completions write it."""

    type: Literal["json_schema"]
    json_schema: JsonSchema

    def followed(self) -> Schema | None:
        """What the answer follows."""
        return self.json_schema.followed()


class ResponseSchemaFormat(JsonSchema):
    """The same, as responses write it."""

    type: Literal["json_schema"]


ChatFormat = Annotated[TextFormat | ObjectFormat | ChatSchemaFormat, Field(discriminator="type")]
ResponseFormat = Annotated[TextFormat | ObjectFormat | ResponseSchemaFormat, Field(discriminator="type")]
