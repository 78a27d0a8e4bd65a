"""A row of a question file to its question; what is wrong is refused with file, row, field and value."""

from __future__ import annotations

import hashlib
from typing import Any

from refrag_platform.corpus.question import Passage, Question
from refrag_platform.corpus.text import is_visible
from refrag_platform.errors import RefragError

# Characters of a wrong value that are quoted.
_QUOTED = 120


def question_of(row: dict[str, Any], where: str, default_id: str) -> Question:
    """The question of a row in any of the forms of `read_questions`.

    Args: where: the file and row, for messages. default_id: of a row that has none.

    Raises:
        RefragError: the row is wrong.
    """
    if "summaries" in row:
        return _summary(row, where, default_id)
    if "targets" in row:
        return _conversation(row, where, default_id)
    question = _text_field(row.get("question"), where, "question")
    answers = row.get("answers")
    answers = _answer_texts([answers] if isinstance(answers, str) else answers, where, "answers")
    passages = passage_texts(row.get("passages"), where, "passages")
    gold = _gold_numbers(row.get("gold"), where, len(passages))
    history = [
        (_part(turn, "role"), _part(turn, "text")) for turn in _list_field(row.get("history") or [], where, "history")
    ]
    if any(role not in ("user", "assistant") or not isinstance(text, str) for role, text in history):
        raise RefragError(f"{where}: `history` must list objects with `role`, user or assistant, and `text`")
    answerable = row.get("answerable", bool(answers))
    if answerable is not None and not isinstance(answerable, bool):
        raise RefragError(f"{where}: `answerable` is {_said(answerable)}; it must be true, false or null")
    closed = row.get("closed", False)
    if not isinstance(closed, bool):
        raise RefragError(f"{where}: `closed` is {_said(closed)}; it must be true or false")
    name = _name_field(row, where, "id") or default_id
    return Question(
        id=name,
        question=question,
        answers=answers,
        passages=passages,
        gold=gold,
        document=_name_field(row, where, "document_id") or (_passage_id(passages[gold[0]]) if gold else name),
        history=tuple(history),
        answerable=answerable,
        closed=closed,
        category=_name_field(row, where, "kind") or "",
        split=_name_field(row, where, "split") or "",
        where=where,
    )


def _conversation(row: dict[str, Any], where: str, default_id: str) -> Question:
    """A task of a multi-turn benchmark: the last turn is asked, the turns before it are history."""
    turns = _list_field(row.get("input"), where, "input")
    spoken = [_text_field(_part(turn, "text"), where, "input") for turn in turns]
    roles = ["user" if _part(turn, "speaker") == "user" else "assistant" for turn in turns]
    if not turns or roles[-1] != "user":
        raise RefragError(f"{where}: `input` must end with a turn of the speaker `user`")
    targets = _list_field(row["targets"], where, "targets")
    verdict = {str(value).upper() for value in _list_field(row.get("answerability") or [], where, "answerability")}
    name = _name_field(row, where, "task_id") or default_id
    return Question(
        id=name,
        question=spoken[-1],
        answers=tuple(_text_field(_part(target, "text"), where, "targets") for target in targets),
        passages=passage_texts(row.get("contexts"), where, "contexts"),
        document=_name_field(row, where, "conversation_id") or name,
        history=tuple(zip(roles[:-1], spoken[:-1], strict=True)),
        # Partly answered and underspecified questions ask for something between an answer and a refusal.
        answerable={frozenset({"ANSWERABLE"}): True, frozenset({"UNANSWERABLE"}): False}.get(frozenset(verdict)),
        where=where,
    )


def _summary(row: dict[str, Any], where: str, default_id: str) -> Question:
    document = (_title_field(row.get("title"), where, "title"), _text_field(row.get("document"), where, "document"))
    name = _name_field(row, where, "id") or default_id
    summaries = _answer_texts(row["summaries"], where, "summaries")
    if not summaries:
        raise RefragError(f"{where}: `summaries` is []; it must be a list of at least one text")
    return Question(name, "", summaries, (document,), gold=(0,), document=name, kind="summary", where=where)


def _passage_id(passage: Passage) -> str:
    digest = hashlib.sha256("\n".join(passage).encode()).hexdigest()
    return f"passage {digest[:16]}"


def _text_field(value: Any, where: str, field: str) -> str:
    """A text that shows something."""
    if not isinstance(value, str) or not is_visible(value):
        raise RefragError(f"{where}: `{field}` is {_said(value)}; it must be a text")
    return value


def _answer_texts(value: Any, where: str, field: str) -> tuple[str, ...]:
    """A list of texts, each of which shows something: an empty one would be learned, and matched, as an answer."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise RefragError(f"{where}: `{field}` is {_said(value)}; it must be a list of texts")
    for number, text in enumerate(value):
        if not is_visible(text):
            raise RefragError(
                f"{where}: `{field}`[{number}] is {_said(text)}, which shows nothing; take it out ([] says that the "
                "passages have no answer)"
            )
    return tuple(value)


def passage_texts(value: Any, where: str, field: str) -> tuple[Passage, ...]:
    """Passages as (title, text), of which one shows something."""
    if not isinstance(value, list) or not all(isinstance(_part(passage, "text"), str) for passage in value):
        raise RefragError(f"{where}: `{field}` must be a list of objects with `text` and, if known, `title`")
    passages = tuple((_title_field(passage.get("title"), where, field), passage["text"]) for passage in value)
    for number, (title, text) in enumerate(passages):
        if not is_visible(title + text):
            raise RefragError(f"{where}: `{field}`[{number}] has neither title nor text; take it out")
    return passages


def _title_field(value: Any, where: str, field: str) -> str:
    """A text, nothing, or a number, as tables hold titles."""
    if value is None or value != value:  # NaN, a table's nothing
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RefragError(f"{where}: a title of `{field}` is {_said(value)}; it must be a text")
    return str(value)


def _gold_numbers(value: Any, where: str, count: int) -> tuple[int, ...]:
    """Numbers of passages, each once."""
    fits = isinstance(value, list) and all(type(number) is int and 0 <= number < count for number in value)
    if value is not None and not fits:
        raise RefragError(f"{where}: `gold` is {_said(value)}; it must list numbers of the {count} passages")
    return tuple(dict.fromkeys(value or ()))


def _name_field(row: dict[str, Any], where: str, field: str) -> str | None:
    """An id: a text or a number; None where there is none."""
    value = row.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RefragError(f"{where}: `{field}` is {_said(value)}; it must be a text or a number")
    return str(value)


def _list_field(value: Any, where: str, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise RefragError(f"{where}: `{field}` is {_said(value)}; it must be a list")
    return value


def _part(value: Any, name: str) -> Any:
    """A field of an object; None of anything else."""
    return value.get(name) if isinstance(value, dict) else None


def _said(value: Any) -> str:
    """A wrong value for a message, cut short."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…"
