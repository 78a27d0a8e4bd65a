"""Chunk vectors passage by passage: on disk as the store keeps them, and made as the service makes them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from refrag_platform.model.encoder import BertEncoder, ChunkEncoder

# The store holds this many times what one request reads; a passage is this many chunks.
STORE_SIZE, PASSAGE = 8, 16


def reads_chunks(encoder: ChunkEncoder) -> bool:
    """Whether it reads each chunk alone, all at once and in any order, as BERT-type encoders can."""
    return isinstance(encoder, BertEncoder) and encoder.window_chunks == 1


def encode_passages(encoder: ChunkEncoder, chunks: Tensor) -> Tensor:
    """Vectors [L, dim] of chunks [L, k] in passages of 16, as the service encodes what no store has."""
    return torch.cat(encoder.encode_passages(chunks.split(PASSAGE)))


class StoredVectors:
    """A file of float16 rows, and the places of the passages that one request reads."""

    def __init__(self, path: Path, rows: int, dim: int, seed: int) -> None:
        """Write the file with random rows [.., dim]; `rows` of them make a request, in passages of 16."""
        generator = torch.Generator().manual_seed(seed)
        self.path, total = path, STORE_SIZE * PASSAGE * -(-rows // PASSAGE)
        save_file({"vectors": torch.randn(total, dim, generator=generator).half()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes = [min(PASSAGE, rows - start) for start in range(0, rows, PASSAGE)]
        places = torch.randperm(total // PASSAGE, generator=generator).tolist()
        self.ranges = [(place * PASSAGE, place * PASSAGE + size) for place, size in zip(places, sizes, strict=False)]

    def fetch(self) -> Tensor:
        """The request's rows [rows, dim] float16, out of a memory map."""
        with safe_open(self.path, "pt") as file:
            vectors = file.get_slice("vectors")
            return torch.cat([vectors[start:end] for start, end in self.ranges])

    def evict(self) -> None:
        """Drop the file from the page cache, so that the next fetch is from the disk itself."""
        if hasattr(os, "posix_fadvise"):
            with self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
