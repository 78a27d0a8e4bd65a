"""Token ids to text, piece by piece: no broken UTF-8 is ever sent, and no part of a stop string."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character of UTF-8 has at most four bytes, so at most three are pending.
MOST_PENDING = 3


def token_texts(tokenizer: PreTrainedTokenizerFast) -> Callable[[int], str]:
    """The text of a token by its id, as log-probabilities name it: special ones too, which an answer's text leaves out.

    Each is decoded once and kept: a drawn token may have 20 beside it, and they are named where all answers are sent.
    """

    @functools.cache
    def text(token_id: int) -> str:
        return str(tokenizer.decode([token_id], skip_special_tokens=False))

    return text


class Detokenizer:
    """Incremental decoding of one answer.

    A token may hold part of a character, and a tokenizer may treat the first token of a text
    differently; so a short window that begins at an earlier token is decoded again with each new token.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._window = 0  # the window's first token
        self._settled = 0  # tokens before this one have been sent whole
        self._sent = 0  # characters of the window that have been sent

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` has come; empty while a character is incomplete."""
        self._ids.append(token_id)
        text = self._decode(self._ids[self._window :])
        pending = min(len(text) - len(text.rstrip(REPLACEMENT)), MOST_PENDING)
        whole = text[: len(text) - pending]
        piece = whole[self._sent :]
        self._sent += len(piece)
        if not pending:
            self._window, self._settled = self._settled, len(self._ids)
            self._sent = len(self._decode(self._ids[self._window :]))
        return piece


class StopStrings:
    """Ends a text before the first of some strings; text that may begin one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The part of the text so far that can be sent; sets `stopped` when a stop string has come."""
        text = self._held + piece
        positions = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if positions:
            self.stopped, self._held = True, ""
            return text[: min(positions)]
        held = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
