"""Questions on many passages, part by part: a part is a file in a work folder, whole or not there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from refrag_platform.corpus.question import Passage
from refrag_platform.errors import RefragError
from refrag_platform.files import write_json
from refrag_platform.progress import Progress
from refrag_platform.training.reading.blanks import QuestionAnswer
from refrag_platform.training.writing.asking import ask
from refrag_platform.training.writing.layout import WriterLayout
from refrag_platform.training.writing.models import TextModel
from refrag_platform.training.writing.reader import answered

# Sorted by length before they are cut into batches: less is padded.
BATCHES_PER_PART = 2


@dataclass(frozen=True)
class WritingSettings:
    """What decides the questions on given passages by given models.

    per_passage: questions that are written about each. least_log_probability: mean over the tokens of a reader's
    answer, in nats, unless it is the writer's own. batch: passages at once; what is drawn depends on it.
    """

    per_passage: int
    least_log_probability: float
    batch: int
    seed: int


class WrittenRows(NamedTuple):
    """Rows of a question file without ids, and what became of all that was written.

    rows: each with the place of what it is about among the passages.
    """

    rows: list[tuple[int, dict[str, Any]]]
    counts: Counter[str]
    dropped: Counter[str]


def parts(
    writer: TextModel,
    reader: TextModel,
    passages: Sequence[Passage],
    settings: WritingSettings,
    work: Path,
    progress: Progress,
) -> Iterator[WrittenRows]:
    """The parts in order; those that lie in the folder `work` already are taken from there.

    Args: progress: of the questions kept.

    Raises:
        RefragError: a batch doesn't fit the device, or a decoder reads too few positions.
    """
    size = settings.batch * BATCHES_PER_PART
    for number, start in enumerate(range(0, len(passages), size)):
        file = work / f"part-{number:06d}.json"
        if file.is_file():
            values = json.loads(file.read_text(encoding="utf-8"))
            rows = [(place, row) for place, row in values["rows"]]
            part = WrittenRows(rows, Counter(values["counts"]), Counter(values["dropped"]))
            progress.update(len(part.rows))
        else:
            try:
                part = _part(writer, reader, passages, range(start, start + size), settings, number, progress)
            except torch.OutOfMemoryError as error:
                raise RefragError(
                    f"{settings.batch} passages with {settings.per_passage} questions each don't fit "
                    f"{writer.decoder.device} at once; lower --batch"
                ) from error
            write_json(file, part._asdict(), ensure_ascii=False, indent=None)
        yield part


def _part(
    writer: TextModel,
    reader: TextModel,
    all_passages: Sequence[Passage],
    places: range,
    settings: WritingSettings,
    number: int,
    progress: Progress,
) -> WrittenRows:
    passages = all_passages[places.start : places.stop]
    part = WrittenRows([], Counter(passages=len(passages)), Counter())
    # Cut, two may be one.
    cut = WriterLayout(writer.tokenizer).shown(passages)
    different = {one.passage: one for one in cut}
    place_of = {one.passage: place for place, one in zip(places, cut, strict=False)}
    shown = sorted((one for one in different.values() if one.sentences), key=lambda one: len(one.token_ids))
    part.counts["passages without a sentence to ask about"] = len(passages) - len(shown)
    for start in range(0, len(shown), settings.batch):
        batch = shown[start : start + settings.batch]
        asked = ask(writer, batch, settings.per_passage, [settings.seed, number, start], part.dropped)
        about = {one.passage: questions for one, questions in zip(batch, asked, strict=True) if questions}
        kept = answered(reader, about, settings.least_log_probability, part.counts, part.dropped)
        part.rows.extend(
            (place_of[passage], _row(passage, one)) for passage, questions in kept.items() for one in questions
        )
        part.counts["written"] += len(batch) * settings.per_passage
        progress.update(len(part.rows) - part.counts["kept"])
        part.counts["kept"] = len(part.rows)
    return part


def _row(passage: Passage, asked: QuestionAnswer) -> dict[str, Any]:
    title, text = passage
    return {
        "question": asked.question,
        "answers": [asked.answer],
        "passages": [{"title": title, "text": text}],
        "gold": [0],
    }
