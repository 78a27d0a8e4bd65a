"""A reader of full text answers what was written; its answers are what is learned from, where it is sure of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from refrag_platform.corpus.question import Passage
from refrag_platform.model.prompts import contents_ids, end_of_turn, passage_text, question_frame
from refrag_platform.training.reading.blanks import QuestionAnswer
from refrag_platform.training.writing.continuations import continuations
from refrag_platform.training.writing.filters import fault, same_text, unsure
from refrag_platform.training.writing.models import TextModel

ANSWER_TOKENS = 20
AGREED, UNSURE = "answered as written", "the reader is unsure"


def answered(
    reader: TextModel,
    asked: Mapping[Passage, Sequence[QuestionAnswer]],
    least_log_probability: float,
    counts: Counter[str],
    dropped: Counter[str],
) -> dict[Passage, list[QuestionAnswer]]:
    """The questions on each passage with the reader's answers; the others are counted by reason.

    Args: counts: is told how many were AGREED on with the writer.
    """
    if not asked:
        return {}
    tokenizer, end_id = reader.tokenizer, end_of_turn(reader.tokenizer)
    opening, before, after = question_frame(tokenizer)
    texts = contents_ids(tokenizer, [passage_text(*passage) for passage in asked])
    prompts = [
        [[*before, *ids, *after] for ids in contents_ids(tokenizer, [one.question for one in questions])]
        for questions in asked.values()
    ]
    answers = continuations(reader.decoder, [[*opening, *ids] for ids in texts], prompts, ANSWER_TOKENS, end_id)
    kept: dict[Passage, list[QuestionAnswer]] = {}
    for (passage, questions), replies in zip(asked.items(), answers, strict=True):
        kept[passage] = []
        for one, answer in zip(questions, replies, strict=True):
            text = str(tokenizer.decode(answer.token_ids, clean_up_tokenization_spaces=False)).strip()
            read = one._replace(answer=text)
            counts[AGREED] += same_text(text, one.answer)
            if not answer.ended or not text:
                dropped["not answered"] += 1
            elif reason := fault(read, passage):
                dropped[f"reader's {reason}"] += 1
            elif unsure(text, answer.log_probability, one.answer, least_log_probability):
                dropped[UNSURE] += 1
            else:
                kept[passage].append(read)
    return kept
