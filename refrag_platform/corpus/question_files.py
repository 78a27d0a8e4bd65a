"""Questions with passages and known answers, and passages alone, from JSON Lines files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from refrag_platform.corpus.question import Passage, Question, spread
from refrag_platform.corpus.question_rows import passage_texts, question_of
from refrag_platform.corpus.rows import Fault, Row, keys_said, read_json_rows, read_parquet_rows
from refrag_platform.corpus.splits import Split
from refrag_platform.errors import RefragError


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


def read_summaries(path: Path) -> list[Question]:
    """The rows document, summaries, title of a file.

    Raises:
        RefragError: the file can't be read, or a row is wrong; it names file, row and fault.
    """
    rows = read_rows(path, ("document", "summaries"))
    return [question_of(row, where, str(number)) for number, (where, row) in enumerate(rows, 1)]


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
    left_out: Counter[str] = Counter()
    for where, row in read_passage_rows(path):
        if split is not None and row.get("split") not in (None, split):
            left_out[str(row["split"])] += 1
            continue
        for passage in passage_texts(row.get("passages", [row]), where, "passages"):
            passages[passage] = None
    if not passages:
        if left_out:
            others = ", ".join(f"{count} of {name}" for name, count in left_out.items())
            raise RefragError(f"{path} has no passages of the split {split!r} ({others}); name another split or file")
        raise RefragError(f"{path} has no passages; give a .jsonl or .parquet file of rows title, text")
    return list(passages)


def read_passage_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a .jsonl file, as `read_rows`, or of a .parquet file: title, text, split.

    Raises:
        RefragError: the file can't be read, or has no column `text`.
    """
    if path.suffix.lower() != ".parquet":
        yield from read_rows(path)
        return
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
