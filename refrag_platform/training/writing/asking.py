"""A trained writer asks about passages: several questions each, all of a passage's at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from refrag_platform.training.reading.blanks import QuestionAnswer
from refrag_platform.training.writing.continuations import continuations
from refrag_platform.training.writing.filters import fault, repeated
from refrag_platform.training.writing.layout import WRITTEN_TOKENS, Shown, WriterLayout
from refrag_platform.training.writing.models import TextModel

# Below 1 fewer questions are odd ones; at 0 a sentence that is asked about twice is asked the same.
TEMPERATURE = 0.85
UNFINISHED, REPEATED = "no whole question", "asked before of its passage"


def ask(
    writer: TextModel, shown: Sequence[Shown], per_passage: int, seed: Sequence[int], dropped: Counter[str]
) -> list[list[QuestionAnswer]]:
    """Questions with their answers on each passage; what the filters drop is counted by reason.

    Args: shown: each with a sentence to ask about; where there are fewer sentences than questions, they come again.
    """
    chance = np.random.default_rng(seed)
    generator = torch.Generator(writer.decoder.device).manual_seed(int(chance.integers(2**62)))
    layout = WriterLayout(writer.tokenizer)
    prompts = [layout.prompts(_drawn(one.sentences, per_passage, chance)) for one in shown]
    written = continuations(
        writer.decoder, [one.token_ids for one in shown], prompts, WRITTEN_TOKENS, layout.end_id, TEMPERATURE, generator
    )
    kept: list[list[QuestionAnswer]] = []
    for one, texts in zip(shown, written, strict=True):
        asked: list[QuestionAnswer] = []
        for continuation in texts:
            read = layout.read(continuation.token_ids) if continuation.ended else None
            if read is None:
                dropped[UNFINISHED] += 1
            elif reason := fault(read, one.passage):
                dropped[reason] += 1
            elif repeated(read, [other.question for other in asked]):
                dropped[REPEATED] += 1
            else:
                asked.append(read)
        kept.append(asked)
    return kept


def _drawn(sentences: Sequence[str], count: int, chance: np.random.Generator) -> list[str]:
    order = chance.permutation(len(sentences)).tolist()
    return [sentences[order[number % len(order)]] for number in range(count)]
