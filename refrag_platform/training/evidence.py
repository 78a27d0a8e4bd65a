"""Which chunks of a question's passages hold its answer: what a choice of chunks should keep.

A policy may learn from that before it is rewarded (ours): among many chunks a random choice hardly ever has the answer,
and rewards that are all alike teach nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from refrag_platform.corpus.question import Passage, mention
from refrag_platform.model.segments import Chunks, unchunk

# What a chunk is to a question: a part of a passage that has the answer, and the place of the answer itself.
IN_GOLD, HAS_ANSWER = 1, 2


def evidence_levels(
    tokenizer: PreTrainedTokenizerFast,
    passages: Sequence[Passage],
    cut: Sequence[Chunks],
    gold: Collection[Passage],
    answers: Sequence[str],
) -> Tensor:
    """Levels [L], int8, of the chunks of all passages: HAS_ANSWER, IN_GOLD, or 0 for those that don't help to answer.

    An answer stands where a passage first mentions it, as far as it does so word for word.

    Args:
        cut: the passages in chunks. gold: those that hold the answer; where none is known, a mention in any counts.
    """
    says = mention(answers)
    parts = []
    for passage, chunks in zip(passages, cut, strict=True):
        part = torch.full((len(chunks.token_ids),), IN_GOLD if passage in gold else 0, dtype=torch.int8)
        if passage in gold or not gold:
            part[_mentioned(tokenizer, chunks.token_ids, says)] = HAS_ANSWER
        parts.append(part)
    return torch.cat(parts)


def _mentioned(tokenizer: PreTrainedTokenizerFast, chunks: Tensor, says: re.Pattern[str]) -> Tensor:
    """Flags [n] of the chunks [n, k] of one passage."""
    tokens = unchunk(chunks)
    match = says.search(str(tokenizer.decode(tokens)))
    flags = torch.zeros(len(chunks), dtype=torch.bool)
    if match:
        size = chunks.shape[1]
        ends = [len(str(tokenizer.decode(tokens[: (number + 1) * size]))) for number in range(len(chunks))]
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            flags[number] = start < match.end() and end > match.start()
    return flags


def evidence_losses(logits: Tensor, evidence: Tensor) -> Tensor:
    """How far the chunks that help to answer are from being picked first, in nats, by level [2]: means over the rows
    that `evidence_counts` counts.

    The answer's chunks are to come before all others, and those around it before other passages': a decoder reads an
    answer best among the words that say what it is.

    Args: logits [B, L], -inf where there is no chunk; evidence [B, L], levels. Rows without any say nothing: 0 if all.
    """
    return torch.stack([_picked_first(logits, evidence >= level) for level in (IN_GOLD, HAS_ANSWER)])


def evidence_counts(evidence: Tensor) -> list[int]:
    """Rows of evidence [B, L] that have any, by level."""
    return [int((evidence >= level).any(1).sum()) for level in (IN_GOLD, HAS_ANSWER)]


def _picked_first(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean negative log-probability that a wanted chunk is picked before all that are not."""
    lowest = torch.finfo(logits.dtype).min
    others = logits.masked_fill(wanted, lowest).clamp(min=lowest).logsumexp(1, keepdim=True)
    losses = nn.functional.softplus(others - logits.clamp(min=lowest)).masked_fill(~wanted, 0.0)
    counts = wanted.sum(1)
    return (losses.sum(1) / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


def kept_answers(keep: Tensor, evidence: Tensor) -> Tensor:
    """Share of the rows of keep [B, L] that keep all of the answer's chunks; NaN if no row has any."""
    answer = evidence == HAS_ANSWER
    return (keep | ~answer).all(1)[answer.any(1)].float().mean()
