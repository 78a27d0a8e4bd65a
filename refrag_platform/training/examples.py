"""Examples of fine-tuning: RAG questions, conversations and summaries as passages with answers.

Decided by the seed, the step and the row alone, as everything in training is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refrag_platform.corpus.passage_rows import TABLE, passage_rows
from refrag_platform.corpus.question import Passage, Question, arranged, keeps_order, mention
from refrag_platform.corpus.question_files import named_files, read_passages, read_summaries
from refrag_platform.corpus.splits import Split
from refrag_platform.corpus.swapping import MARK
from refrag_platform.errors import RefragError
from refrag_platform.model.prompts import NO_ANSWER, Turn, as_turns
from refrag_platform.recipes import FinetunedRecipe
from refrag_platform.training.usable import LeftOut, training_questions, usable

SENTENCES = 3
# Tries for each distractor wanted: in a small file every stranger may be the gold passage.
DRAWS = 20


@dataclass(frozen=True)
class Example:
    """One instruction: the passages it may use, the turns before it, and the answer to learn.

    passages: their numbers in `Examples.passages`. gold: of those, the ones that hold the answer, where that is known.
    """

    task: str
    passages: list[int]
    history: list[Turn]
    question: str
    answer: str
    gold: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Asked:
    """A question and its own passages, as numbers in `Examples.passages`: as listed; those that it needs; the others.

    positions: of its text, the answer counted, once `Examples.fit` knows them.
    """

    question: Question
    listed: tuple[int, ...]
    gold: tuple[int, ...]
    others: tuple[int, ...]
    positions: int = 0


class Examples:
    """All that fine-tuning can draw from, and the draw.

    passages: every passage and document once, (title, text).
    """

    def __init__(
        self, corpus: Path, settings: FinetunedRecipe, seed: int, root: Path = Path(), split: Split = "train"
    ) -> None:
        """
        Args:
            root: the recipe's question, summary and distractor files are relative to it.
            split: of the corpus' own questions.

        Raises:
            RefragError: a task of the recipe has nothing to draw from.
        """
        self.settings, self.seed = settings, seed
        self.passages: list[Passage] = []
        self._numbers: dict[Passage, int] = {}
        self.left_out = LeftOut("finetuned")
        asked_of = training_questions(corpus, settings.questions, root, self.left_out, split)
        questions = [one for one in asked_of if one.kind == "answer"]
        learned = usable(questions, settings.max_passages, self.left_out)
        asked = [self._asked(one) for one in learned if not one.closed]
        for file in named_files(root, settings.distractors):
            self._number(read_passages(file, split="train"))
        # Whatever lies here by now may be a distractor; summaries' documents, which come after, may not, nor the
        # passages of closed questions, which say other things of the same matters, each its own.
        self._pool = len(self.passages)
        summaries = [one for file in named_files(root, settings.summaries) for one in read_summaries(file)]
        if not summaries and settings.tasks.get("summarization", 0) > 0:
            summaries = list(_lead_summaries(corpus))
        # (number of the document, its summaries)
        numbers = self._number([one.passages[0] for one in summaries])
        summarized = [(number, list(one.answers)) for number, one in zip(numbers, summaries, strict=True)]
        if asked and not self._pool:
            raise RefragError(
                f"{questions[0].where}: none of these questions lists a passage, and there are no others to show; list "
                "passages, or name a file of them in finetuned.distractors"
            )
        asked += [self._asked(one) for one in learned if one.closed]
        self._positions, self._costs = math.inf, np.zeros(len(self.passages), dtype=np.int64)
        self._set_sources(asked, list(_conversations(asked)), summarized)
        self._tasks = [task for task, weight in settings.tasks.items() if weight > 0]
        weights = np.array([settings.tasks[task] for task in self._tasks], dtype=float)
        self._shares = weights.cumsum() / weights.sum()

    def _set_sources(
        self, asked: list[_Asked], conversations: list[list[_Asked]], summarized: list[tuple[int, list[str]]]
    ) -> None:
        self._sources: dict[str, Sequence[Any]] = {
            "rag": asked, "multi_turn": conversations, "summarization": summarized
        }  # fmt: skip
        for task, weight in self.settings.tasks.items():
            if weight > 0 and not self._sources[task]:
                why = f" (left out: {self.left_out})" if self.left_out.reasons else ""
                raise RefragError(
                    f"fine-tuning task {task!r} has weight {weight} and nothing to learn from{why}; give the recipe "
                    "finetuned.questions or finetuned.summaries, or set the weight to 0"
                )

    def fit(
        self, positions: int, costs: NDArray[np.int64], frame: int, lengths: Callable[[list[str]], list[int]]
    ) -> None:
        """Leave out what alone is longer than the decoder's positions; beside others, passages that don't fit.

        Args:
            positions: what the decoder reads. costs: [passages], positions that each takes at most. frame: those of
                the text around one turn. lengths: tokens of texts.

        Raises:
            RefragError: a task of the recipe has nothing left to draw from.
        """
        self._positions, self._costs = positions, costs
        asked: list[_Asked] = list(self._sources["rag"])
        texts = [
            "\n".join([one.question.question, *(text for _, text in one.question.history), _answer(one.question)])
            for one in asked
        ]
        turns = [2 + len(one.question.history) for one in asked]
        asked = [
            replace(one, positions=length + count * frame)
            for one, length, count in zip(asked, lengths(texts), turns, strict=True)
        ]
        summarized = self._sources["summarization"]
        longest = lengths([max(texts, key=len) for _, texts in summarized])
        reason = f"longer than the decoder's {positions:,} positions"
        kept = [one for one in asked if self._room([one]) >= 0]
        documents = [
            row for row, text in zip(summarized, longest, strict=True) if text + 2 * frame + costs[row[0]] <= positions
        ]
        self.left_out.add(reason, len(asked) - len(kept) + len(summarized) - len(documents))
        conversations = [turns for turns in _conversations(kept) if self._room(turns) >= 0]
        self._set_sources(kept, conversations, documents)
        self.left_out.say("questions and summaries", len(kept) + len(documents))

    def _room(self, turns: Sequence[_Asked]) -> float:
        """Positions for further passages beside a conversation, the last question's gold passages and its answer."""
        return self._positions - sum(turn.positions for turn in turns) - sum(self._costs[n] for n in turns[-1].gold)

    def draw(self, step: int, row: int) -> Example:
        """The example of one row of a step's batch."""
        random = np.random.default_rng([self.seed, 3, step, row])
        task = self._tasks[int(np.searchsorted(self._shares, random.random(), side="right"))]
        source = self._sources[task]
        number = int(random.integers(len(source)))
        if task == "summarization":
            document, summaries = source[number]
            summary = summaries[int(random.integers(len(summaries)))]
            return Example(task, [document], [], "", summary)
        turns: Sequence[_Asked] = [source[number]] if task == "rag" else source[number]
        # A question that brings its own turns follows those.
        history = as_turns(turns[-1].question.history)
        for turn in [] if history else turns[:-1]:
            history += [
                {"role": "user", "content": turn.question.question},
                {"role": "assistant", "content": _answer(turn.question)},
            ]
        passages, answered = self._draw_passages(turns[-1], self.count(step), self._room(turns), random)
        last = turns[-1].question
        gold = turns[-1].gold if answered and last.gold else ()
        return Example(task, passages, history, last.question, _answer(last) if answered else NO_ANSWER, gold)

    def count(self, step: int) -> int:
        """Passages in each question's prompt of a step, 1 to max_passages: prompts of one length waste no padding."""
        return int(np.random.default_rng([self.seed, 4, step]).integers(1, self.settings.max_passages + 1))

    def _draw_passages(
        self, asked: _Asked, wanted: int, room: float, random: np.random.Generator
    ) -> tuple[list[int], bool]:
        """The gold passages among others, as listed or shuffled; sometimes without the gold: then there is no answer.

        Where the gold isn't known, any passage may hold the answer: no example without one can be made. A closed
        question is about all of its passages and no others.
        """
        if asked.question.closed:
            return arranged(asked.gold, asked.listed, False, random), True
        ranked = keeps_order(self.settings.ranked_share, asked.others, random)
        if asked.question.gold and random.random() < self.settings.no_answer_share:
            freed = room + sum(self._costs[number] for number in asked.gold)
            silent = self._others(asked, wanted, freed, random, ranked, silent=True)
            if silent:
                return arranged(silent, asked.listed, ranked, random), False
        others = self._others(asked, wanted - len(asked.gold), room, random, ranked, silent=False)
        return arranged([*asked.gold, *others], asked.listed, ranked, random), True

    def _others(
        self, asked: _Asked, wanted: int, room: float, random: np.random.Generator, ranked: bool, silent: bool
    ) -> list[int]:
        """Passages that are not gold: the question's own, the first or any of them, then others' and distractors.

        Args: room: positions that they may take. silent: none of them may say one of the answers, by chance or because
            the gold passages aren't all named.
        """
        says = mention(asked.question.answers) if silent else None
        distractors: list[int] = []

        def take(number: int) -> None:
            nonlocal room
            fits = number not in asked.gold and number not in distractors and self._costs[number] <= room
            if fits and (says is None or not says.search(self.passages[number][1])):
                distractors.append(number)
                room -= self._costs[number]

        for place in range(len(asked.others)) if ranked else random.permutation(len(asked.others)):
            if len(distractors) < wanted:
                take(asked.others[place])
        for _ in range(DRAWS * wanted):
            if len(distractors) >= wanted:
                break
            take(int(random.integers(self._pool)))
        return distractors

    def _asked(self, question: Question) -> _Asked:
        numbers = self._number(question.passages)
        gold = tuple(numbers[place] for place in _gold(question))
        listed = tuple(dict.fromkeys(numbers))
        return _Asked(question, listed, gold, tuple(number for number in listed if number not in gold))

    def _number(self, passages: Sequence[Passage]) -> list[int]:
        """Each passage's number; those not met before are taken in."""
        for passage in passages:
            if passage not in self._numbers:
                self._numbers[passage] = len(self.passages)
                self.passages.append(passage)
        return [self._numbers[passage] for passage in passages]


def _gold(question: Question) -> tuple[int, ...]:
    """Places of the gold passages; where they aren't known, the first is taken for it, as a retriever ranked them."""
    return question.needed or ((0,) if question.passages else ())


def _answer(question: Question) -> str:
    return question.answers[0] if question.answers else NO_ANSWER


def _conversations(asked: list[_Asked]) -> Iterator[list[_Asked]]:
    """Questions on the same document (or, where it isn't known, the same gold passage) follow each other as turns.

    Not those whose answer was swapped: what was said before would contradict the passages that are shown.
    """
    groups: dict[object, list[_Asked]] = defaultdict(list)
    for one in asked:
        if MARK in one.question.id:
            continue
        known = one.question.document != one.question.id
        groups[one.question.document if known else one.gold].append(one)
    for same in groups.values():
        for start in range(0, len(same) - 1, 2):
            yield same[start : start + 3]


def _lead_summaries(corpus: Path) -> Iterator[Question]:
    """Without summary files: a passage's first sentence, to be found again behind the rest of the passage."""
    for title, text, split in passage_rows(corpus):
        sentences = text.split(". ")
        if split == "train" and len(sentences) >= SENTENCES:
            lead = sentences[0].strip() + "."
            document = ". ".join([*sentences[1:], sentences[0]])
            yield Question("", "", (lead,), ((title, document),), kind="summary", where=str(corpus / TABLE))
