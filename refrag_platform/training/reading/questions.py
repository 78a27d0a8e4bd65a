"""Contexts that come with questions: the passages that files of questions list, and all that is asked about them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from refrag_platform.corpus.question import Passage, Question
from refrag_platform.model.prompts import contents_ids, passage_text
from refrag_platform.training.reading.blanks import QuestionAnswer
from refrag_platform.training.reading.contexts import ReadingContext, TokenizedPassage
from refrag_platform.training.reading.renaming import Renaming
from refrag_platform.training.usable import LeftOut

# Places in the order of the passages that questions are about, to either side.
NEAR = 12


def fitting(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerFast, chunks: int, chunk_size: int, left_out: LeftOut
) -> list[Question]:
    """Those whose passages, where they need several, fit in a context together; the others are counted."""
    several = [one for one in questions if len(one.needed) > 1]
    passages = list({one.passages[number]: None for one in several for number in one.needed})
    ids = contents_ids(tokenizer, [passage_text(*passage) for passage in passages])
    sizes = {passage: -(-len(tokens) // chunk_size) for passage, tokens in zip(passages, ids, strict=True)}
    over = {id(one) for one in several if sum(sizes[one.passages[number]] for number in one.needed) > chunks}
    left_out.add(f"whose passages take more than {chunks * chunk_size:,} tokens", len(over))
    return [one for one in questions if id(one) not in over]


class QuestionContexts:
    """Draws a question's passages, some of the others that it lists, and every question that these answer.

    Of a question that lists no others they are those that questions near it in its file are about: files are written
    document by document.

    Of a closed question the context is its passages, all of them as they are: of those that list the same, one context.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        tokenizer: PreTrainedTokenizerFast,
        chunks: int,
        chunk_size: int,
        renaming: Renaming,
        renamed_share: float,
    ) -> None:
        """
        Args: questions: with answers and gold passages, and `fitting`. chunks: of a context, at most. renamed_share: of
            the contexts.
        """
        self._questions, self._tokenizer, self._chunks, self._chunk_size = questions, tokenizer, chunks, chunk_size
        self._renaming, self._renamed_share = renaming, renamed_share
        self._about: dict[Passage, list[int]] = defaultdict(list)
        self._closed: dict[frozenset[Passage], list[int]] = defaultdict(list)
        for number, question in enumerate(questions):
            if question.closed:
                self._closed[frozenset(question.passages)].append(number)
            else:
                self._about[question.passages[question.gold[0]]].append(number)
        self._in_order = list(self._about)
        self._place = {passage: place for place, passage in enumerate(self._in_order)}

    def draw(self, chance: np.random.Generator, rate: int = 1) -> ReadingContext:
        """Passages in random order, of which none is cut but the first gold one, where it alone doesn't fit.

        Args: rate: how many chunks are read as one.
        """
        question = self._questions[int(chance.integers(len(self._questions)))]
        gold = [question.passages[number] for number in question.needed]
        others = [passage for passage in question.passages if passage not in gold]
        if not others and not question.closed:
            others = [passage for passage in self._near(question) if passage not in gold]
        wanted = int(chance.integers(len(others) + 1))
        listed = [*gold, *(others[number] for number in chance.permutation(len(others))[:wanted])]
        if question.closed:
            numbers = self._closed[frozenset(question.passages)]
        else:
            numbers = [number for passage in listed for number in self._about[passage]]
        about = [self._questions[number] for number in numbers]
        texts = [passage_text(*passage) for passage in listed]
        rename: Callable[[str], str] | None = None
        # Other numbers would make other answers of what is compared.
        if not question.closed and chance.random() < self._renamed_share:
            rename = self._renaming.draw([*texts, *(one.question for one in about)], chance)
            texts = [rename(text) for text in texts]
        shown: dict[Passage, TokenizedPassage] = {}
        whole: set[Passage] = set()
        room, k = self._chunks // rate, self._chunk_size * rate
        for passage, text, ids in zip(listed, texts, contents_ids(self._tokenizer, texts), strict=True):
            kept = ids if shown else ids[: room * k]
            if (size := -(-len(kept) // k)) <= room:
                # What is cut off can't be asked for.
                cut = len(kept) < len(ids)
                shown[passage] = TokenizedPassage(str(self._tokenizer.decode(kept)) if cut else text, kept)
                whole |= set() if cut else {passage}
                room -= size
        passages = list(shown.values())
        asked = [self._asked(one, rename) for one in about if whole.issuperset(one.passages[n] for n in one.needed)]
        return ReadingContext(
            [passages[number] for number in chance.permutation(len(passages))],
            [asked[number] for number in chance.permutation(len(asked))],
        )

    def _near(self, question: Question) -> list[Passage]:
        place = self._place[question.passages[question.gold[0]]]
        return [*self._in_order[max(0, place - NEAR) : place], *self._in_order[place + 1 : place + 1 + NEAR]]

    @staticmethod
    def _asked(question: Question, rename: Callable[[str], str] | None) -> QuestionAnswer:
        asked, answer = question.question, question.answers[0]
        return QuestionAnswer(rename(asked), rename(answer)) if rename else QuestionAnswer(asked, answer)
