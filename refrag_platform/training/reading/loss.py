"""How a model reads a batch of contexts with questions over them (reading/batches.py), and its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refrag_platform.model.decoder import decoder_states, head_weight
from refrag_platform.model.packed import packed_layout, predicting_states
from refrag_platform.model.refrag import RefragModel
from refrag_platform.model.segments import PAD, pack_slots
from refrag_platform.training.core.batch import Batch, share
from refrag_platform.training.core.groups import vector_std
from refrag_platform.training.core.losses import linear_cross_entropy
from refrag_platform.training.reading.batches import ContextForm


def reading_loss(
    model: RefragModel, batch: Batch, seen: ContextForm, quotes_weight: float
) -> tuple[Tensor, dict[str, Any]]:
    """Mean loss of the answers' tokens in nats, that on quotes by its weight, and figures to log."""
    vectors, figures = None, {}
    if seen == "refrag":
        vectors = model.project(model.encode_rows(batch["chunks"], batch["windows"]))
        figures["vector_std"] = vector_std(model, vectors[batch["chunks"][..., 0] != PAD])
    states, labels = read(model, batch, vectors), batch["blocks"].flatten()
    losses: list[Tensor] = []
    for number, (kind, weight) in enumerate((("answers", 1.0), ("quotes", quotes_weight))):
        if len(places := batch[kind]):
            # Their number differs from batch to batch, and each would be compiled anew.
            part = linear_cross_entropy(states[places], head_weight(model.decoder), labels[places], compiled=False)
            losses.append(share(batch, number) * weight * part)
            figures[f"{kind}_loss"] = part.detach()
    # Where no question fits: all that trains has a gradient all the same, as processes add theirs up.
    if not losses:
        losses.append(0.0 * (states.sum() + head_weight(model.decoder).sum()))
    return torch.stack(losses).sum(), figures


def read(model: RefragModel, batch: Batch, vectors: Tensor | None) -> Tensor:
    """Hidden states [B n o, d] that predict the tokens of a batch's blocks, in order.

    Args: vectors: [B, L, d], what the decoder reads for each chunk; None where no chunk is compressed.
    """
    token_ids, index, known = pack_slots(batch["slots"], batch["owners"], batch["keep"], batch["length"])
    flat = torch.empty(0, 0) if vectors is None else vectors.flatten(0, 1)
    context = model.gather(token_ids, index, flat)
    layout = packed_layout(known[:, None].expand(batch["blocks"].shape[:2]), context.shape[1], batch["blocks"].shape[2])
    text = model.decoder.get_input_embeddings()(batch["blocks"].flatten(1))
    states = decoder_states(model.decoder, torch.cat([context.to(text.dtype), text], 1), layout)
    return predicting_states(states, layout)
