"""What a writer of questions reads and writes: a passage and one of its sentences; then an answer and its question.

TITLE
TEXT

Sentence: SENTENCE
Answer: ANSWER
Question: QUESTION
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from refrag_platform.corpus.passages import sentences
from refrag_platform.corpus.question import Passage
from refrag_platform.model.prompts import content_ids, contents_ids, end_of_turn, passage_text
from refrag_platform.training.reading.blanks import QuestionAnswer

# Tokens of a passage, of its sentence, and of an answer with its question, at most.
PASSAGE_TOKENS, SENTENCE_TOKENS, WRITTEN_TOKENS = 256, 64, 48
SHORTEST_SENTENCE = 30
QUESTION_MARK = "\nQuestion:"


class Shown(NamedTuple):
    """A passage as a writer sees it: of a long one the beginning."""

    passage: Passage
    token_ids: list[int]

    @property
    def sentences(self) -> list[str]:
        """Those that say enough for another question."""
        return [one for one in sentences(self.passage[1]) if len(one) >= SHORTEST_SENTENCE]


class WriterLayout:
    """Text to token ids and back, in one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer, self.end_id = tokenizer, end_of_turn(tokenizer)
        self._sentence, self._answer, self._question = (
            content_ids(tokenizer, mark) for mark in ("\nSentence:", "\nAnswer:", QUESTION_MARK)
        )

    def shown(self, passages: Sequence[Passage]) -> list[Shown]:
        """Each passage, cut to PASSAGE_TOKENS."""
        whole = contents_ids(self._tokenizer, [passage_text(*passage) for passage in passages])
        return [self._shown(passage, ids) for passage, ids in zip(passages, whole, strict=True)]

    def _shown(self, passage: Passage, ids: list[int]) -> Shown:
        title, text = passage
        if len(ids) > PASSAGE_TOKENS:
            ids = ids[:PASSAGE_TOKENS]
            # A token may end within a character.
            text = self._text(ids).rstrip("\ufffd").removeprefix(passage_text(title, "")[:-1] if title else "")
        return Shown((title, text), [self._tokenizer.bos_token_id, *ids])

    def prompts(self, about: Sequence[str]) -> list[list[int]]:
        """What follows a passage: a sentence of it, up to where the answer begins."""
        ids = contents_ids(self._tokenizer, [f" {sentence}" for sentence in about])
        return [[*self._sentence, *tokens[:SENTENCE_TOKENS], *self._answer] for tokens in ids]

    def written(self, asked: QuestionAnswer) -> list[int]:
        """What follows the prompt, its end included."""
        answer, question = contents_ids(self._tokenizer, [f" {asked.answer}", f" {asked.question}"])
        return [*answer, *self._question, *question, self.end_id]

    def read(self, token_ids: list[int]) -> QuestionAnswer | None:
        """What was written, without its end; None where a part is missing."""
        answer, _, question = self._text(token_ids).partition(QUESTION_MARK)
        return QuestionAnswer(question.strip(), answer.strip()) if answer.strip() and question.strip() else None

    def _text(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))
