"""Where weights and tokenizers come from, as a recipe names it; `weights.py` fetches them."""

from __future__ import annotations

from pydantic import AfterValidator

SCHEMES = {"package": "NAME", "hub": "ORG/NAME", "path": "PATH"}


def check_source(*words: str) -> AfterValidator:
    """A check of text that must be SCHEME:NAME, or one of `words`, which name no weights."""
    allowed = [*(f"{scheme}:{name}" for scheme, name in SCHEMES.items()), *words]

    def check(source: str) -> str:
        scheme, _, name = source.partition(":")
        if source not in words and not (scheme in SCHEMES and name):
            raise ValueError(f"allowed are {', '.join(allowed)}")
        return source

    return AfterValidator(check)
