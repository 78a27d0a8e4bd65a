"""Text normalization: the one form of a text that is hashed, split, tokenized and shown."""

from __future__ import annotations

import html
import re
import unicodedata

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


def strip_markup(text: str) -> str:
    """The Factbook's HTML as plain text: breaks become newlines, other tags go, entities are resolved."""
    text = _TAG.sub("", _BREAK_TAG.sub("\n", text))
    # Twice, because a few profiles hold doubly escaped entities (&amp;eacute;).
    text = normalize(html.unescape(html.unescape(text)))
    return re.sub(r"\n+", "\n", text)
