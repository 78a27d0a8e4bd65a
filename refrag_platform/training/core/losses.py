"""Cross-entropy over a large vocabulary without ever holding all its logits."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from refrag_platform.model.decoder import ROWS


def _block(
    hidden: Tensor, weight: Tensor, labels: Tensor, train_weight: bool, taught: Tensor | None, share: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Summed loss of some rows with its gradients by hidden and weight."""
    logits = hidden @ weight.t()
    lse = logits.float().logsumexp(-1)
    right = torch.arange(weight.shape[0], device=labels.device)[None, :] == labels[:, None]
    # A comparison, not a scatter: it fuses with the exponential into one pass over the logits.
    loss, target = (lse - logits.gather(1, labels[:, None])[:, 0].float()).sum(), right.float()
    if taught is not None:
        wanted = (taught @ weight.t()).float().softmax(-1)
        target = (1 - share) * target + share * wanted
        loss = (1 - share) * loss + share * (lse - (wanted * logits.float()).sum(-1)).sum()
    slope = ((logits.float() - lse[:, None]).exp() - target).to(hidden.dtype)
    return loss, slope @ weight, slope.t() @ hidden if train_weight else None


@cache
def _compiled_block() -> Any:
    return torch.compile(_block, dynamic=False)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, block by block: memory is rows x vocabulary, not tokens x vocabulary."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, compiled: bool, taught: Tensor | None, share: float
    ) -> Tensor:
        block = _compiled_block() if compiled else _block
        train_weight = ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if train_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        low = weight.to(hidden.dtype)
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            of_rows = None if taught is None else taught[rows]
            loss, by_hidden, by_weight = block(hidden[rows], low, labels[rows], train_weight, of_rows, share)
            total += loss
            grad_hidden[rows] = by_hidden
            if grad_weight is not None and by_weight is not None:
                grad_weight += by_weight
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.rows = len(hidden)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0] / ctx.rows
        return (
            grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * scale,
            None,
            None,
            None,
            None,
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    compiled: bool | None = None,
    taught: Tensor | None = None,
    taught_share: float = 0.0,
) -> Tensor:
    """Mean cross-entropy of `hidden @ weight.T` against labels, in nats.

    Args:
        hidden: [n, d]. weight: [vocabulary, d]. labels: [n], all of them counted.
        compiled: default on CUDA.
        taught: [n, d], a teacher's hidden states, no gradient; `taught_share` of the target is what `weight` predicts
            of them, the rest the labels.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if taught is not None:
        taught = taught.detach().to(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        compiled = hidden.is_cuda if compiled is None else compiled
        return _LinearCrossEntropy.apply(hidden, weight, labels, compiled, taught, taught_share)
