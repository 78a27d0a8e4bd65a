"""Windows of text for training: decided by the seed and the step alone, so that a resumed run sees the same ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from refrag_platform.corpus.shards import TokenShards
from refrag_platform.errors import RefragError


class WindowSampler:
    """Random windows of one length within the documents of a split, every start equally likely."""

    def __init__(
        self, content: Path, split: str, length: int, seed: int, batch_size: int = 1, section: str = ""
    ) -> None:
        """
        Args: batch_size: of the recipe's section, by which too small a corpus is judged.

        Raises:
            RefragError: no document of the split is as long as a window, or there are fewer windows than a batch has.
        """
        self.shards = TokenShards(content, split)
        self.length, self.seed = length, seed
        starts, lengths = self.shards.documents
        room = np.maximum(lengths - length + 1, 0)
        if not room.sum():
            longest = int(lengths.max()) if len(lengths) else 0
            raise RefragError(
                f"the {split} split of {content} has no document of {length} tokens (the longest has {longest}); "
                "add longer documents or shorten context_tokens, output_tokens or the curriculum"
            )
        if room.sum() < batch_size:
            raise RefragError(
                f"the {split} split of {content} has {int(room.sum())} windows of {length} tokens, fewer than "
                f"{section}.batch_size ({batch_size}): every batch would hold some of them twice; add documents, lower "
                f"{section}.batch_size or shorten the windows"
            )
        self._starts, self._cumulative = starts, room.cumsum()

    def batch(self, step: int, micro: int, size: int, rank: int = 0, world: int = 1) -> Tensor:
        """This rank's share of the windows of a step's micro-batch: [size / world, length] token ids."""
        draws = np.random.default_rng([self.seed, 1, step, micro]).integers(0, self._cumulative[-1], size)
        drawn = draws[rank * size // world : (rank + 1) * size // world]
        documents = np.searchsorted(self._cumulative, drawn, side="right")
        before = np.where(documents > 0, self._cumulative[documents - 1], 0)
        return torch.from_numpy(self.shards.windows(self._starts[documents] + drawn - before, self.length))
