"""Whether a decoder has the positions for what it shall learn to answer: looked at before training, row by row."""

from __future__ import annotations

from collections.abc import Iterable

from refrag_platform.corpus.question_files import Question
from refrag_platform.errors import RefragError
from refrag_platform.model.refrag import RefragModel


def require_room(questions: Iterable[Question], model: RefragModel, passages: int, key: str) -> None:
    """Refuse what can't be read, counted without a tokenizer: no word is less than a token, no k of them less than a
    position as a chunk.

    Args:
        passages: shown at most with one question. key: the recipe's that says so.

    Raises:
        RefragError: a question is too long with its answer and its longest passages; it names file, row and counts.
    """
    positions = model.decoder.config.max_position_embeddings
    for question in questions:
        asked = _words(question.question) + sum(_words(text) for _, text in question.history)
        answer = max(map(_words, question.answers), default=0)
        shown = sorted((_words(text) for _, text in question.passages), reverse=True)
        read = sum(shown[: max(passages, len(question.gold))])
        least = asked + answer + -(-read // model.chunk_size)
        if least > positions:
            raise RefragError(
                f"{question.where}: {asked + answer:,} words of question and answer and {read:,} of passages "
                f"({model.chunk_size} tokens to a position) take {least:,} positions at least, and the decoder has "
                f"{positions:,}; shorten them, leave the row out, or lower {key} ({passages})"
            )


def _words(text: str) -> int:
    return len(text.split())
