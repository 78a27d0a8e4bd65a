"""From a prompt to what the decoder reads: vectors gathered into one batch, projected in one call, set among tokens.

The same as `RefragModel.embed` of one prompt, without a copy more than that: this is the way to the first token.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refrag_platform.decoding.settings import Sampling
from refrag_platform.errors import RefragError
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import PAD, Chunks, Prompt, Text

# Vectors of a store are rounded to float16: other content than vectors that were encoded just now.
TOKEN, STORED_CHUNK, CHUNK = 0, 1, 2


@dataclass(frozen=True)
class PromptInput:
    """What the decoder reads of one prompt.

    embeds: [N, d] on the model's device. content: [N, 1 + k] int32, what stands at each position: a token
    (0, id, -1, ...) or a chunk (1 from a store, else 2; its k token ids); by it prefixes are recognized. Where the
    encoder reads whole passages, five more columns say which one a chunk is of, and where it stands there.
    """

    embeds: Tensor
    content: NDArray[np.int32]


def require_positions(prompt: PromptInput, sampling: Sampling, most: int) -> None:
    """Hold a request against the positions of a sequence, `most`.

    Raises:
        RefragError: it is longer.
    """
    if len(prompt.embeds) + sampling.max_tokens > most:
        raise RefragError(
            f"{len(prompt.embeds)} prompt positions and {sampling.max_tokens} tokens to come are more than a slot's "
            f"{most} positions"
        )


@torch.inference_mode()
def prompt_input(model: RefragModel, prompt: Prompt) -> PromptInput:
    """The decoder's input of one prompt; passages that bring no vectors are encoded here.

    Raises:
        ValueError: the prompt is empty, or a passage was cut with another chunk size.
    """
    content = prompt_content(prompt, model.chunk_size, by_passage=model.encoder.window_chunks > 1)
    places = np.flatnonzero(content[:, 0] != TOKEN)
    tokens = torch.from_numpy(np.where(content[:, 0] == TOKEN, content[:, 1], 0)).to(model.device, non_blocking=True)
    embeds = model.decoder.get_input_embeddings()(tokens)
    if len(places):
        passages = [part for part in prompt if isinstance(part, Chunks) and not bool(part.keep.all())]
        vectors = _gathered([part.compressed_vectors() for part in model.with_vectors(passages)], model.device)
        rows = torch.from_numpy(places).to(model.device, non_blocking=True)
        embeds.index_copy_(0, rows, model.project(vectors).to(embeds.dtype))
    return PromptInput(embeds, content)


def prompt_content(prompt: Prompt, chunk_size: int, by_passage: bool = False) -> NDArray[np.int32]:
    """What stands at each of the prompt's positions (`PromptInput.content`).

    Args: by_passage: whether vectors say something of their whole passage.

    Raises:
        ValueError: the prompt is empty, or a passage was cut with another chunk size.
    """
    parts = [_content(part, chunk_size) for part in prompt]
    if by_passage:
        parts = [np.concatenate([rows, _origin(part, rows)], 1) for part, rows in zip(prompt, parts, strict=True)]
    content = np.concatenate(parts) if parts else np.empty((0, 1 + chunk_size), np.int32)
    if not len(content):
        raise ValueError("the prompt is empty")
    return content


def _content(part: Text | Chunks, chunk_size: int) -> NDArray[np.int32]:
    if isinstance(part, Text):
        return _tokens(np.asarray(part.token_ids, np.int32), chunk_size)
    ids, keep = part.token_ids.numpy(), part.keep.numpy()
    if ids.shape[1] != chunk_size:
        raise ValueError(f"a passage has chunks of {ids.shape[1]} tokens; the model's k is {chunk_size}")
    # Rows of a compressed chunk and of a kept one's tokens, each in order; then both into their places.
    widths = np.where(keep, (ids != PAD).sum(1), 1)
    compressed = np.zeros(widths.sum(), np.bool_)
    compressed[(widths.cumsum() - widths)[~keep]] = True
    rows = np.empty((len(compressed), 1 + chunk_size), np.int32)
    stored = part.vectors is not None and part.vectors.dtype == torch.float16
    rows[compressed, 0] = STORED_CHUNK if stored else CHUNK
    rows[compressed, 1:] = ids[~keep]
    kept = ids[keep]
    rows[~compressed] = _tokens(kept[kept != PAD], chunk_size)
    return rows


def _origin(part: Text | Chunks, rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """[N, 5]: of a vector the digest of its passage and its chunk's number there; zeros for a token."""
    origin = np.zeros((len(rows), 5), np.int32)
    if isinstance(part, Chunks):
        compressed = rows[:, 0] != TOKEN
        digest = hashlib.blake2b(part.token_ids.numpy().tobytes(), digest_size=16).digest()
        origin[compressed, :4] = np.frombuffer(digest, np.int32)
        origin[compressed, 4] = np.flatnonzero(~part.keep.numpy())
    return origin


def _tokens(ids: NDArray[np.int32], chunk_size: int) -> NDArray[np.int32]:
    rows = np.full((len(ids), 1 + chunk_size), PAD, np.int32)
    rows[:, 0] = TOKEN
    rows[:, 1] = ids
    return rows


def _gathered(parts: list[Tensor], device: torch.device) -> Tensor:
    """Vectors in one tensor, pinned where a GPU fetches it."""
    if len(parts) == 1:
        return parts[0]
    if any(vectors.is_cuda for vectors in parts):
        return torch.cat([vectors.to(device) for vectors in parts])
    if device.type != "cuda" or len({vectors.dtype for vectors in parts}) > 1:
        return torch.cat(parts)
    pinned = torch.empty(sum(map(len, parts)), parts[0].shape[1], dtype=parts[0].dtype, pin_memory=True)
    return torch.cat(parts, out=pinned)
