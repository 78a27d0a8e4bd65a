"""What every training stage shares: the loop, checkpoints, windows of text, the curriculum, losses."""
