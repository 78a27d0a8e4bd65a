"""Questions with passages and known answers, and passages alone, from JSON Lines files."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from refrag_platform.corpus.question_fields import (
    Passage,
    answer_texts,
    gold_numbers,
    list_field,
    name_field,
    part,
    passage_texts,
    said,
    text_field,
    title_field,
)
from refrag_platform.corpus.rows import Fault, Row, keys_said, read_json_rows, read_parquet_rows
from refrag_platform.corpus.splits import Split
from refrag_platform.errors import RefragError

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
Retriever = Literal["listed", "strong", "weak"]
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
    closed: it is about all of its passages, and about no others: none may be left out or added. category: what its row
    calls its `kind`, e.g. count; figures are given of each. split: of the corpus, if its row names one.
    where: the file and row it was read from, for messages.
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
    closed: bool = False
    category: str = ""
    split: str = ""
    where: str = field(default="", compare=False, repr=False)

    @property
    def needed(self) -> tuple[int, ...]:
        """Numbers of the passages that a reader must have seen: the gold ones, or all."""
        return tuple(range(len(self.passages))) if self.closed else self.gold

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

    None of those added says one of the answers. Where none is wanted, as where it is closed, the order stays as it is.
    """
    if question.closed:
        return question
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
      [{role, text}], kind, closed, split.
    - Conversations: input [{speaker, text}], targets [{text}], contexts [{title, text}], answerability.
    - Summaries: id, document, summaries, title.

    Args:
        limit: take this many, evenly spread over the file, whose neighbours are about one document.

    Raises:
        RefragError: the file is missing, has no questions, or a row is wrong; it names file, row and fault.
    """
    if not path.is_file():
        raise RefragError(f"no questions at {path}; give a .jsonl file of rows id, question, answers, passages")
    questions = [question_of(row, where, str(number)) for number, (where, row) in enumerate(read_rows(path), 1)]
    if not questions:
        raise RefragError(f"{path} has no questions")
    return spread(questions, limit)


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most `limit` of them, evenly spread; None: all."""
    count = len(questions) if limit is None else min(limit, len(questions))
    return [questions[turn * len(questions) // count] for turn in range(count)]


def read_summaries(path: Path) -> list[Question]:
    """The rows document, summaries, title of a file.

    Raises:
        RefragError: the file can't be read, or a row is wrong; it names file, row and fault.
    """
    rows = read_rows(path, ("document", "summaries"))
    return [_summary(row, where, str(number)) for number, (where, row) in enumerate(rows, 1)]


def question_files_of(corpus: Path, *splits: Split) -> list[Path]:
    """Files of a corpus' own questions, of these splits; one of plain documents has none. Args: corpus: its content."""
    files = (corpus / "questions" / f"{split}.jsonl" for split in splits)
    return [file for file in files if file.is_file() and file.stat().st_size]


def named_files(root: Path, names: Sequence[str]) -> list[Path]:
    """Files that a recipe names by their path from `root`; environment variables are put in."""
    return [root / os.path.expandvars(name) for name in names]


def read_passages(path: Path, split: str | None = None) -> list[Passage]:
    """Every passage of a file once, (title, text): rows of title and text, or questions with passages.

    A corpus' passages.parquet is read as well.

    Args:
        split: leave out the rows that name another one in `split`, as a corpus' passages do. Whatever is learned from
            is read with `train`, so that no training sees a page that is held out.

    Raises:
        RefragError: the file is missing or has no passages, or a row is wrong.
    """
    passages: dict[Passage, None] = {}
    left_out = 0
    for where, row in parquet_rows(path) if path.suffix.lower() == ".parquet" else read_rows(path):
        if split is not None and row.get("split") not in (None, split):
            left_out += 1
            continue
        for passage in passage_texts(row.get("passages", [row]), where, "passages"):
            passages[passage] = None
    if not passages:
        why = f" of the split {split!r} ({left_out} of others)" if left_out else ""
        raise RefragError(f"{path} has no passages{why}; give a .jsonl or .parquet file of rows title, text")
    return list(passages)


def parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Passages (title, text, split) of a parquet file, each after the words that name its file and row.

    Raises:
        RefragError: the file can't be read, or has no column `text`.
    """
    import pyarrow

    try:
        with path.open("rb") as stream:
            yield from _rows(path, read_parquet_rows(stream, ("text", "title", "split")))
    except (OSError, pyarrow.ArrowException) as error:
        said = str(error).splitlines()[0]
        raise RefragError(f"{path} can't be read as passages ({said}); give a .parquet file of title, text") from None


def read_rows(path: Path, needed: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a .jsonl file, each after the words that name its file and row; blank lines are skipped.

    Raises:
        RefragError: the file can't be read, or a row is not JSON or lacks a field; file and row are named.
    """
    try:
        with path.open("rb") as stream:
            yield from _rows(path, read_json_rows(stream), needed)
    except FileNotFoundError:
        raise RefragError(f"no file {path}; correct the name of it") from None
    except OSError as error:
        raise RefragError(f"{path} can't be read ({error.strerror or error}); give a .jsonl file") from None


def _rows(path: Path, rows: Iterable[Row | Fault], needed: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in rows:
        if isinstance(row, Fault):
            raise RefragError(f"{path}{f', row {row.row}' if row.row else ''}: {row.message}")
        where = f"{path}, row {row.number}"
        missing = [field for field in needed if field not in row.values]
        if missing:
            raise RefragError(f"{where}: field {missing[0]!r} is missing; it has {keys_said(row.values)}")
        yield where, row.values


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
    question = text_field(row.get("question"), where, "question")
    answers = row.get("answers")
    answers = answer_texts([answers] if isinstance(answers, str) else answers, where, "answers")
    passages = passage_texts(row.get("passages"), where, "passages")
    gold = gold_numbers(row.get("gold"), where, len(passages))
    history = [
        (part(turn, "role"), part(turn, "text")) for turn in list_field(row.get("history") or [], where, "history")
    ]
    if any(role not in ("user", "assistant") or not isinstance(text, str) for role, text in history):
        raise RefragError(f"{where}: `history` must list objects with `role`, user or assistant, and `text`")
    answerable = row.get("answerable", bool(answers))
    if answerable is not None and not isinstance(answerable, bool):
        raise RefragError(f"{where}: `answerable` is {said(answerable)}; it must be true, false or null")
    closed = row.get("closed", False)
    if not isinstance(closed, bool):
        raise RefragError(f"{where}: `closed` is {said(closed)}; it must be true or false")
    name = name_field(row, where, "id") or default_id
    return Question(
        id=name,
        question=question,
        answers=answers,
        passages=passages,
        gold=gold,
        document=name_field(row, where, "document_id") or (_passage_id(passages[gold[0]]) if gold else name),
        history=tuple(history),
        answerable=answerable,
        closed=closed,
        category=name_field(row, where, "kind") or "",
        split=name_field(row, where, "split") or "",
        where=where,
    )


def _conversation(row: dict[str, Any], where: str, default_id: str) -> Question:
    """A task of a multi-turn benchmark: the last turn is asked, the turns before it are history."""
    turns = list_field(row.get("input"), where, "input")
    spoken = [text_field(part(turn, "text"), where, "input") for turn in turns]
    roles = ["user" if part(turn, "speaker") == "user" else "assistant" for turn in turns]
    if not turns or roles[-1] != "user":
        raise RefragError(f"{where}: `input` must end with a turn of the speaker `user`")
    targets = list_field(row["targets"], where, "targets")
    verdict = {str(value).upper() for value in list_field(row.get("answerability") or [], where, "answerability")}
    name = name_field(row, where, "task_id") or default_id
    return Question(
        id=name,
        question=spoken[-1],
        answers=tuple(text_field(part(target, "text"), where, "targets") for target in targets),
        passages=passage_texts(row.get("contexts"), where, "contexts"),
        document=name_field(row, where, "conversation_id") or name,
        history=tuple(zip(roles[:-1], spoken[:-1], strict=True)),
        # Partly answered and underspecified questions ask for something between an answer and a refusal.
        answerable={frozenset({"ANSWERABLE"}): True, frozenset({"UNANSWERABLE"}): False}.get(frozenset(verdict)),
        where=where,
    )


def _summary(row: dict[str, Any], where: str, default_id: str) -> Question:
    document = (title_field(row.get("title"), where, "title"), text_field(row.get("document"), where, "document"))
    name = name_field(row, where, "id") or default_id
    summaries = answer_texts(row["summaries"], where, "summaries")
    if not summaries:
        raise RefragError(f"{where}: `summaries` is []; it must be a list of at least one text")
    return Question(name, "", summaries, (document,), gold=(0,), document=name, kind="summary", where=where)


def _passage_id(passage: Passage) -> str:
    digest = hashlib.sha256("\n".join(passage).encode()).hexdigest()
    return f"passage {digest[:16]}"
