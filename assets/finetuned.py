"""Fine-tuned model: RAG questions, conversations, summaries; the last training of encoder and decoder."""

from assets.samples import training
from assets.stage_asset import GPU_POOL, stage_asset

finetuned = stage_asset("finetuned", description=__doc__, kinds=("pytorch",), describe=training, pool=GPU_POOL)
