"""Where weights and tokenizers come from, as a recipe names it; `weights.py` fetches them."""

from __future__ import annotations

from pydantic import AfterValidator

SCHEMES = {"package": "NAME", "hub": "ORG/NAME", "path": "PATH"}


def check_source(word: str | None = None) -> AfterValidator:
    """A check of text that must be SCHEME:NAME, or `word`, which names no weights."""
    allowed = [f"{scheme}:{name}" for scheme, name in SCHEMES.items()] + ([word] if word else [])

    def check(source: str) -> str:
        scheme, _, name = source.partition(":")
        if source != word and not (scheme in SCHEMES and name):
            raise ValueError(f"allowed are {', '.join(allowed)}")
        return source

    return AfterValidator(check)
