"""A batch: tensors and facts by name. The tensors move, the facts stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]
# Set by the loop: by what each part of the loss counts among all micro-batches and ranks.
SHARES = "shares"


def pinned(batch: Batch) -> Batch:
    """In page-locked memory, from which a copy to the device does not hold up this process."""
    return {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in batch.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """On the device, without waiting for what comes from page-locked memory."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def share(batch: Batch, part: int = 0) -> Tensor | float:
    """By what this batch's mean counts; 1 where it stands alone."""
    return batch[SHARES][part] if SHARES in batch else 1.0
