"""Fine-tuned model: RAG questions, conversations, summaries; with its policy, all that serving needs."""

from __future__ import annotations

from assets.metadata import Metadata, Published, curve
from assets.stage_asset import GPU_POOL, stage_asset


def describe(published: Published) -> Metadata:
    """The loss of the answers."""
    return curve(published)


finetuned = stage_asset(
    "finetuned", description=__doc__, group="training", kinds=("pytorch",), describe=describe, pool=GPU_POOL
)
