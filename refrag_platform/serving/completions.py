"""POST /v1/completions: a text goes on, after passages if there are any (REFRAG, section 2: context, then output)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, Tag, field_validator, model_validator

from refrag_platform.serving.answers import ChoicesAnswer, PartialChoice, finite
from refrag_platform.serving.contract import Delta, Message, Sampling, TokenLogprob
from refrag_platform.serving.fields import TEXT_OR_LIST, fault, only
from refrag_platform.serving.schema import NOT_HONOURED, ChoicesRequest, FullText, most_tokens

if TYPE_CHECKING:
    from refrag_platform.serving.generation import Generation, Refusal

MOST_LOGPROBS = 5


class CompletionRequest(ChoicesRequest):
    """Body of POST /v1/completions."""

    continues: ClassVar[bool] = True
    fields_here: ClassVar[Mapping[str, str]] = {"messages": "prompt"}

    prompt: Annotated[
        Annotated[FullText, Tag("text")] | Annotated[list[FullText], Field(min_length=1, max_length=1), Tag("list")],
        TEXT_OR_LIST,
    ] = Field(description="one text, or a list of one; what passages are retrieved for, where `retrieve` wants some")
    max_tokens: int | None = most_tokens("default the recipe's")
    logprobs: int | None = Field(
        None, ge=0, le=MOST_LOGPROBS, description="log-probabilities, and so many of the likeliest tokens beside"
    )
    echo: Annotated[Any, only(False)] = Field(None, description=NOT_HONOURED)
    suffix: Annotated[Any, only("")] = Field(None, description=NOT_HONOURED)

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_text(cls, value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], int | list):
            raise fault("unsupported_value", "token ids are not read here; send the text that they stand for")
        if isinstance(value, list) and len(value) > 1:
            raise fault(
                "unsupported_value", f"{len(value):,} prompts are not answered at once; send one request for each"
            )
        return value

    @model_validator(mode="after")
    def _fits(self) -> CompletionRequest:
        self.require_characters(len(self.text()))
        return self

    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    def turns(self) -> list[Message]:
        return [Message("user", self.text())]

    def to_retrieve(self, default: int) -> int:
        """A text by itself asks for no passages."""
        return self.retrieve or 0

    def sampling(self, default_tokens: int) -> Sampling:
        return self.drawn_choices(self.max_tokens or default_tokens, self.logprobs)


class CompletionAnswer(ChoicesAnswer):
    """OpenAI's text_completion around a generation."""

    prefix = "cmpl-"
    whole_object = event_object = "text_completion"

    def __init__(self, asked: CompletionRequest, generation: Generation | Refusal, request_id: str | None) -> None:
        super().__init__(asked, generation, request_id)
        self._logprobs = asked.logprobs is not None
        self._offsets = [0] * self._choices

    def whole_choice(self, choice: PartialChoice) -> dict[str, Any]:
        return {"text": choice.text, "logprobs": self._tokens(choice.tokens, 0) if self._logprobs else None}

    def piece(self, delta: Delta) -> dict[str, Any]:
        tokens = self._tokens(delta.logprobs, self._offsets[delta.choice]) if delta.logprobs else None
        self._offsets[delta.choice] += sum(len(token.text) for token in delta.logprobs)
        return {"text": delta.text, "logprobs": tokens}

    @staticmethod
    def _tokens(tokens: list[TokenLogprob] | tuple[TokenLogprob, ...], offset: int) -> dict[str, Any]:
        """The older shape of log-probabilities: a list for each of their parts."""
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [{text: finite(value) for text, value in token.top} for token in tokens],
            "text_offset": offsets,
        }
