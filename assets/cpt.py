"""CPT checkpoint: continual pre-training on compressed contexts, then with some chunks kept as tokens."""

from assets.samples import training
from assets.stage_asset import GPU_POOL, stage_asset

cpt = stage_asset("cpt", description=__doc__, kinds=("pytorch",), describe=training, pool=GPU_POOL)
