"""What counts as text, and its normalization: the one form that is hashed, split, tokenized and shown."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from refrag_platform.errors import RefragError

# Why a text can't be used that `is_unicode` refuses: no tokenizer takes it and no file can hold it.
NOT_UNICODE = "not valid Unicode (half a surrogate pair)"
# Letters and symbols that show nothing.
_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
# Eight control characters, at most one other between two: what another encoding or binary data leaves, never prose.
_NOISE = re.compile("(?:[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f][^\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]?){8}")
# Control and format characters that carry no text: C0/C1 controls, soft hyphen, zero-width marks, BOM.
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff]")
_NEWLINES = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
# Spaces of every kind but the newline, which ends a line.
_SPACES = re.compile(r"[^\S\n]+")
_AROUND_NEWLINE = re.compile(r" ?\n ?")
_BLANK_LINES = re.compile(r"\n{3,}")
_BREAK_TAG = re.compile(r"<\s*/?\s*(?:br|p|div|li|ul|ol|tr|h[1-6])\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")


def normalize(text: str) -> str:
    """NFC, newlines as \\n, one space between words, at most one blank line, no invisible characters."""
    text = _NEWLINES.sub("\n", unicodedata.normalize("NFC", text))
    text = _SPACES.sub(" ", _INVISIBLE.sub("", text))
    return _BLANK_LINES.sub("\n\n", _AROUND_NEWLINE.sub("\n", text)).strip()


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: one with half a surrogate pair (of JSON's \\ud83d, of a shell's bytes) can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_unicode(text: str, what: str) -> str:
    """The text itself.

    Args:
        what: the text is, for the message.

    Raises:
        RefragError: it is not valid Unicode.
    """
    if not is_unicode(text):
        raise RefragError(f"{what} is {NOT_UNICODE}: {text[:200]!r}; write it in UTF-8")
    return text


def not_unicode(value: Any) -> str | None:
    """The place in a JSON value whose text, keys included, is not valid Unicode, e.g. `passages.0.title`, or None."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, str) and not is_unicode(value):
            return place
        inside: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, dict):
            inside = value.items()
        elif isinstance(value, list):
            inside = enumerate(value)
        for key, one in inside:
            if isinstance(key, str) and not is_unicode(key):
                return ascii(key)
            waiting.append((f"{place}.{key}" if place else str(key), one))
    return None


def is_visible(text: str) -> bool:
    """Whether anything in a text shows: not only spaces, controls, joiners, marks and fillers."""
    return any(
        unicodedata.category(character)[0] not in "ZM"
        and unicodedata.category(character) not in {"Cc", "Cf", "Cs"}
        and character not in _BLANKS
        for character in text
    )


def is_noise(text: str) -> bool:
    """Whether a text is another encoding or binary data read as if it were text."""
    return _NOISE.search(text) is not None


def strip_markup(text: str) -> str:
    """The Factbook's HTML as plain text: breaks become newlines, other tags go, entities are resolved."""
    text = _TAG.sub("", _BREAK_TAG.sub("\n", text))
    # Twice, because a few profiles hold doubly escaped entities (&amp;eacute;).
    text = normalize(html.unescape(html.unescape(text)))
    return re.sub(r"\n+", "\n", text)
