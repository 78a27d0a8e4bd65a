"""`refrag questions write`: a writer is trained, asks about passages, and a reader's answers make a question file.

work/NAME/questions/writer-KEY/   the writer, KEY being a hash of what it was trained by
work/NAME/questions/parts-KEY/    questions part by part, of the writer, reader, passages and settings behind KEY
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refrag_platform import __version__
from refrag_platform.artifacts.digest import file_digest
from refrag_platform.artifacts.manifest import FILE_NAME, Manifest, hardware, libraries, now
from refrag_platform.corpus.passage_rows import passage_rows
from refrag_platform.corpus.question import Passage
from refrag_platform.corpus.question_files import read_passages
from refrag_platform.errors import ArtifactError, RefragError
from refrag_platform.files import lock_file
from refrag_platform.progress import Progress, say
from refrag_platform.project import Project
from refrag_platform.training.usable import LeftOut, held_out_passages, training_questions
from refrag_platform.training.writing.models import TextModel, is_text_model, load_reader, load_text_model
from refrag_platform.training.writing.parts import WritingSettings, parts
from refrag_platform.training.writing.writer import train_writer, writer_settings


@dataclass(frozen=True)
class WritingInputs:
    """What a user names. questions: files of labelled ones. passages: files of those that are written about.

    corpus_passages: the corpus' training passages are, too. writer, reader: folders, where they are named.
    """

    questions: Sequence[Path]
    passages: Sequence[Path]
    corpus_passages: bool
    writer: Path | None
    reader: Path | None


@contextmanager
def begin(
    project: Project, model: str, inputs: WritingInputs, settings: WritingSettings, steps: int, device: torch.device
) -> Iterator[Writing]:
    """A writer, trained now if it isn't yet, and a reader at work; for one process at a time.

    Raises:
        TrainingInterrupted: a signal stopped the training; the same call goes on.
        RefragError: corpus, reader, questions or passages are missing or wrong, or another process writes questions for
            this model.
    """
    work = project.work_dir("questions", model)
    try:
        lock = lock_file(work / "lock", wait=False)
    except BlockingIOError:
        raise RefragError(f"another process writes questions for {model} in {work}; wait for it") from None
    with lock:
        yield Writing(project, model, inputs, settings, steps, device, work)


class Writing:
    """The questions on the passages of one call, and what is to be said of them."""

    def __init__(
        self,
        project: Project,
        model: str,
        inputs: WritingInputs,
        settings: WritingSettings,
        steps: int,
        device: torch.device,
        work: Path,
    ) -> None:
        """As `begin`, in the folder `work`, without a lock."""
        self._started, self._settings, self._work = now(), settings, work
        self._counts, self._dropped = Counter[str](), Counter[str]()
        corpus = project.content("corpus", model)
        if not corpus.is_dir():
            raise ArtifactError(f"no corpus at {corpus}; make it: `refrag run corpus --model {model}`")
        self._facts: dict[str, Any] = {
            "model": model,
            "decoder": project.recipe(model).decoder.source,
            "corpus": Manifest.read(corpus.parent).hash if (corpus.parent / FILE_NAME).is_file() else None,
        }
        # What is missing or refused is said before minutes are spent on training.
        passages = _passages(corpus, inputs)
        self._order = np.random.default_rng([settings.seed]).permutation(len(passages))
        self._passages = [passages[place] for place in self._order]
        self._reader = load_reader(project, model, inputs.reader)
        say(f"answers are read by {self._reader.source}")
        self._writer = self._trained(project, model, corpus, inputs, steps).on(device)
        self._reader.on(device)
        said = [self._writer.digest, self._reader.digest, device.type, asdict(settings), self._passages]
        self._parts = work / f"parts-{_key(said)}"

    def _trained(self, project: Project, model: str, corpus: Path, inputs: WritingInputs, steps: int) -> TextModel:
        """The writer, from its folder if it is there."""
        if inputs.writer and is_text_model(inputs.writer):
            say(f"the writer {inputs.writer} is taken as it is: nothing is learned from labelled questions")
            return load_text_model(inputs.writer)
        recipe, seed = project.recipe(model), self._settings.seed
        settings = writer_settings(recipe, steps)
        files = [str(path.resolve()) for path in inputs.questions]
        left_out = LeftOut("questions write")
        questions = training_questions(corpus, files, project.root, left_out)
        left_out.say("questions", len(questions))
        self._facts["training"] = {
            "questions": len(questions),
            "files": {str(path): file_digest(path) for path in inputs.questions},
            "settings": settings.model_dump(mode="json"),
        }
        asked = [(one.question, one.answers, one.passages, one.gold) for one in questions]
        decides = [recipe.decoder.model_dump(), recipe.seed, settings.model_dump(), seed, asked]
        home = self._work / f"writer-{_key(decides)}"
        out = inputs.writer or home / "content"
        if not is_text_model(out):
            base = project.recipe_path(model).parent
            train_writer(recipe, base, questions, settings, seed, home / "training", out)
        say(f"the writer is {out}; `--writer {out}` uses it again")
        return load_text_model(out)

    def rows(self, count: int) -> list[dict[str, Any]]:
        """Rows of a question file, `count` of them or as many as the passages give.

        Whatever was drawn, they stand in the passages' own order: those near each other are about passages of one
        document, among which `cpt.reading` asks them.

        Raises:
            RefragError: the passages give none.
        """
        rows: list[tuple[int, dict[str, Any]]] = []
        with Progress("questions", count, "kept") as progress:
            for part in parts(self._writer, self._reader, self._passages, self._settings, self._parts, progress):
                self._counts += part.counts
                self._dropped += part.dropped
                rows += part.rows[: count - len(rows)]
                if len(rows) == count:
                    break
        if not rows:
            raise RefragError(
                f"none of {self._counts['written']:,} questions was kept ({_listed(self._dropped)}); train the writer "
                "longer (--steps), name a better --reader, or name longer passages"
            )
        rows.sort(key=lambda placed: self._order[placed[0]])
        return [{"id": f"written-{number}", **row} for number, (_, row) in enumerate(rows, 1)]

    def manifest(self, count: int) -> dict[str, Any]:
        """What made the file of `count` questions: inputs by their digests, settings, and what became of the others."""
        models = {"writer": self._writer, "reader": self._reader}
        return {
            **self._facts,
            **{name: {"folder": str(one.source), "hash": one.digest} for name, one in models.items()},
            "settings": asdict(self._settings),
            "questions": count,
            "passages": len(self._passages),
            "counts": dict(self._counts),
            "dropped": dict(self._dropped.most_common()),
            "refrag_platform": __version__,
            "libraries": libraries(),
            "hardware": hardware(),
            "started": self._started,
            "finished": now(),
        }


def _passages(corpus: Path, inputs: WritingInputs) -> list[Passage]:
    """The passages to write about, each once; those of the corpus' validation and test documents are left out.

    Raises:
        RefragError: there are none.
    """
    passages: dict[Passage, None] = {}
    left_out = LeftOut("questions write")
    for path in inputs.passages:
        read = read_passages(path, "train")
        held_out = held_out_passages(set(read), corpus)
        left_out.add("held out by the corpus", len(held_out))
        passages |= {passage: None for passage in read if passage not in held_out}
    left_out.say("passages", len(passages))
    if inputs.corpus_passages:
        passages |= {(title, text): None for title, text, split in passage_rows(corpus) if split == "train"}
    if not passages:
        why = f" ({left_out})" if left_out.reasons else ""
        raise RefragError(f"{corpus} has no training passages to write about{why}; name some by --passages")
    return list(passages)


def _key(values: Any) -> str:
    said = json.dumps(values, sort_keys=True).encode()
    return hashlib.md5(said, usedforsecurity=False).hexdigest()[:12]


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
