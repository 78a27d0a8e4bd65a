"""CPT checkpoint: continual pre-training on compressed contexts, then with some chunks kept as tokens."""

from __future__ import annotations

from assets.metadata import Metadata, Published, curve
from assets.samples import samples
from assets.stage_asset import GPU_POOL, stage_asset


def describe(published: Published) -> Metadata:
    """The loss of the tokens after the context, and what the vectors carry."""
    return {**curve(published), **samples(published)}


cpt = stage_asset("cpt", description=__doc__, kinds=("pytorch",), describe=describe, pool=GPU_POOL)
