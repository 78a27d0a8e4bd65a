"""Examples of fine-tuning: RAG questions, conversations and summaries as prompts with answers.

Decided by the seed, the step and the row alone, as everything in training is.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refrag_platform.corpus.question_files import Question, read_questions
from refrag_platform.errors import RefragError
from refrag_platform.model.prompts import NO_ANSWER, Turn
from refrag_platform.recipes import FinetunedRecipe

SENTENCES = 3
# Tries for each distractor wanted: in a small file every stranger may be the gold passage.
DRAWS = 20


@dataclass(frozen=True)
class Example:
    """One instruction: the passages it may use, the turns before it, and the answer to learn."""

    task: str
    passages: list[dict[str, str]]
    history: list[Turn]
    question: str
    answer: str


def read_rows(path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of a .jsonl file.

    Raises:
        RefragError: the file is missing, or a row is not JSON or lacks a field; file and row are named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise RefragError(f"no file {path}; correct the recipe's finetuned section") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RefragError(f"{path}, row {number}: not JSON ({error})") from None
        missing = [field for field in needed if field not in row]
        if missing:
            raise RefragError(f"{path}, row {number}: field {missing[0]!r} is missing; it has {', '.join(row)}")
        rows.append(row)
    return rows


class Examples:
    """All that fine-tuning can draw from, and the draw."""

    def __init__(self, corpus: Path, settings: FinetunedRecipe, seed: int, root: Path = Path()) -> None:
        """
        Args: root: the recipe's question and summary files are relative to it.

        Raises:
            RefragError: a task of the recipe has nothing to draw from.
        """
        self.settings, self.seed = settings, seed
        own = corpus / "questions" / "train.jsonl"
        # A corpus of plain documents has no questions of its own.
        files = [own] if own.stat().st_size else []
        files += [root / os.path.expandvars(name) for name in settings.questions]
        self.questions = [question for file in files for question in read_questions(file)]
        self.conversations = list(_conversations(self.questions))
        self.summaries = [
            row
            for name in settings.summaries
            for row in read_rows(root / os.path.expandvars(name), ("document", "summaries"))
        ]
        if not self.summaries and settings.tasks.get("summarization", 0) > 0:
            self.summaries = list(_lead_summaries(corpus))
        self._sources: dict[str, list[Any]] = {
            "rag": self.questions,
            "multi_turn": self.conversations,
            "summarization": self.summaries,
        }
        for task, weight in settings.tasks.items():
            if weight > 0 and not self._sources[task]:
                raise RefragError(
                    f"fine-tuning task {task!r} has weight {weight} and nothing to learn from; give the recipe "
                    "finetuned.questions or finetuned.summaries, or set the weight to 0"
                )

    def draw(self, step: int, row: int) -> Example:
        """The example of one row of a step's batch."""
        random = np.random.default_rng([self.seed, 3, step, row])
        tasks = [task for task, weight in self.settings.tasks.items() if weight > 0]
        weights = np.array([self.settings.tasks[task] for task in tasks], dtype=float)
        task = tasks[int(random.choice(len(tasks), p=weights / weights.sum()))]
        source = self._sources[task]
        item = source[int(random.integers(len(source)))]
        if task == "summarization":
            summary = item["summaries"][int(random.integers(len(item["summaries"])))]
            return Example(task, [{"title": item.get("title", ""), "text": item["document"]}], [], "", summary)
        turns = [item] if task == "rag" else item
        last = turns[-1]
        passages, answered = self._passages(last, random)
        history: list[Turn] = []
        for turn in turns[:-1]:
            history += [
                {"role": "user", "content": turn.question},
                {"role": "assistant", "content": _answer(turn)},
            ]
        return Example(task, passages, history, last.question, _answer(last) if answered else NO_ANSWER)

    def _passages(self, question: Question, random: np.random.Generator) -> tuple[list[dict[str, str]], bool]:
        """The gold passages among others in random order; sometimes without the gold, and then there is no answer."""
        gold = [question.passages[number] for number in _gold(question)]
        wanted = int(random.integers(1, self.settings.max_passages + 1))
        known = {text for _, text in gold}
        others = [passage for passage in question.passages if passage[1] not in known]
        # Few listed distractors: fill up with passages of other questions, never with this one's gold.
        for _ in range(DRAWS * wanted):
            if len(others) >= wanted:
                break
            strangers = self.questions[int(random.integers(len(self.questions)))].passages
            stranger = strangers[int(random.integers(len(strangers)))] if strangers else None
            if stranger is not None and stranger[1] not in known:
                others.append(stranger)
        order = random.permutation(len(others))
        others = [others[number] for number in order]
        # Where the gold isn't known, any passage may hold the answer: no example without one can be made.
        answered = not (question.gold and others and random.random() < self.settings.no_answer_share)
        passages = [*gold, *others[: max(0, wanted - len(gold))]] if answered else others[:wanted]
        order = random.permutation(len(passages))
        return [{"title": passages[number][0], "text": passages[number][1]} for number in order], answered


def _gold(question: Question) -> tuple[int, ...]:
    """Numbers of the gold passages; where they aren't known, the first is taken for it, as a retriever ranked them."""
    return question.gold or ((0,) if question.passages else ())


def _answer(question: Question) -> str:
    return question.answers[0] if question.answers else NO_ANSWER


def _conversations(questions: list[Question]) -> Iterator[list[Question]]:
    """Questions on the same document (or, where it isn't known, the same gold passage) follow each other as turns."""
    groups: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        gold = [question.passages[number][1] for number in _gold(question)[:1]]
        groups[question.document if question.document != question.id else "".join(gold)].append(question)
    for same in groups.values():
        for start in range(0, len(same) - 1, 2):
            yield same[start : start + 3]


def _lead_summaries(corpus: Path) -> Iterator[dict[str, Any]]:
    """Without summary files: a passage's first sentence, to be found again behind the rest of the passage."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(corpus / "passages.parquet", columns=["title", "text", "split"])
    for row in table.to_pylist():
        sentences = row["text"].split(". ")
        if row["split"] == "train" and len(sentences) >= SENTENCES:
            lead = sentences[0].strip() + "."
            document = ". ".join([*sentences[1:], sentences[0]])
            yield {"title": row["title"], "document": document, "summaries": [lead]}
