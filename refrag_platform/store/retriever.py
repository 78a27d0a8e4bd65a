"""Sentence vectors for retrieval: a pretrained encoder with mean pooling, or hashed words without weights."""

from __future__ import annotations

import hashlib
import re
import threading
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

HASH = "hash"
HASH_DIM = 512
# MiniLM was trained with sentences of up to 256 word pieces; most encoders of its kind read 512.
MAX_WORD_PIECES = 256
# Words that say nothing about a passage's subject.
STOP_WORDS = frozenset(
    """a an and are as at be by for from has have how in is it its of on or that the this to was what when
    where which who whose why will with""".split()  # noqa: SIM905
)


class Retriever(Protocol):
    """Texts to unit vectors whose dot product says how near they are."""

    name: str
    dim: int

    @property
    def digest(self) -> str:
        """Hash of all that decides a vector."""
        ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors [len(texts), dim]; a text without a known word is all zeros."""
        ...


class SentenceEncoder:
    """A BERT-type encoder whose token states are averaged, as sentence-transformers' MiniLM models do."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.name, self._model, self._tokenizer = name, model, tokenizer
        self.dim = int(model.config.hidden_size)
        self._digest: str | None = None
        # A tokenizer that pads keeps state: two threads in it raise "Already borrowed".
        self._lock = threading.Lock()

    @property
    def digest(self) -> str:
        if self._digest is None:
            from refrag_platform.weights import tokenizer_digest

            digest = hashlib.sha256(f"mean {MAX_WORD_PIECES} {tokenizer_digest(self._tokenizer)}".encode())
            for name, tensor in sorted(self._model.state_dict().items()):
                digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
            self._digest = digest.hexdigest()[:32]
        return self._digest

    def encode(self, texts: Sequence[str], batch_size: int = 32) -> NDArray[np.float32]:
        """Unit vectors [len(texts), dim]; longer texts are cut at MAX_WORD_PIECES."""
        import torch

        vectors = np.zeros((len(texts), self.dim), np.float32)
        # Texts of one length share a batch: padding costs as much as words do.
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        with torch.inference_mode():
            for begin in range(0, len(order), batch_size):
                numbers = order[begin : begin + batch_size]
                vectors[numbers] = self._encode_batch([texts[number] for number in numbers]).cpu().numpy()
        return vectors

    def _encode_batch(self, texts: list[str]) -> torch.Tensor:
        import torch

        limit = min(MAX_WORD_PIECES, self._model.config.max_position_embeddings)
        options = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}
        with self._lock:
            batch = self._tokenizer(texts, **options)
        batch = batch.to(self._model.device)
        states = self._model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(mean, dim=-1)


class HashedWords:
    """Words and word pairs hashed into HASH_DIM signed buckets: works for any text, with nothing to load."""

    name = HASH
    dim = HASH_DIM
    digest = f"hash-1-{HASH_DIM}"

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors [len(texts), dim]; counts are damped by a square root."""
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            words = [word for word in re.findall(r"\w+", text.lower()) if word not in STOP_WORDS]
            for term in [
                *words,
                *(f"{first} {second}" for first, second in pairwise(words)),
            ]:
                code = zlib.crc32(term.encode())
                row[code % self.dim] += 1.0 if code & 0x8000_0000 else -1.0
        vectors = np.sign(vectors) * np.sqrt(np.abs(vectors))
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.maximum(norms, 1e-12)


def load_retriever(source: str, base: Path, device: torch.device | str = "cpu") -> Retriever:
    """The retriever that a recipe or a store names: `hash`, package:NAME, hub:ORG/NAME or path:DIR.

    Args:
        base: the recipe's folder; `path:` sources are relative to it.

    Raises:
        RefragError: the source is unknown or its weights can't be had.
    """
    if source == HASH:
        return HashedWords()
    import torch

    from refrag_platform.errors import RefragError
    from refrag_platform.recipes import EncoderRecipe
    from refrag_platform.weights import load_encoder

    if source.split(":", 1)[0] not in {"package", "hub", "path"}:
        raise RefragError(
            f"chunks.retriever is {source!r}; allowed are package:NAME, hub:ORG/NAME, path:DIR and {HASH}"
        )
    model, tokenizer = load_encoder(EncoderRecipe(source=source), base, seed=0)
    if tokenizer is None:
        raise RefragError(f"chunks.retriever {source} has no tokenizer")
    torch.nn.Module.to(model, device)
    return SentenceEncoder(source, model, tokenizer)
