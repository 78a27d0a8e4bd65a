"""The sentences nearest to a question, within a budget of tokens: what choosing text by a retriever makes of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from refrag_platform.corpus.passages import SENTENCE_END
from refrag_platform.corpus.question import Passage
from refrag_platform.model.prompts import passage_text
from refrag_platform.store.relevance import PassageRelevance


@dataclass(frozen=True)
class Sentence:
    """A sentence of a passage, the number of the passage, and its tokens as they stand in the passage's own."""

    passage: int
    text: str
    token_ids: list[int]


def split_passage(
    tokenizer: PreTrainedTokenizerFast, number: int, title: str, text: str
) -> tuple[list[int], list[Sentence]]:
    """The title's tokens and the sentences of a passage; together they are the passage's tokens, all of them."""
    whole = passage_text(title, text)
    head = len(whole) - len(text) - 1
    starts = [head, *(head + match.end() for match in SENTENCE_END.finditer(text) if match.end() < len(text))]
    # As `content_ids` makes them.
    tokenized = tokenizer(whole, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    parts: list[list[int]] = [[] for _ in range(len(starts) + 1)]
    for token, (_, end) in zip(tokenized["input_ids"], tokenized["offset_mapping"], strict=True):
        # By its last character: the space before a word is the word's token, and may belong to the sentence before.
        parts[bisect_right(starts, max(end - 1, 0))].append(token)
    ends = [*starts[1:], len(whole)]
    return parts[0], [
        Sentence(number, whole[start:end].strip(), tokens)
        for start, end, tokens in zip(starts, ends, parts[1:], strict=True)
        if tokens
    ]


def nearest_sentences(
    split: Sequence[tuple[list[int], list[Sentence]]],
    relevance: PassageRelevance,
    question: str,
    passages: Sequence[Passage],
    tokens: int,
) -> list[int]:
    """Exactly `tokens` tokens, or all that there are: the nearest sentences, put back in the order of the text.

    A sentence is embedded under its passage's title, as passages are, and the title is read once, before the first
    sentence of its passage. The last sentence that is taken is cut where the budget ends. Without a question, as of
    a summary, nothing is near: sentences are taken in the order of the text.

    Args:
        split: `split_passage` of each passage.
    """
    every = [sentence for _, sentences in split for sentence in sentences]
    nearness = [0.0] * len(every)
    if question:
        nearness = relevance.of(question, [(passages[one.passage][0], one.text) for one in every])
    titles: dict[int, list[int]] = {}
    taken: dict[int, list[int]] = {}
    for place in sorted(range(len(every)), key=lambda place: -nearness[place]):
        number = every[place].passage
        if number not in titles:
            titles[number] = split[number][0][:tokens]
            tokens -= len(titles[number])
        taken[place] = every[place].token_ids[:tokens]
        tokens -= len(taken[place])
        if not tokens:
            break
    chosen: list[int] = []
    for place in sorted(taken):
        chosen += [*titles.pop(every[place].passage, []), *taken[place]]
    return chosen
