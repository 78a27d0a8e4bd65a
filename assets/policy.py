"""RL policy: chooses the share of the chunks that the fine-tuned model reads as tokens; GRPO with PPO clipping."""

import dagster as dg

from assets.metadata import Metadata, Published, curve
from assets.stage_asset import GPU_POOL, stage_asset


def describe(published: Published) -> Metadata:
    """The budget, and reward and loss over the steps."""
    facts = published.read_json("policy.json")
    return {
        "share_kept": dg.MetadataValue.float(float(facts["share_kept"])),
        **curve(published, "reward"),
        **curve(published),
    }


policy = stage_asset("policy", description=__doc__, kinds=("pytorch",), describe=describe, pool=GPU_POOL)
