"""The `refrag` field of an answer in words, for shells and reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def cost(refrag: Mapping[str, Any]) -> str:
    """What was read, and how much it would have been without compression; the two figures give the rate."""
    return (
        f"{refrag['chunks_expanded']} of {refrag['chunks']} chunks expanded, compression "
        f"{refrag['compression_rate']:.2f}x: {refrag['prompt_positions']} positions instead of "
        f"{refrag['plain_prompt_tokens']} tokens"
    )
