"""Negative log-likelihood of the tokens after a context, for each way in which the context is given.

All systems predict the same tokens; they differ in what the decoder reads before them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from refrag_platform.evaluation.windows import Windows
from refrag_platform.model.decoder import decoder_states, head_weight, token_losses
from refrag_platform.model.policy import PolicyNetwork, select
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import window_layout
from refrag_platform.progress import Progress

PlainSystem = Literal["full", "none", "truncated"]
ChunkSource = Literal["own", "another", "zero"]

PLAIN_SYSTEMS: tuple[PlainSystem, ...] = get_args(PlainSystem)


@torch.inference_mode()
def score_plain(
    decoder: PreTrainedModel,
    system: PlainSystem,
    windows: Windows,
    chunk_size: int,
    start_token: int,
    batch_size: int,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """A plain decoder, [W, o] nats.

    All begin with `start_token`, which is all that none reads; full reads the whole context, truncated the last s/k
    tokens, as many positions as REFRAG's decoder has.
    """
    embed = decoder.get_input_embeddings()
    rows = []
    for numbers in _batches(windows, batch_size, progress):
        context, output = windows.context[numbers], windows.output[numbers]
        if system == "none":
            context = context[:, :0]
        elif system == "truncated":
            context = context[:, -(windows.context_tokens // chunk_size) :]
        context = nn.functional.pad(context, (1, 0), value=start_token)
        rows.append(_score(decoder, embed(context.to(decoder.device)), output))
    return np.concatenate(rows)


@torch.inference_mode()
def score_refrag(
    model: RefragModel,
    policy: PolicyNetwork | None,
    windows: Windows,
    share_kept: float,
    batch_size: int,
    chunks: ChunkSource = "own",
    seed: int = 0,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """REFRAG: the context as chunk vectors, [W, o] nats.

    Args:
        share_kept: p, share of chunks kept as tokens; the policy picks them, or chance without one.
        chunks: `own` chunks; those of `another` document; or `zero` vectors in the place of the projection's.

    Raises:
        ValueError: chunks is `another` and there is only one document.
    """
    size, count = model.chunk_size, windows.context_tokens // model.chunk_size
    contexts = windows.context
    if chunks == "another":
        others = windows.of_another_document()
        if others is None:
            raise ValueError("chunks of another document need two documents")
        contexts = contexts[others]
    # Drawn for all windows at once, so that the batch size changes nothing.
    chance = torch.rand(len(windows), count, generator=torch.Generator().manual_seed(seed))
    rows = []
    for numbers in _batches(windows, batch_size, progress):
        context = contexts[numbers].view(-1, count, size)
        vectors = model.encode(context)
        logits = policy(vectors).cpu() if policy else chance[numbers]
        token_ids, index = window_layout(context, select(logits, None, share_kept), model.start_token_id)
        projected = model.project(vectors.flatten(0, 1))
        if chunks == "zero":
            projected = torch.zeros_like(projected)
        prefix = model.gather(token_ids.to(model.device), index.to(model.device), projected)
        rows.append(_score(model.decoder, prefix, windows.output[numbers]))
    return np.concatenate(rows)


def _batches(windows: Windows, batch_size: int, progress: Progress | None) -> Iterator[slice]:
    for begin in range(0, len(windows), batch_size):
        end = min(begin + batch_size, len(windows))
        yield slice(begin, end)
        if progress:
            progress.update(end - begin)


def _score(decoder: PreTrainedModel, prefix: Tensor, output: Tensor) -> NDArray[np.float64]:
    """Nats of output [B, o] after prefix [B, n, d]; logits are made a block of positions at a time."""
    output = output.to(prefix.device)
    following = decoder.get_input_embeddings()(output[:, :-1]).to(prefix.dtype)
    inputs = torch.cat([prefix, following], 1)
    states = decoder_states(decoder, inputs)
    predicting = states[:, prefix.shape[1] - 1 :]
    losses = token_losses(predicting.flatten(0, 1), head_weight(decoder), output.flatten())
    return losses.view(output.shape).cpu().numpy().astype(np.float64)
