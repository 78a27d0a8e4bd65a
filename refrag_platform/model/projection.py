"""The projection: two linear layers from a chunk vector to the decoder's embedding size (section 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "relu": nn.functional.relu,
}


class Projection(nn.Module):
    """e = unit x gain x (c + MLP(norm(c))) where vectors live in the decoder's space, e = MLP(c) elsewhere.

    In the first form the MLP's last layer starts at zero and the gain at one, so that a chunk starts as a plausible
    embedding: `unit` is the root mean square of the decoder's. It stays apart from the gain because it can be as
    small as a few optimizer steps, which would take the gain, and every vector, to zero.
    """

    def __init__(self, vector_dim: int, width: int, hidden: int, activation: str, residual: bool, unit: float) -> None:
        super().__init__()
        self.activation, self.residual = activation, residual
        self.norm = nn.LayerNorm(vector_dim) if residual else nn.Identity()
        self.inner = nn.Linear(vector_dim, hidden)
        self.outer = nn.Linear(hidden, width)
        self.unit = unit
        self.gain = nn.Parameter(torch.ones(()), requires_grad=residual)
        if residual:
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """[..., vector_dim] to [..., decoder width]."""
        projected = self.outer(ACTIVATIONS[self.activation](self.inner(self.norm(vectors))))
        return self.unit * self.gain * (vectors + projected) if self.residual else projected

    def settings(self) -> dict[str, Any]:
        """What is needed, besides the tensors, to build this projection again."""
        return {"hidden_size": self.inner.out_features, "activation": self.activation, "unit": self.unit}
