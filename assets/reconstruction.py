"""Reconstruction checkpoint: encoder and projection learn to carry a chunk's text; the decoder is frozen or learns to
read it, as the recipe says."""

from assets.samples import training
from assets.stage_asset import GPU_POOL, stage_asset

reconstruction = stage_asset(
    "reconstruction", description=__doc__, kinds=("pytorch",), describe=training, pool=GPU_POOL, starts_training=True
)
