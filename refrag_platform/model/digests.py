"""Hashes of weights: the same whichever type and device they were loaded in."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_digest(module: nn.Module, settings: str = "") -> str:
    """SHA-256, its first 32 digits, of a module's tensors in bfloat16, and of settings that no tensor tells."""
    digest = hashlib.sha256(settings.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        flat = tensor.detach().to("cpu", torch.bfloat16).reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
