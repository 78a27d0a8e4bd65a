"""The tiny model with each kind of encoder, its vectors full of what the windows say."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from refrag_platform.model.refrag import RefragModel
from refrag_platform.project import Project
from refrag_platform.recipes import Recipe
from tests.conftest import ROOT

# Sixteen chunks of four tokens, all positions that the tiny BERT has.
WINDOW = {"window": "passage", "window_tokens": 64}
LAYERS = {"source": "decoder", "layers": 1, "config": {}, "train_token_table": False}
ENCODERS: dict[str, dict[str, Any]] = {
    "chunk": {},
    "passage": WINDOW,
    "layers": LAYERS,
    "layers, passage": LAYERS | WINDOW,
}
WHOLE_PASSAGES = ["passage", "layers, passage"]


def recipe_with(encoder: str) -> Recipe:
    values = Project(ROOT).recipe("tiny").model_dump(mode="json")
    values["encoder"] |= ENCODERS[encoder]
    return Recipe.model_validate(values)


def model_with(encoder: str) -> RefragModel:
    """Untrained, but for the weights that start at zero."""
    model = RefragModel.create(recipe_with(encoder), Project(ROOT).recipe_path("tiny").parent).eval()
    generator = torch.Generator().manual_seed(0)
    for name in ("pool", "input_adapter"):
        if layer := getattr(model.encoder, name, None):
            nn.init.normal_(layer.weight, std=0.2, generator=generator)
    # Far from the size of random weights: tokens must differ for what is said of them to.
    nn.init.normal_(model.projection.outer.weight, std=0.1, generator=generator)
    return model


def least_cosine(vectors: Tensor | NDArray[Any], others: Tensor | NDArray[Any]) -> float:
    """Between the rows of two [n, dim]; of what differs by the rounding of bfloat16 alone it is above 0.999."""
    one, other = (torch.as_tensor(rows).float() for rows in (vectors, others))
    return float(torch.cosine_similarity(one, other, dim=1).min().item())
