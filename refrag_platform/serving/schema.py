"""What requests share: how an answer is drawn and from what. What isn't honoured is refused by name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, Tag, WithJsonSchema, model_validator

from refrag_platform.decoding.settings import Schema
from refrag_platform.limits import (
    MOST_CHARACTERS,
    MOST_CHOICES,
    MOST_PASSAGES,
    MOST_QUERY_WORDS,
    MOST_STOP_CHARACTERS,
    MOST_STOPS,
    MOST_TITLE_CHARACTERS,
    MOST_TOKENS,
)
from refrag_platform.serving.contract import Message, Sampling, ServedPassage
from refrag_platform.serving.fields import (
    TEXT_OR_LIST,
    Body,
    Name,
    RequestText,
    fault,
    only,
    require_characters,
    shown,
    whole_text,
)

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


class ExpandedPassage(Body):
    """Chunks of a passage that are to be read as tokens, whatever the policy thinks of them."""

    passage: Name = Field(description="its id: the store's, or request-0 for the first of `passages`")
    chunks: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, max_length=MOST_TOKENS, description="their numbers, from 0, in the order of `selection`; default all"
    )


class RefragOptions(Body):
    """What REFRAG can be told."""

    share_kept: float | None = Field(None, ge=0, le=1, description="as `share_kept` beside this field")
    rate: int | None = Field(
        None,
        ge=1,
        le=MOST_TOKENS,
        description="chunks of the store that are read as one, by the mean of their vectors, and count as one in all "
        "that is said of chunks: one of the rates that the model is trained for; default 1",
    )
    expand: list[ExpandedPassage] | None = Field(
        None, max_length=MOST_PASSAGES, description="chunks to keep as tokens beside that share"
    )


class StreamOptions(Body):
    """OpenAI's options of a stream."""

    include_usage: bool | None = Field(None, description="a last chunk, without choices, bears the usage")
    include_obfuscation: Annotated[Any, only(False)] = None


class AnswerRequest(Body):
    """What is asked of an answer of any shape."""

    also_called: ClassVar[Mapping[str, str]] = {
        name: "passages" for name in ("documents", "docs", "context", "contexts", "sources")
    }
    # What this body calls what the engine's errors name.
    fields_here: ClassVar[Mapping[str, str]] = {}
    # Whether the decoder is to go on with a text, instead of answering a conversation.
    continues: ClassVar[bool] = False

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="default 0: the likeliest token each time")
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    passages: list[GivenPassage] | None = Field(
        None, max_length=MOST_PASSAGES, description="read these; nothing is retrieved unless `retrieve` says so"
    )
    retrieve: int | None = Field(
        None,
        ge=0,
        le=MOST_PASSAGES,
        description="passages retrieved for the question; default the recipe's, of a text that is continued none",
    )
    share_kept: float | None = Field(
        None, ge=0, le=1, description="p: share of chunks that the policy keeps as tokens; default the recipe's"
    )
    refrag: RefragOptions | None = None
    # Names for the client's own use: they change no answer anywhere.
    user: RequestText | None = Field(None, description="for the client's own use")
    safety_identifier: RequestText | None = Field(None, description="for the client's own use")
    metadata: dict[str, Any] | None = Field(None, description="for the client's own use; not kept")
    prompt_cache_key: RequestText | None = Field(
        None, description="of no use here: a collection's prompts share one cache"
    )
    prompt_cache_retention: RequestText | None = Field(None, description="of no use here")
    store: Annotated[Any, only(False)] = Field(None, description=NOT_HONOURED)
    service_tier: Annotated[Any, only("auto", "default")] = Field(None, description=NOT_HONOURED)

    @model_validator(mode="after")
    def _options_fit(self) -> AnswerRequest:
        if self.stream_options is not None and not self.stream:
            raise fault("invalid_value", "stream_options needs stream: true", "stream_options")
        told = self.refrag or RefragOptions()
        if told.share_kept is not None and self.share_kept is not None:
            raise fault("invalid_value", "share_kept stands beside refrag too; send one of them", "refrag.share_kept")
        names = [one.passage for one in told.expand or []]
        if len(set(names)) < len(names):
            raise fault("invalid_value", "a passage is named twice; list its chunks in one place", "refrag.expand")
        return self

    def field_here(self, name: str) -> str:
        """What this body calls a field that the engine's errors name."""
        return self.fields_here.get(name, name)

    @property
    def share(self) -> float | None:
        """p, from either place."""
        return self.refrag.share_kept if self.refrag and self.refrag.share_kept is not None else self.share_kept

    @property
    def rate(self) -> int:
        """How many chunks are read as one."""
        return (self.refrag and self.refrag.rate) or 1

    @property
    def expand(self) -> dict[str, list[int] | None]:
        """Chunks to read as tokens, by passage."""
        return {one.passage: one.chunks for one in (self.refrag and self.refrag.expand) or []}

    @abstractmethod
    def turns(self) -> list[Message]:
        """What is asked, in the engine's form."""

    @abstractmethod
    def sampling(self, default_tokens: int) -> Sampling:
        """How the answer is drawn."""

    def drawn(self, max_tokens: int, top_logprobs: int | None, schema: Schema | None = None) -> Sampling:
        """`sampling` by the fields that all shapes have."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            top_logprobs=top_logprobs,
            schema=schema,
        )

    def passages_sent(self) -> list[ServedPassage]:
        """The passages of the request, named by their place in it."""
        return [
            ServedPassage(id=f"request-{place}", title=item.title, text=item.text)
            for place, item in enumerate(self.passages or [])
        ]

    def to_retrieve(self, default: int) -> int:
        """How many passages to look up."""
        if self.retrieve is not None:
            return self.retrieve
        return 0 if self.passages is not None else default

    def require_characters(self, asked: int) -> None:
        """What is asked, in characters, and the passages are together no more than the limit.

        Raises:
            PydanticCustomError: they are.
        """
        name = self.fields_here.get("messages", "messages")
        characters = asked + sum(len(passage.title) + len(passage.text) for passage in self.passages or [])
        require_characters(characters, f"{name} and passages", "passages" if self.passages else name)


def _no_bias(value: dict[str, float] | None) -> dict[str, float] | None:
    if value and any(value.values()):
        raise fault("unsupported_value", f"{shown(value)} is not honoured here; leave the field out or send {{}}")
    return value


def most_tokens(description: str) -> Any:
    """A field that says how long an answer may be."""
    return Field(None, ge=1, le=MOST_TOKENS, description=description)


class ChoicesRequest(AnswerRequest):
    """What chat completions and completions have in common beside."""

    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="choices, which share the prompt's prefill")
    stop: Stops | None = None
    logit_bias: Annotated[dict[str, float] | None, AfterValidator(_no_bias), WithJsonSchema({"enum": [{}, None]})] = (
        Field(None, description=NOT_HONOURED)
    )
    presence_penalty: Annotated[Any, only(0)] = Field(None, description=NOT_HONOURED)
    frequency_penalty: Annotated[Any, only(0)] = Field(None, description=NOT_HONOURED)
    best_of: Annotated[Any, only(1)] = Field(None, description=NOT_HONOURED)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that bears the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def drawn_choices(self, max_tokens: int, top_logprobs: int | None, schema: Schema | None = None) -> Sampling:
        """`sampling` of several choices."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        sampling = self.drawn(max_tokens, top_logprobs, schema)
        return replace(sampling, stop=tuple(stop for stop in stops if stop), n=self.n or 1)


class ConversationRequest(AnswerRequest):
    """What chat completions and responses have in common beside: the model calls no tools."""

    parallel_tool_calls: bool | None = Field(None, description="of no use here: no tool is called")
    tools: list[Any] | None = Field(
        None, description="not honoured, the model calls no tools: [], or any with tool_choice none"
    )
    tool_choice: Annotated[Any, only("none", "auto")] = Field(None, description=NOT_HONOURED)

    @model_validator(mode="after")
    def _no_tool_is_called(self) -> ConversationRequest:
        if self.tools and self.tool_choice != "none":
            told = 'the model calls no tools; leave the field out, or send tool_choice "none" with it'
            raise fault("unsupported_value", told, "tools")
        return self


def not_blank(value: str) -> str:
    """A text that says something."""
    if not value.strip():
        raise fault("invalid_value", "it is empty; it must say what to look for")
    return value


class RetrieveRequest(Body):
    """Body of POST /v1/retrieve."""

    also_called: ClassVar[Mapping[str, str]] = {"n": "k", "top_k": "k", "retrieve": "k", "question": "query"}

    query: Annotated[FullText, AfterValidator(not_blank)] = Field(
        description=f"at most {MOST_QUERY_WORDS:,} different words"
    )
    k: int = Field(8, ge=1, le=MOST_PASSAGES, description="passages to find")
