"""Answers that follow a JSON schema: the tokens that may come next, by llguidance.

    matcher = Grammars(tokenizer).matcher(Schema('{"type": "object"}')).copy()
    allowed = matcher.allowed()  # one of these ids is drawn
    matcher.advance(drawn)

llguidance parses the answer's bytes, so a token may cross the parts of JSON as it likes. It is imported with the first
schema.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cached_property, lru_cache
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from refrag_platform.decoding import trial
from refrag_platform.decoding.settings import Schema
from refrag_platform.errors import RefragError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_GRAMMARS = 32  # kept, the last used
# What llguidance says of a schema that it takes if it may be lenient.
LEFT_OUT_IF_LENIENT = ("Unimplemented keys", "oneOf constraints", "Unknown format")
MOST_SAID = 300  # characters of an error: it may repeat the schema
# Of the process that tries a schema, whose processor time is limited; more only where many wait for a processor.
SECONDS_OF_TRIAL = 30.0


class SchemaError(RefragError):
    """A JSON schema that answers can't be held to."""


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> Matcher:
        """One that goes on by itself from here."""
        return Matcher(self._matcher.deep_copy())

    @property
    def whole(self) -> bool:
        """Whether the JSON is whole and nothing but its end may follow."""
        # A parser that has failed has stopped too.
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())

    def allowed(self) -> Tensor:
        """Ids of the tokens that may come next, [n]; the tokenizer's eos only where the JSON is whole.

        Raises:
            SchemaError: there is none, or telling takes too much.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        ids = np.unpackbits(bits, bitorder="little").nonzero()[0]
        if self._matcher.is_error() or not len(ids):
            reason = _one_line(self._matcher.get_error()) or "no token can follow"
            raise SchemaError(f"the answer can't follow its schema any further ({reason}); make the schema simpler")
        return torch.from_numpy(ids)

    def advance(self, token_id: int) -> None:
        """Go on by a token, one of `allowed`."""
        self._matcher.consume_token(token_id)


class Grammars:
    """The grammars of schemas over one tokenizer; any thread may ask."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._compiled = lru_cache(MOST_GRAMMARS)(self._compile)
        # Clients choose schemas: those that take all that one may take leave the other processors to the decoder.
        self._one_at_a_time = Lock()

    def matcher(self, schema: Schema) -> Matcher:
        """A matcher at the beginning of an answer, which all with this schema share: each goes on with a copy.

        Raises:
            SchemaError: no grammar can be made of the schema, or not with the time and memory that it may take.
        """
        return self._compiled(schema)

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self._tokenizer)

    def _compile(self, schema: Schema) -> Matcher:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError as error:
            raise SchemaError(
                f"llguidance can't be imported ({error}), which holds answers to a schema; install it on the server "
                "(`pip install llguidance`), or ask for text"
            ) from None
        lenient = not schema.strict
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                schema.text,
                # JSON may hold any amount of white space, which a small decoder may write without end.
                overrides={"whitespace_flexible": False, "lenient": lenient, "coerce_one_of": lenient},
            )
        except ValueError as error:
            raise SchemaError(f"the schema can't be read: {error}") from None
        with self._one_at_a_time:
            if reason := _tried(grammar):
                helped = not lenient and reason.startswith(LEFT_OUT_IF_LENIENT)
                mend = ", or send strict: false, which ignores keywords that have no grammar" if helped else ""
                raise SchemaError(
                    f"no grammar can be made of the schema: {reason}; change or leave out that part{mend}"
                )
            limits = LLParserLimits(**trial.LIMITS)
            matcher = Matcher(LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits))
            matcher.allowed()
        return matcher


def _tried(grammar: str) -> str:
    """What is wrong with a grammar; "" if nothing is.

    In a process of its own, which may be ended: a hundred characters can ask for minutes and gigabytes.
    """
    command = [sys.executable, "-P", trial.__file__]
    try:
        tried = subprocess.run(
            command, input=json.dumps(grammar), capture_output=True, text=True, timeout=SECONDS_OF_TRIAL
        )
    except subprocess.TimeoutExpired:
        tried = None
    if tried is not None and tried.returncode > 0:
        raise RefragError(f"a schema could not be tried: {tried.stderr[-1000:]}")
    if tried is None or tried.returncode:
        return f"it takes more than {trial.SECONDS} s or {trial.MEMORY // 2**20:,} MiB, or is nested too deep"
    return _one_line(json.loads(tried.stdout))


def _one_line(error: str) -> str:
    """What llguidance says, without the mark by which it says that there could be more, and without its own calls."""
    return " ".join(error.partition("<backtrace>")[0].replace("<non-verbose/>", "").split())[:MOST_SAID]
