"""Passages of fine-tuning as chunks of tokens and as vectors, each made once: both would starve a GPU in every step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from refrag_platform.corpus.question_files import Passage
from refrag_platform.model.prompts import contents_ids, passage_text
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import PAD

TOKENIZED_AT_ONCE = 1024
# Chunks are encoded in multiples of this many, so that few shapes reach the GPU.
ENCODED_AT_ONCE = 512
# Largest table of vectors kept on the GPU.
TABLE_BYTES = 8 << 30


class PassageTable:
    """chunks [M, k] int32, padded with -1: the chunks of all passages, one passage after another.

    Row 0 is of no passage: it is what may be read where there is none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        passages: Sequence[Passage],
        chunk_size: int,
        contexts: NDArray[np.int32] | None = None,
    ) -> None:
        """Args: contexts: token ids [n, s] that follow the passages as n more, numbered on; s a multiple of k."""
        blocks, counts = [np.zeros((1, chunk_size), np.int32)], [1]
        for start in range(0, len(passages), TOKENIZED_AT_ONCE):
            texts = [passage_text(title, text) for title, text in passages[start : start + TOKENIZED_AT_ONCE]]
            for ids in contents_ids(tokenizer, texts):
                block = np.full((-(-len(ids) // chunk_size), chunk_size), PAD, np.int32)
                block.reshape(-1)[: len(ids)] = ids
                blocks.append(block)
                counts.append(len(block))
        for context in () if contexts is None else contexts:
            blocks.append(context.reshape(-1, chunk_size))
            counts.append(len(blocks[-1]))
        self.chunks = np.concatenate(blocks)
        self._starts = np.cumsum(counts)
        # [passages], chunks of each.
        self.counts = np.array(counts[1:], dtype=np.int64)

    def rows(self, passages: Sequence[int]) -> NDArray[np.int64]:
        """Rows of `chunks` of these passages, in order, [L]."""
        parts = [np.arange(self._starts[number], self._starts[number + 1]) for number in passages]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


class ChunkVectors:
    """Vectors of a table's chunks by a frozen encoder.

    On a GPU each chunk is encoded when it is first read, and kept. On a CPU a batch is encoded by itself: then a
    resumed run meets the same numbers to the last bit.
    """

    def __init__(self, model: RefragModel, table: PassageTable, bf16: bool) -> None:
        self._model, self._table, self._bf16 = model, table, bf16
        self._vectors: Tensor | None = None
        self._known = np.zeros(len(table.chunks), dtype=bool)

    @torch.no_grad()
    def of(self, rows: NDArray[np.int64]) -> Tensor:
        """Vectors [B, L, dim] of rows [B, L] of the table; those of rows below 0 mean nothing."""
        device = self._model.device
        size = len(self._table.chunks) * self._model.vector_dim * 2
        if device.type != "cuda" or size > TABLE_BYTES:
            distinct, places = np.unique(rows.clip(min=0), return_inverse=True)
            return self._encode(distinct)[torch.from_numpy(places.reshape(rows.shape)).to(device)]
        if self._vectors is None:
            shape = (len(self._table.chunks), self._model.vector_dim)
            self._vectors = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        wanted = np.unique(rows[rows >= 0])
        missing = wanted[~self._known[wanted]]
        if len(missing):
            # Some are encoded twice; the number of shapes stays small.
            missing = np.resize(missing, -(-len(missing) // ENCODED_AT_ONCE) * ENCODED_AT_ONCE)
            self._vectors[_on(missing, device)] = self._encode(missing).to(torch.bfloat16)
            self._known[missing] = True
        return self._vectors[_on(rows.clip(min=0), device)]

    def _encode(self, rows: NDArray[np.int64]) -> Tensor:
        device = self._model.device
        token_ids = _on(self._table.chunks[rows].astype(np.int64), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16 and device.type == "cuda"):
            # That some chunk is padded is certain enough, and looking would hold up the GPU.
            return self._model.encode(token_ids, padded=True).float()


def _on(values: NDArray[np.int64], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
