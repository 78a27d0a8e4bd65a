"""Small things that the stages share: parameter groups, the health of vectors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from refrag_platform.model.backbone import embedding_size
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import TrainsDecoder, TrainsEncoder


def encoder_groups(model: RefragModel, settings: TrainsEncoder) -> list[dict[str, Any]]:
    """Backbone and token table at the encoder's rate; what is new (pooling, skip, projection) at the projection's."""
    pretrained = [p for p in model.encoder.pretrained() if p.requires_grad]
    known = {id(p) for p in pretrained}
    fresh = [
        p
        for module in (model.encoder, model.projection)
        for p in module.parameters()
        if p.requires_grad and id(p) not in known
    ]
    return [
        {"name": "encoder", "params": pretrained, "lr": settings.encoder_learning_rate},
        {"name": "projection", "params": fresh, "lr": settings.projection_learning_rate},
    ]


def decoder_group(model: RefragModel, settings: TrainsDecoder) -> dict[str, Any]:
    """The decoder's trainable parameters at its own rate."""
    return {
        "name": "decoder",
        "params": [p for p in model.decoder.parameters() if p.requires_grad],
        "lr": settings.decoder_learning_rate,
    }


def vector_std(model: RefragModel, embeds: Tensor) -> Tensor:
    """Standard deviation over chunks of what the decoder reads, in units of its embeddings' size."""
    return embeds.detach().float().std(0).mean() / embedding_size(model.decoder)
