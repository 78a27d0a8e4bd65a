"""Questions with passages and known answers, and passages alone, from JSON Lines files."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from refrag_platform.errors import RefragError
from refrag_platform.recipes import EvaluationRecipe

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
Passage = tuple[str, str]
Retriever = Literal["listed", "strong", "weak"]
RETRIEVERS: tuple[Retriever, ...] = get_args(Retriever)
# A weak retriever draws from this many of the best (section 5).
WEAK_POOL = 200


@dataclass(frozen=True)
class Question:
    """passages: (title, text), best first; gold: numbers of those that hold the answer, if known.

    document: what the question is about; intervals resample documents. Default: the first gold passage, of which there
    may be several questions; where none is known, the question's own id.
    gold_kept: `take` has the gold passages among its own, whatever their rank. ranked: it keeps the order; else any
    passage may stand anywhere.
    history: earlier turns, (user or assistant, text). kind: what is asked for; a summary has no question.
    answerable: whether the passages hold the answer; None where it isn't known or is debatable.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    gold: tuple[int, ...] = ()
    document: str = ""
    gold_kept: bool = True
    ranked: bool = True
    history: tuple[tuple[str, str], ...] = ()
    kind: Literal["answer", "summary"] = "answer"
    answerable: bool | None = None

    def take(self, count: int) -> tuple[Passage, ...]:
        """`count` passages: the gold ones and the first of the others, as listed or in an order fixed by id and count.

        Without gold numbers these are the first `count`, as a retriever ranked them.
        """
        gold = self.gold if self.gold_kept else ()
        others = [number for number in range(len(self.passages)) if number not in gold]
        chosen = sorted([*gold, *others][:count])
        if not self.ranked:
            # Otherwise the gold ones, which come from further down, would stand last.
            random.Random(f"order {self.id} {count}").shuffle(chosen)
        return tuple(self.passages[number] for number in chosen)

    def shuffled(self, order: Sequence[int]) -> Question:
        """The question with the passages of these numbers, in this order."""
        place = {number: place for place, number in enumerate(order)}
        gold = tuple(sorted(place[number] for number in self.gold if number in place))
        return replace(self, passages=tuple(self.passages[number] for number in order), gold=gold)


def retrieved(question: Question, retriever: Retriever) -> Question:
    """The question as a retriever would serve it; passages are listed best first.

    listed: as it is, the gold passages kept. strong: the best, whether gold or not. weak: any of the first 200 in
    random order (fixed by the question's id), the gold ones among them.
    """
    if retriever == "strong":
        return replace(question, gold_kept=False)
    if retriever == "listed":
        return question
    order = list(range(min(len(question.passages), WEAK_POOL)))
    order += [number for number in question.gold if number not in order]
    random.Random(f"weak {question.id}").shuffle(order)
    return replace(question.shuffled(order), ranked=False)


def with_distractors(question: Question, pool: Sequence[Passage], count: int) -> Question:
    """The question with passages of `pool` added until it has `count`, all in random order, fixed by its id.

    None of those added says one of the answers. Where none is wanted the order stays as it is.
    """
    chance = random.Random(f"distractors {question.id}")
    says = mention(question.answers)
    known = set(question.passages)
    added: list[Passage] = []
    for passage in chance.sample(pool, len(pool)):
        if len(question.passages) + len(added) >= count:
            break
        if passage not in known and not says.search(passage[1]):
            added.append(passage)
    if not added:
        return question
    order = list(range(len(question.passages) + len(added)))
    chance.shuffle(order)
    return replace(question, passages=(*question.passages, *added)).shuffled(order)


def keeps_order(share: float, others: Sequence[object], chance: np.random.Generator) -> bool:
    """Whether a question's passages stand as listed: for a share of those that list `others` beside the gold ones.

    Where nothing else is listed, no retriever ranked, and the gold ones would always come first.
    """
    return share > 0 and bool(others) and chance.random() < share


def arranged(chosen: Sequence[T], listed: Sequence[T], ranked: bool, chance: np.random.Generator) -> list[T]:
    """Chosen passages (or their numbers) as a retriever listed them, best first, or in random order.

    Those that aren't listed, which no retriever ranked for this question, come last.
    """
    if not ranked:
        return [chosen[number] for number in chance.permutation(len(chosen))]
    place = {passage: place for place, passage in enumerate(dict.fromkeys(listed))}
    return sorted(chosen, key=lambda passage: place.get(passage, len(place)))


def mention(answers: Sequence[str]) -> re.Pattern[str]:
    """Finds one of the answers as whole words, whatever its case."""
    words = "|".join(rf"(?<!\w){re.escape(answer)}(?!\w)" for answer in answers if answer)
    return re.compile(words or r"(?!)", re.IGNORECASE)


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Questions in any of three forms of row; blank lines are skipped.

    - id, question, answers, passages [{title, text}] and, if known, gold [numbers], document_id, answerable, history
      [{role, text}].
    - Conversations: input [{speaker, text}], targets [{text}], contexts [{title, text}], answerability.
    - Summaries: id, document, summaries, title.

    Args:
        limit: take this many, evenly spread over the file, whose neighbours are about one document.

    Raises:
        RefragError: the file is missing, has no questions, or a row is wrong; it names file, row and fault.
    """
    if not path.is_file():
        raise RefragError(f"no questions at {path}; give a .jsonl file of rows id, question, answers, passages")
    questions = [_question(row, where, str(number)) for number, (where, row) in enumerate(read_rows(path), 1)]
    if not questions:
        raise RefragError(f"{path} has no questions")
    if limit is None or limit >= len(questions):
        return questions
    return [questions[turn * len(questions) // limit] for turn in range(limit)]


def question_file(settings: EvaluationRecipe, base: Path) -> Path | None:
    """The file of questions that the recipe in the folder `base` names, if it names one."""
    return None if settings.question_file is None else (base / os.path.expandvars(settings.question_file)).resolve()


def held_out_questions(settings: EvaluationRecipe, corpus: Path, base: Path) -> list[Question]:
    """What an evaluation asks: the corpus' test questions, or those of the file that the recipe names.

    Args:
        corpus: its content folder. base: the recipe's folder.

    Raises:
        RefragError: there is no such file, a row is wrong, or it asks about a document that the corpus trains on.
    """
    file = question_file(settings, base)
    if file is None:
        return read_questions(corpus / "questions" / "test.jsonl", settings.questions)
    asked = read_questions(file, settings.questions)
    _require_held_out(asked, corpus / "documents.parquet", file)
    return [retrieved(question, "strong") for question in asked]


def _require_held_out(asked: Sequence[Question], documents: Path, file: Path) -> None:
    """Refuse questions about documents of the corpus that are not held out for tests."""
    import pyarrow.parquet as parquet

    if not documents.is_file():
        raise RefragError(f"{documents} is missing: the corpus is not in place; make it by `refrag run corpus`")
    table = parquet.read_table(documents, columns=["id", "split"])
    split_of = dict(zip(table["id"].to_pylist(), table["split"].to_pylist(), strict=True))
    for question in asked:
        if split_of.get(question.document, "test") != "test":
            raise RefragError(
                f"{file}: {question.id} asks about {question.document}, which this corpus has in its split "
                f"{split_of[question.document]}; leave it out, or rank the corpus' own test questions"
            )


def read_passages(path: Path) -> list[Passage]:
    """Every passage of a file once, (title, text): rows of title and text, or questions with passages.

    A corpus' passages.parquet is read as well.

    Raises:
        RefragError: the file is missing or has no passages, or a row is wrong.
    """
    found: dict[Passage, None] = {}
    for where, row in _parquet_rows(path) if path.suffix == ".parquet" else read_rows(path):
        for passage in _passages(row.get("passages", [row]), where, "passages"):
            found[passage] = None
    if not found:
        raise RefragError(f"{path} has no passages; give a .jsonl or .parquet file of rows title, text")
    return list(found)


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Passages of a parquet file, each after the words that name its file and row."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path, columns=["title", "text"])
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise RefragError(f"{path} can't be read as passages ({error}); give a .parquet file of title, text") from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path}, row {number}", row


def read_rows(path: Path, needed: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a .jsonl file, each after the words that name its file and row; blank lines are skipped.

    Raises:
        RefragError: the file is missing, or a row is not JSON or lacks a field; file and row are named.
    """
    number = 0
    try:
        with path.open(encoding="utf-8", errors="strict") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield f"{path}, row {number}", _object(line, f"{path}, row {number}", needed)
    except FileNotFoundError:
        raise RefragError(f"no file {path}; correct the name of it") from None
    except UnicodeDecodeError as error:
        raise RefragError(f"{path} is not UTF-8 ({error.reason} after row {number})") from None


def _object(line: str, where: str, needed: Sequence[str]) -> dict[str, Any]:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise RefragError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise RefragError(f"{where}: {type(row).__name__} instead of an object")
    missing = [field for field in needed if field not in row]
    if missing:
        raise RefragError(f"{where}: field {missing[0]!r} is missing; it has {', '.join(row)}")
    return row


def _question(row: dict[str, Any], where: str, default_id: str) -> Question:
    if "summaries" in row:
        return _summary(row, where, default_id)
    if "targets" in row:
        return _conversation(row, where, default_id)
    question = _text(row.get("question"), where, "question")
    answers = row.get("answers")
    answers = [answers] if isinstance(answers, str) else _texts(answers, where, "answers")
    passages = _passages(row.get("passages"), where, "passages")
    gold = row.get("gold") or []
    if not isinstance(gold, list) or not all(isinstance(g, int) and 0 <= g < len(passages) for g in gold):
        raise RefragError(f"{where}: `gold` is {gold!r}; it must list numbers of the {len(passages)} passages")
    history = [
        (_field(turn, "role"), _field(turn, "text")) for turn in _list(row.get("history") or [], where, "history")
    ]
    if any(role not in ("user", "assistant") or not isinstance(text, str) for role, text in history):
        raise RefragError(f"{where}: `history` must list objects with `role`, user or assistant, and `text`")
    answerable = row.get("answerable", bool(answers))
    if answerable is not None and not isinstance(answerable, bool):
        raise RefragError(f"{where}: `answerable` is {answerable!r}; it must be true, false or null")
    name = str(row.get("id", default_id))
    return Question(
        id=name,
        question=question,
        answers=tuple(answers),
        passages=passages,
        gold=tuple(gold),
        document=str(row.get("document_id") or (_passage_id(passages[gold[0]]) if gold else name)),
        history=tuple(history),
        answerable=answerable,
    )


def _conversation(row: dict[str, Any], where: str, default_id: str) -> Question:
    """A task of a multi-turn benchmark: the last turn is asked, the turns before it are history."""
    turns = _list(row.get("input"), where, "input")
    said = [_text(_field(turn, "text"), where, "input") for turn in turns]
    roles = ["user" if _field(turn, "speaker") == "user" else "assistant" for turn in turns]
    if not turns or roles[-1] != "user":
        raise RefragError(f"{where}: `input` must end with a turn of the speaker `user`")
    targets = [_text(_field(target, "text"), where, "targets") for target in _list(row["targets"], where, "targets")]
    verdict = {str(value).upper() for value in _list(row.get("answerability") or [], where, "answerability")}
    name = str(row.get("task_id", default_id))
    return Question(
        id=name,
        question=said[-1],
        answers=tuple(targets),
        passages=_passages(row.get("contexts"), where, "contexts"),
        document=str(row.get("conversation_id") or name),
        history=tuple(zip(roles[:-1], said[:-1], strict=True)),
        # Partly answered and underspecified questions ask for something between an answer and a refusal.
        answerable={frozenset({"ANSWERABLE"}): True, frozenset({"UNANSWERABLE"}): False}.get(frozenset(verdict)),
    )


def _summary(row: dict[str, Any], where: str, default_id: str) -> Question:
    document = (str(row.get("title") or ""), _text(row.get("document"), where, "document"))
    name = str(row.get("id", default_id))
    summaries = tuple(_texts(row["summaries"], where, "summaries"))
    return Question(name, "", summaries, (document,), gold=(0,), document=name, kind="summary")


def _passages(value: Any, where: str, field: str) -> tuple[Passage, ...]:
    if not isinstance(value, list) or not all(isinstance(_field(passage, "text"), str) for passage in value):
        raise RefragError(f"{where}: `{field}` must be a list of objects with `text` and, if known, `title`")
    return tuple((str(passage.get("title") or ""), passage["text"]) for passage in value)


def _passage_id(passage: Passage) -> str:
    digest = hashlib.sha256("\n".join(passage).encode()).hexdigest()
    return f"passage {digest[:16]}"


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RefragError(f"{where}: `{field}` is {value!r}; it must be a text")
    return value


def _texts(value: Any, where: str, field: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise RefragError(f"{where}: `{field}` is {value!r}; it must be a list of texts")
    return value


def _list(value: Any, where: str, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise RefragError(f"{where}: `{field}` is {value!r}; it must be a list")
    return value


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None
