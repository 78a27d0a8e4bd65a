"""Which chunks of a prompt stay tokens: the policy over all passages together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from refrag_platform.model.policy import PolicyNetwork, budget, select
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import Chunks


@torch.no_grad()
def with_vectors(model: RefragModel, passages: Sequence[Chunks]) -> list[Chunks]:
    """The passages, each with its vectors; those that came without are encoded in one batch."""
    missing = [passage for passage in passages if passage.vectors is None]
    if not missing:
        return list(passages)
    vectors = iter(model.encode(torch.cat([p.token_ids for p in missing])).split([len(p.token_ids) for p in missing]))
    return [p if p.vectors is not None else Chunks(p.token_ids, p.keep, next(vectors)) for p in passages]


@torch.no_grad()
def expand(
    model: RefragModel,
    passages: Sequence[Chunks],
    share: float,
    policy: PolicyNetwork | None = None,
    generator: torch.Generator | None = None,
) -> list[Chunks]:
    """Keep a share p of all the passages' chunks as tokens; the budget is one for the whole context.

    The policy chooses; without one the choice is random, drawn with `generator`.
    """
    passages = with_vectors(model, passages)
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
        keep = select(policy_scores(model, passages, policy)[None], None, share)[0].cpu()
    return [passage.kept(flags) for passage, flags in zip(passages, keep.split(counts), strict=True)]


@torch.no_grad()
def policy_scores(model: RefragModel, passages: Sequence[Chunks], policy: PolicyNetwork) -> Tensor:
    """The policy's logit of every chunk of all passages in order, [L]."""
    vectors = [p.vectors for p in with_vectors(model, passages) if p.vectors is not None]
    return policy(torch.cat([v.to(model.device) for v in vectors])[None])[0]
