"""Reconstruction checkpoint: encoder and projection learn to carry a chunk's text; the decoder is frozen or learns to
read it, as the recipe says."""

from __future__ import annotations

from assets.metadata import Metadata, Published, curve
from assets.samples import samples
from assets.stage_asset import GPU_POOL, stage_asset


def describe(published: Published) -> Metadata:
    """The loss over the table-8 curriculum, and what the vectors carry."""
    return {**curve(published), **samples(published)}


reconstruction = stage_asset(
    "reconstruction",
    description=__doc__,
    kinds=("pytorch",),
    describe=describe,
    pool=GPU_POOL,
    starts_training=True,
)
