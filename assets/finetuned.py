"""Fine-tuned model: RAG questions, conversations, summaries; the last training of encoder and decoder."""

from __future__ import annotations

from assets.metadata import Metadata, Published, curve
from assets.samples import samples
from assets.stage_asset import GPU_POOL, stage_asset


def describe(published: Published) -> Metadata:
    """The loss of the answers, and some of them."""
    return {**curve(published), **samples(published)}


finetuned = stage_asset("finetuned", description=__doc__, kinds=("pytorch",), describe=describe, pool=GPU_POOL)
