"""Which chunks of a prompt stay tokens: the policy over all passages together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from refrag_platform.model.policy import PolicyNetwork, budget, select
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks, chunk_tokens


@torch.no_grad()
def expand(
    model: RefragModel,
    passages: Sequence[Chunks],
    share: float,
    policy: PolicyNetwork | None = None,
    generator: torch.Generator | None = None,
    question: Sequence[int] = (),
) -> list[Chunks]:
    """Keep a share p of all the passages' chunks as tokens; the budget is one for the whole context.

    The policy chooses; without one the choice is random, drawn with `generator`. question: its token ids
    (`content_ids`), for a policy that reads them.
    """
    passages = model.with_vectors(passages)
    counts = [len(passage.token_ids) for passage in passages]
    kept = budget(sum(counts), share)
    if kept == 0:
        return [
            passage.kept(torch.zeros(count, dtype=torch.bool)) for passage, count in zip(passages, counts, strict=True)
        ]
    if policy is None:
        keep = torch.zeros(sum(counts), dtype=torch.bool)
        keep[torch.randperm(sum(counts), generator=generator)[:kept]] = True
    else:
        keep = select(policy_scores(model, passages, policy, question)[None], None, share)[0].cpu()
    return [passage.kept(flags) for passage, flags in zip(passages, keep.split(counts), strict=True)]


@torch.no_grad()
def policy_scores(
    model: RefragModel, passages: Sequence[Chunks], policy: PolicyNetwork, question: Sequence[int] = ()
) -> Tensor:
    """The policy's logit of every chunk of all passages in order, [L]."""
    vectors = [p.vectors for p in model.with_vectors(passages) if p.vectors is not None]
    asked, relevance = None, None
    if policy.reads_question and question:
        asked = model.encode(chunk_tokens(question, model.chunk_size))[None]
    if policy.reads_relevance:
        relevance = chunk_relevance(passages).to(model.device)[None]
    return policy(torch.cat([v.to(model.device) for v in vectors])[None], question=asked, relevance=relevance)[0]


def chunk_relevance(passages: Sequence[Chunks]) -> Tensor:
    """Each passage's relevance for each of its chunks, [L]; NaN where it isn't known."""
    values = torch.tensor([math.nan if p.relevance is None else p.relevance for p in passages], dtype=torch.float32)
    return values.repeat_interleave(torch.tensor([len(passage.token_ids) for passage in passages]))
