"""The fields of a row of a question file: what each must be. A wrong one is refused with file, row, field and value."""

from __future__ import annotations

from typing import Any

from refrag_platform.corpus.text import is_visible
from refrag_platform.errors import RefragError

Passage = tuple[str, str]
# Characters of a wrong value that are quoted.
_QUOTED = 120


def text_field(value: Any, where: str, field: str) -> str:
    """A text that shows something."""
    if not isinstance(value, str) or not is_visible(value):
        raise RefragError(f"{where}: `{field}` is {said(value)}; it must be a text")
    return value


def answer_texts(value: Any, where: str, field: str) -> tuple[str, ...]:
    """A list of texts, each of which shows something: an empty one would be learned, and matched, as an answer."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise RefragError(f"{where}: `{field}` is {said(value)}; it must be a list of texts")
    for number, text in enumerate(value):
        if not is_visible(text):
            raise RefragError(
                f"{where}: `{field}`[{number}] is {said(text)}, which shows nothing; take it out ([] says that the "
                "passages have no answer)"
            )
    return tuple(value)


def passage_texts(value: Any, where: str, field: str) -> tuple[Passage, ...]:
    """Passages as (title, text), of which one shows something."""
    if not isinstance(value, list) or not all(isinstance(part(passage, "text"), str) for passage in value):
        raise RefragError(f"{where}: `{field}` must be a list of objects with `text` and, if known, `title`")
    found = tuple((title_field(passage.get("title"), where, field), passage["text"]) for passage in value)
    for number, (title, text) in enumerate(found):
        if not is_visible(title + text):
            raise RefragError(f"{where}: `{field}`[{number}] has neither title nor text; take it out")
    return found


def title_field(value: Any, where: str, field: str) -> str:
    """A text, nothing, or a number, as tables hold titles."""
    if value is None or value != value:  # NaN, a table's nothing
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RefragError(f"{where}: a title of `{field}` is {said(value)}; it must be a text")
    return str(value)


def gold_numbers(value: Any, where: str, count: int) -> tuple[int, ...]:
    """Numbers of passages, each once."""
    fits = isinstance(value, list) and all(type(number) is int and 0 <= number < count for number in value)
    if value is not None and not fits:
        raise RefragError(f"{where}: `gold` is {said(value)}; it must list numbers of the {count} passages")
    return tuple(dict.fromkeys(value or ()))


def name_field(row: dict[str, Any], where: str, field: str) -> str | None:
    """An id: a text or a number; None where there is none."""
    value = row.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RefragError(f"{where}: `{field}` is {said(value)}; it must be a text or a number")
    return str(value)


def list_field(value: Any, where: str, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise RefragError(f"{where}: `{field}` is {said(value)}; it must be a list")
    return value


def part(value: Any, name: str) -> Any:
    """A field of an object; None of anything else."""
    return value.get(name) if isinstance(value, dict) else None


def said(value: Any) -> str:
    """A wrong value for a message, cut short."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…"
