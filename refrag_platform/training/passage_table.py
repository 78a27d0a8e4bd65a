"""Passages of fine-tuning as chunks of tokens and as vectors, each made once: both would starve a GPU in every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from refrag_platform.corpus.question import Passage
from refrag_platform.model.prompts import contents_ids, passage_text
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import PAD
from refrag_platform.training.core.precision import autocast

TOKENIZED_AT_ONCE = 1024
# Chunks that are encoded at once, at most: short passes leave a GPU waiting for the processor.
CHUNKS_AT_ONCE = 8192
# Largest table of vectors kept on the GPU.
TABLE_BYTES = 8 << 30


def passages_ids(tokenizer: PreTrainedTokenizerFast, passages: Sequence[Passage]) -> Iterator[list[int]]:
    """Token ids of each passage, many tokenized at once."""
    for start in range(0, len(passages), TOKENIZED_AT_ONCE):
        texts = [passage_text(title, text) for title, text in passages[start : start + TOKENIZED_AT_ONCE]]
        yield from contents_ids(tokenizer, texts)


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
        for ids in passages_ids(tokenizer, passages):
            block = np.full((-(-len(ids) // chunk_size), chunk_size), PAD, np.int32)
            block.reshape(-1)[: len(ids)] = ids
            blocks.append(block)
            counts.append(len(block))
        for context in () if contexts is None else contexts:
            blocks.append(context.reshape(-1, chunk_size))
            counts.append(len(blocks[-1]))
        self.chunks = np.concatenate(blocks)
        # Row 0 counts as a passage here, and the others are numbered from 1: chunks of each, and whose each row is [M].
        self.lengths = np.array(counts, dtype=np.int64)
        self._starts = self.lengths.cumsum() - self.lengths
        self.owners = np.arange(len(counts)).repeat(counts)
        # [passages], chunks of each.
        self.counts = self.lengths[1:]

    def rows(self, passages: Sequence[int], rate: int = 1) -> NDArray[np.int64]:
        """Rows of `chunks` of these passages, in order, `rate` of them together, [L, rate]; -1 where one has ended."""
        groups = [np.empty((0, rate), np.int64)]
        for number in passages:
            numbers = np.arange(-(-self.counts[number] // rate) * rate).reshape(-1, rate)
            groups.append(np.where(numbers < self.counts[number], self._starts[number + 1] + numbers, -1))
        return np.concatenate(groups)

    def token_ids(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """Token ids [..., k] of rows of `chunks` [...], -1 in those below 0."""
        return np.where(rows[..., None] >= 0, self.chunks[rows], np.int32(PAD))

    def whole(self, owners: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids [P, length, k] and rows [P, length] of the passages of these numbers, -1 where one has ended."""
        numbers = np.arange(length)
        rows = np.where(numbers < self.lengths[owners, None], self._starts[owners, None] + numbers, -1)
        return self.token_ids(rows).astype(np.int64), rows


def encoded_rows(
    model: RefragModel, table: PassageTable, rows: NDArray[np.int64], padded: bool | None = None
) -> Tensor:
    """Vectors [B, L, dim] of rows [B, L] of a table, whose passages are encoded whole; of rows below 0 of any."""
    rows = rows.clip(min=0)
    owners, which = np.unique(table.owners[rows], return_inverse=True)
    token_ids, encoded = table.whole(owners, int(table.lengths[owners].max()))
    which = which.reshape(rows.shape)
    vectors = model.encode(_on(token_ids, model.device), padded)
    return vectors[_on(which, model.device), _on(rows - encoded[which, 0], model.device)]


class ChunkVectors:
    """Vectors of a table's chunks by a frozen encoder.

    On a GPU each passage is encoded when it is first read, and kept. On a CPU a batch is encoded by itself: then a
    resumed run meets the same numbers to the last bit.
    """

    def __init__(self, model: RefragModel, table: PassageTable, precision: str) -> None:
        self._model, self._table, self._precision = model, table, precision
        self._vectors: Tensor | None = None
        self._known = np.zeros(table.owners[-1] + 1, dtype=bool)

    @torch.no_grad()
    def of(self, rows: NDArray[np.int64]) -> Tensor:
        """Vectors [B, L, dim] of rows [B, L] of the table; those of rows below 0 mean nothing."""
        device = self._model.device
        size = len(self._table.chunks) * self._model.vector_dim * 2
        # That something is padded is certain enough, and looking would hold up the GPU.
        with autocast(self._precision, device):
            # All ranks gather sharded weights together: each must run the encoder as often as the others.
            sharded = hasattr(next(self._model.encoder.parameters()), "ds_id")
            if device.type != "cuda" or size > TABLE_BYTES or sharded:
                return encoded_rows(self._model, self._table, rows, padded=True).float()
            return self._remembered(rows)

    def _remembered(self, rows: NDArray[np.int64]) -> Tensor:
        """The same from the table of vectors, to which passages that are met for the first time are added."""
        device = self._model.device
        if self._vectors is None:
            shape = (len(self._table.chunks), self._model.vector_dim)
            self._vectors = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        wanted = np.unique(self._table.owners[rows[rows >= 0]])
        missing = wanted[~self._known[wanted]]
        # The number of shapes stays small: both sides are powers of two, and some passages are encoded twice.
        lengths = 2 ** np.ceil(np.log2(self._table.lengths[missing])).astype(np.int64)
        for length in np.unique(lengths):
            alike = missing[lengths == length]
            at_once = min(max(1, CHUNKS_AT_ONCE // int(length)), 1 << (len(alike) - 1).bit_length())
            for block in np.resize(alike, (-(-len(alike) // at_once), at_once)):
                token_ids, places = self._table.whole(block, int(length))
                vectors = self._model.encode(_on(token_ids, device), padded=True).flatten(0, 1)
                real = np.flatnonzero(places >= 0)
                self._vectors[_on(places.ravel()[real], device)] = vectors[_on(real, device)].to(torch.bfloat16)
        self._known[missing] = True
        return self._vectors[_on(rows.clip(min=0), device)]


def _on(values: NDArray[np.int64], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
