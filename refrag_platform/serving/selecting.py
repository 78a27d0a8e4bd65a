"""Which chunks the decoder reads as tokens, with the reason: the policy's scores, and what the request wants whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from refrag_platform.model.loading import Bundle
from refrag_platform.model.policy import budget, select
from refrag_platform.model.precision import cpu_autocast
from refrag_platform.model.segments import Chunks
from refrag_platform.model.selection import policy_scores
from refrag_platform.serving.contract import BadRequest, ServedPassage
from refrag_platform.store.relevance import PassageRelevance
from refrag_platform.store.retriever import Retriever

# Chunks of passages by their numbers, from 0; None: all of a passage's.
Expand = Mapping[str, Collection[int] | None]


@dataclass(frozen=True)
class Selected:
    """A passage as the decoder reads it; scores: the policy's logit of each chunk, None where it had no choice."""

    chunks: Chunks
    scores: list[float] | None = None


def choose(
    bundle: Bundle, passages: Sequence[Chunks], share: float, question: Sequence[int], wanted: Sequence[torch.Tensor]
) -> list[Selected]:
    """Keep the share p of all chunks that the policy scores highest (appendix A.1), and those that are wanted.

    Args: question: its token ids. wanted: for each passage [n] bool.
    """
    with cpu_autocast():  # As the store's were made.
        passages = bundle.model.with_vectors(passages)
    counts = [len(passage.token_ids) for passage in passages]
    kept = budget(sum(counts), share)
    keep, scores = torch.full((sum(counts),), kept == sum(counts)), None
    if bundle.policy is not None and 0 < kept < sum(counts):
        logits = policy_scores(bundle.model, passages, bundle.policy, question).float()
        keep, scores = select(logits[None], None, share)[0].cpu(), logits.cpu()
    flags = [one | also for one, also in zip(keep.split(counts), wanted, strict=True)]
    reasons = [None] * len(counts) if scores is None else [part.tolist() for part in scores.split(counts)]
    return [
        Selected(passage.kept(flag), reason) for passage, flag, reason in zip(passages, flags, reasons, strict=True)
    ]


def with_relevance(
    bundle: Bundle, retriever: Retriever | None, passages: Sequence[ServedPassage], share: float, question: str
) -> Sequence[ServedPassage]:
    """The passages with their relevance, for a policy that is told it and has a choice; without a retriever as sent."""
    policy = bundle.policy
    if policy is None or not policy.reads_relevance or share in (0, 1) or retriever is None:
        return passages
    if all(passage.score is not None for passage in passages):
        return passages
    texts = [(passage.title, passage.text) for passage in passages]
    # Not kept from one request to the next: what is sent has no end.
    values = PassageRelevance(retriever).of(question, texts)
    return [replace(passage, score=value) for passage, value in zip(passages, values, strict=True)]


def wanted_chunks(expand: Expand, passages: Sequence[ServedPassage], counts: Sequence[int]) -> list[torch.Tensor]:
    """For each passage [n] bool: the chunks that the request wants expanded.

    Args: counts: chunks of each passage.

    Raises:
        BadRequest: a passage isn't read, or has no such chunk.
    """
    known = [passage.id for passage in passages]
    for name in expand:
        if name not in known:
            raise BadRequest(
                f"passage {name!r} is not read here; those that are: {', '.join(map(repr, known)) or 'none'}",
                param="refrag.expand",
            )
    flags = []
    for name, count in zip(known, counts, strict=True):
        numbers = expand.get(name, ())
        flag = torch.full((count,), numbers is None)
        for number in numbers or ():
            if number >= count:
                raise BadRequest(
                    f"passage {name!r} has no chunk {number}; its chunks are 0 to {count - 1}", param="refrag.expand"
                )
            flag[number] = True
        flags.append(flag)
    return flags
