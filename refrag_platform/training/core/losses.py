"""Cross-entropy over a large vocabulary without ever holding all its logits."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from refrag_platform.model.decoder import ROWS


def _block(hidden: Tensor, weight: Tensor, labels: Tensor, train_weight: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Summed loss of some rows with its gradients by hidden and weight."""
    logits = hidden @ weight.t()
    lse = logits.float().logsumexp(-1)
    right = torch.arange(weight.shape[0], device=labels.device)[None, :] == labels[:, None]
    # A comparison, not a scatter: it fuses with the exponential into one pass over the logits.
    loss = (lse - logits.gather(1, labels[:, None])[:, 0].float()).sum()
    slope = ((logits.float() - lse[:, None]).exp() - right.float()).to(hidden.dtype)
    return loss, slope @ weight, slope.t() @ hidden if train_weight else None


@cache
def _compiled_block() -> Any:
    return torch.compile(_block, dynamic=False)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, block by block: memory is rows x vocabulary, not tokens x vocabulary."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, compiled: bool) -> Tensor:
        block = _compiled_block() if compiled else _block
        train_weight = ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if train_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        low = weight.to(hidden.dtype)
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            loss, by_hidden, by_weight = block(hidden[rows], low, labels[rows], train_weight)
            total += loss
            grad_hidden[rows] = by_hidden
            if grad_weight is not None and by_weight is not None:
                grad_weight += by_weight
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.rows = len(hidden)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0] / ctx.rows
        return (
            grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * scale,
            None,
            None,
        )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, compiled: bool | None = None) -> Tensor:
    """Mean cross-entropy of `hidden @ weight.T` against labels, in nats.

    Args:
        hidden: [n, d]. weight: [vocabulary, d]. labels: [n], all of them counted.
        compiled: default on CUDA.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    with torch.autocast(hidden.device.type, enabled=False):
        compiled = hidden.is_cuda if compiled is None else compiled
        return _LinearCrossEntropy.apply(hidden, weight, labels, compiled)
