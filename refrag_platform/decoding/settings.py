"""How an answer is drawn. Imports no torch: a server's process starts with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schema:
    """A JSON schema, as text. strict: nothing of it is ignored; else keywords that have no grammar are."""

    text: str
    strict: bool = True


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 takes the likeliest token each time; top_p draws from the smallest set that reaches it.

    seed: of choice 0; choice i is drawn with seed + i. stop: strings before which the answer ends. n: choices, which
    share the prompt's prefill. top_logprobs: None = no log-probabilities, else how many tokens beside the drawn one.
    schema: what the answer, as JSON, follows.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    top_logprobs: int | None = None
    schema: Schema | None = None
