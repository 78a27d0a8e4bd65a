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


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Rows id, question, answers, passages [{title, text}] and, if known, gold [numbers] of a .jsonl file.

    A question without answers is answered by NO_ANSWER; `gold` is None where it isn't known.

    Raises:
        RefragError: as `read_rows`, or a field is of another form; file and row are named.
    """
    rows = []
    for number, row in enumerate(read_rows(path, ("id", "question", "answers", "passages")), 1):
        where = f"{path}, row {number}"
        answers = [row["answers"]] if isinstance(row["answers"], str) else row["answers"]
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise RefragError(f"{where}: `answers` is {answers!r}; it must be a list of texts")
        passages = row["passages"]
        if not isinstance(passages, list) or not all(isinstance(p, dict) and "text" in p for p in passages):
            raise RefragError(f"{where}: `passages` must be a list of objects with `text` and, if known, `title`")
        gold = row.get("gold")
        if gold is not None and not all(isinstance(g, int) and 0 <= g < len(passages) for g in gold):
            raise RefragError(f"{where}: `gold` is {gold!r}; it must list numbers of the {len(passages)} passages")
        titled = [{"title": str(p.get("title") or ""), "text": p["text"]} for p in passages]
        rows.append({**row, "answers": answers or [NO_ANSWER], "passages": titled, "gold": gold})
    return rows


class Examples:
    """All that fine-tuning can draw from, and the draw."""

    def __init__(self, corpus: Path, settings: FinetunedRecipe, seed: int, root: Path = Path()) -> None:
        """
        Args: root: the recipe's question and summary files are relative to it.

        Raises:
            RefragError: a task of the recipe has nothing to draw from.
        """
        files = [
            corpus / "questions" / "train.jsonl",
            *(root / os.path.expandvars(name) for name in settings.questions),
        ]
        self.settings, self.seed = settings, seed
        self.questions = [row for file in files for row in read_questions(file)]
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
                {"role": "user", "content": turn["question"]},
                {"role": "assistant", "content": turn["answers"][0]},
            ]
        return Example(task, passages, history, last["question"], last["answers"][0] if answered else NO_ANSWER)

    def _passages(self, row: dict[str, Any], random: np.random.Generator) -> tuple[list[dict[str, str]], bool]:
        """The gold passages among others in random order; sometimes without the gold, and then there is no answer."""
        # Without gold numbers the first passage is taken for it, as a retriever ranked them.
        gold = set(row["gold"] if row["gold"] is not None else range(min(1, len(row["passages"]))))
        wanted = int(random.integers(1, self.settings.max_passages + 1))
        known = {row["passages"][number]["text"] for number in gold}
        others = [p for number, p in enumerate(row["passages"]) if number not in gold and p["text"] not in known]
        # Few listed distractors: fill up with passages of other questions, never with this one's gold.
        for _ in range(DRAWS * wanted):
            if len(others) >= wanted:
                break
            stranger = self.questions[int(random.integers(len(self.questions)))]["passages"]
            candidate = stranger[int(random.integers(len(stranger)))] if stranger else None
            if candidate is not None and candidate["text"] not in known:
                others.append(candidate)
        random.shuffle(others)
        # Where the gold isn't known, any passage may hold the answer: no example without one can be made.
        if row["gold"] is not None and others and random.random() < self.settings.no_answer_share:
            return others[:wanted], False
        kept = [row["passages"][number] for number in sorted(gold)]
        passages = [*kept, *others[: max(0, wanted - len(kept))]]
        order = random.permutation(len(passages))
        return [passages[number] for number in order], True


def _conversations(questions: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Questions on the same gold passage (or the same document) follow each other as turns."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in questions:
        gold = row["gold"] or ([0] if row["passages"] else [])
        key = row.get("document_id") or (row["passages"][gold[0]]["text"] if gold else "")
        groups[key].append(row)
    for rows in groups.values():
        for start in range(0, len(rows) - 1, 2):
            yield rows[start : start + 3]


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
